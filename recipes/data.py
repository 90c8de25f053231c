"""The data of a run: read, tokenized, held out, mixed and collated as its configuration says.

Rows are the matter of `recipes/rows.py`, tokens of `recipes/tokens.py`, packing of `recipes/packing.py`.
"""

import hashlib
import json
from itertools import chain, islice
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, concatenate_datasets, interleave_datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from recipes.chat import IGNORED_LABEL, check_template
from recipes.config import DataSetConfig, FinetuneConfig
from recipes.formats import is_conversation
from recipes.rows import load_rows
from recipes.tokens import Chat, tokenize

MIXTURE_SEED = 0  # the rows of a mixture are the same for all seeds of a run


class PreparedData(NamedTuple):
    """What a run trains on and is measured on."""

    rows: list[DatasetDict]  # of each data set, as loaded
    train: Dataset  # tokens, as the others
    validation: Dataset | None
    heldout: Dataset | None  # of the `test` splits
    counts: dict[str, int]  # of sequences in and left out
    chat: Chat | None  # how questions are asked


def prepare_data(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Load and tokenize the data sets.

    Raises:
        ValueError: a data set, a row or the chat template is broken or does not fit, or a split is empty.
    """
    data_sets = config.data_sets()
    rows = [_load(data_set, config) for data_set in data_sets]
    chat = choose_chat(config, rows)
    if chat is not None or any(is_conversation(splits["train"]) for splits in rows):
        check_template(tokenizer)

    def tokens_of(split: str) -> list[Dataset]:
        return [tokenize(splits[split], tokenizer, chat) for splits in rows if split in splits]

    fitting, num_dropped = zip(*(drop_long(tokens, config.max_length) for tokens in tokens_of("train")), strict=True)
    train = mix(list(fitting), [data_set.weight for data_set in data_sets])
    train = train.select(range(min(len(train), config.max_train_samples or len(train))))
    counts = {"num_train_sequences": len(train), "num_dropped_train_sequences": sum(num_dropped)}
    validation, heldout = tokens_of("validation"), tokens_of("test")
    validation_set = heldout_set(concatenate_datasets(validation), config.max_length)[0] if validation else None
    if not heldout:
        return PreparedData(rows, train, validation_set, None, counts, chat)
    heldout_tokens, num_cut = heldout_set(concatenate_datasets(heldout), config.max_length)
    counts |= {"num_eval_problems": len(heldout_tokens), "num_cut_eval_problems": num_cut}
    return PreparedData(rows, train, validation_set, heldout_tokens, counts, chat)


def _load(data_set: DataSetConfig, config: FinetuneConfig) -> DatasetDict:
    splits = load_rows(data_set.path, data_set.dataset_config, data_set.dataset_split, data_set.columns)
    if config.num_validation_samples is not None:
        splits = hold_out(splits, config.num_validation_samples)
    if config.validation_fraction is not None:
        splits = hold_out_fraction(splits, config.validation_fraction)
    if config.heldout_split == "validation":
        splits["test"] = splits["validation"]
    elif "test" in splits:
        splits["test"] = first_rows(splits["test"], config.max_eval_samples)
    return splits


def first_rows(rows: Dataset, number: int | None) -> Dataset:
    """The first so many rows; all of them where `number` is None or more than there are."""
    return rows if number is None else rows.select(range(min(number, len(rows))))


def hold_out(problems: DatasetDict, num_samples: int) -> DatasetDict:
    """Move the last `num_samples` training problems into a split of their own, `validation`.

    Raises:
        ValueError: none is left to train on.
    """
    num_train = len(problems["train"]) - num_samples
    if num_train < 1:
        raise ValueError(
            f"num_validation_samples={num_samples} leaves nothing to train on: there are {len(problems['train'])} "
            "training problems."
        )
    train, validation = (
        problems["train"].select(range(num_train)),
        problems["train"].select(range(num_train, num_train + num_samples)),
    )
    return DatasetDict({**problems, "train": train, "validation": validation})


def hold_out_fraction(problems: DatasetDict, fraction: float) -> DatasetDict:
    """Move a part of the training problems into `validation`, each by a hash of what it says.

    Where others are added or the order changes, a problem stays where it was; copies of one are on one side.

    Raises:
        ValueError: a side is empty.
    """
    rows = problems["train"]
    chosen = [_fraction_of(row) < fraction for row in rows]
    for side, is_empty in (("train on", all(chosen)), ("validate on", not any(chosen))):
        if is_empty:
            raise ValueError(
                f"validation_fraction={fraction} leaves nothing to {side} of {len(rows)} training problems: change it."
            )
    train = rows.select([number for number, is_held_out in enumerate(chosen) if not is_held_out])
    validation = rows.select([number for number, is_held_out in enumerate(chosen) if is_held_out])
    return DatasetDict({**problems, "train": train, "validation": validation})


def _fraction_of(row: dict[str, Any]) -> float:
    """A number between 0 and 1 that is the row's own; a None, where only others have something, does not count."""
    said = json.loads(json.dumps(row), object_hook=lambda part: {k: v for k, v in part.items() if v is not None})
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_chat(config: FinetuneConfig, rows: list[DatasetDict]) -> Chat | None:
    """Say whether questions are put into the chat template, in training and in scoring: where the rows are turns.

    Raises:
        ValueError: the rows are of both kinds, or the configuration says otherwise.
    """
    asks = [splits["train"] for splits in rows if "text" not in splits["train"].column_names]
    of_turns = {is_conversation(train) for train in asks}
    if config.apply_chat_template is None and len(of_turns) > 1:
        raise ValueError(
            "Some of the data sets are conversations and some are not: with apply_chat_template: true all of them and "
            "the tasks are put into the chat template. Set it."
        )
    if config.apply_chat_template is False and True in of_turns:
        raise ValueError("apply_chat_template: false, but rows are conversations and nothing else: leave it out.")
    if not (config.apply_chat_template or True in of_turns):
        if config.system_prompt is not None:
            raise ValueError("system_prompt is for a chat template: set apply_chat_template: true, or leave it out.")
        return None
    return Chat(config.system_prompt)


def mix(tokens: list[Dataset], weights: list[float | None]) -> Dataset:
    """Join data sets: all their rows, or by weight until one of them has no more, so that none is used twice."""
    if len(tokens) == 1 or weights[0] is None:
        return concatenate_datasets(tokens)
    shares = [weight / sum(filter(None, weights)) for weight in weights if weight is not None]
    return interleave_datasets(tokens, shares, seed=MIXTURE_SEED, stopping_strategy="first_exhausted")


def heldout_lines(rows: list[DatasetDict], max_rows: int | None = None) -> str:
    """Write the `test` splits as JSON Lines, or the first `max_rows` of each."""
    heldout = chain.from_iterable(islice(splits["test"], max_rows) for splits in rows if "test" in splits)
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in heldout)


def drop_long(tokens: Dataset, max_length: int) -> tuple[Dataset, int]:
    """Drop the training sequences over `max_length`.

    Returns:
        `tuple[Dataset, int]`: the others, and how many were too long.

    Raises:
        ValueError: none is left.
    """
    lengths = [len(input_ids) for input_ids in tokens["input_ids"]]
    fitting = [index for index, length in enumerate(lengths) if length <= max_length]
    if not fitting:
        shortest = min(lengths, default=0)
        raise ValueError(
            f"None of the {len(lengths)} training sequences fits in max_length={max_length}; the shortest has "
            f"{shortest} tokens. Raise max_length if the model's context allows it."
        )
    return tokens.select(fitting), len(lengths) - len(fitting)


def heldout_set(tokens: Dataset, max_length: int) -> tuple[Dataset, int]:
    """Cut every sequence at `max_length`, so that each held-out problem counts with the tokens that fit.

    Returns:
        `tuple[Dataset, int]`: the sequences of which something is left to predict, and how many were cut.

    Raises:
        ValueError: there is none.
    """
    num_cut = sum(len(input_ids) > max_length for input_ids in tokens["input_ids"])
    cut = tokens.map(lambda row: {name: values[:max_length] for name, values in row.items()}, desc="Cutting")
    # The mean loss of a batch without a label would be NaN.
    labelled = cut.filter(lambda row: any(label != IGNORED_LABEL for label in row["labels"][1:]), desc="Labelled")
    if not len(labelled):
        raise ValueError(f"No held-out sequence has a label within max_length={max_length}: raise max_length.")
    return labelled, num_cut


def make_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pad a batch to its longest sequence, labels with -100."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)

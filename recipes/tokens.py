"""Rows to tokens: `input_ids`, `attention_mask`, and `labels` on what is learned.

The text of a question is that of lm-evaluation-harness' `gsm8k` task, and its chat template is applied as the harness
does, so a model is trained on the very prompt it is scored with.
"""

from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.chat import IGNORED_LABEL, TokenSequence, Turn, encode_turns, render
from recipes.formats import tools_of


class Chat(NamedTuple):
    """That rows which are no conversations go into the chat template, and after which system prompt."""

    system_prompt: str | None = None

    def ask(self, prompt: str) -> list[Turn]:
        """Make the turns of a prompt."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return [*system, {"role": "user", "content": prompt}]


def format_prompt(question: str) -> str:
    """Write a question as lm-evaluation-harness' `gsm8k` task does."""
    return f"Question: {question}\nAnswer:"


def with_options(row: dict[str, Any]) -> tuple[str, str]:
    """The question of a row of AQuA-RAT as `aqua_rat_local` asks it, and the right option, such as `A)21`."""
    question = "\n".join([row["question"], "Options:", *row["options"]])
    return question, next(option for option in row["options"] if option[:1] == row["correct"])


def prompt_tokens(question: str, tokenizer: PreTrainedTokenizerBase, chat: Chat | None = None) -> list[int]:
    """The tokens that ask a question, as `tokenize` puts them before its answer."""
    if chat is None:
        return tokenizer(format_prompt(question))["input_ids"]
    return render(tokenizer, chat.ask(format_prompt(question)), add_generation_prompt=True)


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, chat: Chat | None = None) -> Dataset:
    """Turn rows of one of the formats of `recipes/formats.py` into tokens.

    Learned are: the answer or completion and the final eos; in a chat template what the assistant says; of a text all.

    Args:
        rows (`Dataset`): all of one format.
        tokenizer: of the model.
        chat (`Chat`, *optional*): puts questions and prompts into its chat template; conversations always are.

    Returns:
        `Dataset`: a sequence for each row; a conversation may be several, see `encode_turns`.

    Raises:
        ValueError: a row has nothing to learn; or the tokens of a prompt change when the completion follows; or its
            chat template does not fit it.
    """
    encode = partial(_encode_batch, tokenizer=tokenizer, chat=chat)
    tokens = rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names, desc="Tokenizing")
    _check_labels(rows, tokens)
    return tokens.remove_columns("row")


def num_prompt_tokens(labels: list[int]) -> int:
    """Count the tokens before the first that is learned."""
    return next((place for place, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))


def _encode_batch(batch: dict[str, list], indices: list[int], **settings) -> dict[str, list]:
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": [], "row": []}
    for place, index in enumerate(indices):
        for input_ids, labels in _encode({name: values[place] for name, values in batch.items()}, **settings):
            columns["input_ids"].append(input_ids)
            columns["attention_mask"].append([1] * len(input_ids))
            columns["labels"].append(labels)
            columns["row"].append(index)
    return columns


def _encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat: Chat | None) -> list[TokenSequence]:
    if "text" in row:
        input_ids = _with_eos(tokenizer, row["text"])
        return [TokenSequence(input_ids, input_ids)]
    if "question" in row:
        question, completion = with_options(row) if "options" in row else (row["question"], row["answer"])
        prompt = format_prompt(question)
        return (
            [_encode_completion(tokenizer, prompt, f" {completion}")]
            if chat is None
            else _encode_exchange(tokenizer, chat, prompt, completion)
        )
    if "messages" in row:
        return encode_turns(tokenizer, row["messages"], **_beside(row))
    if isinstance(row["prompt"], list):
        turns = [*row["prompt"], *row["completion"]]
        return encode_turns(tokenizer, turns, num_given=len(row["prompt"]), **_beside(row))
    if chat is None:
        return [_encode_completion(tokenizer, row["prompt"], row["completion"])]
    return _encode_exchange(tokenizer, chat, row["prompt"], row["completion"])


def _encode_exchange(tokenizer: PreTrainedTokenizerBase, chat: Chat, prompt: str, answer: str) -> list[TokenSequence]:
    return encode_turns(tokenizer, [*chat.ask(prompt), {"role": "assistant", "content": answer}])


def _encode_completion(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> TokenSequence:
    """Tokenize prompt and completion as one text.

    A tokenizer that puts a space before every text would put one more before a completion tokenized alone.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    input_ids = _with_eos(tokenizer, prompt + completion)
    if input_ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            f"The end of a prompt, {prompt[-20:]!r}, and the beginning of its completion, {completion[:20]!r}, share "
            "a token, so the model would learn after other tokens than it is asked with: move white space from the "
            "end of the prompt to the beginning of the completion."
        )
    return TokenSequence(input_ids, [IGNORED_LABEL] * len(prompt_ids) + input_ids[len(prompt_ids) :])


def _with_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    input_ids = tokenizer(text)["input_ids"]
    return input_ids if input_ids[-1:] == [tokenizer.eos_token_id] else [*input_ids, tokenizer.eos_token_id]


def _beside(row: dict[str, Any]) -> dict[str, Any]:
    """What a chat template is given with the turns."""
    return {"tools": tools_of(row), **(row.get("chat_template_kwargs") or {})}


def _check_labels(rows: Dataset, tokens: Dataset) -> None:
    masked = [
        index
        for index, labels in zip(tokens["row"], tokens["labels"], strict=True)
        if num_prompt_tokens(labels[1:]) == len(labels) - 1  # nothing comes before the first
    ]
    if masked:
        raise ValueError(
            f"{len(masked)} of {len(rows)} rows have nothing to learn, as the assistant says nothing in them. Leave "
            f"them out. The first is row {masked[0] + 1} of the {rows.split or 'data'}: {rows[masked[0]]!r:.200}"
        )

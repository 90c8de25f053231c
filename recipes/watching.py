"""What watches a training: exact match on a few held-out problems at every evaluation, and early stopping."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice

from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback

from dipnet_hf import GenerationCallback
from eval.scoring import AnswerCheck
from recipes.chat import IGNORED_LABEL
from recipes.config import FinetuneConfig, WatchConfig
from recipes.data import PreparedData
from recipes.tokens import tokenize


def make_callbacks(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, data: PreparedData
) -> list[TrainerCallback]:
    """Make what the configuration asks for, in the order in which it must be added.

    Raises:
        ValueError: a problem has no answer that can be checked, or leaves no room for one.
    """
    callbacks: list[TrainerCallback] = []
    evaluation = config.evaluation
    if evaluation.while_training is not None:
        check = AnswerCheck(evaluation.while_training.task, evaluation.while_training.filter)
        problems = watched_problems(evaluation.while_training.num_problems, tokenizer, data)
        answers = [str(tokenizer.decode(answer, skip_special_tokens=True)) for _, answer in problems]
        check_answers(answers, check, evaluation.while_training)
        settings = {"max_new_tokens": evaluation.max_new_tokens, "batch_size": evaluation.batch_size}
        prompts = [prompt for prompt, _ in problems]
        callbacks.append(
            GenerationCallback(trainer, prompts, answers, check, stop_strings=check.stop_strings, **settings)
        )
    if evaluation.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(evaluation.early_stopping_patience))
    return callbacks


@contextmanager
def watched(trainer: Trainer, callbacks: list[TrainerCallback]) -> Iterator[None]:
    """Context in which the callbacks belong to the trainer; evaluations after it generate nothing."""
    for callback in callbacks:
        trainer.add_callback(callback)
    yield
    for callback in callbacks:
        trainer.remove_callback(type(callback))  # another one, if the run was resumed


def watched_problems(
    number: int, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> list[tuple[list[int], list[int]]]:
    """The first problems of the rows that evaluations on the way use: the tokens of prompt and answer, not cut."""
    split = "test" if data.validation is None else "validation"
    rows = [splits[split] for splits in data.rows if split in splits]
    heads = [tokenize(part.select(range(min(number, len(part)))), tokenizer, data.chat) for part in rows]
    sequences = islice(chain.from_iterable(heads), number)
    return [split_last_answer(row["input_ids"], row["labels"]) for row in sequences]


def split_last_answer(input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Split a sequence before the last run of learned tokens; what follows that is left out."""
    learned = [label != IGNORED_LABEL for label in labels]
    end = len(learned) - learned[::-1].index(True)
    start = end - [*learned[:end][::-1], False].index(False)
    return input_ids[:start], input_ids[start:end]


def check_answers(answers: list[str], check: AnswerCheck, watch: WatchConfig) -> None:
    """Refuse problems whose own answers would not count as right."""
    for number, answer in enumerate(answers, start=1):
        if not check(answer, answer):
            raise ValueError(
                f"Held-out problem {number} has no answer that can be checked: {watch.filter} of {watch.task} would "
                f"not count its own answer, which ends in {answer.strip()[-60:]!r}, as right. GSM8K's end in "
                "'#### 18'. Choose another filter or task in evaluation.while_training, or leave that out."
            )

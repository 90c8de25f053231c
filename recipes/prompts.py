"""The prompts of training and of scoring, compared token for token before the training."""

from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from eval.scoring import chat_prompt, task_prompts
from recipes.config import FinetuneConfig
from recipes.data import PreparedData, heldout_lines
from recipes.formats import is_conversation
from recipes.rows import read_problems
from recipes.tokens import num_prompt_tokens, tokenize

NUM_COMPARED = 4  # problems of each task, and conversations of each data set
ADVICE = "or score with eval/run.py and set evaluation.tasks=[]."


def check_prompts(model, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, data: PreparedData) -> None:
    """Compare the first problems of every task, and conversations that begin with one question.

    Raises:
        ValueError: the tokens before a trained answer are not those that lm-evaluation-harness would ask with.
    """
    with TemporaryDirectory() as folder:
        heldout = Path(folder) / "test.jsonl"
        heldout.write_text(heldout_lines(data.rows, NUM_COMPARED), encoding="utf-8")
        tasks = {name: path or str(heldout) for name, path in config.evaluation.tasks.items()}
        asked = task_prompts(model, tokenizer, tasks, NUM_COMPARED, **_wording(data))
        for name, path in tasks.items():
            trained = prompts_of(Dataset.from_list(read_problems(path)[:NUM_COMPARED]), tokenizer, data)
            advice = f"Choose a task that asks as gsm8k_local does, {ADVICE}"
            for asked_tokens, trained_tokens in zip(asked[name], trained, strict=True):
                _compare(tokenizer, f"The task {name}", asked_tokens, trained_tokens, advice)
    for splits in data.rows:
        if is_conversation(splits["train"]):
            _check_conversations(model, tokenizer, splits["train"], data)


def prompts_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> list[list[int]]:
    """The tokens that come before the first learned one of each sequence."""
    tokens = tokenize(rows, tokenizer, data.chat)
    return [row["input_ids"][: num_prompt_tokens(row["labels"])] for row in tokens]


def _wording(data: PreparedData) -> dict[str, Any]:
    return {
        "apply_chat_template": data.chat is not None,
        "system_instruction": None if data.chat is None else data.chat.system_prompt,
    }


def _check_conversations(model, tokenizer: PreTrainedTokenizerBase, rows: Dataset, data: PreparedData) -> None:
    """Ask the question that a conversation opens with as a task would."""
    assert data.chat is not None  # as there are conversations
    for number in range(min(NUM_COMPARED, len(rows))):
        row = rows[number]
        opening = list(takewhile(lambda turn: turn["role"] != "assistant", row.get("messages", row.get("prompt"))))
        if [turn["role"] for turn in opening] not in (["user"], ["system", "user"]):
            continue
        trained = prompts_of(rows.select([number]), tokenizer, data)[0]
        asked = chat_prompt(model, tokenizer, data.chat.ask(opening[-1]["content"]))
        advice = f"Set system_prompt to that of the conversations, {ADVICE}"
        _compare(tokenizer, "A task in the chat template", asked, trained, advice)


def _compare(tokenizer: PreTrainedTokenizerBase, what: str, asked: list[int], trained: list[int], advice: str) -> None:
    if asked == trained:
        return
    place = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(asked, trained, strict=False))))
    parts = [tokenizer.decode(tokens[max(0, place - 5) : place + 20]) for tokens in (asked, trained)]
    raise ValueError(
        f"{what} would not be asked as the model is trained: the tokens differ from number {place + 1} on. "
        f"Asked would be ...{parts[0]!r}..., and trained is ...{parts[1]!r}.... {advice}"
    )

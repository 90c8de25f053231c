"""The prompts of training and of scoring, compared token for token before the training."""

from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from eval.scoring import Prompts
from recipes.config import FinetuneConfig
from recipes.data import PreparedData, heldout_lines
from recipes.formats import is_conversation
from recipes.rows import read_problems
from recipes.tokens import Chat, num_prompt_tokens, tokenize

NUM_COMPARED = 4  # problems and conversations of each data set
ADVICE = "or score with eval/run.py and set evaluation.tasks=[]."


def check_prompts(model, tokenizer: PreTrainedTokenizerBase, config: FinetuneConfig, data: PreparedData) -> None:
    """Compare the first problems of every task, and conversations that begin with one question.

    Raises:
        ValueError: the tokens before a trained answer are not those that lm-evaluation-harness would ask with.
    """
    system_prompt = None if data.chat is None else data.chat.system_prompt
    prompts = Prompts(model, tokenizer, data.chat is not None, system_prompt)
    with TemporaryDirectory() as folder:
        heldout = Path(folder) / "test.jsonl"
        heldout.write_text(heldout_lines(data.rows, NUM_COMPARED), encoding="utf-8")
        tasks = {name: path or str(heldout) for name, path in config.evaluation.tasks.items()}
        limit = NUM_COMPARED * len(data.rows)
        for name, asked in prompts.of_tasks(tasks, limit).items():
            problems = Dataset.from_list(read_problems(tasks[name])[:limit])
            advice = f"Choose a task that asks as gsm8k_local does, {ADVICE}"
            for asked_tokens, trained_tokens in zip(asked, _trained(problems, tokenizer, data.chat), strict=True):
                _compare(tokenizer, f"The task {name}", asked_tokens, trained_tokens, advice)
    for splits in data.rows:
        if is_conversation(splits["train"]):
            _check_conversations(prompts, tokenizer, splits["train"], data.chat)


def _trained(rows: Dataset, tokenizer: PreTrainedTokenizerBase, chat: Chat | None) -> list[list[int]]:
    """The tokens that come before the first learned one of each sequence."""
    tokens = tokenize(rows, tokenizer, chat)
    return [row["input_ids"][: num_prompt_tokens(row["labels"])] for row in tokens]


def _check_conversations(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, rows: Dataset, chat: Chat | None
) -> None:
    """Ask the question that a conversation opens with as a task would."""
    assert chat is not None  # as there are conversations
    for number in range(min(NUM_COMPARED, len(rows))):
        row = rows[number]
        opening = list(takewhile(lambda turn: turn["role"] != "assistant", row.get("messages", row.get("prompt"))))
        if [turn["role"] for turn in opening] not in (["user"], ["system", "user"]):
            continue
        asked = prompts.of_turns(chat.ask(opening[-1]["content"]))
        advice = f"Set system_prompt to that of the conversations, {ADVICE}"
        trained = _trained(rows.select([number]), tokenizer, chat)[0]
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

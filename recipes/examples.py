"""Training rows as a model sees them: what is learned in colour, what is masked in grey, and their labels."""

from collections.abc import Iterable
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from recipes.chat import IGNORED_LABEL

MASKED, LEARNED, PLAIN = "\x1b[90m", "\x1b[1;32m", "\x1b[0m"


def format_example(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Lay out one row of tokens: its text, what is learned green and between `[[` and `]]`, and then its labels."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    text, labels = "", []
    for is_masked, group in groupby(pairs, key=lambda pair: pair[1] == IGNORED_LABEL):
        run = list(group)
        part = tokenizer.decode([token for token, _ in run])
        text += f"{MASKED}{part}{PLAIN}" if is_masked else f"{LEARNED}[[{part}]]{PLAIN}"
        labels.append(f"{IGNORED_LABEL} x {len(run)}" if is_masked else " ".join(str(label) for _, label in run))
    return f"{text}\nlabels: {', '.join(labels)}"


def print_examples(rows: Iterable[dict], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print rows, with the number of tokens that each has and learns."""
    for number, row in enumerate(rows, start=1):
        num_learned = sum(label != IGNORED_LABEL for label in row["labels"])
        print(f"--- row {number}: {len(row['input_ids'])} tokens, {num_learned} of them learned")
        print(format_example(row, tokenizer))

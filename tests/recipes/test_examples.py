"""Printed rows: every token is there, in the colour of what is learned or masked, with its label."""

from datasets import Dataset

from recipes.examples import LEARNED, MASKED, PLAIN, format_example, print_examples
from recipes.tokens import tokenize


def test_a_row_shows_what_is_learned(tokenizer, capsys):
    rows = tokenize(Dataset.from_list([{"prompt": "1 + 1", "completion": " = 2"}] * 2), tokenizer)
    labels = " ".join(str(token) for token in rows[0]["input_ids"][5:])
    expected = f"{MASKED}1 + 1{PLAIN}{LEARNED}[[ = 2</s>]]{PLAIN}\nlabels: -100 x 5, {labels}"
    assert format_example(rows[0], tokenizer) == expected
    print_examples(rows, tokenizer)
    printed = capsys.readouterr().out
    assert printed.count(expected) == 2 and "--- row 2: 10 tokens, 5 of them learned" in printed

"""GSM8K in the chat template of a real model: as messages, and as questions put into the template."""

import json

import pytest
from transformers import AutoTokenizer

from recipes.rows import load_rows
from recipes.tokens import Chat, format_prompt, tokenize


@pytest.mark.parametrize("real_model", ["SmolLM2-135M-Instruct"], indirect=True)
def test_gsm8k_as_messages_has_the_tokens_of_its_questions_in_the_template(real_model, shared, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    problems = load_rows(str(shared / "data" / "gsm8k"))["train"].select(range(20))
    lines = []
    for problem in problems:
        turns = [*Chat().ask(format_prompt(problem["question"])), {"role": "assistant", "content": problem["answer"]}]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    tokens = tokenize(load_rows(str(tmp_path / "train.jsonl"))["train"], tokenizer)
    assert tokens.to_list() == tokenize(problems, tokenizer, Chat()).to_list()
    for row, problem in zip(tokens, problems):
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learned) == f"{problem['answer']}<|im_end|>"
        assert tokenizer.decode(row["input_ids"]).startswith(
            "<|im_start|>system\nYou are a helpful AI assistant named"
        )

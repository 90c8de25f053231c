"""Tokens of every format: which of them are learned, and rows in which none could be."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from recipes.tokens import Chat, format_prompt, num_prompt_tokens, prompt_tokens, tokenize

TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def sequences(rows, tokenizer, chat=None):
    """The text of each sequence, and that of what is learned of it."""
    tokens = tokenize(Dataset.from_list(rows), tokenizer, chat)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "labels"}
    learned = [[label for label in row["labels"] if label != -100] for row in tokens]
    return [(tokenizer.decode(row["input_ids"]), tokenizer.decode(ids)) for row, ids in zip(tokens, learned)]


@pytest.mark.parametrize(
    "row, text, learned",
    [
        ({"question": "1 + 1?", "answer": "2"}, "Question: 1 + 1?\nAnswer: 2</s>", " 2</s>"),
        ({"prompt": "1 + 1", "completion": " = 2"}, "1 + 1 = 2</s>", " = 2</s>"),
        ({"prompt": "1 + 1", "completion": " = 2</s>"}, "1 + 1 = 2</s>", " = 2</s>"),
        ({"text": "1 + 1 = 2"}, "1 + 1 = 2</s>", "1 + 1 = 2</s>"),
    ],
)
def test_texts_are_learned_to_the_eos(tokenizer, row, text, learned):
    assert sequences([row] * 2, tokenizer) == [(text, learned)] * 2


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"


@pytest.mark.parametrize(
    "row, question",
    [
        ({"messages": TURNS}, "1 + 1?"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "1 + 1?"),
        ({"prompt": "1 + 1?", "completion": "2"}, "1 + 1?"),
        ({"question": "1 + 1?", "answer": "2"}, format_prompt("1 + 1?")),
    ],
)
def test_turns_are_learned_to_their_end(chat_tokenizer, row, question):
    assert sequences([row], chat_tokenizer, Chat()) == [(CHATML.format(question), "2<|im_end|>")]


def test_a_system_prompt_comes_before_questions(chat_tokenizer):
    row = {"question": "1 + 1?", "answer": "2"}
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    ((text, _),) = sequences([row], chat_tokenizer, Chat("Be brief."))
    assert text == system + CHATML.format(format_prompt("1 + 1?"))


@pytest.mark.parametrize("chat", [None, Chat(), Chat("Be brief.")])
def test_a_question_alone_has_the_tokens_before_its_answer(chat_tokenizer, chat):
    row = tokenize(Dataset.from_list([{"question": "1 + 1?", "answer": "2"}]), chat_tokenizer, chat)[0]
    prompt = prompt_tokens("1 + 1?", chat_tokenizer, chat)
    assert row["input_ids"][: num_prompt_tokens(row["labels"])] == prompt


def test_a_conversation_in_the_template_has_its_tools(chat_tokenizer):
    template = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}{{ mood }}" + template
    try:
        rows = [{"messages": TURNS, "tools": json.dumps([{"name": "add"}]), "chat_template_kwargs": {"mood": "!"}}]
        ((text, learned),) = sequences(rows, chat_tokenizer)
    finally:
        chat_tokenizer.chat_template = template
    assert text == "[add]!" + CHATML.format("1 + 1?") and learned == "2<|im_end|>"


def test_rows_with_nothing_to_learn_are_counted_and_the_first_is_shown(chat_tokenizer):
    rows = Dataset.from_list([{"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": TURNS[:1]}])
    with pytest.raises(ValueError, match="2 of 3 rows have nothing to learn.* The first is row 2 of the data: {'mess"):
        tokenize(rows, chat_tokenizer)


def test_a_completion_that_shares_a_token_with_its_prompt_is_refused(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    good, bad = {"prompt": "Once upon", "completion": " a time"}, {"prompt": "Once up", "completion": "on a time"}
    assert len(tokenize(Dataset.from_list([good]), tokenizer)) == 1
    with pytest.raises(ValueError, match="'Once up', and the beginning of its completion, 'on a time', share"):
        tokenize(Dataset.from_list([good, bad]), tokenizer)

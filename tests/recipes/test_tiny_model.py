"""The demo's tokenizer gives every text back and splits numbers; its model has the size and the ids it promises."""

import pytest
import torch
from transformers import AutoTokenizer, set_seed

from recipes.tiny_model import tiny_llama, train_tokenizer
from recipes.word_problems import generate_splits


@pytest.fixture(scope="module")
def problems():
    return generate_splits(0, {"pretrain": 200, "test_unseen_templates": 50})


@pytest.fixture(scope="module")
def tokenizer(problems):
    return train_tokenizer(f"{problem['question']}\n{problem['answer']}" for problem in problems["pretrain"])


def test_texts_come_back_unchanged(tokenizer, problems, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    texts = [text for split in problems.values() for problem in split for text in problem.values()]
    texts += ["", " ", "#### 18", "a  b\n\n\tc ,d .", "naïve 漢字 🙂", "<<3+4=7>>7"]
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in texts:
            assert loaded.decode(loaded(text)["input_ids"]) == text


def test_every_digit_is_a_token_and_words_are_few(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer("Tom has 2048 apples.")["input_ids"]]
    assert pieces[2:7] == [" ", "2", "0", "4", "8"]
    assert pieces[1] == " has" and pieces[-2:] == [" apples", "."]


def test_special_tokens_are_added_by_nobody_and_dropped_on_demand(tokenizer):
    text = f"#### 18{tokenizer.eos_token}"
    input_ids = tokenizer(text)["input_ids"]
    assert input_ids[-1] == tokenizer.eos_token_id and tokenizer.bos_token_id not in input_ids
    assert tokenizer.decode(input_ids, skip_special_tokens=True) == "#### 18"
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_the_model_follows_the_tokenizer_and_the_seed(tokenizer):
    set_seed(0)
    model = tiny_llama(tokenizer)
    assert 0.8e6 < model.num_parameters() < 1e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    set_seed(0)
    again = tiny_llama(tokenizer).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())

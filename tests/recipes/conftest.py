"""A Llama of two small layers with a tokenizer, and a folder of problems, as a recipe loads them: from disk."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` out of the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, and eos; no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """A saved model of a few thousand parameters with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def problems_folder(tmp_path):
    """Twelve training and five test problems; one of the training problems is long."""
    folder = tmp_path / "problems"
    folder.mkdir()
    rows = [{"question": f"{a} + {a}?", "answer": f"#### {a + a}" + " " * 100 * (a == 7)} for a in range(17)]
    write_jsonl(folder / "train.jsonl", rows[:12])
    write_jsonl(folder / "test.jsonl", rows[12:])
    return folder


def write_jsonl(path, rows):
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

"""A Llama of two small layers with a tokenizer, a folder of problems, and finished DIP runs, as recipes load them."""

import copy

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tests.helpers import write_jsonl

WEIGHTS = {"full": "full", "lora": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}}


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


CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    """The tokenizer with the marks of turns, and ChatML for a template."""
    tokenizer = copy.deepcopy(tokenizer)
    marks = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "bos_token": "<s>", "pad_token": "</s>"})
    tokenizer.chat_template = CHATML
    return tokenizer


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
        initializer_range=0.3,  # where a step or noise makes a difference that can be seen
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def problems_folder(tmp_path):
    """A folder with the problems of `write_problems`."""
    return write_problems(tmp_path / "problems")


@pytest.fixture(scope="session")
def dip_runs(model_folder, tmp_path_factory):
    """Finished runs of `recipes/finetune.py` with DIP, `full` and `lora`, on `write_problems`; not to be changed."""
    from recipes import finetune  # not above: that takes seconds, and most tests do without

    root = tmp_path_factory.mktemp("dip_runs")
    problems = write_problems(root / "problems")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        for name, weights in WEIGHTS.items():
            config = {
                "model": str(model_folder),
                "dataset": str(problems),
                "max_length": 64,
                "weights": weights,
                "dip": {"init_noise_std": 0.5},
                "training": {
                    "output_dir": str(root / name),
                    "max_steps": 10,
                    "per_device_train_batch_size": 4,
                    "learning_rate": 3e-2,
                    "seed": 0,
                    "use_cpu": True,
                    "save_strategy": "no",
                },
                "evaluation": {"tasks": []},
            }
            (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
            finetune.main([str(root / f"{name}.yaml")])
    return {name: root / name for name in WEIGHTS}


def write_problems(folder):
    """Write twelve training and five test problems; one of the training problems is long."""
    folder.mkdir()
    rows = [{"question": f"{a} + {a}?", "answer": f"#### {a + a}" + " " * 100 * (a == 7)} for a in range(17)]
    write_jsonl(folder / "train.jsonl", rows[:12])
    write_jsonl(folder / "test.jsonl", rows[12:])
    return folder

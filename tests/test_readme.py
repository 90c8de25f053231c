"""Every Python block of the README and of the pages runs, on a tiny model in the place of the real one."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB_SIZE, build

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "docs" / "quickstart.md"
MODEL = "Qwen/Qwen2.5-0.5B"
# A few steps on a CPU, in float32, which TRL leaves where it can.
CHANGED = {
    "TrainingArguments(": "TrainingArguments(max_steps=3, use_cpu=True, ",
    "SFTConfig(": "SFTConfig(max_steps=3, use_cpu=True, bf16=False, ",
}
SUMS = [(a, b) for a in range(8) for b in range(8)]


def blocks(page):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page != QUICKSTART and blocks(page))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model that knows the sentences of the examples, as a pretrained one does, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<pad>", "<bos>", "<eos>", "plus", "is", ".", "What", "?", *map(str, range(15))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    assert len(tokenizer) <= VOCAB_SIZE
    tokenizer.save_pretrained(folder)
    model = build("llama")
    batch = tokenizer([f"{a} plus {b} is {a + b}." for a, b in SUMS], return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch):
    """Run a page's blocks one after the other in a folder of their own; gives the names that they define."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{a} plus {b} is", "answer": f"{a + b}."} for a, b in SUMS]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Dataset.from_list(rows))

    def run(page, names=None):
        names = {} if names is None else names
        for block in blocks(page):
            if "trl" in block:
                pytest.importorskip("trl", reason="TRL needs Python 3.11")
            for written, run_instead in ({MODEL: str(model_folder)} | CHANGED).items():
                block = block.replace(written, run_instead)
            exec(compile(block, page.name, "exec"), names)
        return names

    return run


# TRL 1.16 sets it in every SFTConfig, which transformers 5.23 warns of.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_the_readme_runs(run, tmp_path):
    names = run(ROOT / "README.md")
    assert names["tokens"].shape[0] == 1
    for adapter in ("my-adapter", "my-sft-adapter"):
        assert isinstance(PeftModel.from_pretrained(build("llama"), tmp_path / adapter), PeftModel)


def test_the_quickstart_runs(run, tmp_path, capsys):
    names = run(QUICKSTART)
    assert "'name': 'model.layers.0'" in capsys.readouterr().out
    assert names["tokens"].shape[0] == 1 and names["spread"].mutual_information.shape == (1, 4)
    assert isinstance(PeftModel.from_pretrained(build("llama"), tmp_path / "my-adapter"), PeftModel)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_goes_on_where_the_quickstart_ended(run, page):
    run(page, run(QUICKSTART))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110

"""The README's example runs as it stands, on a tiny model in the place of the one it downloads."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny model that knows the example's sentences a little, as a pretrained one does."""
    words = ["<pad>", "plus", "is", ".", *map(str, range(15))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path / "model")
    model = build("llama")
    batch = tokenizer([f"{a} plus {b} is {a + b}." for a in range(8) for b in range(8)], return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_example_ends_in_an_adapter_that_loads(folder, capsys, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    training, ensemble = (next(block for block in blocks if name in block) for name in ("get_dip_model", "predict("))
    monkeypatch.chdir(folder)
    names = {}
    exec(training.replace("Qwen/Qwen2.5-0.5B", str(folder / "model")), names)
    exec(ensemble, names)
    assert "'name': 'model.layers.0'" in capsys.readouterr().out
    assert names["tokens"].shape[0] == 1 and names["spread"].mutual_information.shape == (1, 4)
    assert isinstance(PeftModel.from_pretrained(build("llama"), folder / "my-adapter"), PeftModel)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200

"""What all tests share: a tiny Llama with a batch, and the way to the shared data. Other models: `tiny_models`."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whichever library

from tests import tiny_models

pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """A Llama of three layers in eval mode, always of the same weights."""
    return tiny_models.build("llama")


@pytest.fixture
def batch():
    """Four rows of ten tokens for `tiny_llama`: `input_ids`, `attention_mask` with padding, `labels` with -100."""
    return tiny_models.make_batch("llama")


@pytest.fixture(scope="session")
def shared():
    """The folder of shared data and models; skips the test where it is absent."""
    folder = Path(os.environ.get("DIPNET_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set DIPNET_SHARED")
    return folder


@pytest.fixture(scope="session")
def few_problems(shared, tmp_path_factory):
    """The folder of a data set, the first problems of GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split in ("train", "test"):
        lines = (shared / "data" / "gsm8k" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:8]))
    return folder

"""Real pretrained models, where they were fetched; the tests of a machine without them skip."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("DIPNET_REAL_MODELS", ROOT / "runs" / "models"))


@pytest.fixture(params=["SmolLM2-135M-Instruct", "gemma-3-270m"])
def real_model(request):
    """The folder of a real model; skips the test, with the command that fetches it, where it is absent."""
    folder = MODELS / request.param
    if not (folder / "model.safetensors").is_file():
        pytest.skip(
            f"no model at {folder}: put {request.param} there from a hub, or, from the folder of shared data, "
            "python ../shared/tools/real_models.py runs/models"
        )
    return folder

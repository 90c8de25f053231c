"""`recipes/noise_level.py` from its command line to its picture."""

import json
from pathlib import Path

import pytest

from recipes import noise_level

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "stories260k-gsm8k-300.yaml"


@pytest.mark.parametrize("dip", ["{}", "{noise_scale: absolute, init_noise_std: 0.1}"])
def test_the_sweep_is_drawn(shared, few_problems, tmp_path, monkeypatch, capsys, dip):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    settings = [f"model={shared / 'models' / 'stories260K'}", f"dataset={few_problems}", f"dip={dip}"]
    settings += ["num_validation_samples=2", "max_train_samples=4", "training.per_device_train_batch_size=2"]
    options = ["--stds", "0.1", "0.5", "--num-batches", "1", "--output", str(tmp_path / "pictures")]
    noise_level.main([str(CONFIG), "--set", *settings, *options])
    results = json.loads((tmp_path / "pictures" / "noise-level.json").read_text())
    assert results["level"] > 0 and f"Level {results['level']:.3g}" in capsys.readouterr().out
    sites = ["all", *(f"model.layers.{i}" for i in range(5))]
    assert [(row["site"], row["std"]) for row in results["sweep"]] == [
        ("all", 0.0),
        *((site, std) for site in sites for std in (0.1, 0.5)),
    ]
    assert (tmp_path / "pictures" / "noise-level.png").read_bytes().startswith(b"\x89PNG")


def test_a_plain_run_has_no_noise_to_draw():
    with pytest.raises(ValueError, match="dip: null, and a plain model has no noise"):
        noise_level.main([str(CONFIG), "--set", "dip=null"])

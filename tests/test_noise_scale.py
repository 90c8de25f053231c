"""The comparison of scales in `benchmarks/noise_scale.py`: its candidates' known values, and its result file."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import noise_scale

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "stories260k-gsm8k-300.yaml"


@pytest.mark.parametrize("name", ["channel_rms", "median_deviation", "interquartile_range", "clipped_rms"])
def test_robust_or_not_every_scale_is_the_standard_deviation_of_normal_channels(name):
    x = 5 + torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 10.0])
    scale = noise_scale.CANDIDATES[name](x, x)
    torch.testing.assert_close(scale / torch.tensor([0.1, 1.0, 10.0]), torch.ones(3), rtol=0.03, atol=0)


def test_a_massive_token_moves_the_rms_alone():
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    massive = torch.cat([torch.full((1, 4), 1e4), x])
    for name in ("median_deviation", "interquartile_range", "clipped_rms"):
        scale = noise_scale.CANDIDATES[name]
        torch.testing.assert_close(scale(massive, massive), scale(x, x), rtol=0.02, atol=0)
    for name in ("site_rms", "channel_rms"):
        assert (noise_scale.CANDIDATES[name](massive, massive) > 100).all()
    update = 3 * x
    torch.testing.assert_close(
        noise_scale.update_deviation(massive[1:], update), 3 * noise_scale.median_deviation(x, x)
    )


def test_rows_are_measured_once(shared, few_problems, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise_scale, "RESULTS", tmp_path)
    monkeypatch.setattr(noise_scale, "STDS", (0.05, 0.2))
    monkeypatch.setattr(noise_scale, "NUM_CALIBRATION_BATCHES", 1)
    monkeypatch.setattr(noise_scale, "NUM_TRAIN", 4)
    monkeypatch.setattr(noise_scale, "NUM_VALIDATION", 2)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    settings = [f"model={shared / 'models' / 'stories260K'}", f"dataset={few_problems}"]
    settings += [
        "num_validation_samples=2",
        "training.per_device_train_batch_size=2",
        "training.save_strategy=no",
        "dip.init_loss_increase=0.5",
    ]
    scales = ["median_deviation", "update_deviation"]
    arguments = [str(CONFIG), "--set", *settings, "--scales", *scales]
    noise_scale.main([*arguments, "--train", "1"])
    (path,) = tmp_path.glob("noise_scale-*.json")
    written = json.loads(path.read_text())
    table = {(row["scale"], row["std"]): row["loss"] for row in written["rows"] if "loss" in row}
    assert len(table) == 2 + 2 * 2
    (level,) = (std for scale, std in table if scale == "default")
    assert 0.05 < table["default", level] - table["noise off", 0.0] < 0.95
    assert table["median_deviation", 0.05] < table["median_deviation", 0.2]
    trained = {row["scale"]: row for row in written["rows"] if "epochs" in row}
    assert list(trained) == ["noise off", *scales]
    assert all(len(row["nll_by_epoch"]) == 1 for row in trained.values())
    assert trained["noise off"]["level"] is None
    # Updates are smaller than the stream, so that more of their deviation costs as much.
    assert trained["update_deviation"]["level"] > trained["median_deviation"]["level"] > 0

    capsys.readouterr()
    noise_scale.main([*arguments, "--train", "1"])
    assert json.loads(path.read_text()) == written and "'loss'" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="is of another configuration"):
        noise_scale.main([str(CONFIG), "--set", *settings[:-1]])

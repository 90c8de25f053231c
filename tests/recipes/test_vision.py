"""Small networks on digits: each trains by each method, attacks stay within their radius, a run goes on."""

import json

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from recipes import vision
from recipes.images import as_rows, load_splits


@pytest.fixture(scope="module")
def digits():
    return {name: {key: values[:100] for key, values in images.items()} for name, images in load_splits().items()}


@pytest.fixture
def short(monkeypatch, digits):
    """Three steps per run, on a hundred images."""
    monkeypatch.setattr(vision, "TRAINING", {**vision.TRAINING, "num_train_epochs": 1, "max_steps": 3})
    monkeypatch.setattr(vision, "load_splits", lambda: digits)


@pytest.mark.parametrize("method", vision.METHODS)
@pytest.mark.parametrize("name", vision.NETWORKS)
def test_every_network_trains_by_every_method(short, digits, tmp_path, name, method):
    network, method = vision.NETWORKS[name], vision.METHODS[method]
    model = vision.train(network, method, method.values[0], 0, as_rows(digits["train"]), tmp_path)
    torch.manual_seed(0)
    untrained = dict(network.make().named_parameters())
    trained = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    assert all(not torch.equal(trained[name], p) for name, p in untrained.items() if p.dim() > 1)
    scores = vision.score(model, digits["test"]["pixel_values"], digits["test"]["labels"])
    assert all(0 <= row["accuracy"] <= 1 and row["nll"] > 0 for row in scores.values())


def test_fixed_noise_on_the_image_does_not_learn(short, digits, tmp_path):
    model = vision.train(
        vision.NETWORKS["vit"], vision.METHODS["randomized_smoothing"], 0.2, 0, as_rows(digits["train"]), tmp_path
    )
    (row,) = model.noise_summary()
    assert row["name"].endswith("patch_embeddings")
    assert row["mean"] == pytest.approx(0.2)


class Linear(nn.Module):
    """Two classes, by the sign of w x."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, pixel_values):
        score = (pixel_values.flatten(1) * self.weights).sum(-1)
        return ImageClassifierOutput(logits=torch.stack([-score, score], -1))


@pytest.mark.parametrize("steps", [1, 10])
def test_an_attack_on_a_linear_network_is_the_worst_corner_within_the_pixels_range(steps):
    images = torch.tensor([[0.5, 0.5, 0.98]]).view(1, 1, 1, 3)
    moved = vision.attack(Linear([1.0, -2.0, -3.0]), images, torch.tensor([1]), steps)
    torch.testing.assert_close(moved.flatten(), torch.tensor([0.4, 0.6, 1.0]))


def test_a_run_goes_on_and_gives_the_same_numbers(short, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(vision.METHODS, "dip", vision.METHODS["dip"]._replace(values=(0.3,)))
    arguments = ["--models", "mlp", "--methods", "dip"]
    vision.main([str(tmp_path / "once"), *arguments, "--seeds", "2"])
    vision.main([str(tmp_path / "twice"), *arguments, "--seeds", "1"])
    vision.main([str(tmp_path / "twice"), *arguments, "--seeds", "2"])
    once, twice = (json.loads((tmp_path / name / "vision.json").read_text())["rows"] for name in ("once", "twice"))
    assert once == twice
    assert set(once["mlp dip"]["seeds"]["1"]) == {"noise_off", "mean"}
    assert "| mlp dip, mean of 8 |" in capsys.readouterr().out


def test_rows_of_another_setting_are_not_mixed(short, tmp_path, monkeypatch):
    vision.main([str(tmp_path), "--models", "mlp", "--methods", "plain", "--seeds", "1"])
    monkeypatch.setattr(vision, "ATTACK_RADIUS", 0.3)
    with pytest.raises(ValueError, match=r"vision.json was made with .*0\.1.*, this program has .*0\.3"):
        vision.main([str(tmp_path), "--models", "mlp", "--methods", "plain", "--seeds", "1"])

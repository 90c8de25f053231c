"""The model card: what it says of an adapter, and what it leaves as it was."""

import statistics

import pytest

import dipnet_hf
from dipnet_hf import DipConfig, get_dip_model
from dipnet_hf.card import read_noise, write_model_card
from tests.helpers import trained_model
from tests.tiny_models import build


def test_the_card_says_what_the_adapter_is(tmp_path):
    model = trained_model(num_samples=2, layers_to_transform=[0, 2], target_sites="mlp")
    model.peft_config["default"].base_model_name_or_path = "someone/a-model"
    model.save_pretrained(tmp_path)
    card = tmp_path.joinpath("README.md")
    text = card.read_text()
    header, body = text.split("---\n")[1:3]
    assert "base_model: someone/a-model" in header and "library_name: peft" in header
    assert "- dipnet\n" in header and "- dipnet_hf\n" in header
    assert "import dipnet_hf" in body and "from peft import AutoPeftModelForCausalLM" in body
    for expected in (
        "`someone/a-model`",
        "`LORA`",
        "Sites: `mlp`, layers `[0, 2]`",
        "2 noise sample(s)",
        "not recorded",
    ):
        assert expected in body
    assert f"dipnet_hf {dipnet_hf.__version__}" in body and "More Information Needed" not in body
    noise = read_noise(tmp_path)
    assert list(noise) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    for row in model.noise_summary():
        std = noise[row["name"]]["std"]
        assert sum(std) / len(std) == pytest.approx(row["mean"], rel=1e-5)
        assert statistics.median_low(noise[row["name"]]["scale"]) == row["scale"]
        cells = "".join(f" {row[name]:.4g} |" for name in ("scale", "mean", "min", "max"))
        assert f"| {row['name']} |{cells}\n" in body


def test_the_card_keeps_what_was_written_by_hand(tmp_path):
    model = trained_model()
    card = tmp_path.joinpath("README.md")
    card.write_text("Above, by hand. [More Information Needed]\n")
    model.save_pretrained(tmp_path)
    card.write_text(f"{card.read_text()}\nBelow, by hand.\n")
    model.save_pretrained(tmp_path)
    saved = card.read_text()
    write_model_card(tmp_path, training_data="some problems", metrics={"eval_nll": 1.23456})
    measured = card.read_text()
    assert "- Training data: some problems\n- eval_nll: 1.2346\n" in measured
    for text in (saved, measured):
        assert text.count("# DIPNet adapter") == text.count("## Learned noise") == text.count("import dipnet_hf") == 1
        assert text.index("Above, by hand.") < text.index("# DIPNet adapter") < text.index("Below, by hand.")
    model.save_pretrained(tmp_path)
    assert card.read_text() == saved  # saving again adds nothing


def test_layers_of_a_deep_model_are_in_their_order(tmp_path):
    model = get_dip_model(
        build("llama", num_layers=12), DipConfig(weights="frozen", noise_scale="absolute", init_noise_std=0.05)
    )
    model.save_pretrained(tmp_path)
    assert list(read_noise(tmp_path)) == [f"model.layers.{i}" for i in range(12)]

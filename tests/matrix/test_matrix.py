"""A sample of the matrix, one kind of site for each of 20 models that are unlike each other; and the page it makes."""

import pytest
import torch

from dipnet_hf import DipConfig
from dipnet_hf.noise import add_noise
from tests.matrix import run
from tests.matrix.cases import NotAsked, Outcome, ask
from tests.matrix.other_models import OTHER_MODELS
from tests.matrix.properties import (
    PROPERTIES,
    has_the_gradient_of_differences,
    recomputes_its_noise_reentrantly,
    trains_in_bfloat16,
)
from tests.matrix.shrinking import causal_families

# PEFT and TRL's own calls; a site of a tiny batch sees few tokens.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:A site was calibrated on only"),
]

SAMPLE = {
    "llama": "decoder_layer",
    "gpt2": "mlp",
    "phi3": "linear",
    "gemma3": "decoder_layer",  # composite
    "qwen3_5": "decoder_layer",  # composite, and a hybrid
    "gemma3n_text": "decoder_layer",  # streams stand before the rows
    "gemma4_text": "decoder_layer",  # layers share keys
    "xlnet": "decoder_layer",  # the length stands before the rows
    "ctrl": "attention",  # called with values, keys and queries by position
    "mixtral": "mlp",
    "gpt_oss": "attention",
    "deepseek_v3": "attention",  # latents in place of keys and values
    "deepseek_v4": "attention",  # hyper-connections
    "qwen3_next": "linear",  # a gated delta net
    "mamba2": "linear",
    "jamba": "decoder_layer",
    "rwkv": "decoder_layer",
    "swin_classes": "linear",
    "convnext_classes": r".*layers\.\d+",
    "deberta_v2_classes": "decoder_layer",
}
# `make matrix` asks them too.
SLOW = (has_the_gradient_of_differences, recomputes_its_noise_reentrantly, trains_in_bfloat16)
QUICK = [check for check in PROPERTIES if check not in SLOW]


@pytest.mark.parametrize("name", SAMPLE)
def test_every_property_holds(name):
    if name not in (*causal_families(), *OTHER_MODELS):
        pytest.skip(f"transformers has no {name} yet")
    outcomes = run.run_site(run.make_network(name), run.sites_of(name)[SAMPLE[name]], QUICK)
    wrong = {check: outcome for check, outcome in outcomes.items() if outcome.kind not in ("ok", "base")}
    assert wrong == {}
    assert sum(outcome.kind == "ok" for outcome in outcomes.values()) > len(QUICK) / 2


def test_a_refusal_is_one_that_this_package_raises():
    def break_off(case):
        raise NotAsked("no cache")

    def refuse(case):
        DipConfig(weights="ful")

    def fail_within(case):
        add_noise(torch.zeros(2), torch.zeros(3), torch.ones(()))

    assert ask(lambda case: None, None) == Outcome("ok")
    assert ask(break_off, None) == Outcome("base", "no cache")
    assert ask(refuse, None).kind == "refused" and "weights must be one of" in ask(refuse, None).reason
    assert ask(fail_within, None).kind == "failed"
    assert ask(lambda case: [][0], None).kind == "failed"


def test_the_page_counts_the_cells_and_gives_every_reason_once():
    refused = ["refused", "Site 'a.0' should have 64 channels."]
    sites = {"mlp": {"is_made": ["ok", ""], "is_drawn_anew": refused, "finds_its_level": ["base", "no labels"]}}
    rows = {
        "first": {"weights": "lora", "sites": sites},
        "second": {"weights": "full", "sites": {"mlp": {"is_drawn_anew": ["refused", refused[1].replace("64", "8")]}}},
        "third": {"failed": "its process ended with -9"},
        "fourth": {"not_built": "ImportError: timm"},
    }
    page = run.format_page(rows, {"git": {"commit": "0123456789"}, "versions": {"transformers": "5.23.0"}})
    assert "5.23.0 at commit 0123456." in page
    assert "**1 cells are right, 2 refused, 0 failed**" in page
    assert "| first | lora |  |  | 1 (1) **1 refused** |  |  |  |" in page
    assert "* first (mlp), second (mlp): Site 'a.0' should have 64 channels.\n" in page
    assert "* fourth: ImportError: timm" in page and "* third: its process ended with -9" in page
    assert run.failures(rows) == ["third: its process ended with -9"]

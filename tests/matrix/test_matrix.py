"""A sample of the matrix, one kind of site for each of 20 models that are unlike each other; and the page it makes."""

import pytest

from tests.matrix import run
from tests.matrix.other_models import OTHER_MODELS
from tests.matrix.properties import PROPERTIES, NotAsked, Outcome, ask
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


@pytest.mark.parametrize("name", SAMPLE)
def test_every_property_holds(name):
    if name not in (*causal_families(), *OTHER_MODELS):
        pytest.skip(f"transformers has no {name} yet")
    outcomes = run.run_site(run.make_network(name), run.sites_of(name)[SAMPLE[name]])
    wrong = {check: outcome for check, outcome in outcomes.items() if outcome.kind not in ("ok", "base")}
    assert wrong == {}
    assert sum(outcome.kind == "ok" for outcome in outcomes.values()) > len(PROPERTIES) / 2


def test_a_refusal_is_one_of_this_package():
    def refuse(case):
        run.make_network("llama").model.no_such_attribute  # noqa: B018

    def break_off(case):
        raise NotAsked("no cache")

    assert ask(lambda case: None, None) == Outcome("ok")
    assert ask(break_off, None) == Outcome("base", "no cache")
    assert ask(refuse, None).kind == "failed"

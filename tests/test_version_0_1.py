"""Adapters that version 0.1 wrote (commit 3489916, tests/data/version_0_1) mean today what they meant then.

`logits.json` holds what that commit computed: the logits after the last of eight tokens, rounded to six digits.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import dipnet_hf  # noqa: F401
from tests.tiny_models import build

FOLDER = Path(__file__).parent / "data" / "version_0_1"


@pytest.mark.parametrize(("name", "sampling"), [("lora", "independent"), ("frozen", "pairs")])
def test_an_old_adapter_gives_its_old_logits(name, sampling):
    model = PeftModel.from_pretrained(build("llama"), FOLDER / name).eval()
    expected = json.loads((FOLDER / name / "logits.json").read_text())
    ids = torch.arange(3, 11)[None]
    logits = {}
    with torch.no_grad():
        logits["noise_free"] = model(input_ids=ids).logits
        with model.sampling(seed=3):
            logits["sampled"] = model(input_ids=ids).logits
        with model.ensemble(num_samples=3, seed=4):
            logits["ensemble"] = model(input_ids=ids).logits.log_softmax(-1)  # log-probabilities then
    for kind, values in expected.items():
        torch.testing.assert_close(logits[kind][0, -1], torch.tensor(values), atol=2e-6, rtol=1e-5, msg=kind)
    assert model.base_model.active_dip_config.sampling == sampling
    assert not torch.allclose(logits["sampled"], logits["noise_free"], atol=1e-3)


def test_an_old_prior_is_read_as_the_same_one():
    config = PeftModel.from_pretrained(build("llama"), FOLDER / "lora").base_model.active_dip_config
    assert (config.prior_std, config.prior_weight) == (0.2, 1.0)  # alpha 12.5, beta 0.5

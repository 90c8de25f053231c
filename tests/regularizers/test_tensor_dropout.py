"""Dropout of components against the sketched weight, statistics of its draws, and what evaluation sees."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dipnet_hf.regularizers import TensorDropout
from tests.helpers import assert_resumes, checkpointed, collate, dip_model, gradients, logits, make_rows
from tests.tiny_models import build


def lora_model(**config):
    torch.manual_seed(0)
    defaults = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(build("llama"), LoraConfig(**defaults | config))


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_a_layer_adds_a_sketch_of_its_product():
    """The same one for all tokens: s B diag(m) A with m of zeros and 1 / (1 - p)."""
    model = lora_model().train()
    TensorDropout(p=0.3).attach(model)
    layer, x = layer_of(model), torch.randn(5, 7, 32)
    torch.manual_seed(3)
    found = layer(x) - layer.base_layer(x)
    torch.manual_seed(3)
    kept = torch.full((8,), 0.7).bernoulli() / 0.7
    assert 0 < (kept == 0).sum() < 8
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(
        found, layer.scaling["default"] * x @ (B @ torch.diag(kept) @ A).T, atol=1e-5, rtol=1e-5
    )


def test_the_mean_over_draws_is_the_plain_output():
    """5 sigma bounds of 4,000 draws, with the variance of the closed form, (B A x)_i^2 p / (1 - p) by component."""
    model = lora_model()
    method = TensorDropout(p=0.4)
    method.attach(model)
    layer, x = layer_of(model), torch.randn(1, 32)
    with torch.no_grad():
        plain = layer.eval()(x)
        components = (layer.lora_A["default"](x)[0] * layer.lora_B["default"].weight * layer.scaling["default"]).T
        variance = components.square().sum(0) * 0.4 / 0.6
        layer.train()
        draws = torch.cat([layer(x) for _ in range(4000)])
    assert ((draws.mean(0) - plain[0]).abs() < 5 * (variance / 4000).sqrt()).all()
    ratio = draws.var(0) / variance
    assert ratio.min() > 0.85 and ratio.max() < 1.15


def test_evaluation_and_what_is_detached_are_plain():
    model, method = lora_model(), TensorDropout(p=0.5)
    plain = logits(model)
    method.attach(model)
    assert torch.equal(logits(model.eval()), plain)
    assert not torch.equal(logits(model.train()), plain)
    method.detach()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_draws_the_same_again(reentrant):
    batch, found = collate(list(make_rows())[:4]), []
    for options in (None, {"use_reentrant": reentrant}):
        model = lora_model().train()
        TensorDropout(p=0.5).attach(model)
        if options is not None:
            checkpointed(model, options)
        torch.manual_seed(5)
        found.append(gradients(model, model(**batch).loss))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_it_works_beside_dip():
    model = dip_model(weights=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    plain = logits(model.eval())
    TensorDropout(p=0.5).attach(model)
    assert torch.equal(logits(model), plain)
    model.calibrate([collate(list(make_rows()))])
    assert torch.isfinite(model.train()(**collate(list(make_rows())[:2])).loss)


def test_a_resumed_run_goes_on_as_if_uninterrupted(tmp_path):
    assert_resumes(lora_model, lambda: TensorDropout(p=0.5), tmp_path)


def test_models_without_lora_are_refused():
    with pytest.raises(ValueError, match="TensorDropout drops components of LoRA.* LlamaForCausalLM has none"):
        TensorDropout().attach(build("llama"))


@pytest.mark.parametrize("p", [0.0, 1.0, float("nan")])
def test_bad_settings_are_refused(p):
    with pytest.raises(ValueError, match="p of TensorDropout must be between 0 and 1, got"):
        TensorDropout(p=p)

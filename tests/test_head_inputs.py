"""The fast paths of `dip_loss` inside real models against the plain one: no whole logits, lower layers once."""

import copy

import pytest
import torch
from torch import nn

from dipnet_hf import DipConfig, dip_loss, get_dip_model
from dipnet_hf.head_inputs import HeadInputs
from dipnet_hf.rows import RowRepeater
from tests.test_recompute import checkpointed
from tests.test_trainer import make_rows, make_trainer
from tests.tiny_models import CAUSAL, NUM_LAYERS, build, make_batch

# What changes logits after the head: a tanh, a factor, a divisor.
TRANSFORMED = ("gemma2", "cohere", "granite")


def set_logits(model):
    """Settings far from neutral, and weights large enough for a tanh to matter."""
    config = model.config
    for name, value in (("final_logit_softcapping", 2.0), ("logit_scale", 0.25), ("logits_scaling", 3.0)):
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
            if hasattr(model, name):
                setattr(model, name, value)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def make(name, **config):
    model = set_logits(build(name)) if name in TRANSFORMED else build(name)
    config = {"weights": "full", "init_noise_std": 0.3, "noise_scale": "absolute"} | config
    return get_dip_model(model, DipConfig(**config)).train()


def loss_and_gradients(model, batch):
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    result = dip_loss(model, batch)
    result.loss.backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_the_plain_path(model, batch, monkeypatch):
    fast, fast_gradients = loss_and_gradients(model, batch)
    monkeypatch.setattr(HeadInputs, "_plain_head", lambda self: None)
    monkeypatch.setattr(RowRepeater, "can_enter_in_training", lambda self, inputs: False)
    plain, plain_gradients = loss_and_gradients(model, batch)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, gradient in fast_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", sorted({*CAUSAL, *TRANSFORMED}))
@pytest.mark.parametrize("target", ["log_prob", "logits"])
def test_architectures(name, target, monkeypatch):
    model = make(name, num_samples=2, stability_loss_weight=0.2, stability_target=target)
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("antithetic", [True, False])
def test_architectures_with_the_upper_layers_projected(name, antithetic, monkeypatch):
    model = make(name, num_samples=4, antithetic=antithetic, layers_to_transform=list(range(1, NUM_LAYERS)))
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_with_the_upper_ones_projected(use_reentrant, monkeypatch):
    model = make("llama", num_samples=2, layers_to_transform=[1, 2])
    plain, plain_gradients = loss_and_gradients(model, make_batch("llama"))
    checkpointed(model.get_base_model(), {"use_reentrant": use_reentrant})
    recomputed, gradients = loss_and_gradients(model, make_batch("llama"))
    assert torch.equal(plain.loss, recomputed.loss)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)


def test_lower_layers_run_on_one_copy_and_the_head_on_no_token():
    model = make("llama", num_samples=4, layers_to_transform=[2])
    dip_loss(model, make_batch("llama"))  # compares the logits of some tokens
    seen = []
    base = model.get_base_model()
    for layer in base.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[:2])))
    forward = base.lm_head.forward
    base.lm_head.forward = lambda x: (seen.append(tuple(x.shape[:2])), forward(x))[1]
    dip_loss(model, make_batch("llama"))
    assert seen == [(4, 10), (4, 10), (16, 10), (16, 0)]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads(tied, monkeypatch):
    base = build("llama")
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    model = get_dip_model(base, DipConfig(weights="full", noise_scale="absolute", init_noise_std=0.3)).train()
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch)


def test_noise_at_the_heads_own_input(monkeypatch):
    model = make("llama", target_modules=["lm_head"], num_samples=2)
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch)


def test_autocast(monkeypatch):
    model, batch = make("llama", num_samples=2), make_batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        fast, _ = loss_and_gradients(model, batch)
        monkeypatch.setattr(HeadInputs, "_plain_head", lambda self: None)
        plain, _ = loss_and_gradients(model, batch)
    torch.testing.assert_close(fast.loss, plain.loss, atol=2e-2, rtol=2e-2)


def test_other_logits_are_left_whole_and_a_warning_says_so():
    base = build("llama")
    forward = base.forward
    base.forward = lambda *args, **kwargs: (out := forward(*args, **kwargs), setattr(out, "logits", out.logits**3))[0]
    model = get_dip_model(base, DipConfig(noise_scale="absolute", weights="full")).train()
    batch = make_batch("llama")
    with pytest.warns(UserWarning, match="logits of LlamaForCausalLM are not the plain output of its head"):
        first = dip_loss(model.train(), batch)
    with model.deterministic():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(dip_loss(model, batch).nll, expected)
    assert first.loss.requires_grad


def test_an_adapter_on_the_head_is_not_bypassed(monkeypatch):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = make("llama", weights=lora)
    assert model.base_model._head_inputs._plain_head() is None
    result, gradients = loss_and_gradients(model, make_batch("llama"))
    assert any("lm_head.lora_B" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


def test_the_comparison_leaves_the_random_state_alone():
    model, batch = make("llama"), make_batch("llama")
    torch.manual_seed(3)
    first = dip_loss(model, batch).loss
    torch.manual_seed(3)
    assert torch.equal(dip_loss(model, batch).loss, first)


def test_the_trainer_keeps_a_loss_function_that_was_set(tmp_path):
    model = make("llama", init_noise_std=0.0, alpha=0.0, beta=0.0)
    base = model.get_base_model()
    plain = base.loss_function
    base.loss_function = lambda **kwargs: 3 * plain(**kwargs)
    trainer = make_trainer(model, make_rows(), tmp_path, max_steps=1)
    trainer.train()
    tripled = trainer.state.log_history[0]["nll"]
    assert 3 * 3.5 < tripled < 3 * 5  # ln 64 = 4.16

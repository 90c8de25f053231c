"""The fast paths of `dip_loss` inside real models against the plain one: no whole logits, lower layers once."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from dipnet_hf import dip_loss, hidden_states
from dipnet_hf.architecture import plain_head
from dipnet_hf.hidden_states import HiddenStateCapture
from dipnet_hf.late_expansion import LateExpansion
from tests.helpers import checkpointed, dip_model
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


def absolute_model(base="llama", **config):
    """A DIP model that needs no calibration, in train mode."""
    base = set_logits(build(base)) if base in TRANSFORMED else base
    return dip_model(base, noise_scale="absolute", **config).train()


def loss_and_gradients(model, batch):
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    result = dip_loss(model, batch)
    result.loss.backward()
    return result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_the_plain_path(model, batch, monkeypatch, expands_late=False):
    """Both are compared, and the fast one was not left for the plain one."""
    captured, expanded = [], []
    pop, expand = HiddenStateCapture.pop, LateExpansion.expand_copies
    monkeypatch.setattr(HiddenStateCapture, "pop", lambda self: (captured.append(pop(self)), captured[-1])[1])
    monkeypatch.setattr(
        LateExpansion, "expand_copies", lambda *args: (expanded.append(expand(*args)), expanded[-1])[1]
    )
    fast, fast_gradients = loss_and_gradients(model, batch)
    assert captured[0] is not None and any(inputs is not None for inputs in expanded) == expands_late
    monkeypatch.setattr(hidden_states, "plain_head", lambda model: None)
    monkeypatch.setattr(LateExpansion, "expand_copies", lambda *args: None)
    plain, plain_gradients = loss_and_gradients(model, batch)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert fast_gradients.keys() == plain_gradients.keys()
    for name, gradient in fast_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", sorted({*CAUSAL, *TRANSFORMED}))
@pytest.mark.parametrize("target", ["log_prob", "logits"])
def test_architectures(name, target, monkeypatch):
    model = absolute_model(name, num_samples=2, stability_loss_weight=0.2, stability_target=target)
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("sampling", ["pairs", "independent"])
def test_architectures_with_the_upper_layers_projected(name, sampling, monkeypatch):
    model = absolute_model(name, num_samples=4, sampling=sampling, layers_to_transform=list(range(1, NUM_LAYERS)))
    # Falcon's layers are given position biases.
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch, expands_late=name != "falcon")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_with_the_upper_ones_projected(use_reentrant, monkeypatch):
    model = absolute_model("llama", num_samples=2, layers_to_transform=[1, 2])
    plain, plain_gradients = loss_and_gradients(model, make_batch("llama"))
    checkpointed(model.get_base_model(), {"use_reentrant": use_reentrant})
    recomputed, gradients = loss_and_gradients(model, make_batch("llama"))
    assert torch.equal(plain.loss, recomputed.loss)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-5)


def test_lower_layers_run_on_one_copy_and_the_head_on_no_token():
    model = absolute_model("llama", num_samples=4, layers_to_transform=[2])
    seen = []
    base = model.get_base_model()
    for layer in base.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[:2])))
    forward = base.lm_head.forward
    base.lm_head.forward = lambda x: (seen.append(tuple(x.shape[:2])), forward(x))[1]
    dip_loss(model, make_batch("llama"))  # compares the logits of some tokens
    seen.clear()
    dip_loss(model, make_batch("llama"))
    assert seen == [(4, 10), (4, 10), (16, 10), (16, 0)]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads(tied, monkeypatch):
    base = build("llama")
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    model = absolute_model(base)
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch)


def test_noise_at_the_heads_own_input(monkeypatch):
    model = absolute_model("llama", target_modules=["lm_head"], num_samples=2)
    assert_equal_to_the_plain_path(model, make_batch("llama"), monkeypatch)


def test_autocast(monkeypatch):
    model, batch = absolute_model("llama", num_samples=2), make_batch("llama")
    dtypes = []
    output_head = hidden_states.output_head
    monkeypatch.setattr(
        hidden_states, "output_head", lambda *args: (dtypes.append(output_head(*args).dtype), output_head(*args))[1]
    )
    with torch.autocast("cpu", torch.bfloat16):
        fast, fast_gradients = loss_and_gradients(model, batch)
        monkeypatch.setattr(hidden_states, "plain_head", lambda model: None)
        plain, plain_gradients = loss_and_gradients(model, batch)
    assert dtypes == [torch.bfloat16]
    torch.testing.assert_close(fast.loss, plain.loss, atol=2e-2, rtol=2e-2)
    ours, theirs = (
        torch.cat([gradients[name].flatten() for name in plain_gradients])
        for gradients in (fast_gradients, plain_gradients)
    )
    assert ours.dtype == torch.float32 and (ours - theirs).norm() < 3e-2 * theirs.norm()


def test_other_logits_are_left_whole_and_a_warning_says_so():
    base = build("llama")
    forward = base.forward

    def cubed(*args, labels=None, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits**3
        if labels is not None:
            output.loss = base.loss_function(logits=output.logits, labels=labels, vocab_size=base.config.vocab_size)
        return output

    base.forward = cubed
    model = absolute_model(base, init_noise_std=0.05)
    batch = make_batch("llama")
    with pytest.warns(UserWarning, match="logits of LlamaForCausalLM are not the plain output of its head"):
        first = dip_loss(model.train(), batch)
    with model.deterministic():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(dip_loss(model, batch).nll, expected)
    assert first.loss.requires_grad


def padded_vocabulary(logits):
    logits[..., -3:] = float("-inf")
    return logits


def finite_mask(logits):
    logits[..., -3:] = torch.finfo(logits.dtype).min
    return logits


@pytest.mark.parametrize("change", [padded_vocabulary, finite_mask, lambda logits: logits.mul_(1.015)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_and_rescaled_logits_are_noticed(change, dtype):
    base = build("llama").to(dtype)
    forward = base.forward
    base.forward = lambda *args, **kwargs: (out := forward(*args, **kwargs), change(out.logits))[0]
    model = absolute_model(base, init_noise_std=0.05)
    with pytest.warns(UserWarning, match="not the plain output of its head"):
        assert not model.hidden_state_capture.probe().logits_are_plain


def test_a_head_that_changes_is_probed_again():
    model, batch = absolute_model("llama"), make_batch("llama")
    dip_loss(model, batch)
    head = model.get_base_model().lm_head
    forward = head.forward
    head.forward = lambda x: 2 * forward(x)
    with pytest.warns(UserWarning, match="not the plain output of its head"):
        doubled = dip_loss(model, batch)
    with model.deterministic():
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        expected = nn.functional.cross_entropy(
            model(**inputs).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )
        assert dip_loss(model, batch).nll.item() == pytest.approx(expected.item(), rel=1e-5)
    assert doubled.loss.requires_grad


def test_a_head_that_is_called_twice_is_not_taken_for_one():
    base = build("llama")
    forward = base.forward
    base.forward = lambda *args, **kwargs: (forward(*args, **kwargs), base.lm_head(torch.ones(1, 2, 32)))[0]
    model = absolute_model(base, init_noise_std=0.05)
    with pytest.warns(UserWarning, match="not the plain output of its head"):
        dip_loss(model, make_batch("llama"))


def test_only_hidden_states_of_the_batch_are_captured():
    base = build("llama")
    capture = HiddenStateCapture(base, without_noise=contextlib.nullcontext)
    ids = torch.arange(12).view(2, 6)
    with capture.capturing(torch.Size([2, 5])):
        logits = base(input_ids=ids).logits
        assert capture.pop() is None and logits.shape == (2, 6, 64)
    with capture.capturing(torch.Size([2, 6])):
        logits = base(input_ids=ids).logits
        hidden, head = capture.pop()
    assert hidden.shape == (2, 6, 32) and logits.shape == (2, 0, 64)
    assert torch.equal(head.logits(hidden), base(input_ids=ids).logits)


def test_a_second_use_of_the_head_in_one_pass_is_left_alone():
    """As by a part of the model that did not run when the model was probed."""
    base = build("llama")
    capture = HiddenStateCapture(base, without_noise=contextlib.nullcontext)
    assert capture.probe().logits_are_plain
    ids, others = torch.arange(12).view(2, 6), torch.randn(2, 6, 32)
    with capture.capturing(torch.Size([2, 6])):
        base(input_ids=ids)
        second = base.lm_head(others)
        hidden, head = capture.pop()
    assert torch.equal(second, base.lm_head(others))
    assert torch.equal(head.logits(hidden), base(input_ids=ids).logits)


def test_an_adapter_on_the_head_is_not_bypassed(monkeypatch):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = absolute_model("llama", weights=lora)
    assert plain_head(model.get_base_model()) is None
    result, gradients = loss_and_gradients(model, make_batch("llama"))
    assert any("lm_head.lora_B" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())


def test_the_probe_leaves_the_random_state_alone():
    base = build("gpt2")
    base.transformer.drop.p = 0.5
    model = absolute_model(base, init_noise_std=0.05)
    batch = make_batch("llama")
    torch.manual_seed(3)
    first = dip_loss(model, batch).loss
    torch.manual_seed(3)
    assert torch.equal(dip_loss(model, batch).loss, first)


def test_a_small_penalty_in_the_models_loss_is_noticed():
    base = build("llama")
    capture = HiddenStateCapture(base, without_noise=contextlib.nullcontext)
    assert capture.probe().loss_is_plain
    plain = base.loss_function
    base.loss_function = lambda logits, **kwargs: plain(logits, **kwargs) + 1e-4 * logits.logsumexp(-1).square().mean()
    assert not capture.probe().loss_is_plain

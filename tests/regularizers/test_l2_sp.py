"""Decay towards the start against AdamW's, autograd and the norm of the product that is never built."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dipnet_hf.regularizers import L2SP
from tests.helpers import assert_resumes, collate, dip_model, make_rows
from tests.tiny_models import build


def lora_model(**config):
    torch.manual_seed(0)
    return get_peft_model(build("llama"), LoraConfig(**{"r": 4, "target_modules": "all-linear", **config}))


def moved(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def effective(model):
    """The weights of all layers as they act, by name."""
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return dict(merged.named_parameters())


def test_the_gradient_is_that_of_the_distance():
    model, batch = build("llama"), collate(list(make_rows())[:2])
    method = L2SP(weight=0.3)
    method.attach(model)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    moved(model)
    method.backward(model, batch)
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(**batch).loss.backward()
    for parameter, gradient, w0 in zip(model.parameters(), found, start, strict=True):
        torch.testing.assert_close(gradient, parameter.grad + 0.3 * (parameter - w0))


@pytest.mark.parametrize("init", [True, False, "pissa"])
def test_of_lora_it_is_the_distance_of_the_layers_weights(init):
    """Also where the start is not zero, or was taken out of the weight."""
    method = L2SP()
    method.attach(model := lora_model(init_lora_weights=init, use_rslora=True))
    start = effective(lora_model(init_lora_weights=init, use_rslora=True))
    torch.testing.assert_close(method.squared_distance(), torch.zeros(()), atol=1e-4, rtol=0)
    moved(model)
    found = method.squared_distance()
    distance = sum((weight - start[name]).square().sum() for name, weight in effective(model).items())
    torch.testing.assert_close(found, distance, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_lora_is_that_of_the_product():
    model = lora_model(target_modules=["q_proj"], layers_to_transform=[0]).double()
    method = L2SP()
    method.attach(model)
    moved(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(method.squared_distance(), parameters)
    A, B = parameters
    scaling = 8 / 4
    expected = torch.autograd.grad((scaling * B @ A).square().sum(), parameters)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_what_is_trained_beside_lora_counts_and_noise_does_not():
    model = dip_model(weights=LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]))
    method = L2SP()
    method.attach(model)
    for name, parameter in model.named_parameters():
        if "dip_logvar" in name or "lm_head.modules_to_save" in name:
            parameter.data += 1.0
    torch.testing.assert_close(method.squared_distance(), torch.tensor(64 * 32.0))


def test_decoupled_from_zero_is_the_decay_of_adamw():
    """To the bit, with a learning rate for each group of parameters."""
    trained = []
    for weight_decay in (0.0, 0.1):
        model, batch = build("llama"), collate(list(make_rows())[:2])
        groups = [{"params": [p for p in model.parameters() if p.dim() == d], "lr": 10.0**-d} for d in (1, 2)]
        optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
        if not weight_decay:
            method = L2SP(weight=0.1, decoupled=True)
            method.attach(model, optimizer)
            method.load_state_dict({name: torch.zeros_like(start) for name, start in method.state_dict().items()})
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        trained.append(model)
    for parameter, other in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.equal(parameter, other)


def test_decoupled_moves_towards_the_start_alone():
    """w - w0 shrinks by 1 - lr * weight; there is no term in the loss."""
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = L2SP(weight=0.4, decoupled=True)
    method.attach(model, optimizer)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    before = [parameter - w0 for parameter, w0 in zip(moved(model).parameters(), start, strict=True)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, w0, distance in zip(model.parameters(), start, before, strict=True):
        torch.testing.assert_close(parameter - w0, 0.8 * distance)
    batch = collate(list(make_rows())[:2])
    assert method.backward(model, batch) == pytest.approx(model(**batch).loss.item())


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_resumed_run_goes_on_as_if_uninterrupted(tmp_path, decoupled):
    """Its start is the first one, even if it begins with another model."""
    models = iter([build("llama"), moved(build("llama"))])
    assert_resumes(lambda: next(models), lambda: L2SP(weight=1.0, decoupled=decoupled), tmp_path)


def test_decoupled_needs_the_optimizer():
    method = L2SP(decoupled=True)
    method.attach(model := build("llama"))
    with pytest.raises(ValueError, match=r"L2SP acts at the steps of the optimizer: attach\(model, optimizer\)"):
        method.backward(model, collate(list(make_rows())[:2]))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {"decoupled": True}, "decoupled of L2SP .* LoRA have none.* Use decoupled=False"),
        (
            {"use_dora": True},
            {},
            "L2SP knows plain LoRA of linear layers, and that of .* \\(Linear\\) .* use_dora off",
        ),
        ({"target_modules": ["embed_tokens"]}, {}, r"that of .*embed_tokens \(Embedding\) is of another kind"),
    ],
    ids=str,
)
def test_other_kinds_of_lora_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        L2SP(**settings).attach(lora_model(**config))


@pytest.mark.parametrize("weight", [0.0, float("nan"), -1.0])
def test_bad_settings_are_refused(weight):
    with pytest.raises(ValueError, match="weight of L2SP must be positive, got"):
        L2SP(weight=weight)

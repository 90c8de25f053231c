"""Largest singular values against the decomposition of the matrices that layers act with."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from dipnet_hf.regularizers.power_iteration import SpectralNorms
from tests.helpers import dip_model
from tests.tiny_models import build

# The matrices of a model's parameters.
MATRICES = {
    "llama": lambda model: [p for p in model.parameters() if p.dim() > 1],
    "gpt2": lambda model: [p for p in model.parameters() if p.dim() > 1],
    "mixtral": lambda model: [W for p in model.parameters() if p.dim() > 1 for W in p.reshape(-1, *p.shape[-2:])],
    "resnet": lambda model: [p.flatten(1) for p in model.parameters() if p.dim() > 1],
}


def largest(matrices):
    return torch.stack([torch.linalg.svdvals(matrix.detach())[0] for matrix in matrices])


@pytest.mark.parametrize("name", MATRICES)
def test_of_full_weights_they_are_the_singular_values(name):
    model = build(name)
    norms = SpectralNorms(model, "It")
    norms.iterate(200)
    torch.testing.assert_close(norms.values().detach(), largest(MATRICES[name](model)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_lora_they_are_those_of_the_sum(name):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    model = get_peft_model(build(name), config)
    norms = SpectralNorms(model, "It")
    norms.iterate(200)
    found = norms.values().detach()
    merged = dict(model.merge_and_unload().named_parameters())
    expected = [merged[f"{key.removeprefix('base_model.model.')}.weight"] for key in norms.state_dict()]
    torch.testing.assert_close(found, largest(expected), rtol=1e-3, atol=1e-4)


def test_what_is_trained_beside_lora_and_noise_counts():
    model = dip_model(weights=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    names = list(SpectralNorms(model, "It").state_dict())
    assert [name.rpartition("layers.")[2] for name in names if "q_proj" in name] == [
        f"{i}.self_attn.q_proj" for i in range(3)
    ]
    assert sum("lm_head.modules_to_save" in name for name in names) == 1
    assert len(names) == 4


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_gradient_is_that_of_the_singular_value(with_lora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    if with_lora:
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    norms = SpectralNorms(model, "It")
    norms.iterate(500)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(norms.values().sum(), parameters)
    if with_lora:
        A, B = parameters
        matrix = model.base_model.model[0].base_layer.weight + 8 / 2 * B @ A
    else:
        (matrix,) = parameters
    expected = torch.autograd.grad(torch.linalg.matrix_norm(matrix, 2), parameters)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)


def test_it_goes_on_from_the_vectors_that_it_has():
    """One step after a small change of weights is far nearer than one step from a random vector; state is exact."""
    model = build("llama")
    norms = SpectralNorms(model, "It")
    norms.iterate(200)
    for parameter in model.parameters():
        parameter.data += 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    norms.iterate(1)
    exact = largest(MATRICES["llama"](model))
    torch.testing.assert_close(norms.values().detach(), exact, rtol=1e-3, atol=1e-4)
    other = SpectralNorms(model, "It")
    assert not torch.equal(other.values(), norms.values())
    other.load_state_dict(norms.state_dict())
    assert torch.equal(other.values(), norms.values())


def test_half_precision_is_left():
    model = build("llama").bfloat16()
    norms = SpectralNorms(model, "It")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms.iterate(200)
        found = norms.values().detach()
    expected = largest([matrix.float() for matrix in MATRICES["llama"](model)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_matrix_of_zeros_has_the_gradient_zero_until_it_is_none():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(layer.weight)
    norms = SpectralNorms(layer, "It")
    norms.values().sum().backward()
    assert norms.values().item() == 0 and layer.weight.grad.abs().max() == 0
    nn.init.normal_(layer.weight)
    norms.iterate(100)
    torch.testing.assert_close(norms.values().detach(), largest([layer.weight]))


def test_other_adapters_are_refused():
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"It knows full weights and LoRA, and .*k_proj has .* another kind \(ia3\)"):
        SpectralNorms(get_peft_model(build("llama"), config), "It")


def test_a_model_without_matrices_that_learn_is_refused():
    with pytest.raises(ValueError, match="It has nothing to act on: no weight matrix of LlamaForCausalLM learns"):
        SpectralNorms(build("llama").requires_grad_(False), "It")


def test_quantized_weights_are_refused():
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    layer.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"that of .*layers\.1\.self_attn\.q_proj is quantized .* 16 or 32 bits"):
        SpectralNorms(model, "It")

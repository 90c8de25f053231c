"""Dropout at the layers' inputs: its statistics, what shares a mask, and the ensemble against masks in the open."""

from statistics import NormalDist

import pytest
import torch
from torch import nn

from dipnet_hf.architecture import decoder_layers
from dipnet_hf.noise import fold_in
from dipnet_hf.regularizers import LayerDropout
from tests.helpers import record
from tests.tiny_models import build, make_batch


def factors(kind, p, name="llama", layers=None):
    """What the input of every layer is multiplied by in training: `(L, B, T, D)`; layers only add to their input."""
    model = build(name).train()
    for _, layer in decoder_layers(model):
        layer.forward = lambda hidden_states, **kwargs: hidden_states
    model.get_input_embeddings().weight.data.fill_(1.0)
    LayerDropout(p, kind, layers).attach(model)
    seen = record(model, [name for name, _ in decoder_layers(model)])
    torch.manual_seed(0)
    with torch.no_grad():
        model(input_ids=torch.ones(40, 50, dtype=torch.long))
    return torch.stack([inputs[0] for inputs in seen.values()])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_bernoulli_factors_are_zero_with_probability_p_and_of_mean_one(p):
    first = factors("bernoulli", p)[0]
    n = first.numel()
    assert sorted(first.unique().tolist()) == pytest.approx([0.0, 1 / (1 - p)])
    assert abs((first == 0).float().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert abs(first.mean() - 1) < 5 * (p / (1 - p) / n) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_gaussian_factors_have_mean_one_and_the_variance_of_dropout(p):
    first = factors("gaussian", p)[0].double()
    n, variance = first.numel(), p / (1 - p)
    assert abs(first.mean() - 1) < 5 * (variance / n) ** 0.5
    assert abs(first.var() - variance) < 5 * variance * (2 / n) ** 0.5
    kurtosis = ((first - first.mean()) ** 4).mean() / first.var() ** 2
    assert abs(kurtosis - 3) < 5 * (24 / n) ** 0.5


def test_each_token_and_layer_has_its_own_factors_in_training():
    first, second, _ = factors("gaussian", 0.5)
    assert not torch.equal(first[0, 0], first[0, 1]) and not torch.equal(first[0, 0], first[1, 0])
    assert abs(torch.corrcoef(torch.stack([first.flatten(), (second / first).flatten().clamp(-9, 9)]))[0, 1]) < 0.1


def test_layers_are_chosen_by_number():
    first, second, third = factors("bernoulli", 0.5, layers=[1])
    assert (first == 1).all() and torch.equal(second, third) and (second == 0).any()


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
@torch.no_grad()
def test_a_sample_of_the_ensemble_has_one_mask_per_layer_for_all_tokens(kind):
    """Against hooks that multiply in the open, by noise from a generator of its own for (seed, layer, sample)."""
    batch, p, samples = {"input_ids": make_batch("llama")["input_ids"]}, 0.2, []
    for sample in range(3):
        model = build("llama")
        for number, (_, layer) in enumerate(decoder_layers(model)):
            key = fold_in(fold_in(torch.tensor(7), number), sample)
            noise = torch.randn(32, generator=torch.Generator().manual_seed(int(key)))
            if kind == "bernoulli":
                factor = (noise > NormalDist().inv_cdf(p)) / (1 - p)
            else:
                factor = 1 + (p / (1 - p)) ** 0.5 * noise
            layer.register_forward_pre_hook(lambda module, args, factor=factor: (args[0] * factor, *args[1:]))
        samples.append(model(**batch).logits)
    model, method = build("llama"), LayerDropout(p, kind)
    method.attach(model)
    with method.ensemble_samples(3, seed=7):
        found = model(**batch).logits
    torch.testing.assert_close(found, torch.stack(samples), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_the_mean_of_many_samples_of_a_linear_network_is_the_network_without_noise(kind):
    model = build("llama", num_layers=1)
    for _, layer in decoder_layers(model):
        layer.forward = lambda hidden_states, **kwargs: hidden_states
    model.model.norm = nn.Identity()
    method, batch = LayerDropout(0.5, kind), make_batch("llama")
    method.attach(model)
    with torch.no_grad(), method.ensemble_samples(400):
        samples = model(input_ids=batch["input_ids"]).logits
        mean, error = samples.mean(0), samples.std(0) / 400**0.5
    plain = model(input_ids=batch["input_ids"]).logits
    assert ((mean - plain).abs() <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
def test_gradients_are_those_of_the_same_masks(kind):
    """Against finite differences in float64: the masks are repeated by the seed."""
    model = build("llama", num_layers=2, hidden_size=8).double().train()
    for _, layer in decoder_layers(model):
        layer.forward = lambda hidden_states, **kwargs: hidden_states.sin()
    model.model.norm = nn.Identity()  # which would compute in float32
    LayerDropout(0.3, kind).attach(model)
    embeds = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)

    def run(inputs_embeds):
        torch.manual_seed(0)
        return model(inputs_embeds=inputs_embeds).logits

    assert torch.autograd.gradcheck(run, embeds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 0.0}, "p of LayerDropout must be between 0 and 1, got 0.0"),
        ({"p": 1.0}, "p of LayerDropout must be between 0 and 1, got 1.0"),
        ({"kind": "normal"}, "kind of LayerDropout must be one of bernoulli, gaussian, got 'normal'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LayerDropout(**settings)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="names layer 3, and the model has layers 0 to 2"):
        LayerDropout(layers_to_transform=[0, 3]).attach(build("llama"))

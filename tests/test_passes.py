"""Fresh noise: new in every row, token, channel, site and forward pass, or the same again by a seed."""

import pytest
import torch

from dipnet_hf.batches import expand_batch
from tests.helpers import calibrated_model, dip_model, logits, projections
from tests.tiny_models import NUM_LAYERS, build, make_batch


def correlation(a, b):
    """The mean product of two standard normal tensors, in standard errors."""
    return ((a * b).mean() * a.numel() ** 0.5).abs()


def eps_by_site(model, batch, seed=0):
    """The standard normal noise of one forward, by site: what a projection adds, in units of its std."""
    eps = {}

    def keep(projection, args, output):
        eps[projection.site.name] = (output - args[0]) / (projection.scale * torch.exp(projection.logvar / 2))

    hooks = [projection.register_forward_hook(keep) for projection in projections(model).values()]
    logits(model, batch, seed=seed)
    for hook in hooks:
        hook.remove()
    return eps


def test_noise_is_fresh_everywhere():
    batch = {name: tensor[:1].repeat(8, 1) for name, tensor in make_batch("llama").items()}  # eight rows alike
    model = calibrated_model()
    eps = eps_by_site(model, batch)
    assert len(eps) == NUM_LAYERS
    first, second, third = eps.values()
    assert max(correlation(first, second), correlation(second, third), correlation(first, third)) < 5
    for eps_BLD in eps.values():
        assert abs(eps_BLD.std().item() - 1) < 5 * (2 * eps_BLD.numel()) ** -0.5
        assert correlation(eps_BLD[1:], eps_BLD[:-1]) < 5  # rows
        assert correlation(eps_BLD[:, 1:], eps_BLD[:, :-1]) < 5  # tokens
        assert correlation(eps_BLD[..., 1:], eps_BLD[..., :-1]) < 5  # channels
    with model.sampling(seed=0):
        again = [eps_by_site(model, batch, seed=None) for _ in range(2)]
    assert correlation(again[0]["model.layers.0"], again[1]["model.layers.0"]) < 5  # successive forwards


def test_sampling_with_a_seed_repeats():
    model = calibrated_model()
    with model.sampling(seed=0):
        first = [logits(model) for _ in range(3)]
    torch.manual_seed(5)
    with model.train().sampling(seed=0):
        again = [logits(model) for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], logits(model.eval(), seed=1))
    assert torch.equal(logits(model), logits(build("llama")))  # the context is over


def test_sampling_without_a_seed_follows_the_global_generator():
    model = calibrated_model()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        with model.sampling():
            drawn.append((logits(model), logits(model)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(*drawn[0])


def test_contexts_nest_and_end_with_an_error():
    model = calibrated_model()
    plain = logits(model)
    with model.sampling(seed=0):
        noisy = logits(model)
        with model.deterministic():
            assert torch.equal(logits(model), plain)
        assert not torch.equal(logits(model), plain)
    with pytest.raises(KeyError, match="stop"), model.sampling(seed=0):
        assert torch.equal(logits(model), noisy)
        raise KeyError("stop")
    assert torch.equal(logits(model), plain)
    model.train()  # its draws follow the global generator again
    torch.manual_seed(5)
    noisy = logits(model)
    torch.manual_seed(5)
    assert torch.equal(logits(model), noisy)


def test_generation(batch):
    prompt = {"input_ids": batch["input_ids"][:, :4], "attention_mask": batch["attention_mask"][:, :4]}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = calibrated_model(init_noise_std=1.0)
    plain = build("llama").generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), plain)
    drawn = []
    for seed in (0, 0, 1):
        with model.sampling(seed):
            drawn.append(model.generate(**prompt, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], plain) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(model.generate(**prompt, **options), plain)


def test_a_training_pass_that_failed_in_an_upper_layer_leaves_no_trace_in_the_next(batch):
    """Where copies of rows part at the upper layers, a pass that failed there was one of repeated rows."""
    model = dip_model(noise_scale="absolute", num_samples=2, layers_to_transform=[1, 2]).train()
    plain = logits(build("llama"), batch)

    def fail(module, args, output):
        raise MemoryError("the layer is too large")

    with model.sampled_rows():
        hook = model.get_base_model().model.layers[1].register_forward_hook(fail)
        with pytest.raises(MemoryError, match="the layer is too large"):
            model(**expand_batch(batch, 2))
        hook.remove()
        with model.deterministic():
            assert torch.equal(logits(model, batch), plain)


def test_an_adapter_that_is_set_within_a_training_pass_is_a_reference(batch):
    model = dip_model(weights="frozen", noise_scale="absolute").train()
    model.add_adapter("reference", model.peft_config["default"])
    plain = logits(build("llama"), batch)
    with model.sampled_rows():
        assert not torch.equal(logits(model, batch), plain)
        model.set_adapter("reference")
        assert torch.equal(logits(model, batch), plain)
        model.set_adapter("default")
        assert not torch.equal(logits(model, batch), plain)
    model.set_adapter("reference")
    assert not torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize("target_sites", ["decoder_layer", "attention", "linear"])
def test_rows_that_are_compared_share_their_noise(batch, target_sites):
    model = dip_model(noise_scale="absolute", target_sites=target_sites).train()
    rows = {name: tensor[:1].repeat(4, 1) for name, tensor in batch.items()}
    with model.sampled_rows(num_compared=2):
        first, second = logits(model, rows).chunk(2)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(first[0], first[1], atol=1e-3)

"""The ensemble against a slow reference, and what must not matter to it: cache, batch, padding, the other samples."""

import contextlib
import copy
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)

from dipnet_hf import DipConfig, get_dip_model, noise, predict
from dipnet_hf.architecture import decoder_layers
from dipnet_hf.noise import BLOCK_LENGTH, PositionNoise
from tests.helpers import dip_model, noise_by_definition, projections
from tests.tiny_models import CAUSAL, NUM_LAYERS, VOCAB_SIZE, build, make_batch

SITES = {
    "all layers": {},
    "upper layers": {"layers_to_transform": [1, 2]},
    "attention": {"target_sites": "attention"},
    "upper linears": {"target_sites": "linear", "layers_to_transform": [2]},
    "embedding": {"target_sites": "embedding"},
    "one variance a layer": {"granularity": "layer"},
}
TOLERANCE = 2e-6


def model_and_prompts(name="llama", init_noise_std=0.5, **config):
    """A model whose channels have different variances, and four prompts of seven tokens."""
    config = {"weights": "frozen", "init_noise_std": init_noise_std} | config
    model = dip_model(name, [make_batch(name)], **config)
    generator = torch.Generator().manual_seed(1)
    for logvar in model.logvars():
        logvar.data += torch.rand(logvar.shape, generator=generator)
    return model.eval(), make_batch(name)["input_ids"][:, :7].clamp(min=3)


@contextlib.contextmanager
def one_sample(model, seed, sample):
    """Noise added in the open, token by token, for one sample; positions count from zero."""

    def add(x, number, projection):
        noise = torch.stack([noise_by_definition(seed, number, sample, t, x.shape[-1]) for t in range(x.shape[-2])])
        return x + projection.scale * torch.exp(projection.logvar / 2) * noise

    def hook_for(number, projection):
        if projection.site.at_output:
            return lambda module, args, output: add(output, number, projection)

        def hook(module, args, kwargs):
            if args:
                return (add(args[0], number, projection), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": add(kwargs["hidden_states"], number, projection)}

        return hook

    handles = []
    for number, (name, projection) in enumerate(projections(model).items()):
        module, hook = model.get_base_model().get_submodule(name), hook_for(number, projection)
        handles.append(
            module.register_forward_hook(hook)
            if projection.site.at_output
            else module.register_forward_pre_hook(hook, with_kwargs=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slow_samples(model, inputs, num_samples, seed):
    """The logits of the samples, one noisy pass a sample and row, of shape `(S, B, L, V)`."""
    samples = []
    for sample in range(num_samples):
        with one_sample(model, seed, sample):
            samples.append(torch.cat([model(input_ids=row[None]).logits for row in inputs]))
    return torch.stack(samples)


# ---- the same numbers as the reference ----


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_the_mean_is_that_of_separate_passes(name, sites):
    model, input_ids = model_and_prompts(name, **SITES[sites])
    samples = slow_samples(model, input_ids, num_samples=3, seed=5)
    expected = {"prob": samples.softmax(-1).mean(0).log(), "logit": samples.mean(0)}
    expected["prob"] += samples.logsumexp(-1, keepdim=True).mean(0)  # on the level of the samples
    for average, logits in expected.items():
        with model.ensemble(num_samples=3, average=average, seed=5):
            torch.testing.assert_close(model(input_ids=input_ids).logits, logits, atol=5e-6, rtol=1e-5)
    assert (expected["prob"] - model(input_ids=input_ids).logits).abs().max() > 0.02


def test_gradients_are_those_of_separate_passes():
    model, input_ids = model_and_prompts(weights="full")
    targets = input_ids[:, 1:].flatten()
    samples = slow_samples(model, input_ids, num_samples=2, seed=0)
    F.nll_loss(samples.softmax(-1).mean(0).log()[:, :-1].flatten(0, 1), targets).backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: p.grad.clone() for name, p in learning.items()}
    model.zero_grad()
    with model.ensemble(num_samples=2):
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    for name, parameter in learning.items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_the_loss_is_that_of_the_mean(batch):
    model, _ = model_and_prompts()
    with model.ensemble(4):
        output = model(**batch)
        loss, logits, *_ = model(**batch, return_dict=False)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


@pytest.mark.parametrize(
    ("name", "config"), [("vit", {}), ("resnet", {"target_modules": r".*stages.*layer\.0\.convolution"})]
)
@torch.no_grad()
def test_images_have_one_noise_an_example(name, config):
    model = get_dip_model(
        build(name), DipConfig(**{"weights": "frozen", "init_noise_std": 0.5} | config), calibration=[make_batch(name)]
    ).eval()
    images = make_batch(name)["pixel_values"]
    with model.ensemble(3, average="logit"):
        logits = model(pixel_values=images).logits
        rows = torch.cat([model(pixel_values=image[None]).logits for image in images])
    torch.testing.assert_close(logits, rows)
    singles = []
    for k in (1, 2, 3):
        with model.ensemble(k, average="logit"):
            singles.append(k * model(pixel_values=images).logits)
    torch.testing.assert_close(logits, (singles[1] + (singles[2] - singles[1])) / 3)
    assert not torch.allclose(2 * singles[0], singles[1])


# ---- what must not matter ----


@pytest.mark.parametrize("sites", ["all layers", "upper layers"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_noise_depends_on_the_position_alone(name, sites):
    model, input_ids = model_and_prompts(name, **SITES[sites])
    padding = torch.zeros(4, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(input_ids)], dim=1)
    padded = {"input_ids": torch.cat([padding, input_ids], dim=1), "attention_mask": mask}
    if name not in ("falcon", "opt"):  # whose positions come from the mask
        padded["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with model.ensemble(3, seed=2):
        whole = model(input_ids=input_ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in input_ids])
        left_padded = model(**padded).logits[:, 3:]
        first = model(input_ids=input_ids[:, :4], use_cache=True)
        cached = [first.logits]
        for t in range(4, 7):
            step = model(input_ids=input_ids[:, t : t + 1], past_key_values=first.past_key_values)
            cached.append(step.logits)
        torch.testing.assert_close(alone, whole, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(left_padded, whole, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(torch.cat(cached, dim=1), whole, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("sites", ["all layers", "upper layers", "embedding"])
@torch.no_grad()
def test_generation_does_not_depend_on_cache_batch_padding_or_chunks(sites):
    model, input_ids = model_and_prompts(**SITES[sites])
    prompts = [input_ids[0, :3], input_ids[1, :7], input_ids[2, :5]]
    padded = torch.stack([F.pad(prompt, (7 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (7 - len(prompt), 0)) for prompt in prompts])
    settings = {"max_new_tokens": BLOCK_LENGTH + 2, "min_new_tokens": BLOCK_LENGTH + 2, "do_sample": False}
    with model.ensemble(4):
        alone = [model.generate(input_ids=prompt[None], **settings)[0, len(prompt) :] for prompt in prompts]
        for change in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"past_key_values": DynamicCache()}):
            generated = model.generate(input_ids=padded, attention_mask=mask, **settings, **change)
            assert torch.equal(generated[:, 7:], torch.stack(alone)), change
    assert len({tuple(answer.tolist()) for answer in alone}) == 3


@torch.no_grad()
def test_generation_with_streamer_scores_sequences_and_embeddings(capsys):
    model, input_ids = model_and_prompts()

    class Numbers:
        def decode(self, token_ids, **kwargs):
            return " ".join(map(str, torch.as_tensor(token_ids).tolist())) + " "

    settings = {"max_new_tokens": 5, "do_sample": False}
    with model.ensemble(3):
        expected = model.generate(input_ids=input_ids, **settings)
        model.generate(input_ids=input_ids[:1], streamer=TextStreamer(Numbers()), **settings)
        embeds = model.generate(inputs_embeds=model.get_input_embeddings()(input_ids), **settings)
        scores = model.generate(
            input_ids=input_ids, return_dict_in_generate=True, output_logits=True, **settings
        ).logits
        torch.manual_seed(0)
        several = model.generate(input_ids=input_ids, max_new_tokens=5, do_sample=True, num_return_sequences=2)
        whole = model(input_ids=expected[:, :-1]).logits[:, 6:]
    assert capsys.readouterr().out.split() == [str(token) for token in expected[0].tolist()]
    assert torch.equal(embeds, expected[:, 7:])
    torch.testing.assert_close(torch.stack(scores, dim=1), whole, atol=TOLERANCE, rtol=TOLERANCE)
    assert several.shape == (8, 12) and not torch.equal(several[0], several[1])


@pytest.mark.parametrize("do_sample", [False, True])
def test_one_sample_without_variance_is_plain_generation(do_sample):
    model, input_ids = model_and_prompts(weights=LoraConfig(r=2, target_modules="all-linear"))
    for logvar in model.logvars():
        logvar.data.fill_(-torch.inf)
    torch.manual_seed(0)
    expected = model.generate(input_ids=input_ids, max_new_tokens=20, do_sample=do_sample)
    torch.manual_seed(0)
    with model.ensemble(num_samples=1):
        assert torch.equal(model.generate(input_ids=input_ids, max_new_tokens=20, do_sample=do_sample), expected)


@pytest.mark.parametrize("average", ["prob", "logit"])
def test_without_variance_a_repetition_penalty_acts_as_on_the_plain_model(average):
    """It depends on the level of the logits, which log-probabilities do not have."""
    model, input_ids = model_and_prompts()
    for logvar in model.logvars():
        logvar.data.fill_(-torch.inf)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    unpenalized = model.generate(input_ids=input_ids, **settings)
    for penalty in (0.8, 1.3):
        expected = model.generate(input_ids=input_ids, repetition_penalty=penalty, **settings)
        with model.ensemble(3, average=average):
            generated = model.generate(input_ids=input_ids, repetition_penalty=penalty, **settings)
        assert torch.equal(generated, expected) and not torch.equal(generated, unpenalized)


def test_the_seed_chooses_the_networks_and_the_global_generators_are_left_alone():
    model, input_ids = model_and_prompts()
    state = torch.get_rng_state()

    def logits(**settings):
        with torch.no_grad(), model.ensemble(2, **settings):
            return model(input_ids=input_ids).logits

    assert torch.equal(logits(seed=1), logits(seed=1))
    assert not torch.allclose(logits(seed=0), logits(seed=1))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_bfloat16_keeps_its_dtype_and_is_near_float32():
    model, input_ids = model_and_prompts()
    with model.ensemble(4):
        expected = model(input_ids=input_ids).logits
        logits = model.to(torch.bfloat16)(input_ids=input_ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.02)


@torch.no_grad()
def test_a_changed_variance_is_seen_within_the_ensemble():
    model, input_ids = model_and_prompts()
    with model.ensemble(2):
        before = model(input_ids=input_ids).logits
        for logvar in model.logvars():
            logvar.add_(1.0)
        after = model(input_ids=input_ids).logits
    with model.ensemble(2):
        assert torch.equal(model(input_ids=input_ids).logits, after)
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_a_site_that_sees_all_rows_as_one_has_each_tokens_noise():
    model, input_ids = model_and_prompts("mixtral", target_modules=["gate"])
    seen = []
    gate = model.get_base_model().get_submodule(next(iter(projections(model))))
    gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with model.ensemble(2):
        logits = model(input_ids=input_ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in input_ids])
    assert seen[0] == (2 * 4 * 7, 32)
    torch.testing.assert_close(logits, alone, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(logits, model(input_ids=input_ids).logits)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
@torch.no_grad()
def test_layers_with_inputs_of_their_own_are_right_too(name):
    model, input_ids = model_and_prompts(name, layers_to_transform=[2])
    with model.ensemble(3):
        logits = model(input_ids=input_ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in input_ids])
    torch.testing.assert_close(logits, alone, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(
        logits.softmax(-1), slow_samples(model, input_ids, 3, seed=0).softmax(-1).mean(0), atol=5e-6, rtol=1e-5
    )


def test_noise_drawn_in_inference_mode_may_meet_gradients():
    model, input_ids = model_and_prompts(weights="full")
    with model.ensemble(2):
        with torch.inference_mode():
            expected = model(input_ids=input_ids).logits
        logits = model(input_ids=input_ids).logits
        logits.sum().backward()
    assert torch.equal(logits, expected)


# ---- what it costs ----


@pytest.mark.parametrize(
    "name", [name for name in CAUSAL if name != "falcon"]
)  # whose layers may be given a bias of B * heads rows
@pytest.mark.parametrize("first", range(NUM_LAYERS))
def test_layers_below_the_first_site_run_once_a_prompt(name, first):
    model, input_ids = model_and_prompts(name, layers_to_transform=list(range(first, NUM_LAYERS)))
    rows = [[] for _ in range(NUM_LAYERS)]
    for seen, (_, layer) in zip(rows, decoder_layers(model.get_base_model()), strict=True):
        # The projection's own hook comes first, so this one sees what the layer is given in the end.
        layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
    with model.ensemble(num_samples=4):
        model.generate(input_ids=input_ids[:2], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    below = first if first > 0 else 0
    assert rows == [[2] * 3] * below + [[8] * 3] * (NUM_LAYERS - below)


def test_nothing_is_repeated_where_no_noise_is_drawn():
    model, input_ids = model_and_prompts()
    expected = model(input_ids=input_ids).logits
    with model.ensemble(num_samples=4):
        with model.deterministic():
            assert torch.equal(model(input_ids=input_ids).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=input_ids).logits, build("llama")(input_ids=input_ids).logits)


def test_afterwards_all_is_as_before():
    model, input_ids = model_and_prompts(layers_to_transform=[1, 2])
    expected = model.generate(input_ids=input_ids, max_new_tokens=3, do_sample=False)
    # PyTorch has no public list of a module's hooks.
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    attributes = set(vars(model.get_base_model()))
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), model.ensemble(num_samples=4):
            model(input_ids=input_ids)
            if error is not None:
                raise error
        assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        assert attributes == set(vars(model.get_base_model()))
    assert torch.equal(model.generate(input_ids=input_ids, max_new_tokens=3, do_sample=False), expected)


def test_a_generate_of_the_instance_is_called_within_and_is_back_afterwards():
    model, input_ids = model_and_prompts()
    base, calls = model.get_base_model(), []

    def own_generate(*args, **kwargs):
        calls.append(kwargs["max_new_tokens"])
        return type(base).generate(base, *args, **kwargs)

    base.generate = own_generate
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), model.ensemble(num_samples=2):
            model.generate(input_ids=input_ids, max_new_tokens=3, do_sample=False)
            if error is not None:
                raise error
        assert base.generate is own_generate
    assert calls == [3, 3]


def test_no_noise_is_kept_afterwards(monkeypatch):
    alive = weakref.WeakSet()

    class Watched(PositionNoise):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr(noise, "PositionNoise", Watched)
    model, input_ids = model_and_prompts()
    with torch.no_grad(), model.ensemble(num_samples=2):
        model(input_ids=input_ids)
        assert len(alive) == NUM_LAYERS
    assert not alive


def test_a_failed_forward_leaves_no_trace_in_the_next():
    model, input_ids = model_and_prompts()
    with model.ensemble(num_samples=2):
        expected = model(input_ids=input_ids[:2]).logits
        with pytest.raises(IndexError):
            model(input_ids=input_ids + VOCAB_SIZE)
        assert torch.equal(model(input_ids=input_ids[:2]).logits, expected)
        with model.deterministic(), pytest.raises(IndexError):
            model(input_ids=input_ids + VOCAB_SIZE)
        assert torch.equal(model(input_ids=input_ids[:2]).logits, expected)


@torch.no_grad()
def test_a_forward_that_failed_in_an_upper_layer_leaves_no_trace_in_the_next():
    """Where rows are repeated at the upper layers, a pass that failed there was one of repeated rows."""
    model, input_ids = model_and_prompts(layers_to_transform=[1, 2])
    plain = model(input_ids=input_ids).logits

    def fail(module, args, output):
        raise MemoryError("the layer is too large")

    with model.ensemble(num_samples=2):
        expected = model(input_ids=input_ids).logits
        for _ in range(2):
            hook = model.get_base_model().model.layers[1].register_forward_hook(fail)
            with pytest.raises(MemoryError, match="the layer is too large"):
                model(input_ids=input_ids)
            hook.remove()
            with model.deterministic():
                assert torch.equal(model(input_ids=input_ids).logits, plain)
            assert torch.equal(model(input_ids=input_ids).logits, expected)


# ---- predict ----


def test_predict_is_the_spread_of_the_samples(batch):
    model, input_ids = model_and_prompts()
    prediction = predict(model, {"input_ids": input_ids}, num_samples=3, seed=4)
    probs = slow_samples(model, input_ids, num_samples=3, seed=4).softmax(-1)
    mean = probs.mean(0)
    total, expected = -(mean * mean.log()).sum(-1), -(probs * probs.log()).sum(-1).mean(0)
    torch.testing.assert_close(prediction.log_probs, mean.log(), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(prediction.total_entropy, total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.expected_entropy, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.mutual_information, total - expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(prediction.variance, probs.var(0, correction=0).sum(-1), atol=1e-6, rtol=1e-4)
    assert not any(field.requires_grad for field in prediction)
    with model.ensemble(3, seed=4), pytest.raises(ValueError, match="This model is in an ensemble"):
        predict(model, batch, num_samples=2)


def test_one_sample_knows_no_disagreement(batch):
    model, _ = model_and_prompts()
    prediction = predict(model, batch, num_samples=1)
    assert prediction.mutual_information.abs().max() < 1e-6 and prediction.variance.abs().max() < 1e-6


# ---- bad input ----


def test_integers_of_numpy_are_integers():
    model, input_ids = model_and_prompts()
    with model.ensemble(3, seed=4):
        expected = model(input_ids=input_ids).logits
    with model.ensemble(np.int64(3), seed=np.int32(4)):
        assert torch.equal(model(input_ids=input_ids).logits, expected)


def test_a_cache_that_other_samples_filled_is_refused():
    model, input_ids = model_and_prompts()
    with torch.no_grad():
        with model.ensemble(2, seed=1):
            filled = model(input_ids=input_ids, use_cache=True)
            given = model(input_ids=input_ids, past_key_values=DynamicCache()).past_key_values
        plain = model(input_ids=input_ids, use_cache=True).past_key_values
        step = {"input_ids": input_ids[:, :1]}
        with model.ensemble(2, seed=1):  # the same samples
            again = model(**step, past_key_values=copy.deepcopy(filled.past_key_values)).logits
            assert torch.equal(model(**step, past_key_values=given).logits, again)
        message = "filled with seed=1, num_samples=2, and this ensemble has seed=0, num_samples=2"
        with model.ensemble(2), pytest.raises(ValueError, match=message):
            model(**step, past_key_values=filled.past_key_values)
        with model.ensemble(1), pytest.raises(ValueError, match="filled without an ensemble"):
            model(**step, past_key_values=plain)


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True, "8", None])
def test_the_number_of_samples_is_checked(num_samples):
    model, _ = model_and_prompts()
    with pytest.raises(ValueError, match=f"num_samples must be an integer of at least 1, got {num_samples!r}"):
        model.ensemble(num_samples).__enter__()


def test_a_model_that_was_merged_has_no_samples():
    model, input_ids = model_and_prompts()
    model.merge_and_unload()
    with pytest.raises(ValueError, match="A model that was merged or unloaded has none"):
        predict(model, {"input_ids": input_ids}, num_samples=2)
    with pytest.raises(ValueError, match="A model that was merged or unloaded has none"):
        model.ensemble(2).__enter__()


def test_what_has_no_ensemble_is_refused():
    model, input_ids = model_and_prompts()
    with pytest.raises(ValueError, match=r"average must be one of \['prob', 'logit'\], got 'mean'"):
        model.ensemble(2, average="mean").__enter__()
    with pytest.raises(ValueError, match="seed must be an integer, got None"):
        model.ensemble(2, seed=None).__enter__()
    with model.ensemble(2), pytest.raises(ValueError, match="This model is in an ensemble"):
        model.ensemble(2).__enter__()
    with pytest.raises(ValueError, match="from get_dip_model, got PeftModel"):
        predict(get_peft_model(build("llama"), LoraConfig(target_modules="all-linear")), {}, 2)
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="noise of a DIP adapter, and none is active"):
        model.ensemble(2).__enter__()
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8))
    t5 = get_dip_model(t5, DipConfig(weights="frozen", noise_scale="absolute", init_noise_std=0.05))
    with pytest.raises(ValueError, match=r"encoder-decoder.*model.sampling\(seed\)"):
        t5.ensemble(2).__enter__()
    uncalibrated = get_dip_model(build("llama"), DipConfig(weights="frozen"))
    with uncalibrated.ensemble(2), pytest.raises(ValueError, match="never calibrated"):
        uncalibrated(input_ids=input_ids)


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "dynamic"])
def test_scaled_rotary_positions_reach_past_the_configs_limit(rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    config = build("llama").config
    config.rope_parameters = rope
    base = AutoModelForCausalLM.from_config(config).eval()
    input_ids = torch.randint(3, VOCAB_SIZE, (1, 100), generator=torch.Generator().manual_seed(0))
    expected = base.generate(input_ids=input_ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    model = dip_model(base, noise_scale="absolute", init_noise_std=1e-6).eval()
    with model.ensemble(2):
        assert torch.equal(
            model.generate(input_ids=input_ids, max_new_tokens=3, min_new_tokens=3, do_sample=False), expected
        )


def test_what_would_draw_other_noise_is_refused(batch):
    model, input_ids = model_and_prompts()
    with torch.no_grad(), model.ensemble(2):
        model(input_ids=input_ids)
        with pytest.raises(RuntimeError, match="before the model's first forward pass began"):
            model.get_base_model().model(input_ids=input_ids)  # the trunk by itself
        with pytest.raises(ValueError, match="in an ensemble, whose seed decides its noise"):
            model.sampling(seed=1).__enter__()
        packed = {"input_ids": input_ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
        with pytest.raises(ValueError, match="not sequences packed by position_ids"):
            model(**packed)
        with pytest.raises(ValueError, match=r"the inputs \['input_ids', .*\] hold none"):
            model(input_ids=None)
    model.add_adapter(
        "upper", DipConfig(weights="frozen", layers_to_transform=[2], noise_scale="absolute", init_noise_std=0.05)
    )
    with model.ensemble(2), pytest.raises(ValueError, match="adapter was changed within an ensemble"):
        model.set_adapter("upper")
        model(input_ids=input_ids)
    mamba, input_ids = model_and_prompts("mamba")
    with mamba.ensemble(2), pytest.raises(ValueError, match="keeps cache_params, which tells no position"):
        mamba.generate(input_ids=input_ids, max_new_tokens=2)
    with mamba.ensemble(2):
        assert mamba.generate(input_ids=input_ids, max_new_tokens=2, use_cache=False).shape[0] == 4


def test_sites_that_see_cached_tokens_again_need_all_tokens_at_once():
    model, input_ids = model_and_prompts("deepseek_v3", target_sites="linear")
    settings = dict(max_new_tokens=3, do_sample=False)
    with model.ensemble(2), torch.no_grad():
        whole = model(input_ids=input_ids).logits
        assert torch.allclose(model(input_ids=input_ids[:, :-1]).logits, whole[:, :-1], atol=1e-5)
        with pytest.raises(ValueError, match="kv_b_proj' sees the cached tokens again.*generate with use_cache=False"):
            model.generate(input_ids=input_ids, **settings)
        cache = model(input_ids=input_ids[:, :-1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="kv_b_proj' sees the cached tokens again"):
            model(input_ids=input_ids[:, -1:], past_key_values=cache)
        tokens = model.generate(input_ids=input_ids, use_cache=False, **settings)
        assert torch.equal(tokens[:, input_ids.shape[1]], whole[:, -1].argmax(-1))


def test_inputs_that_cannot_be_repeated_are_refused(batch):
    model, input_ids = model_and_prompts()
    with model.ensemble(2):
        for call in (model, partial(model.generate, max_new_tokens=2)):
            with pytest.raises(ValueError, match=r"prompt is empty, of shape \(4, 0\).*bos"):
                call(input_ids=input_ids[:, :0])
            with pytest.raises(ValueError, match="prompt has 70 tokens, more than the 64 of the model's context"):
                call(input_ids=input_ids.repeat(1, 10))
        with pytest.raises(ValueError, match=r"padded batches, not sequences packed into one row \(cu_seq_lens_q\)"):
            model(input_ids=input_ids, cu_seq_lens_q=torch.tensor([0, 28]))
        with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 7\) does not have one for each of the 4"):
            model(input_ids=input_ids, attention_mask=torch.ones(3, 7))
        with model.deterministic():
            plain_cache = model(input_ids=input_ids).past_key_values
        with pytest.raises(ValueError, match="holds 4 rows, and 2 samples of 4 prompts need 8.*the same ensemble"):
            model(input_ids=input_ids[:, :1], past_key_values=plain_cache)
    vit = get_dip_model(build("vit"), DipConfig(weights="frozen", init_noise_std=0.1), calibration=[make_batch("vit")])
    with vit.ensemble(2), pytest.raises(ValueError, match="ViTForImageClassification takes no labels"):
        vit(**make_batch("vit"))

"""What holds for every method whose samples are networks: what must not matter to an ensemble, and what is refused."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from dipnet_hf.regularizers import METHODS, TFB, LayerDropout
from dipnet_hf.regularizers.samples import SampledRegularizer
from tests.helpers import checkpointed, dip_model
from tests.tiny_models import build, make_batch

TOLERANCE = 2e-6
# Every such method, and settings with which its samples differ clearly on a tiny model.
SETTINGS = {"blob": {"init_std": 0.2}, "layer_dropout": {"p": 0.3}, "tfb": {}}


def lora_model(name="llama"):
    """A model with LoRA that has learned something, in eval mode."""
    torch.manual_seed(0)
    # "all-linear" would reach into experts and routers.
    targets = ["q_proj", "v_proj"] if name == "mixtral" else "all-linear"
    model = get_peft_model(build(name), LoraConfig(r=4, target_modules=targets)).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.1)
    return model


@pytest.fixture(params=SETTINGS)
def method(request):
    return METHODS[request.param](**SETTINGS[request.param])


def attach(method, model):
    method.attach(model)
    if isinstance(method, TFB):  # which has no noise before it is fitted
        method.load_state_dict({"sigma": torch.tensor(0.1)})


def attached(method, name="llama"):
    model = lora_model(name)
    attach(method, model)
    return model, make_batch(name)["input_ids"][:, :7].clamp(min=3)


def test_every_such_method_is_asked():
    assert set(SETTINGS) == {name for name, method in METHODS.items() if issubclass(method, SampledRegularizer)}


@torch.no_grad()
def test_the_mean_is_that_of_the_samples_one_by_one(method):
    model, input_ids = attached(method)
    plain = model(input_ids=input_ids).logits
    with method.ensemble_samples(3, seed=5):
        samples = model(input_ids=input_ids).logits
    with method.ensemble_samples(1, seed=5):
        torch.testing.assert_close(model(input_ids=input_ids).logits[0], samples[0], atol=TOLERANCE, rtol=TOLERANCE)
    probs = samples.softmax(-1)
    for average, expected in {"prob": probs.mean(0), "logit": samples.mean(0).softmax(-1)}.items():
        with method.ensemble(3, average=average, seed=5):
            torch.testing.assert_close(model(input_ids).logits.softmax(-1), expected, atol=TOLERANCE, rtol=1e-5)
    prediction = method.predict({"input_ids": input_ids}, 3, seed=5)
    torch.testing.assert_close(prediction.log_probs.exp(), probs.mean(0), atol=TOLERANCE, rtol=1e-5)
    assert samples.shape == (3, *plain.shape)
    assert min((samples[s] - samples[s - 1]).abs().max() for s in range(3)) > 0.01
    assert torch.equal(model(input_ids=input_ids).logits, plain)  # the mean network, before and after


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_neox", "mixtral"])
@torch.no_grad()
def test_cache_batch_and_padding_see_the_same_networks(method, name):
    model, input_ids = attached(method, name)
    mask = torch.cat([torch.zeros(4, 3, dtype=torch.long), torch.ones_like(input_ids)], dim=1)
    padded = {"input_ids": F.pad(input_ids, (3, 0)), "attention_mask": mask}
    padded["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with method.ensemble(3, seed=2):
        whole = model(input_ids=input_ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in input_ids])
        left_padded = model(**padded).logits[:, 3:]
        first = model(input_ids=input_ids[:, :6], use_cache=True)
        step = model(input_ids=input_ids[:, 6:], past_key_values=first.past_key_values).logits
    for other in (alone, left_padded, torch.cat([first.logits, step], dim=1)):
        torch.testing.assert_close(other, whole, atol=5e-6, rtol=5e-6)


@torch.no_grad()
def test_generation_does_not_depend_on_cache_batch_or_padding(method):
    model, input_ids = attached(method)
    prompts = [input_ids[0, :3], input_ids[1, :7]]
    padded = torch.stack([F.pad(prompt, (7 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (7 - len(prompt), 0)) for prompt in prompts])
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    plain = model.generate(input_ids=padded, attention_mask=mask, **settings)
    with method.ensemble(4):
        alone = [model.generate(input_ids=prompt[None], **settings)[0, len(prompt) :] for prompt in prompts]
        for change in ({}, {"use_cache": False}, {"past_key_values": DynamicCache()}):
            generated = model.generate(input_ids=padded, attention_mask=mask, **settings, **change)
            assert torch.equal(generated[:, 7:], torch.stack(alone)), change
    assert not torch.equal(generated, plain)


def test_seeds_choose_the_networks_and_the_global_generators_are_left_alone(method):
    model, input_ids = attached(method)
    state = torch.get_rng_state()

    def logits(seed):
        with torch.no_grad(), method.ensemble(2, seed=seed):
            return model(input_ids=input_ids).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(0), logits(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_detached_it_leaves_no_trace(method):
    model = lora_model()
    before, parameters = copy.deepcopy(vars(model.get_base_model())), set(dict(model.named_parameters()))
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    method.attach(model)
    method.detach()
    assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    assert set(vars(model.get_base_model())) == set(before) and set(dict(model.named_parameters())) == parameters


@torch.no_grad()
def test_bfloat16_keeps_its_dtype_and_is_near_float32(method):
    model, input_ids = attached(method)
    with method.ensemble(4):
        expected = model(input_ids=input_ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(input_ids=input_ids).logits.float(), expected, atol=0.1, rtol=0.05)
        logits = model.to(torch.bfloat16)(input_ids=input_ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "tfb"])  # which comes after training
def test_training_draws_anew_from_the_global_generator(name):
    method = METHODS[name](**SETTINGS[name])
    model, input_ids = attached(method)
    model.train()
    torch.manual_seed(0)
    first, second = model(input_ids=input_ids).logits, model(input_ids=input_ids).logits
    torch.manual_seed(0)
    assert torch.equal(model(input_ids=input_ids).logits, first)
    assert not torch.allclose(first, second)


def test_gradients_under_checkpointing_are_those_without(method):
    batch, found = make_batch("llama"), []
    for change in (lambda model: model, lambda model: checkpointed(model, {"use_reentrant": False})):
        torch.manual_seed(1)  # what a method draws when it is attached
        model = copy.deepcopy(lora_model())
        other = copy.deepcopy(method)
        attach(other, model)
        change(model).train()
        torch.manual_seed(0)
        model(**batch).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for gradient, expected in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    with other.ensemble(2), pytest.raises(ValueError, match="recomputed without its noise"):
        model(**batch)
    with other.ensemble(2), torch.no_grad():
        model(**batch)


# ---- with DIPNet ----


@torch.no_grad()
def test_beside_dip_each_has_its_own_ensemble():
    batch = make_batch("llama")
    model = dip_model("llama", [batch], weights=LoraConfig(r=4, target_modules="all-linear")).eval()
    method = LayerDropout(p=0.3)
    with model.ensemble(2):
        expected = model(**batch).logits
    method.attach(model)
    with model.ensemble(2):
        assert torch.equal(model(**batch).logits, expected)
        with pytest.raises(ValueError, match="one token at a time"):
            model.generate(input_ids=batch["input_ids"], num_beams=2)
    with method.ensemble(2):
        assert not torch.allclose(model(**batch).logits, expected)
        with pytest.raises(ValueError, match="one token at a time"):
            model.generate(input_ids=batch["input_ids"], num_beams=2)
    method.detach()
    with model.ensemble(2), pytest.raises(ValueError, match="one token at a time"):
        model.generate(input_ids=batch["input_ids"], num_beams=2)


# ---- refusals ----


def test_what_has_no_ensemble_is_refused():
    method = LayerDropout()
    model, input_ids = attached(method)
    with pytest.raises(ValueError, match=r"average must be one of \['prob', 'logit'\], got 'mean'"):
        method.ensemble(2, average="mean").__enter__()
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        method.ensemble(0).__enter__()
    with method.ensemble(2), pytest.raises(ValueError, match="in an ensemble: leave it first"):
        method.ensemble(2).__enter__()
    cache = model(input_ids=input_ids, use_cache=True).past_key_values
    with method.ensemble(1), pytest.raises(ValueError, match="was filled without an ensemble"):
        model(input_ids=input_ids[:, :1], past_key_values=cache)
    with method.ensemble(2), pytest.raises(ValueError, match="does not hold 2 samples of 0 rows"):
        model.get_base_model().model(input_ids=input_ids)  # the trunk by itself
    streams = build("gemma3n_text")
    LayerDropout().attach(streams)
    method = LayerDropout()
    method.attach(streams)
    with pytest.raises(ValueError, match="Gemma3n.* are not given its rows first"):
        method.ensemble(2).__enter__()


@pytest.mark.parametrize("name", [name for name in SETTINGS if METHODS[name].needs_lora])
def test_an_adapter_that_does_not_run_has_no_samples(name):
    method = METHODS[name](**SETTINGS[name])
    model, _ = attached(method)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' of .* is merged, .*: call unmerge_adapter\(\)"):
        method.ensemble(2).__enter__()
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"'default' of .* is not active, .*set_adapter\(name\)"):
        method.ensemble(2).__enter__()
    model.set_adapter("default")
    model.merge_and_unload()
    with pytest.raises(ValueError, match="is merged"):
        method.ensemble(2).__enter__()


def test_a_failed_forward_leaves_no_trace_in_the_next(method):
    model, input_ids = attached(method)
    with torch.no_grad(), method.ensemble(2):
        expected = model(input_ids=input_ids).logits
        with contextlib.suppress(IndexError):
            model(input_ids=input_ids + 64)
        assert torch.equal(model(input_ids=input_ids).logits, expected)

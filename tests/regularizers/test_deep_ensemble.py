"""Deep ensembles against means of separate models made by hand, in one pass and step by step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import DynamicCache

from dipnet_hf.regularizers import DeepEnsemble
from tests.tiny_models import build, make_batch

LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", modules_to_save=["lm_head"])
SETTINGS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def lora_runs():
    """Three runs of LoRA, each on a base of its own, and one model that holds all of them."""
    runs = []
    together = get_peft_model(build("llama"), LORA, adapter_name="run0")
    for number in range(1, 3):
        together.add_adapter(f"run{number}", LORA)
    for number in range(3):
        run = get_peft_model(build("llama"), LORA, adapter_name=f"run{number}")
        generator = torch.Generator().manual_seed(number)
        for name, parameter in run.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 10
                together.get_parameter(name).data = parameter.data.clone()
        runs.append(run.eval())
    return runs, together.eval()


def full_runs():
    """Three models of weights that differ."""
    runs = [build("llama").eval() for _ in range(3)]
    for number, run in enumerate(runs):
        generator = torch.Generator().manual_seed(number)
        for parameter in run.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    return runs, copy.deepcopy(runs)


def members(kind):
    """Separate models; an ensemble of the same ones, and the model that answers for it."""
    runs, given = lora_runs() if kind == "lora" else full_runs()
    return runs, DeepEnsemble(given), given if kind == "lora" else given[0]


@pytest.fixture(params=["lora", "full"])
def kind(request):
    return request.param


@torch.no_grad()
def test_the_mean_is_that_of_separate_models(kind):
    runs, ensemble, model = members(kind)
    batch = make_batch("llama")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    samples = torch.stack([run(**inputs).logits for run in runs])
    with ensemble.ensemble_samples(3):
        torch.testing.assert_close(model(**inputs).logits, samples, atol=2e-6, rtol=1e-5)
    for k in (1, 2, 3):
        with ensemble.ensemble(k, average="logit"):
            torch.testing.assert_close(model(**inputs).logits, samples[:k].mean(0), atol=2e-6, rtol=1e-5)
        with ensemble.ensemble(k):
            output = model(**batch)
            probs = output.logits.softmax(-1)
        torch.testing.assert_close(probs, samples[:k].softmax(-1).mean(0), atol=2e-6, rtol=1e-5)
        expected = F.nll_loss(probs.log()[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
    prediction = ensemble.predict(inputs, 3)
    torch.testing.assert_close(prediction.log_probs.exp(), samples.softmax(-1).mean(0), atol=2e-6, rtol=1e-5)
    assert prediction.mutual_information.min() > 1e-3
    torch.testing.assert_close(model(**inputs).logits, runs[0](**inputs).logits, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_generation_takes_the_likeliest_token_of_the_mean_at_each_step(kind):
    runs, ensemble, model = members(kind)
    prompts = make_batch("llama")["input_ids"][:, :7].clamp(min=3)
    expected = prompts
    for _ in range(8):
        probs = torch.stack([run(input_ids=expected).logits[:, -1].softmax(-1) for run in runs]).mean(0)
        probs[:, 2] = 0  # no end of the text before `min_new_tokens`
        expected = torch.cat([expected, probs.argmax(-1, keepdim=True)], dim=1)
    with ensemble.ensemble(3):
        for change in ({}, {"use_cache": False}, {"past_key_values": DynamicCache()}):
            assert torch.equal(model.generate(input_ids=prompts, **SETTINGS, **change), expected), change
        padded = F.pad(prompts, (3, 0))
        mask = F.pad(torch.ones_like(prompts), (3, 0))
        generated = model.generate(input_ids=padded, attention_mask=mask, **SETTINGS)
        assert torch.equal(generated[:, 10:], expected[:, 7:])
    assert not torch.equal(model.generate(input_ids=prompts, **SETTINGS), expected)


@torch.no_grad()
def test_a_cache_holds_that_of_every_member(kind):
    _, ensemble, model = members(kind)
    input_ids = make_batch("llama")["input_ids"][:, :7].clamp(min=3)
    with ensemble.ensemble(3):
        whole = model(input_ids=input_ids).logits
        for cache in (None, DynamicCache()):
            first = model(input_ids=input_ids[:, :5], past_key_values=cache, use_cache=True)
            kept = copy.deepcopy(first.past_key_values)
            step = model(input_ids=input_ids[:, 5:], past_key_values=first.past_key_values).logits
            torch.testing.assert_close(torch.cat([first.logits, step], 1), whole, atol=2e-6, rtol=1e-5)
            again = model(input_ids=input_ids[:, 5:], past_key_values=kept).logits
            torch.testing.assert_close(again, step)
    with ensemble.ensemble(2), pytest.raises(ValueError, match="past_key_values .*filled"):
        model(input_ids=input_ids[:, :1], past_key_values=first.past_key_values)
    plain = model(input_ids=input_ids, use_cache=True).past_key_values
    with ensemble.ensemble(2), pytest.raises(ValueError, match="past_key_values .*filled|holds 4 rows"):
        model(input_ids=input_ids[:, :1], past_key_values=plain)


@torch.no_grad()
def test_models_of_images_have_a_mean_too():
    models, images = [build("vit"), build("vit")], {"pixel_values": make_batch("vit")["pixel_values"]}
    models[1].classifier.weight.data *= -1
    expected = torch.stack([model(**images).logits for model in models]).mean(0)
    with DeepEnsemble(models).ensemble(2, average="logit"):
        torch.testing.assert_close(models[0](**images).logits, expected)


def test_what_is_no_ensemble_is_refused(kind):
    _, ensemble, model = members(kind)
    with pytest.raises(ValueError, match="has 3 members, got num_samples=4"):
        ensemble.ensemble(4).__enter__()
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        ensemble.ensemble(0).__enter__()
    with ensemble.ensemble(2), pytest.raises(ValueError, match="one token at a time"):
        model.generate(input_ids=make_batch("llama")["input_ids"], num_beams=2, max_new_tokens=2)
    model.train()
    with pytest.raises(ValueError, match="answer in eval mode"):
        ensemble.ensemble(2).__enter__()
    with pytest.raises(ValueError, match="needs at least 2 members, got 1"):
        DeepEnsemble([build("llama")])
    with pytest.raises(ValueError, match="Two members of the ensemble are the same model"):
        DeepEnsemble([same := build("llama"), same])
    with pytest.raises(ValueError, match="'default' is of IA3Config: give a list of models"):
        DeepEnsemble(get_peft_model(build("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[])))

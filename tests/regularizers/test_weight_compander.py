"""The companded weights against the formula and its derivative; what learns, what is saved, and what is left."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM, Trainer

from dipnet_hf.regularizers import WeightCompander, regularize
from dipnet_hf.regularizers.weight_compander import Compander
from tests.helpers import assert_resumes, calibrated_model, logits, make_rows, make_trainer
from tests.tiny_models import build, make_batch


def layer_of(model, method):
    method.attach(model)
    return model.parametrizations.weight.original, model.parametrizations.weight[0]


@pytest.mark.parametrize("margin", [1.01, 2.0, 100.0])
def test_it_starts_at_the_weights(margin):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    before = layer.weight.detach().clone()
    v, compander = layer_of(layer, WeightCompander(margin=margin))
    torch.testing.assert_close(layer.weight, before)
    assert compander.start.item() == pytest.approx(margin * 2 / math.pi * before.abs().max().item())
    torch.testing.assert_close(v, compander.start * torch.tan(before / compander.start))


def test_no_weight_leaves_the_bound():
    layer = nn.Linear(30, 20)
    largest = layer.weight.abs().max().item()
    v, _ = layer_of(layer, WeightCompander(margin=1.5))
    v.data *= 1e6
    assert layer.weight.abs().max().item() == pytest.approx(1.5 * largest, rel=1e-4)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    compander = Compander(torch.randn(3, 4), WeightCompander()).double()
    nn.init.constant_(compander.log_a, 0.3)
    nn.init.constant_(compander.log_b, -0.2)
    inputs = (torch.randn(3, 4).double().requires_grad_(), compander.log_a, compander.log_b)

    def psi(v, log_a, log_b):
        return torch.func.functional_call(compander, {"log_a": log_a, "log_b": log_b}, (v,))

    assert torch.autograd.gradcheck(psi, inputs)
    a, b = compander.start * math.exp(0.3), compander.start * math.exp(-0.2)
    (slope,) = torch.autograd.grad(compander(inputs[0]).sum(), inputs[0])
    torch.testing.assert_close(slope, a / b / (1 + (inputs[0] / b) ** 2))


@pytest.mark.parametrize("learned", [True, False])
def test_a_and_b_learn_in_float32_if_they_should(learned):
    model = build("llama").bfloat16()
    WeightCompander(learned=learned).attach(model)
    batch = make_batch("llama")
    model(**batch).loss.backward()
    own = {name: parameter for name, parameter in model.named_parameters() if "log_" in name}
    assert len(own) == 2 * (7 * 3 + 1)
    for parameter in own.values():
        assert parameter.dtype == torch.float32
        assert (parameter.grad is not None and parameter.grad != 0) == learned


def test_a_model_is_companded_but_for_embeddings_and_what_is_shared():
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    WeightCompander().attach(model)
    companded = [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]
    assert len(companded) == 7 * 3 and all(name.endswith("_proj") for name in companded)


@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_answers_stay_and_what_is_detached_is_plain(name):
    model, batch = build(name), make_batch(name) if name != "resnet" else {"pixel_values": torch.ones(1, 3, 32, 32)}
    plain, keys = logits(model, batch), list(model.state_dict())
    parameters = {id(parameter) for parameter in model.parameters()}
    method = WeightCompander()
    method.attach(model)
    assert parameters < {id(parameter) for parameter in model.parameters()}
    torch.testing.assert_close(logits(model, batch), plain, atol=1e-4, rtol=1e-3)
    companded = logits(model, batch)
    method.detach()
    assert sorted(model.state_dict()) == sorted(keys) and parameters == {id(p) for p in model.parameters()}
    assert torch.equal(logits(model, batch), companded)


def test_what_learns_comes_back_to_the_bit():
    """In the same memory, which optimizers and DistributedDataParallel hold on to."""
    model, method = build("llama"), WeightCompander()
    method.attach(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()}
    companded = logits(model)
    with method.finished():
        assert not any("parametrizations" in name for name in model.state_dict())
        assert torch.equal(logits(model), companded)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == parameters


def lora_model():
    torch.manual_seed(0)
    return get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))


MODELS = {"full": lambda: build("llama"), "lora": lora_model}


@pytest.mark.parametrize("weights", MODELS)
def test_a_resumed_run_goes_on_as_if_uninterrupted_and_all_that_is_saved_is_plain(tmp_path, weights):
    trainer, _ = assert_resumes(MODELS[weights], WeightCompander, tmp_path)
    assert not any("parametrizations" in name for name, _ in trainer.model.named_parameters())
    trainer.save_model(str(tmp_path / "final"))
    for folder in ("final", "checkpoint-2"):
        saved = LlamaForCausalLM.from_pretrained(tmp_path / folder) if weights == "full" else None
        saved = saved or PeftModel.from_pretrained(build("llama"), tmp_path / folder)
        assert torch.equal(logits(saved), logits(trainer.model.eval()))


def test_the_best_model_is_plain(tmp_path):
    steps = dict.fromkeys(("save_strategy", "eval_strategy"), "steps") | dict(save_steps=1, eval_steps=1)
    best = dict(load_best_model_at_end=True, learning_rate=0.5)
    trainer = make_trainer(build("llama"), make_rows(), tmp_path, Trainer, **steps, **best)
    regularize(trainer, WeightCompander())
    trainer.train()
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == min(evaluated)


def test_it_works_beside_dip():
    model = calibrated_model(weights="full")
    plain = logits(model)
    WeightCompander().attach(model)
    torch.testing.assert_close(logits(model), plain, atol=1e-4, rtol=1e-3)
    assert not torch.equal(logits(model, seed=1), logits(model))


def test_a_model_without_matrices_that_learn_is_refused():
    with pytest.raises(ValueError, match="WeightCompander has nothing to act on: no layer of LlamaForCausalLM"):
        WeightCompander().attach(build("llama").requires_grad_(False))


@pytest.mark.parametrize("margin", [1.0, float("nan"), float("inf")])
def test_bad_settings_are_refused(margin):
    with pytest.raises(ValueError, match="margin of WeightCompander must be above 1 and finite, got"):
        WeightCompander(margin=margin)

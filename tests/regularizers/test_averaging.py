"""Means of weights against torch's and closed forms; who sees the mean, and who the weights that train."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM, Trainer

from dipnet_hf.regularizers import WeightAverage, regularize
from tests.helpers import assert_resumes, collate, losses, make_rows, make_trainer
from tests.tiny_models import build


def walked(num_steps, **settings):
    """A method after steps of a model of one weight vector, the model, and its weights after each step."""
    torch.manual_seed(0)
    model, method = nn.Linear(3, 1, bias=False), WeightAverage(**settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method.attach(model, optimizer)
    seen = []
    for _ in range(num_steps):
        model.weight.grad = torch.randn(1, 3)
        optimizer.step()
        seen.append(model.weight.detach().clone())
    return method, model, seen


def mean_of(method, model):
    with method.finished():
        return model.weight.detach().clone()


def test_with_decay_one_it_is_stochastic_weight_averaging():
    """torch's own, of every third step after the fourth."""
    method, model, seen = walked(13, decay=1.0, start=4, period=3)
    reference = AveragedModel(model)
    for weight in seen[6::3]:
        model.weight.data.copy_(weight)
        reference.update_parameters(model)
    torch.testing.assert_close(mean_of(method, model), reference.module.weight.detach())
    torch.testing.assert_close(mean_of(method, model), torch.stack(seen[6::3]).mean(0))


def test_with_decay_it_is_the_exponential_mean():
    """Of 4 equal weights 1 / 4 that then decay: 0.75 of the mean is kept each time."""
    method, model, seen = walked(10, decay=0.75)
    shares = torch.tensor([0.25 * 0.75**6] * 4 + [0.25 * 0.75 ** (9 - i) for i in range(4, 10)])
    assert shares.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(mean_of(method, model), (shares[:, None, None] * torch.stack(seen)).sum(0))


def test_the_weights_that_train_come_back_until_the_end():
    method, model, seen = walked(5)
    with pytest.raises(RuntimeError, match="anything"), method.finished():
        assert not torch.equal(model.weight, seen[-1])
        raise RuntimeError("anything")
    assert torch.equal(model.weight, seen[-1])
    mean = mean_of(method, model)
    method.finish()
    assert torch.equal(model.weight, mean) and torch.equal(mean_of(method, model), mean)


def test_before_the_first_look_there_is_no_mean():
    method, model, seen = walked(3, start=3)
    assert torch.equal(mean_of(method, model), seen[-1])
    method.finish()
    assert torch.equal(model.weight, seen[-1])


def test_a_mean_of_half_precision_is_kept_in_full():
    """Steps of a mean that bfloat16 would round away."""
    model, method = nn.Linear(1, 1, bias=False).bfloat16(), WeightAverage(decay=0.999)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method.attach(model, optimizer)
    nn.init.ones_(model.weight)
    for step in range(3000):
        model.weight.grad = torch.zeros(1, 1, dtype=torch.bfloat16)
        optimizer.step()
        if step == 1000:
            nn.init.constant_(model.weight, 2.0)
    assert method.state_dict()["mean.weight"].item() == pytest.approx(2 - 0.999**1999, abs=1e-3)


def trained(tmp_path, method, **arguments):
    arguments = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2} | arguments
    trainer = make_trainer(build("llama"), make_rows(), tmp_path, Trainer, **arguments)
    if method is not None:
        regularize(trainer, method)
    trainer.train()
    return trainer


def test_in_a_trainer_the_mean_is_evaluated_saved_and_left_and_training_is_untouched(tmp_path):
    plain = trained(tmp_path, None)
    steps = [LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    method = WeightAverage(decay=1.0)
    trainer = trained(tmp_path, method, eval_strategy="steps", eval_steps=2)
    assert losses(trainer) == losses(plain)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, sum(step.state_dict()[name] for step in steps) / 2)
        assert torch.equal(saved[name], weight)
    live = load_file(tmp_path / "checkpoint-2" / "regularizer.safetensors")
    assert torch.equal(live["trained.lm_head.weight"], plain.model.lm_head.weight)
    logged = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.evaluate()["eval_loss"] == logged != plain.evaluate()["eval_loss"]


def test_a_resumed_run_goes_on_as_if_uninterrupted(tmp_path):
    assert_resumes(lambda: build("llama"), WeightAverage, tmp_path)


def test_the_best_model_is_a_mean(tmp_path):
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, learning_rate=0.5)
    trainer = trained(tmp_path, WeightAverage(), **best)
    step = int(trainer.state.best_model_checkpoint[-1])
    evaluated = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert evaluated[step] == min(evaluated.values()) == trainer.evaluate()["eval_loss"]
    trainer._load_best_model()
    assert trainer.evaluate()["eval_loss"] == evaluated[step]


def test_it_needs_the_optimizer():
    method = WeightAverage()
    method.attach(model := build("llama"))
    with pytest.raises(ValueError, match="WeightAverage acts at the steps of the optimizer"):
        method.backward(model, collate(list(make_rows())[:2]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0.0}, "decay of WeightAverage must be above 0 and at most 1, got 0.0"),
        ({"decay": 1.1}, "decay of WeightAverage must be above 0 and at most 1, got 1.1"),
        ({"start": -1}, "start of WeightAverage must be at least 0 and period at least 1, got -1 and 1"),
        ({"period": 0}, "got 0 and 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightAverage(**settings)

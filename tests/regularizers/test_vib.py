"""The information bottleneck against torch's divergence, passes by hand, and the plain network."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.distributions import Normal, kl_divergence
from transformers import Trainer

from dipnet_hf import DipTrainer
from dipnet_hf.regularizers import VIB, regularize
from dipnet_hf.regularizers.vib import information, root_mean_square
from tests.helpers import dip_model, logits, losses, make_rows, make_trainer
from tests.tiny_models import HIDDEN_SIZE, build, build_task, make_batch


def lora():
    torch.manual_seed(0)
    return get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))


def head_inputs(model, regularizer, batch):
    """What the head is given in one training step, and the step's loss."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    loss = regularizer.backward(model, batch)
    hook.remove()
    return seen[0], loss


def test_the_information_is_torchs_divergence():
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.randn(5, 7, generator=generator).double(), torch.randn(7, generator=generator).double()
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(information(mean, log_std), expected)
    assert information(torch.zeros(3, 7), torch.zeros(7)) == 0
    assert torch.autograd.gradcheck(information, (mean.requires_grad_(), log_std.requires_grad_()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora"])
def test_the_loss_is_that_of_a_draw_paid_for(name):
    """From what the head was given; `s` is the root mean square over the supervised tokens."""
    model, batch = (lora() if name == "lora" else build(name)).train(), make_batch("llama", 16)
    plain = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: plain.append(args[0].detach()))
    model(**batch)
    hook.remove()
    regularizer = VIB(beta=0.01, init_std=0.5)
    regularizer.attach(model)
    drawn, loss = head_inputs(model, regularizer, batch)
    mask, targets = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]
    tokens = plain[0][:, :-1][mask]
    scale = tokens.square().mean(0).sqrt()
    torch.testing.assert_close(regularizer.state_dict()["scale"], scale)
    nll = F.cross_entropy(model.get_output_embeddings()(drawn)[:, :-1][mask], targets[mask])
    paid = kl_divergence(Normal(tokens / scale, 0.5), Normal(0.0, 1.0)).sum(-1).mean()
    assert loss == pytest.approx((nll + 0.01 * paid).item(), rel=1e-5)
    z = (drawn - plain[0]) / (0.5 * scale)
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / z.numel()) ** 0.5
    assert (z.square().mean((0, 1)) - 1).abs().max() < 5 * (2 * HIDDEN_SIZE / z.numel()) ** 0.5


def test_without_a_price_and_noise_it_is_the_plain_network():
    batch, found = make_batch("llama"), []
    for regularizer in (VIB(beta=0.0, init_std=1e-30), None):
        model = build("llama").train()
        if regularizer is None:
            model(**batch).loss.backward()
        else:
            regularizer.attach(model)
            regularizer.backward(model, batch)
        found.append([p.grad for name, p in model.named_parameters() if not name.endswith("vib_log_std")])
    for gradient, other in zip(*found, strict=True):
        assert torch.equal(gradient, other)


def test_evaluation_and_other_passes_are_those_of_the_plain_network():
    model, regularizer, batch = build("llama"), VIB(init_std=1.0), make_batch("llama")
    plain = logits(model, batch)
    regularizer.attach(model)
    regularizer.backward(model.train(), batch)
    assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model.eval(), batch), plain)


def test_accumulated_batches_average_over_all_tokens(tmp_path):
    """Batches of rows with more and with fewer tokens, with `s` known and hardly any noise."""
    runs = []
    for batch_size, steps in [(16, 1), (4, 4)]:
        regularizer = VIB(beta=1.0, init_std=1e-20, learning_rate=0.0)
        trainer = make_trainer(
            build("llama"), make_rows(), tmp_path, Trainer, optim="sgd", max_steps=1, learning_rate=1e-2,
            max_grad_norm=0.0, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        regularize(trainer, regularizer)
        regularizer.load_state_dict(regularizer.state_dict() | {"scale": torch.full((HIDDEN_SIZE,), 2.0)})
        trainer.train()
        runs.append(trainer)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    for parameter, other in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_beside_dip_it_pays_once_for_all_samples(tmp_path, num_samples):
    """Every channel has a mean square of 1 at first, in the units of `s`."""
    model = dip_model(num_samples=num_samples, prior_weight=0.0)
    trainer = make_trainer(model, make_rows(), tmp_path, DipTrainer, max_steps=1, per_device_train_batch_size=16)
    regularize(trainer, VIB(beta=1.0, init_std=0.1))
    trainer.train()
    log = trainer.state.log_history[0]
    paid = HIDDEN_SIZE * (0.01 / 2 - math.log(0.1))
    assert log["loss"] - log["nll"] == pytest.approx(paid, rel=1e-4)


def test_its_group_learns_at_its_own_rate_and_does_not_decay(tmp_path):
    trainer = make_trainer(build("llama"), make_rows(), tmp_path, Trainer, weight_decay=0.3, max_steps=1)
    regularize(trainer, VIB(beta=1.0, learning_rate=0.5))
    trainer.train()
    (log_std,) = [p for name, p in trainer.model.named_parameters() if name.endswith("vib_log_std")]
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is log_std for p in g["params"])]
    assert (len(group["params"]), group["initial_lr"], group["weight_decay"]) == (1, 0.5, 0.0)
    moved = (log_std - math.log(0.1)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5), atol=1e-3, rtol=0)  # Adam's first step


@pytest.mark.parametrize("make_model", [lambda: build("llama"), lora], ids=["full", "lora"])
def test_a_resumed_run_is_the_run(tmp_path, make_model):
    def trained(checkpoint=None):
        torch.manual_seed(0)
        arguments = dict(save_strategy="steps", save_steps=1, max_steps=2, learning_rate=1e-2)
        trainer = make_trainer(make_model(), make_rows(), tmp_path, Trainer, **arguments)
        regularize(trainer, regularizer := VIB())
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, regularizer.state_dict()

    once, state = trained()
    resumed, resumed_state = trained(str(tmp_path / "checkpoint-1"))
    assert losses(resumed)[-1:] == losses(once)[-1:]
    assert all(torch.equal(state[name], resumed_state[name]) for name in ("log_std", "scale"))
    for (name, parameter), other in zip(once.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_processes_measure_the_hidden_states_together(monkeypatch):
    """As one process does all tokens; the others' sums come from what stands for them."""
    hidden = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)
    alone = root_mean_square(hidden)
    others = torch.cat([hidden[3:].square().sum(0), torch.tensor([9.0])])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(others))
    torch.testing.assert_close(root_mean_square(hidden[:3]), alone)
    torch.testing.assert_close(alone, hidden.square().mean(0).sqrt())


def test_channels_that_are_off_have_a_scale_too():
    hidden = torch.tensor([[2.0, 3.0, 0.0], [-2.0, 3.0, 0.0]])
    assert root_mean_square(hidden).tolist() == [2.0, 3.0, pytest.approx(2e-3)]


def test_detach_leaves_no_trace():
    model, regularizer = build("llama"), VIB()
    names = list(model.state_dict())
    regularizer.attach(model)
    regularizer.detach()
    assert list(model.state_dict()) == names
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, "beta of VIB must be finite and at least 0, got -1.0"),
        ({"learning_rate": math.inf}, "learning_rate of VIB must be finite"),
        ({"init_std": 0.0}, "init_std of VIB must be positive and finite, got 0.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VIB(**settings)


@pytest.mark.parametrize("make_model", [lambda: build("vit"), lambda: build_task("t5")], ids=["vit", "t5"])
def test_a_model_without_a_head_of_next_tokens_is_refused(make_model):
    with pytest.raises(ValueError, match="before the output head of a causal language model, and .* is none"):
        VIB().attach(make_model())


def test_a_loss_that_leaves_the_head_out_is_refused():
    model, regularizer, batch = build("llama").train(), VIB(), make_batch("llama")
    regularizer.attach(model)
    with pytest.raises(
        ValueError, match="this forward pass has left that out. Switch off .* use_liger_kernel; TRL's SFTTrainer"
    ):
        regularizer.backward(model, batch, forward=lambda model, batch: SumOfStates(model, batch))


class SumOfStates:
    def __init__(self, model, batch):
        self.loss = model.model(input_ids=batch["input_ids"]).last_hidden_state.sum()


def test_a_first_batch_without_labels_is_refused():
    model, regularizer, batch = build("llama").train(), VIB(), make_batch("llama")
    regularizer.attach(model)
    with pytest.raises(ValueError, match="on the first batch, which has no supervised token"):
        regularizer.backward(model, batch | {"labels": torch.full_like(batch["labels"], -100)})

"""Self-distillation against a loss by hand, with every kind of noise; `test_two_passes` has what is not its own."""

import pytest
import torch
import torch.nn.functional as F

from dipnet_hf import DipTrainer
from dipnet_hf.regularizers import SelfDistillation, regularize
from tests.helpers import dip_model, lora_model, make_rows, make_trainer, predictions
from tests.tiny_models import make_batch


def calibrated():
    return dip_model(calibration=[make_batch("llama", 16)])


def targets_of(batch):
    return batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]


def supervised_logits(model, batch):
    return model(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]


def divergence(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("kind", ["lora_dropout", "layer_dropout", "dip"])
def test_gradients_are_those_of_a_loss_by_hand(kind):
    """Of the mean over all supervised tokens: the divergence changes the prediction without noise alone."""
    batch = make_batch("llama")
    make_model = {"lora_dropout": lambda: lora_model(lora_dropout=0.3), "layer_dropout": lora_model, "dip": calibrated}
    model = make_model[kind]().train()
    regularizer = SelfDistillation(alpha=3.0, layer_dropout=0.2 if kind == "layer_dropout" else 0.0)
    regularizer.attach(model)
    torch.manual_seed(1)
    loss = regularizer.backward(model, batch)
    found = [parameter.grad for parameter in model.parameters()]
    assert model.training

    model.zero_grad()
    torch.manual_seed(1)
    noisy = supervised_logits(model, batch)
    log_p, log_q = noisy.detach().log_softmax(-1), supervised_logits(model.eval(), batch).log_softmax(-1)
    assert divergence(log_p, log_q) > 1e-5
    expected = F.cross_entropy(noisy, targets_of(batch)) + 3 * divergence(log_p, log_q)
    expected.backward()
    assert loss == pytest.approx(expected.item())
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_within_sampling_the_second_pass_has_no_noise_either():
    model, batch, regularizer = calibrated(), make_batch("llama"), SelfDistillation(alpha=3.0)
    regularizer.attach(model)
    with model.sampling(3):
        found = regularizer.backward(model.train(), batch)
    with model.sampling(3):
        noisy = predictions(model, batch)
    expected = F.nll_loss(noisy, targets_of(batch)) + 3 * divergence(noisy, predictions(model.eval(), batch))
    assert found == pytest.approx(expected.item())


def test_over_the_draws_the_network_without_noise_is_taught_their_mean():
    """The mean of the steps' gradients is that of one divergence, from the mean of the noisy predictions."""
    model, batch, regularizer = calibrated(), make_batch("llama"), SelfDistillation(alpha=3.0)
    regularizer.attach(model)
    torch.manual_seed(1)
    regularizer.backward(model.train(), *[batch] * 8)
    found = [parameter.grad for parameter in model.parameters()]

    model.zero_grad()
    torch.manual_seed(1)
    noisy = [supervised_logits(model, batch).log_softmax(-1) for _ in range(8)]
    mean = torch.stack(noisy).exp().mean(0).log().detach()
    expected = sum(F.nll_loss(log_p, targets_of(batch)) / 8 for log_p in noisy)
    expected += 3 * divergence(mean, supervised_logits(model.eval(), batch).log_softmax(-1))
    expected.backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_prior_counts_once(tmp_path):
    trainer = make_trainer(dip_model(prior_weight=0.5, prior_std=0.1), make_rows(), tmp_path, DipTrainer, max_steps=1)
    regularize(trainer, SelfDistillation(alpha=1e-9))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["prior"] > 0.1
    assert log["loss"] == pytest.approx(log["nll"] + log["prior"], rel=1e-4)

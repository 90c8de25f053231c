"""Self-distillation against a loss by hand, with every kind of noise; `test_two_passes` has what is not its own."""

import pytest
import torch
import torch.nn.functional as F

from dipnet_hf import DipTrainer
from dipnet_hf.regularizers import SelfDistillation, regularize
from dipnet_hf.regularizers.self_distillation import kl
from tests.helpers import dip_model, lora_model, make_rows, make_trainer
from tests.tiny_models import make_batch


def calibrated():
    return dip_model(calibration=[make_batch("llama", 16)])


def log_probs(model, batch):
    """As `predictions`, with a graph."""
    logits = model(**batch).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != -100].log_softmax(-1)


def loss_by_hand(noisy, clean, batch, alpha):
    """From the log-probabilities of both passes."""
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    divergence = (noisy.detach().exp() * (noisy.detach() - clean)).sum(-1).mean()
    assert divergence > 1e-5
    return (F.nll_loss(noisy, targets) + F.nll_loss(clean, targets)) / 2 + alpha * divergence


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
    assert all(module.training for module in model.modules())
    found = [parameter.grad for parameter in model.parameters()]

    model.zero_grad()
    torch.manual_seed(1)
    expected = loss_by_hand(log_probs(model, batch), log_probs(model.eval(), batch), batch, alpha=3.0)
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
        noisy = log_probs(model, batch)
    expected = loss_by_hand(noisy, log_probs(model.eval(), batch), batch, alpha=3.0)
    assert found == pytest.approx(expected.item())


def test_over_the_draws_the_network_without_noise_is_taught_their_mean():
    """The mean gradient of all draws at the predictions without noise is that of their mean prediction."""
    noisy, clean = torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 7)

    def gradient(teacher):
        student = clean.clone().requires_grad_()
        kl(teacher, student).backward()
        return student.grad

    mean = noisy.softmax(-1).mean(0).log()
    torch.testing.assert_close(torch.stack([gradient(draw) for draw in noisy]).mean(0), gradient(mean))


def test_the_prior_counts_once(tmp_path):
    """Noise this weak leaves both passes of one loss."""
    model = dip_model(init_noise_std=1e-3, prior_weight=0.5, prior_std=0.1)
    trainer = make_trainer(model, make_rows(), tmp_path, DipTrainer, max_steps=1)
    regularize(trainer, SelfDistillation())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["prior"] > 1
    assert log["loss"] == pytest.approx(log["nll"] + log["prior"], rel=1e-4)

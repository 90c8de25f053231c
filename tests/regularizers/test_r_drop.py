"""R-Drop against closed forms and torch's divergence; `test_two_passes` has what it shares with other methods."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dipnet_hf.regularizers import RDrop, two_passes
from dipnet_hf.regularizers.r_drop import symmetric_kl
from tests.helpers import dip_model, lora_model, predictions
from tests.tiny_models import build, make_batch


def test_of_two_classes_it_is_the_closed_form():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) + KL(q||p) = (p - q) . ln(p / q) = ln(3) / 4."""
    logits, others = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[5.0, 5.0]])
    torch.testing.assert_close(symmetric_kl(logits, others), torch.tensor(math.log(3.0) / 4))


@pytest.mark.parametrize("chunk_logits", [1, 14, 10**6])
def test_it_is_torchs_divergence_both_ways(monkeypatch, chunk_logits):
    monkeypatch.setattr(two_passes, "_CHUNK_LOGITS", chunk_logits)
    logits, others = 3 * torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p, log_q = logits.log_softmax(-1), others.log_softmax(-1)
    both = [F.kl_div(a, b, log_target=True, reduction="sum") for a, b in [(log_p, log_q), (log_q, log_p)]]
    torch.testing.assert_close(symmetric_kl(logits, others), sum(both))
    assert symmetric_kl(logits, logits.clone()) == 0
    assert torch.autograd.gradcheck(symmetric_kl, (logits.requires_grad_(), others.requires_grad_()))


def test_half_precision_is_taken_in_float32():
    logits, others = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = symmetric_kl(logits, others)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, symmetric_kl(logits.float(), others.float()))


@pytest.mark.parametrize("kind", ["lora_dropout", "layer_dropout", "dip"])
def test_the_loss_is_that_of_two_passes_by_hand(kind):
    """Of the mean over all supervised tokens; the passes draw one after the other."""
    batch = make_batch("llama")
    model = {"lora_dropout": lambda: lora_model(lora_dropout=0.3), "layer_dropout": lora_model, "dip": dip_model}[
        kind
    ]()
    if kind == "dip":
        model.calibrate([make_batch("llama", 16)])
    regularizer = RDrop(alpha=3.0, layer_dropout=0.2 if kind == "layer_dropout" else 0.0)
    regularizer.attach(model)
    torch.manual_seed(1)
    found = regularizer.backward(model.train(), batch)
    torch.manual_seed(1)
    first, second = predictions(model, batch), predictions(model, batch)
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    nll = -sum(passed.gather(1, targets[:, None]).mean() for passed in (first, second)) / 2
    divergence = ((first.exp() - second.exp()) * (first - second)).sum(-1).mean()
    assert divergence > 1e-5
    assert found == pytest.approx((nll + 3 / 4 * divergence).item())


def test_gradients_agree_with_finite_differences():
    """In float64, which a Llama and transformers' loss would leave: the slope along the gradient is its norm."""
    model, regularizer, batch = build("gpt2").double().train(), RDrop(alpha=5.0, layer_dropout=0.2), make_batch("gpt2")
    regularizer.attach(model)
    targets = batch["labels"][:, 1:].flatten()

    def forward(model, batch):
        logits = model(**batch).logits
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), targets))

    def loss():
        torch.manual_seed(1)
        return regularizer.backward(model, batch, forward=forward)

    loss()
    parameters = list(model.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    ends, step = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += sign * step * gradient / norm
        ends.append(loss())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(norm.item(), rel=1e-6)

"""The loss in chunks against whole logits and autograd: every head, odd shapes, every dtype, forward and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dipnet_hf import chunked_loss as module
from dipnet_hf.chunked_loss import OutputHead, chunked_loss
from dipnet_hf.objective import stability_penalty

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def reference(hidden, targets, weight, bias, scale, softcap, num_samples, stability_weight, target):
    """Eqs. (2) and (4) from all logits."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = -F.cross_entropy(logits, targets, reduction="none")
    nll = -log_probs.sum() / num_samples
    if not stability_weight:
        return nll, nll * 0
    measured = log_probs if target == "log_prob" else logits
    samples = measured.unflatten(0, (num_samples, -1))
    return nll, stability_weight * samples.var(0).sum()


def random_case(num_samples, num_tokens, hidden_size, vocab_size, dtype, bias):
    """Hidden states, the head's weight and bias, and targets."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_samples * num_tokens, hidden_size, generator=generator).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator).repeat(num_samples)
    return hidden, weight, torch.randn(vocab_size, generator=generator).to(dtype) if bias else None, targets


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 5, 11), (33, 16, 1023)], ids=str)
@pytest.mark.parametrize(
    ("num_samples", "stability_weight", "target"),
    [(1, 0.0, "log_prob"), (2, 0.7, "log_prob"), (4, 0.3, "logits"), (3, 0.0, "logits")],
)
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, None), (True, 2.0, 3.0)])
def test_it_equals_the_reference(
    monkeypatch, dtype, sizes, num_samples, stability_weight, target, bias, scale, softcap
):
    monkeypatch.setitem(module.MAX_CHUNK_LOGITS, "cpu", 4 * num_samples * sizes[2])  # chunks of four tokens
    hidden, weight, bias, targets = random_case(num_samples, *sizes, dtype, bias)
    ours = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    theirs = [None if x is None else x.double().requires_grad_() for x in (hidden, weight, bias)]
    head = OutputHead(ours[1], ours[2], dtype, scale, softcap)
    result = chunked_loss(ours[0], targets, head, num_samples, stability_weight, target)
    expected = reference(theirs[0], targets, *theirs[1:], scale, softcap, num_samples, stability_weight, target)
    (0.3 * result.total).backward()  # as divided by the number of items
    (0.3 * sum(expected)).backward()
    tolerance = TOLERANCE[dtype]
    for value, other in zip(result[1:], expected):
        torch.testing.assert_close(value.double(), other.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(result.total, result.nll + result.stability)
    for value, other in zip(ours, theirs):
        if value is not None:
            assert value.grad.dtype == dtype
            error = (value.grad.double() - other.grad).abs().max()
            assert error <= tolerance * max(1.0, float(other.grad.abs().max()))


def test_weight_gradients_of_many_bfloat16_chunks_are_added_up_in_float32(monkeypatch):
    hidden, weight, _, targets = random_case(1, 512, 8, 16, torch.bfloat16, bias=False)
    errors = []
    for chunk in (512, 1):
        monkeypatch.setitem(module.MAX_CHUNK_LOGITS, "cpu", chunk * 16)
        leaf = weight.clone().requires_grad_()
        chunked_loss(hidden, targets, OutputHead(leaf, None, torch.bfloat16), 1).total.backward()
        exact = weight.double().requires_grad_()
        F.cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
        errors.append(float((leaf.grad.double() - exact.grad).norm() / exact.grad.norm()))
    assert errors[1] < 2 * errors[0] < 2e-2


def test_a_frozen_head_gets_no_gradient_and_a_batch_without_targets_costs_nothing():
    hidden, weight, _, targets = random_case(2, 3, 4, 5, torch.float32, bias=False)
    hidden.requires_grad_()
    chunked_loss(hidden, targets, OutputHead(weight, None, torch.float32), 2).total.backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None
    empty = hidden.detach()[:0].requires_grad_()
    result = chunked_loss(empty, targets[:0], OutputHead(weight, None, torch.float32), 2, 0.1)
    result.total.backward()
    assert result.total == 0 and empty.grad.shape == (0, 4)


def test_without_gradients_none_are_computed():
    hidden, weight, _, targets = random_case(1, 3, 4, 5, torch.float32, bias=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        total = chunked_loss(hidden, targets, OutputHead(weight.requires_grad_(), None, torch.float32), 1).total
    assert counter.get_total_flops() == 2 * 3 * 4 * 5  # of the logits alone
    assert not total.requires_grad


def test_sums_over_many_float16_tokens_stay_finite():
    """One channel is large and one target frequent, as special tokens make them: float16 ends at 65,504."""
    hidden, weight, _, _ = random_case(1, 4000, 8, 16, torch.float16, bias=False)
    hidden[:, 0] = 40
    targets = torch.zeros(4000, dtype=torch.int64)
    weight.requires_grad_()
    loss = chunked_loss(hidden, targets, OutputHead(weight, None, torch.float16), 1).total / 4000
    loss.backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, targets).backward()
    assert (weight.grad.double() - exact.grad).norm() < 1e-2 * exact.grad.norm()


def test_it_is_differentiated_once():
    hidden, weight, _, targets = random_case(1, 3, 4, 5, torch.float32, bias=False)
    total = chunked_loss(hidden.requires_grad_(), targets, OutputHead(weight, None, torch.float32), 1).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        total.backward()


def test_the_penalty_is_that_of_whole_outputs():
    hidden, weight, _, targets = random_case(4, 6, 4, 7, torch.float32, bias=False)
    result = chunked_loss(hidden, targets, OutputHead(weight, None, torch.float32), 4, 0.5, "logits")
    assert result.stability.item() == pytest.approx(0.5 * stability_penalty(hidden @ weight.T, 4).item(), rel=1e-5)

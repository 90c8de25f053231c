"""Eqs. (2) and (4) from the hidden states before the output head, in chunks of the supervised tokens.

The logits of all tokens never exist at the same time. Each chunk's gradients are computed together with its loss, so
that no logits are computed twice.

Shape legend: S samples, N supervised tokens, D hidden size, V vocabulary. Rows of `(S * N, ...)` are sample by sample.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .objective import Terms

# Logits per chunk: few enough for a CPU's cache, enough to keep a GPU busy.
MAX_CHUNK_LOGITS = {"cpu": 2**22}
MAX_CHUNK_LOGITS_GPU = 2**27


class OutputHead(NamedTuple):
    """Logits are `softcap * tanh(scale * (h W^T + b) / softcap)`; `softcap=None` leaves the tanh out.

    The product is computed in `dtype` (autocast's, for example), everything after it in float32.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """The logits, in at least float32."""
        bias = None if self.bias_V is None else self.bias_V.to(self.dtype)
        logits = F.linear(hidden_RD.to(self.dtype), self.weight_VD.to(self.dtype), bias)
        logits = logits.to(torch.promote_types(self.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


def chunked_loss(
    hidden_RD: torch.Tensor,
    targets_R: torch.Tensor,
    head: OutputHead,
    num_samples: int,
    stability_weight: float = 0.0,
    stability_target: str = "log_prob",
) -> Terms:
    """Compute eq. (2), and eq. (4) times its weight, from the hidden states of `num_samples` samples.

    `total` can be differentiated once: its gradients are kept instead of the logits.

    Args:
        hidden_RD (`torch.Tensor` of shape `(S * N, D)`): the head's inputs at the supervised tokens, sample by sample.
        targets_R (`torch.Tensor` of shape `(S * N,)`): int64, the same in every sample.
        head (`OutputHead`): its weight may be tied. Gradients are summed over the chunks in float32.
        num_samples (`int`): S, at least 2 for a `stability_weight` that is not zero.
        stability_weight (`float`): of eq. (4).
        stability_target (`str`): `"log_prob"` of the target, or `"logits"`, summed over V.
    """
    total, terms = _ChunkedLoss.apply(
        hidden_RD,
        head.weight_VD,
        head.bias_V,
        targets_R,
        head,
        num_samples,
        stability_weight,
        stability_target,
        torch.is_grad_enabled(),
    )
    nll, stability = terms.unbind()
    return Terms(total, nll, stability, len(targets_R) // num_samples)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_RD, weight_VD, bias_V, targets_R, head, num_samples, stability_weight, stability_target, has_graph
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_SND = hidden_RD.unflatten(0, (num_samples, -1))
        targets_SN = targets_R.unflatten(0, (num_samples, -1))
        dtype = torch.promote_types(head.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = (needed and has_graph for needed in ctx.needs_input_grad[:3])
        hidden_grad = torch.zeros_like(hidden_SND) if needs_hidden else None
        # Sums over the chunks, which a lower precision would round again at every chunk.
        weight_grad = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        bias_grad = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
        terms = torch.zeros(2, dtype=dtype, device=hidden_RD.device)
        chunk = max(1, _max_chunk_logits(hidden_RD.device) // (num_samples * len(weight_VD)))
        weight = weight_VD.to(head.dtype)
        for start in range(0, targets_SN.shape[1], chunk):
            tokens = slice(start, start + chunk)
            hidden = hidden_SND[:, tokens].flatten(0, 1).to(head.dtype)
            logits = head._replace(weight_VD=weight).logits(hidden)
            grad = _logits_gradient(terms, logits, targets_SN[:, tokens], head, stability_weight, stability_target)
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            grad = grad.to(head.dtype)
            if hidden_grad is not None:
                hidden_grad[:, tokens] = (grad @ weight).unflatten(0, (num_samples, -1))
            if weight_grad is not None:
                _add_product(weight_grad, grad.T, hidden)
            del logits, grad  # before the next chunk needs the memory
        ctx.grads = [None if hidden_grad is None else hidden_grad.flatten(0, 1), weight_grad, bias_grad]
        ctx.dtypes = [hidden_RD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype]
        ctx.mark_non_differentiable(terms)
        return terms.sum(), terms

    @staticmethod
    def backward(ctx, grad_total, _):
        if ctx.grads is None:
            raise RuntimeError("This loss was differentiated before, and its gradients are freed: compute it again.")
        grads, ctx.grads = ctx.grads, None
        scaled = [
            None if grad is None else grad.mul_(grad_total).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None, None


def _max_chunk_logits(device: torch.device) -> int:
    return MAX_CHUNK_LOGITS.get(device.type, MAX_CHUNK_LOGITS_GPU)


def _logits_gradient(
    terms: torch.Tensor,
    logits_RV: torch.Tensor,
    targets_SN: torch.Tensor,
    head: OutputHead,
    stability_weight: float,
    stability_target: str,
) -> torch.Tensor:
    """Add a chunk's two terms to `terms`, and return their gradient with respect to `h W^T + b`, of shape `(R, V)`.

    With `c = log p(target)` and w the weight: d nll / d c = -1 / S, d stability / d c = 2 w (c - mean_s c) / (S - 1),
    and likewise for logits. `logits_RV` is overwritten.
    """
    num_samples = len(targets_SN)
    targets_R1 = targets_SN.reshape(-1, 1)
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1)
    chosen_SN = log_probs_RV.gather(-1, targets_R1).view(targets_SN.shape)
    terms[0] -= chosen_SN.sum() / num_samples
    grad_chosen_SN = torch.full_like(chosen_SN, -1 / num_samples)
    share = stability_weight / max(num_samples - 1, 1)
    if stability_weight and stability_target == "log_prob":
        deviations_SN = chosen_SN - chosen_SN.mean(0)
        terms[1] += share * deviations_SN.square().sum()
        grad_chosen_SN += 2 * share * deviations_SN
    grad_chosen_R1 = grad_chosen_SN.view(-1, 1)
    grad_RV = log_probs_RV.exp_().mul_(-grad_chosen_R1).scatter_add_(-1, targets_R1, grad_chosen_R1)
    # The tanh's derivative, taken before the logits are overwritten.
    slope_RV = None if head.softcap is None else 1 - (logits_RV / head.softcap).square_()
    if stability_weight and stability_target == "logits":
        samples_SNV = logits_RV.view(*targets_SN.shape, -1)  # shares the memory, so the next line changes `logits_RV`
        samples_SNV -= samples_SNV.mean(0)
        terms[1] += share * torch.linalg.vector_norm(samples_SNV).square()
        grad_RV.add_(logits_RV, alpha=2 * share)
    if slope_RV is not None:
        grad_RV *= slope_RV
    return grad_RV if head.scale == 1.0 else grad_RV.mul_(head.scale)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add `a @ b` to `total`, which is at least float32. In float16 the product, a sum over tokens, might overflow."""
    if a.dtype in (total.dtype, torch.float16):
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        total += a @ b

"""Curvature of the mean loss by chosen parameters: Hessian and generalized Gauss-Newton matrix, never built.

Shape legend: N supervised tokens, V vocabulary, P chosen parameters, all in one vector.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .predictions import Batch, num_targets, predict_targets, standing_still

MATRICES = ("hessian", "ggn")


class Curvature:
    """A symmetric `(P, P)` matrix that can be multiplied by a vector: `curvature @ v`.

    `"hessian"` is `d^2 loss / d w^2`. `"ggn"` is `J^T H J`, J being the Jacobian of the logits and H the Hessian of
    the loss by the logits (Schraudolph 2002): it has no negative eigenvalue. The loss is the mean NLL over the
    supervised tokens of all batches.

    A product costs as much as nine forward passes over the batches for the Hessian and seven for the GGN, or four
    where the parameters are few, and the memory of the graph of one batch. The model must answer the same at every
    pass: noise off, or inside `model.ensemble(k)`.

    Args:
        model (`nn.Module`): as for `lipschitz_constants`.
        parameters (`Iterable[nn.Parameter]`): those of the model by which the loss is differentiated.
        batches (`Iterable[Mapping]`): model inputs with `labels`; all are kept.
        matrix (`str`): `"hessian"` or `"ggn"`.

    Raises:
        ValueError: there is no parameter, or one that is not the model's or has no derivatives; no batch or no labels;
            no such matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        batches: Iterable[Batch],
        matrix: str = "hessian",
    ) -> None:
        self.model, self.parameters, self.batches, self.matrix = model, list(parameters), list(batches), matrix
        if matrix not in MATRICES:
            raise ValueError(f"matrix must be one of {', '.join(MATRICES)}, got {matrix!r}.")
        if not self.parameters:
            raise ValueError("There is no parameter to differentiate by: give those that were trained.")
        if not set(self.parameters) <= set(model.parameters()):
            raise ValueError("A parameter is not the model's: take them from model.parameters().")
        if kinds := {parameter.dtype for parameter in self.parameters if not parameter.is_floating_point()}:
            raise ValueError(f"Parameters of {', '.join(map(str, kinds))} have no derivatives: load them in float32.")
        if not self.batches:
            raise ValueError("There is no batch to measure the loss on.")
        self.num_targets = sum(num_targets(model, batch) for batch in self.batches)
        self.num_products = 0

    @property
    def size(self) -> int:
        """P."""
        return sum(parameter.numel() for parameter in self.parameters)

    def __matmul__(self, vector: torch.Tensor) -> torch.Tensor:
        """Multiply by a vector of shape `(P,)`.

        Raises:
            ValueError: the vector is of another length, or the product is not finite.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"The vector must have the shape ({self.size},), got {tuple(vector.shape)}.")
        multiply = self._hessian_product if self.matrix == "hessian" else self._ggn_product
        pieces = vector.split([parameter.numel() for parameter in self.parameters])
        parts = [
            piece.view_as(parameter).to(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)
        ]
        totals = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        with standing_still(self.model, learning=self.parameters):
            for batch in self.batches:
                for total, product in zip(totals, multiply(batch, parts), strict=True):
                    if product is not None:
                        total += product
        self.num_products += 1
        result = torch.cat([total.flatten().to(vector) for total in totals]) / self.num_targets
        if not result.isfinite().all():
            raise ValueError("A product with the curvature is not finite: does the model overflow? Use float32.")
        return result

    def _hessian_product(self, batch: Batch, parts: list[torch.Tensor]) -> tuple:
        loss = F.cross_entropy(*predict_targets(self.model, batch), reduction="sum")
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(gradients, self.parameters, parts, allow_unused=True)

    def _ggn_product(self, batch: Batch, parts: list[torch.Tensor]) -> tuple:
        logits_NV, _ = predict_targets(self.model, batch)
        u_NV = torch.zeros_like(logits_NV, requires_grad=True)
        pulled = torch.autograd.grad(logits_NV, self.parameters, u_NV, create_graph=True, materialize_grads=True)
        (pushed_NV,) = torch.autograd.grad(pulled, u_NV, parts, retain_graph=True)  # J v
        probs_NV = logits_NV.detach().softmax(-1)
        # The Hessian of the cross entropy by the logits is diag(p) - p p^T.
        weighted_NV = probs_NV * (pushed_NV - (probs_NV * pushed_NV).sum(-1, keepdim=True))
        return torch.autograd.grad(logits_NV, self.parameters, weighted_NV, allow_unused=True)


def top_eigenvalues(
    curvature: Curvature, num_eigenvalues: int = 1, tolerance: float = 1e-2, max_products: int = 200, seed: int = 0
) -> list[float]:
    """Find the largest eigenvalues, from the largest down, by the Lanczos iteration of SciPy's ARPACK.

    Args:
        curvature (`Curvature`): the matrix; it counts the products in `num_products`.
        num_eigenvalues (`int`): k. About `max(2 k + 1, 8)` vectors of P numbers are held.
        tolerance (`float`): relative accuracy.
        max_products (`int`): about the most products that are made.
        seed (`int`): of the first vector.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: as many eigenvalues as parameters are asked for, or more.
        RuntimeError: the eigenvalues did not converge within `max_products`.
    """
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise ImportError("Eigenvalues need SciPy: pip install dipnet_hf[diagnostics].") from error
    size = curvature.size
    if not 1 <= num_eigenvalues < size:
        raise ValueError(f"num_eigenvalues must be from 1 to {size - 1}, got {num_eigenvalues}.")
    first = curvature.parameters[0]
    dtype = torch.promote_types(first.dtype, torch.float32)

    def multiply(vector):
        return (curvature @ torch.from_numpy(vector.copy()).to(first.device, dtype)).cpu().numpy()

    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    num_vectors = min(size, max(2 * num_eigenvalues + 1, 8))
    num_restarts = max(1, (max_products - num_vectors) // max(1, num_vectors - num_eigenvalues))
    operator = LinearOperator((size, size), matvec=multiply, dtype=start.numpy().dtype)
    try:
        values = eigsh(
            operator,
            num_eigenvalues,
            which="LA",
            v0=start.numpy(),
            ncv=num_vectors,
            tol=tolerance,
            maxiter=num_restarts,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"{num_eigenvalues} eigenvalue(s) did not converge to {tolerance:g} within {curvature.num_products} "
            "products: raise max_products or tolerance."
        ) from error
    return sorted(map(float, values), reverse=True)


class Estimate(NamedTuple):
    """A mean over random draws, and its standard error."""

    mean: float
    standard_error: float


def trace(curvature: Curvature, num_vectors: int = 8, seed: int = 0) -> Estimate:
    """Estimate the trace by `E[v^T C v]` with signs +-1 for v (Hutchinson 1990); one product per vector.

    Raises:
        ValueError: `num_vectors` is below 2.
    """
    if num_vectors < 2:
        raise ValueError(f"num_vectors must be at least 2, to tell the error, got {num_vectors}.")
    generator = torch.Generator().manual_seed(seed)
    first = curvature.parameters[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    values = torch.empty(num_vectors, dtype=torch.float64)
    for number in range(num_vectors):
        signs = torch.randint(2, (curvature.size,), generator=generator).mul(2).sub(1).to(first.device, dtype)
        values[number] = torch.dot(signs.double(), (curvature @ signs).double())
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(num_vectors))

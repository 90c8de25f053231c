"""BLoB: Bayesian LoRA, whose mean and standard deviations of A are learned together by backpropagation."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .lora_noise import LoraNoise
from .regularizer import Batch


@dataclass
class BLoB(LoraNoise):
    """BLoB (Wang et al. 2024, arXiv 2406.11675): `A ~ N(M, Omega^2)` by element, `Omega = G^2`; B has no noise.

    The loss is the data loss of a sample, plus `kl_weight` times the divergence from the prior `N(0, prior_std^2)`,

        KL = sum log(prior_std / Omega) + (Omega^2 + M^2) / (2 prior_std^2) - 1/2,

    which the paper shows to be that of the full weights from a low-rank Gaussian prior. M is LoRA's A; G is added, and
    learns. A training pass draws A by Flipout (Wen et al. 2018, arXiv 1803.04386): one noise matrix E for the
    batch and signs s, t for every row, `A x = M x + t * ((Omega * E) (s * x))`. All tokens of a row see one A. Draws
    come from PyTorch's global generators. The paper learns the divergence by an optimizer of its own, with a weight
    that doubles from batch to batch over an epoch; here both are one loss with a constant weight.

    In `eval()` the network is that of the mean M, and `ensemble` the mean of k draws of A. Weight decay makes G
    smaller, as it does all weights.

    Cost: 1 pass, with a second product by A; G has the size of A. An ensemble: k rows for one.

    Args:
        prior_std (`float`): the prior's standard deviation; the paper has 0.2.
        init_std (`float`): G begins uniformly in `[sqrt(init_std / 2), sqrt(init_std)]`; the paper has 0.05^2.
        kl_weight (`float`): for a data loss that is a mean over tokens, 1 divided by the supervised tokens of the
            training set gives the evidence lower bound.

    Raises:
        ValueError: a setting out of range, or the model has no LoRA, or one that is not of linear layers alone.
    """

    prior_std: float = 0.2
    init_std: float = 0.0025
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("prior_std", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} of BLoB must be positive, got {getattr(self, name)!r}.")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight of BLoB must be at least 0, got {self.kl_weight!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        super().install(model)
        self._roots = nn.ParameterDict()
        for number, site in enumerate(self.sites):
            root = torch.empty(site.a_RI.shape, device=site.a_RI.device, dtype=torch.float32)
            nn.init.uniform_(root, math.sqrt(self.init_std / 2), math.sqrt(self.init_std))
            self._roots[str(number)] = nn.Parameter(root)
        # Not within the layers of LoRA, all of whose parameters PEFT writes into the adapter's file.
        self.network.blob_roots = self._roots

    def detach(self) -> None:
        """See `Regularizer`."""
        super().detach()
        del self.network.blob_roots

    def std(self, number: int) -> torch.Tensor:
        """See `LoraNoise`."""
        return self._roots[str(number)].square()

    def training_noise(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """See `LoraNoise`; Flipout."""
        std_RI = self.std(number)
        noise_RI = std_RI * torch.randn_like(std_RI)
        middle = [1] * (x.dim() - 2)
        s = _signs(x, (x.shape[0], *middle, x.shape[-1]))
        t = _signs(x, (x.shape[0], *middle, len(std_RI)))
        return t * F.linear(s * x, noise_RI.to(x.dtype))

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        return batch.loss() + self.kl_weight * batch.share * self.divergence()

    def divergence(self) -> torch.Tensor:
        """The divergence of the learned distribution of all A from the prior, in nats."""
        total = torch.zeros(())
        for number, site in enumerate(self.sites):
            std_RI = self.std(number)
            mean_RI = site.a_RI.to(std_RI.dtype)
            squares = (std_RI.square() + mean_RI.square()) / (2 * self.prior_std**2)
            total = total.to(std_RI.device) + (squares - torch.log(std_RI / self.prior_std) - 0.5).sum()
        return total

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Regularizer`."""
        return {f"{site.name}.{site.adapter}": self._roots[str(n)] for n, site in enumerate(self.sites)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`."""
        with torch.no_grad():
            for name, root in self.state_dict().items():
                root.copy_(state[name])


def _signs(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Fair signs, 1 or -1."""
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype).mul_(2).sub_(1)

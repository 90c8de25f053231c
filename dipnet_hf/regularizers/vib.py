"""A variational information bottleneck between the network's last hidden state and its output head.

Shape legend: B batch, L sequence, D hidden size, N supervised tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..architecture import network_of, shifts_labels
from ..batches import num_supervised, supervised, targets_of
from ..logvar_groups import give_own_groups
from .regularizer import Batch, Regularizer

_LOG_STD = "vib_log_std"  # what the parameter is called in the output head


@dataclass
class VIB(Regularizer):
    """The variational information bottleneck (Alemi et al. 2017, arXiv 1612.00410, eq. 17) of a pretrained network.

    In training the head reads a draw of the hidden state `h` of every token, and what the draw tells of its input is
    paid for by the divergence from a prior that knows nothing of it:

        z / s ~ N(h / s, diag(std^2)),   loss = NLL + beta * KL(N(h / s, diag(std^2)) || N(0, I)),

    summed over the channels and averaged over the supervised tokens. In evaluation the head reads the mean, `h`.

    What differs from the paper: the mean is the network's own hidden state, so that nothing changes at first but for
    the noise; and `std` is one learned number per channel, where the paper computes it from the input. A fixed `s`
    makes a prior of variance 1 fit: the root mean square of each channel over the supervised tokens of the first
    training batch, of all processes. One sample is drawn per token, as with the paper's `num_samples` of 1.

    Cost: 1 pass; two tensors of the size of the hidden states, in float32.

    Args:
        beta (`float`): nats of loss per nat of information; the latter adds up over the channels, to thousands.
        init_std (`float`): where `std` begins.
        learning_rate (`float`): of the logarithm of `std`, which never decays, in a group of its own.

    Raises:
        ValueError: a setting out of range; a model that is no causal language model with an output head; or a forward
            pass that leaves the head out.
    """

    beta: float = 1e-4
    init_std: float = 0.1
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} of VIB must be finite and at least 0, got {getattr(self, name)!r}.")
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std of VIB must be positive and finite, got {self.init_std!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        network = network_of(model)
        self._head: Any = network.get_output_embeddings() if shifts_labels(network) else None
        if self._head is None:
            raise ValueError(
                f"VIB puts noise before the output head of a causal language model, and {type(network).__name__} is "
                "none: noise at the input of any module is what DipConfig(target_modules=...) adds."
            )
        weight = self._head.weight
        log_std = torch.full(weight.shape[-1:], math.log(self.init_std), dtype=torch.float32, device=weight.device)
        self._head.register_parameter(_LOG_STD, nn.Parameter(log_std))
        self._scale = torch.full_like(log_std, torch.nan)
        self._batch: Batch | None = None
        self._information: torch.Tensor | None = None
        self._hook = self._head.register_forward_pre_hook(self._draw)

    def detach(self) -> None:
        """See `Regularizer`."""
        self._hook.remove()
        delattr(self._head, _LOG_STD)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Regularizer`; the optimizer gets a group more."""
        give_own_groups(optimizer, [self._log_std], self.learning_rate)
        super().watch(optimizer)

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        self._batch, self._information = batch, None
        try:
            data_loss = batch.loss()
        finally:
            self._batch = None
        if self._information is None:
            raise ValueError(
                "VIB puts noise before the output head, and this forward pass has left that out. Switch off what "
                "computes the loss from the hidden states, such as use_liger_kernel; TRL's SFTTrainer always does so: "
                "take transformers' Trainer."
            )
        num_tokens = num_supervised(*targets_of(batch.inputs, True))
        return data_loss + self.beta * batch.weight(num_tokens) * self._information

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The logarithm of `std`, and `s`."""
        return {"log_std": self._log_std, "scale": self._scale}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`."""
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(state[name])

    @property
    def _log_std(self) -> nn.Parameter:
        return getattr(self._head, _LOG_STD)

    def _draw(self, head: nn.Module, args: tuple) -> tuple | None:
        """The head's pre-hook: noise on the hidden states of a training batch, of S times its rows with DIPNet."""
        if self._batch is None or not torch.is_grad_enabled():
            return None
        hidden_BLD = args[0].float()
        labels, shift = targets_of(self._batch.inputs, True)
        num_samples = len(hidden_BLD) // len(labels)
        labels = labels.to(hidden_BLD.device).repeat(num_samples, 1)
        hidden_ND = supervised(hidden_BLD, labels, shift)[0]
        if self._scale.isnan().any():
            self._scale = root_mean_square(hidden_ND.detach())
        self._information = information(hidden_ND / self._scale, self._log_std) / num_samples
        noise_BLD = self._scale * self._log_std.exp() * torch.randn_like(hidden_BLD)
        return ((hidden_BLD + noise_BLD).to(args[0].dtype), *args[1:])


def information(mean_ND: torch.Tensor, log_std_D: torch.Tensor) -> torch.Tensor:
    """`KL(N(mean, diag(std^2)) || N(0, I))`, summed over channels and tokens; a scalar."""
    variance_D = (2 * log_std_D).exp()
    return (mean_ND.square() + variance_D - 1 - 2 * log_std_D).sum() / 2


def root_mean_square(hidden_ND: torch.Tensor) -> torch.Tensor:
    """That of every channel over the tokens of all processes, of shape `(D,)`, and no less than 1e-3 of their median.

    Raises:
        ValueError: there are no tokens.
    """
    sums = torch.cat([hidden_ND.square().sum(0), hidden_ND.new_tensor([len(hidden_ND)])])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    if sums[-1] == 0:
        raise ValueError("VIB measures the hidden states on the first batch, which has no supervised token.")
    scale_D = (sums[:-1] / sums[-1]).sqrt()
    return scale_D.clamp(min=1e-3 * scale_D.median())

"""Methods that answer with the mean of k networks, through the same `ensemble` calls as DIPNet.

Here a sample is a network: its noise is a pure function of (seed, module, sample), and the same at all positions of
all rows, as variational dropout has it for sequences (Gal and Ghahramani 2016, arXiv 1512.05287). So a cached step, a
pass over the whole sequence, another batch and another padding see the same k networks.

Shape legend: S samples, B batch. Row s * B + b is sample s of row b.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..architecture import input_names, network_of, token_dims
from ..contexts import ContextValue
from ..ensemble import average_of, predict_in
from ..generation import GenerationGuard
from ..noise import PositionNoise, fold_in
from ..sampled_rows import Repeated, SampledRows
from ..uncertainty import Prediction
from .regularizer import Regularizer

Combine = Callable[[torch.Tensor], torch.Tensor]


class Answering:
    """Lets a model answer with the mean of samples, as `DipModel` does; `make_samples` says of which ones."""

    def answer_from(self, model: nn.Module) -> None:
        """Put hooks on a network, which do nothing outside of `ensemble`."""
        self.network: Any = network_of(model)
        self._samples: ContextValue[SampledRows | None] = ContextValue(None)
        self._input_names = input_names(self.network)
        self._handles: list[Any] = [
            self.network.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            self.network.register_forward_hook(self._end_forward),
        ]
        self._guard = GenerationGuard(self.network, self._samples, self._samples)

    def stop_answering(self) -> None:
        """Take the hooks away."""
        self._guard.remove()
        for handle in self._handles:
            handle.remove()

    def make_samples(self, num_samples: int, seed: int, combine: Combine) -> SampledRows:
        """The samples of an ensemble."""
        raise NotImplementedError

    @contextmanager
    def ensemble(self, num_samples: int, average: str = "prob", seed: int = 0) -> Iterator[None]:
        """Answer with the mean of k samples, in `forward` and `generate`; shapes do not change.

        Args:
            num_samples (`int`): k.
            average (`str`): `"prob"`, logits of the mean probability, or `"logit"`, the mean of the logits.
            seed (`int`): which k samples.

        Raises:
            ValueError: as `DipModel.ensemble` does.
        """
        with self.ensemble_samples(num_samples, seed, average_of(average)):
            yield

    @contextmanager
    def ensemble_samples(
        self, num_samples: int, seed: int = 0, combine: Combine = lambda logits: logits
    ) -> Iterator[None]:
        """As `ensemble`, but with the samples' logits of shape `(k, B, ...)`, or what `combine` makes of them."""
        if self._samples.get() is not None:
            raise ValueError("This model is in an ensemble: leave it first.")
        samples = self.make_samples(num_samples, seed, combine)
        with self._samples.set_to(samples):
            try:
                yield
            finally:
                samples.stop()

    def predict(self, inputs: Mapping[str, Any], num_samples: int, seed: int = 0) -> Prediction:
        """Predict with k samples, and say what they disagree on; see `dipnet_hf.predict`."""
        return predict_in(self.ensemble_samples(num_samples, seed), self.network, inputs)

    def _begin_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        samples = self._samples.get()
        if samples is None:
            return None
        named = dict(zip(self._input_names, args, strict=False))
        return (), samples.repeat(named | kwargs).inputs

    def _end_forward(self, module: nn.Module, args: tuple, output: Any) -> Any:
        samples = self._samples.get()
        return None if samples is None else samples.end(output)


class SampledRegularizer(Answering, Regularizer):
    """A method whose modules are random: anew in every training pass, one network per sample in an ensemble.

    In `eval()` and outside of `ensemble` the network is the mean one, without noise.
    """

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        self.answer_from(model)

    def detach(self) -> None:
        """See `Regularizer`."""
        self.stop_answering()

    def fit(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Find what the samples need, on training batches after the training; most methods have learned it before."""

    def make_samples(self, num_samples: int, seed: int, combine: Combine) -> SampledRows:
        """See `Answering`."""
        return NetworkSamples(self.network, num_samples, combine, seed)

    @property
    def samples(self) -> "NetworkSamples | None":
        """What the modules' noise comes from within an ensemble; None outside."""
        samples = self._samples.get()
        return samples if isinstance(samples, NetworkSamples) else None


class NetworkSamples(SampledRows):
    """Samples that are networks: the noise of each random module, of every sample; see `SampledRows`."""

    def __init__(self, model: nn.Module, num_samples: int, combine: Combine, seed: int) -> None:
        super().__init__(model, num_samples, combine, seed)
        if token_dims(model) is not None:
            raise ValueError(
                f"The layers of {type(model).__name__} are not given its rows first, so they cannot tell the samples."
            )
        self._noise: dict[tuple[int, torch.device], torch.Tensor] = {}  # drawn once: decoding asks at every token

    def repeat(self, kwargs: dict[str, Any]) -> Repeated:
        """See `SampledRows`."""
        is_checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if is_checkpointed and self.model.training and torch.is_grad_enabled():
            raise ValueError(
                "An ensemble's layers would be recomputed without its noise: call model.eval(), or disable gradient "
                "checkpointing."
            )
        return super().repeat(kwargs)

    def noise(self, module_number: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The standard normal noise of one module for all samples, of shape `(S, *shape)`, float32."""
        key = (module_number, device)
        if key not in self._noise:
            noise = PositionNoise(fold_in(torch.tensor(self.seed), module_number), self.num_samples)
            self._noise[key] = noise.whole(shape, device).squeeze(1)
        return self._noise[key]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of a module's input, `(S * B, ...)` or `(S * B * L, D)`, by samples: `(S, B, ...)` or `(S, B * L, D)`.

        Raises:
            ValueError: the input has not all of the samples' rows, as one of a router or an expert.
        """
        num_rows = self.num_rows or 0
        num_tokens = num_rows * (self._now.length or 1)
        if x.shape[0] != self.num_samples * (num_tokens if x.dim() == 2 else num_rows) or num_rows == 0:
            raise ValueError(
                f"A module's input of shape {tuple(x.shape)} does not hold {self.num_samples} samples of {num_rows} "
                "rows: an ensemble needs modules that see every token, within the model's forward pass."
            )
        return x.unflatten(0, (self.num_samples, -1))

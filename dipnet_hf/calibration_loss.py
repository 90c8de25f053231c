"""The loss by which calibration finds the level of the noise: the mean over its batches' supervised tokens.

Shape legend: N supervised tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from .architecture import is_encoder_decoder, shifts_labels
from .batches import IGNORE_INDEX, num_supervised
from .data_loss import data_terms, run
from .hidden_states import HiddenStateCapture
from .scale import num_processes
from .sharding import reshard

_TOKENS_DRAWN_AT_ONCE = 256  # their probabilities take 268 MB at a vocabulary of 262,144


class CalibrationLoss:
    """A model's mean loss over the batches of all processes, with noise or without.

    Args:
        model (`nn.Module`): the network.
        batches (`list`): those of the calibration; only used to find out whether there are labels.
        capture (`HiddenStateCapture`): of the network.
        noise (`Callable`): `noise(on)` gives a context with noise on or off; the draws are the same every time.
        wrapped (`nn.Module`): what the network is called through; itself, unless it is sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list,
        capture: HiddenStateCapture,
        noise: Callable[[bool], AbstractContextManager[None]],
        wrapped: nn.Module,
    ) -> None:
        for batch in batches:
            if not isinstance(batch, (Mapping, torch.Tensor)):
                raise TypeError(
                    f"Calibration takes a list of batches, each a mapping or a tensor, got {type(batch).__name__} "
                    "among them. One batch alone is given as [batch]."
                )
        self._model: Any = model
        self._run: Any = wrapped
        self._capture = capture
        self._noise = noise
        self._shifts = shifts_labels(model)
        has_labels = any(isinstance(batch, Mapping) and batch.get("labels") is not None for batch in batches)
        # Probed here already: the probe runs the model, and calibration observes what runs later.
        self._is_plain = has_labels and self._shifts and capture.probe(wrapped).loss_is_plain

    def mean(self, batches: Iterable, noise: bool) -> float | None:
        """The loss in nats per supervised token; None if there is no such token."""
        device = next(self._model.parameters()).device
        total = torch.zeros(2, dtype=torch.float64)
        with self._noise(noise):
            for batch in batches:
                total += self._sum(send_to_device(batch, device))
        reshard(self._run)
        if num_processes() > 1:
            total = total.to(device)
            torch.distributed.all_reduce(total)
        return float(total[0] / total[1]) if total[1] > 0 else None

    def _sum(self, batch: Any) -> torch.Tensor:
        """The sum of a batch's loss over its supervised tokens, and their number; zeros if the model gives no loss."""
        if isinstance(batch, torch.Tensor):
            self._run(batch)
            return torch.zeros(2)
        labels = batch.get("labels")
        if labels is None or "labels" not in inspect.signature(self._model.forward).parameters:
            outputs = self._run(**{name: value for name, value in batch.items() if name != "labels"})
            loss = getattr(outputs, "loss", None)  # from labels with another name
            return torch.zeros(2) if loss is None else torch.tensor([float(loss), 1.0])
        if self._is_plain and "shift_labels" not in batch:
            terms, _ = data_terms(self._run, batch, self._shifts, self._capture)
            return torch.tensor([float(terms.nll), terms.num_tokens])
        loss = getattr(self._run(**batch), "loss", None)
        num_items = num_supervised(labels, self._shifts)
        if loss is None or not num_items:
            return torch.zeros(2)
        return torch.tensor([float(loss) * num_items, num_items])

    def draw_labels(self, batch: Any, seed: int) -> Any:
        """Replace a batch's labels by draws from the noise-free predictions.

        Labels stay as they are if they are not classes, if they are inputs too (of a decoder), or if the model's
        outputs are not one prediction per label.
        """
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or "shift_labels" in batch:
            return batch
        if is_encoder_decoder(self._model):
            return batch
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self._noise(False):
            inputs = send_to_device(inputs, next(self._model.parameters()).device)
            predictions = run(self._run, inputs, self._shifts, self._capture, labels.shape)
        states = predictions.states
        if states is None or states.shape[:-1] != labels.shape or states.shape[-1] == 1:
            return batch
        shift = int(self._shifts)
        labels = labels.to(states.device, copy=True)
        targets, states = labels[..., shift:], states.narrow(-2, 0, labels.shape[-1] - shift)  # views of them
        mask = targets != IGNORE_INDEX
        if mask.any():
            generator = torch.Generator(states.device).manual_seed(seed)
            chunks = states[mask].split(_TOKENS_DRAWN_AT_ONCE)
            drawn = [_draw(predictions.logits(chunk), generator) for chunk in chunks]
            targets[mask] = torch.cat(drawn)
        return {**batch, "labels": labels}


def _draw(logits_NV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(logits_NV.float().softmax(-1), 1, generator=generator).squeeze(-1)

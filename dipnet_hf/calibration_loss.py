"""The loss by which calibration finds the level of the noise: that of its batches, per supervised token.

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
from .batches import IGNORE_INDEX
from .data_loss import data_terms, run
from .hidden_states import HiddenStateCapture
from .scale import num_processes

_TOKENS_DRAWN_AT_ONCE = 256  # their probabilities take 268 MB at a vocabulary of 262,144


class CalibrationLoss:
    """A model's mean loss over some batches of all processes, with noise and without.

    Args:
        model (`nn.Module`): the network.
        batches (`list`): of which it will be asked; they tell whether there are labels.
        capture (`HiddenStateCapture`): of the network.
        noise (`Callable`): whether noise is on, to a context in which it is so; the same draws every time.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list,
        capture: HiddenStateCapture,
        noise: Callable[[bool], AbstractContextManager[None]],
    ) -> None:
        for batch in batches:
            if not isinstance(batch, (Mapping, torch.Tensor)):
                raise TypeError(
                    f"Calibration takes a list of batches, each a mapping or a tensor, got {type(batch).__name__} "
                    "among them. One batch alone is given as [batch]."
                )
        self._model: Any = model
        self._capture = capture
        self._noise = noise
        self._shifts = shifts_labels(model)
        has_labels = any(isinstance(batch, Mapping) and batch.get("labels") is not None for batch in batches)
        # Asked here, because the model runs for it, and calibration observes later runs.
        self._is_plain = has_labels and self._shifts and capture.probe().loss_is_plain

    def mean(self, batches: Iterable, noise: bool) -> float | None:
        """The loss in nats per supervised token, None where no batch has one."""
        device = next(self._model.parameters()).device
        total = torch.zeros(2, dtype=torch.float64)
        with self._noise(noise):
            for batch in batches:
                total += self._sum(send_to_device(batch, device))
        if num_processes() > 1:
            total = total.to(device)
            torch.distributed.all_reduce(total)
        return float(total[0] / total[1]) if total[1] > 0 else None

    def _sum(self, batch: Any) -> torch.Tensor:
        """A batch's loss, summed over its supervised tokens, and their number; zeros where the model computes none."""
        if isinstance(batch, torch.Tensor):
            self._model(batch)
            return torch.zeros(2)
        labels = batch.get("labels")
        if labels is None or "labels" not in inspect.signature(self._model.forward).parameters:
            outputs = self._model(**{name: value for name, value in batch.items() if name != "labels"})
            loss = getattr(outputs, "loss", None)  # of labels by other names
            return torch.zeros(2) if loss is None else torch.tensor([float(loss), 1.0])
        if self._is_plain and "shift_labels" not in batch:
            terms, _ = data_terms(self._model, batch, self._shifts, self._capture)
            return torch.tensor([float(terms.nll), terms.num_tokens])
        loss = getattr(self._model(**batch), "loss", None)
        targets = labels[:, 1:] if self._shifts else labels
        num_items = int((targets != IGNORE_INDEX).sum()) if isinstance(targets, torch.Tensor) else len(targets)
        return torch.zeros(2) if loss is None or not num_items else torch.tensor([float(loss) * num_items, num_items])

    def draw_labels(self, batch: Any, seed: int) -> Any:
        """Replace a batch's labels by draws from the noise-free predictions.

        They are left as they are where they are not classes, where the labels are inputs too (of a decoder), and where
        the model's outputs are not one prediction per label.
        """
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or "shift_labels" in batch:
            return batch
        if is_encoder_decoder(self._model):
            return batch
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self._noise(False):
            inputs = send_to_device(inputs, next(self._model.parameters()).device)
            predictions = run(self._model, inputs, self._shifts, self._capture, labels.shape)
        states = predictions.states
        if states is None or states.shape[:-1] != labels.shape or states.shape[-1] == 1:
            return batch
        shift = int(self._shifts)
        labels = labels.to(states.device, copy=True)
        targets, states = labels[..., shift:], states.narrow(-2, 0, labels.shape[-1] - shift)  # views
        mask = targets != IGNORE_INDEX
        if mask.any():
            generator = torch.Generator(states.device).manual_seed(seed)
            chunks = states[mask].split(_TOKENS_DRAWN_AT_ONCE)
            drawn = [_draw(predictions.logits(chunk), generator) for chunk in chunks]
            targets[mask] = torch.cat(drawn)
        return {**batch, "labels": labels}


def _draw(logits_NV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(logits_NV.float().softmax(-1), 1, generator=generator).squeeze(-1)

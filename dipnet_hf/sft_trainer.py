"""The objective inside TRL's SFTTrainer. A file of its own, because importing TRL is slow and optional."""

from typing import Any

import torch
from transformers import Trainer
from trl import SFTTrainer

from .trainer import DipTrainerMixin
from .trl_trainers import TrlTrainer


class DipSFTTrainer(DipTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with the DIP objective, completion-only, packed and padding-free data included.

    The data loss and `stability_target="log_prob"` come from TRL's fused head, which never builds the logits. Neither
    does `stability_target="logits"`, but TRL's own training metrics (entropy, accuracy) are left out there, and in
    evaluation inside `model.ensemble`, whose loss is that of the mean.

    Raises:
        TypeError, ValueError: see `DipTrainerMixin`; and `stability_target="logits"` with `loss_type="dft"`.
    """

    _trl_trainers = (TrlTrainer("SFTTrainer", repeats_rows=True),)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self._stabilizes_logits():
            self._check_loss_type('stability_target="logits"', 'use stability_target="log_prob"')

    def _check_loss_type(self, what: str, instead: str) -> None:
        """Refuse a loss that TRL's fused head alone computes, where it does not run."""
        args: Any = self.args
        if args.loss_type != "nll":
            raise ValueError(f'{what} needs loss_type="nll", got {args.loss_type!r}: {instead}.')

    def _evaluation_loss(self, model, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch) -> Any:
        if not self._tuner().in_ensemble:
            return super()._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_loss_type("The loss of an ensemble", "evaluate outside model.ensemble")
        # The mean is that of logits, which TRL's fused head never builds.
        return Trainer.compute_loss(self, model, dict(inputs), return_outputs, num_items_in_batch)

    def _can_compute_own_terms(self, inputs: dict[str, Any], return_outputs: bool) -> bool:
        return not return_outputs and self._stabilizes_logits() and self._data_loss_is_plain(inputs)

    def _stabilizes_logits(self) -> bool:
        config = self._tuner().active_dip_config
        return bool(config.stability_loss_weight) and config.stability_target == "logits"

    def _data_loss(self, model, inputs: dict[str, Any], num_items_in_batch, return_outputs: bool) -> Any:
        if self._stabilizes_logits():
            return Trainer.compute_loss(
                self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        outputs = []

        def keep_outputs(*args, **kwargs):
            outputs.append(model(*args, **kwargs))
            return outputs[-1]

        # Asked for its outputs, TRL would run a second forward, with another draw.
        loss = SFTTrainer.compute_loss(self, keep_outputs, inputs, num_items_in_batch=num_items_in_batch)
        return loss, outputs[0]

    def _supervised_outputs(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if "log_probs" in outputs:
            return outputs.log_probs[outputs.label_mask]
        return super()._supervised_outputs(outputs, inputs)

"""The objective inside TRL's SFTTrainer. A file of its own, because importing TRL is slow and optional."""

from typing import Any

import torch
from transformers import Trainer
from trl import SFTTrainer

from .trainer import DipTrainerMixin


class DipSFTTrainer(DipTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with the DIP objective, completion-only, packed and padding-free data included.

    The data loss and `stability_target="log_prob"` come from TRL's fused head, which never builds the logits. Neither
    does `stability_target="logits"`, but TRL's own training metrics (entropy, accuracy) are left out there.
    """

    def __init__(self, model, *args, **kwargs):
        named = model.named_parameters() if isinstance(model, torch.nn.Module) else []
        kept = {name: parameter.detach().clone() for name, parameter in named if "dip_logvar" in name}
        super().__init__(model, *args, **kwargs)
        # TRL casts the trainable parameters of a quantized model to bfloat16, where small steps of logvar vanish.
        trained: Any = self.model
        for name, parameter in trained.named_parameters():
            if "dip_logvar" in name and parameter.dtype != torch.float32:
                parameter.data = kept.get(name, parameter.data).float()

    def _can_compute_own_terms(self, inputs: dict[str, Any], return_outputs: bool) -> bool:
        if return_outputs or not self._stabilizes_logits():
            return False
        return getattr(self.args, "loss_type", "nll") == "nll" and self._data_loss_is_plain(inputs)

    def _stabilizes_logits(self) -> bool:
        config = self._tuner().active_dip_config
        return bool(config.stability_loss_weight) and config.stability_target == "logits"

    def _data_loss(self, model, inputs: dict[str, Any], num_items_in_batch) -> Any:
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

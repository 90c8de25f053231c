"""A plugin of Axolotl: `adapter: dip` puts noise around the LoRA of the same file, and trains it with the objective.

A file of its own, because it needs axolotl: Axolotl imports it, by the name in `plugins:`.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from pydantic import BaseModel, Field, model_validator

from .config import DipConfig
from .trainer import DipTrainerMixin

ADAPTER = "dip"


class DipArgs(BaseModel):
    """What the plugin adds to Axolotl's settings: `dip:`, the fields of `DipConfig`.

    Raises:
        ValueError: a setting that `adapter: dip` does not work with, or a field that `DipConfig` refuses.
    """

    dip: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def check(self):
        """Refuse, before a model is loaded, what would be ignored or fail later."""
        settings: Any = self  # of the class that Axolotl makes of its own settings and these
        if settings.adapter != ADAPTER:
            if self.dip:
                raise ValueError(f"dip: needs `adapter: {ADAPTER}`, got `adapter: {settings.adapter}`.")
            return self
        if settings.load_in_4bit or settings.load_in_8bit:
            raise ValueError(
                "Axolotl quantizes a base model for its own lora and qlora alone, and ignores load_in_4bit and "
                f"load_in_8bit with `adapter: {ADAPTER}`: leave them out, and name a base_model that was saved in 4 "
                "or 8 bits."
            )
        if settings.rl or settings.reward_model or settings.process_reward_model:
            raise ValueError(
                f"`adapter: {ADAPTER}` is for supervised fine-tuning, not for rl or reward models: use TRL's trainers "
                "with DipTrainerMixin."
            )
        if ("weights" in self.dip) == (settings.lora_r is not None):
            raise ValueError(
                f"`adapter: {ADAPTER}` needs lora_r (with the other lora_* settings of Axolotl) or dip.weights, and "
                f"not both; got lora_r={settings.lora_r} and dip={self.dip}."
            )
        try:
            DipConfig(**self.dip)
        except TypeError as error:
            raise ValueError(f"dip: {error}. It takes the fields of DipConfig.") from error
        return self


class DipPlugin(BasePlugin):
    """`plugins: [dipnet_hf.axolotl.DipPlugin]` and `adapter: dip` in a configuration of Axolotl."""

    def get_input_args(self) -> str:
        """The name of the settings' class."""
        return f"{__name__}.{DipArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter's name; it is no LoRA to Axolotl, which would load it as one."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=False)]

    def load_adapter(self, model, cfg, inference: bool = False, config_only: bool = False):
        """A model with a new adapter, or with that of `lora_model_dir`, and its config; None for other adapters."""
        if cfg.adapter != ADAPTER:
            return None
        config = dip_config(model, cfg)
        if config_only:
            return None, config
        if getattr(model, "is_quantized", False):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(cfg.gradient_checkpointing))
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return model, model.active_peft_config
        return get_peft_model(model, config), config

    def get_trainer_cls(self, cfg):
        """Axolotl's trainer with the objective; None for other adapters."""
        if cfg.adapter != ADAPTER:
            return None
        from axolotl.core.trainers.base import AxolotlTrainer

        class DipAxolotlTrainer(DipTrainerMixin, AxolotlTrainer):
            pass

        return DipAxolotlTrainer


def dip_config(model: Any, cfg: Any) -> DipConfig:
    """The config of `dip:`, around the LoRA of Axolotl's `lora_*` settings if it names no weights of its own."""
    fields: dict[str, Any] = dict(cfg.dip or {})
    if "weights" not in fields:
        fields["weights"] = _lora_config(model, cfg)
    return DipConfig(**{"task_type": "CAUSAL_LM", **fields})


def _lora_config(model: Any, cfg: Any) -> PeftConfig:
    from axolotl.loaders import load_lora

    return load_lora(model, cfg, config_only=True)[1]

"""dipnet_hf: Distributional Input Projection Networks (arXiv 2506.04690) as a PEFT tuner.

Importing it registers the tuner with PEFT, so that `PeftModel.from_pretrained` knows its adapters.
"""

__version__ = "0.3.0"

from . import registry  # noqa: F401
from .config import DipConfig
from .ensemble import predict
from .loss import DipLoss, dip_loss
from .model import DipModel, get_dip_model
from .objective import kl_weights

__all__ = [
    "DipConfig",
    "DipLoss",
    "DipModel",
    "DipSFTTrainer",
    "DipTrainer",
    "DipTrainerMixin",
    "GenerationCallback",
    "dip_loss",
    "get_dip_model",
    "kl_weights",
    "predict",
]


def __getattr__(name: str):
    # A trainer imports datasets, and TRL's imports much more: only who asks for one pays for it.
    if name in ("DipTrainer", "DipTrainerMixin"):
        from . import trainer

        return getattr(trainer, name)
    if name == "GenerationCallback":
        from .generation_callback import GenerationCallback

        return GenerationCallback
    if name == "DipSFTTrainer":
        from .sft_trainer import DipSFTTrainer

        return DipSFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

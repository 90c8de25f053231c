"""What DIPNet is compared with, one file per method; each works around any transformers Trainer and in a plain loop.

from dipnet_hf.regularizers import SAM, regularize

regularize(trainer, SAM(rho=0.05))
trainer.train()
"""

from .in_trainer import regularize
from .monteclora import MonteCLoRA
from .neftune import NEFTune
from .normality import NormalityNormalization
from .r_drop import RDrop
from .regularizer import Batch, Regularizer
from .sam import SAM
from .vib import VIB

METHODS: dict[str, type[Regularizer]] = {
    "monteclora": MonteCLoRA,
    "neftune": NEFTune,
    "normality": NormalityNormalization,
    "r_drop": RDrop,
    "sam": SAM,
    "vib": VIB,
}

__all__ = ["METHODS", "Batch", "Regularizer", "regularize", *sorted(method.__name__ for method in METHODS.values())]

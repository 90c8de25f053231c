"""What DIPNet is compared with, one file per method; each works around any transformers Trainer and in a plain loop.

from dipnet_hf.regularizers import SAM, regularize

regularize(trainer, SAM(rho=0.05))
trainer.train()
"""

from .blob import BLoB
from .deep_ensemble import DeepEnsemble
from .in_trainer import regularize
from .layer_dropout import LayerDropout
from .regularizer import Batch, Regularizer
from .sam import SAM
from .tfb import TFB

METHODS: dict[str, type[Regularizer]] = {
    "blob": BLoB,
    "layer_dropout": LayerDropout,
    "sam": SAM,
    "tfb": TFB,
}

__all__ = [
    "METHODS",
    "Batch",
    "DeepEnsemble",
    "Regularizer",
    "regularize",
    *sorted(method.__name__ for method in METHODS.values()),
]

"""What DIPNet is compared with, one file per method; each works around any transformers Trainer and in a plain loop.

from dipnet_hf.regularizers import SAM, regularize

regularize(trainer, SAM(rho=0.05))
trainer.train()
"""

from .averaging import WeightAverage
from .blob import BLoB
from .deep_ensemble import DeepEnsemble
from .gam import GAM
from .gradient_norm import GradientNormPenalty
from .in_trainer import regularize
from .l2_sp import L2SP
from .layer_dropout import LayerDropout
from .monteclora import MonteCLoRA
from .neftune import NEFTune
from .normality import NormalityNormalization
from .r_drop import RDrop
from .regularizer import Batch, Regularizer
from .sam import SAM
from .self_distillation import SelfDistillation
from .spectral import SpectralRegularization
from .spectral_norm import SpectralNorm
from .tensor_dropout import TensorDropout
from .tfb import TFB
from .vib import VIB
from .weight_compander import WeightCompander

METHODS: dict[str, type[Regularizer]] = {
    "blob": BLoB,
    "gam": GAM,
    "gradient_norm": GradientNormPenalty,
    "l2_sp": L2SP,
    "layer_dropout": LayerDropout,
    "monteclora": MonteCLoRA,
    "neftune": NEFTune,
    "normality": NormalityNormalization,
    "r_drop": RDrop,
    "sam": SAM,
    "self_distillation": SelfDistillation,
    "spectral": SpectralRegularization,
    "spectral_norm": SpectralNorm,
    "tensor_dropout": TensorDropout,
    "tfb": TFB,
    "vib": VIB,
    "weight_average": WeightAverage,
    "weight_compander": WeightCompander,
}

__all__ = [
    "METHODS",
    "Batch",
    "DeepEnsemble",
    "Regularizer",
    "regularize",
    *sorted(method.__name__ for method in METHODS.values()),
]

"""Instruments for the smoothness of a trained model: of any causal language model, and of a DIPNet's noisy mean.

An instrument measures a model as it answers where it is called: noise off by itself, the mean of k samples inside
`model.ensemble(k)`, one fixed draw of the noise inside `model.ensemble(1, seed=s)`. It leaves the model as it was.
"""

from .curvature import Curvature, Estimate, top_eigenvalues, trace
from .disagreement import Disagreement, disagreement
from .landscape import loss_line, loss_plane
from .learned_noise import LearnedNoise, learned_noise
from .lipschitz import LipschitzConstants, lipschitz_constants
from .perturbation import layer_places, places
from .predictions import Scores, scores
from .robustness import Robustness, attack_robustness, noise_robustness, weight_robustness

__all__ = [
    "Curvature",
    "Disagreement",
    "Estimate",
    "LearnedNoise",
    "LipschitzConstants",
    "Robustness",
    "Scores",
    "attack_robustness",
    "disagreement",
    "layer_places",
    "learned_noise",
    "lipschitz_constants",
    "loss_line",
    "loss_plane",
    "noise_robustness",
    "places",
    "scores",
    "top_eigenvalues",
    "trace",
    "weight_robustness",
]

"""Noise of a fixed level, as other papers have it: each is a `DipConfig` whose variances do not learn.

They are no entries of `METHODS`: `get_dip_model` takes them, and a recipe has them as `dip: {...}`. In a loop of one's
own, leave `model.logvars()` out of the optimizer.
"""

from typing import Any

from ..config import DipConfig


def hype_config(noise_std: float = 1e-5, **config: Any) -> DipConfig:
    """HyPe with normal noise (Yuan et al. 2022, arXiv 2212.08853): `h + e`, `e ~ N(0, noise_std^2)`, at every layer.

    The noise is of one absolute size, far below what a network notices. In a network whose hidden states are bfloat16
    (`dtype: bfloat16`) it is rounded away; under autocast it is not. The paper's other form, of uniform noise, is not
    offered.

        dip: {noise_scale: absolute, init_noise_std: 1.0e-5, logvar_learning_rate: 0.0, prior_weight: 0.0}

    Args:
        noise_std (`float`): the standard deviation at the input of every decoder layer.
        config: other fields of `DipConfig`, such as `weights`.
    """
    return _fixed_noise(noise_std, noise_scale="absolute", **config)


def layer_noise_config(noise_std: float | str = "auto", **config: Any) -> DipConfig:
    """DIPNet whose variances do not learn: what remains of its gain is not due to learning them.

        dip: {init_noise_std: auto, logvar_learning_rate: 0.0, prior_weight: 0.0}

    Args:
        noise_std (`float` or `str`): relative to the spread of every channel, or `"auto"`, see `DipConfig`.
        config: other fields of `DipConfig`.
    """
    return _fixed_noise(noise_std, **config)


def randomized_smoothing_config(noise_std: float | str = "auto", **config: Any) -> DipConfig:
    """Randomized smoothing (Cohen et al. 2019, arXiv 1902.02918) of the token embeddings; DIPNet's baseline RS.

    The network trains on `x + e`, `e ~ N(0, noise_std^2 I)`, and answers by `model.ensemble` as the smoothed one: by
    the mean of its predictions, where the paper takes the most frequent one and certifies a radius.

        dip: {target_sites: embedding, noise_scale: absolute, init_noise_std: auto, logvar_learning_rate: 0.0,
              prior_weight: 0.0}

    Args:
        noise_std (`float` or `str`): of every channel alike, in the embedding's units, or `"auto"`, see `DipConfig`.
        config: other fields of `DipConfig`.
    """
    return _fixed_noise(noise_std, target_sites="embedding", noise_scale="absolute", **config)


def _fixed_noise(noise_std: float | str, **config: Any) -> DipConfig:
    return DipConfig(init_noise_std=noise_std, logvar_learning_rate=0.0, prior_weight=0.0, **config)

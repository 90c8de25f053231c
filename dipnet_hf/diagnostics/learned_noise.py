"""What the learned variances say: by depth, and by channel.

Shape legend: K sites, D channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class LearnedNoise(NamedTuple):
    """How the learned standard deviations differ from their initial value and from one another."""

    ratio_by_depth: list[float]  # (K,), geometric mean over channels of std / initial std
    depth_share: float  # of the variance of ln std: what the site alone tells, 0 to 1
    channel_share: float  # what the channel alone tells, 0 to 1; the rest is the channel's own at each site
    scale_correlation: float | None  # of ln std with ln scale within a site, by ranks; None if one of them is constant


def learned_noise(noise: Mapping[str, Mapping[str, Sequence[float]]], init_std: float) -> LearnedNoise:
    """Split the variance of `ln std` over sites and channels into depth, channel and the rest (two-way, no repeats).

    Args:
        noise (`Mapping`): by site name, in the order of depth, the lists `scale` and `std`, as
            `dipnet_hf.card.read_noise` reads them.
        init_std (`float`): the standard deviation at which training began, in units of the scale; that is
            `model.init_noise_std`.

    Raises:
        ValueError: there is no site, or sites have different numbers of variances, or `init_std` is not positive.
    """
    if not init_std > 0:
        raise ValueError(f"init_std must be positive, got {init_std}.")
    widths = {len(site["std"]) for site in noise.values()}
    if len(widths) != 1:
        raise ValueError(f"Sites must have one number of variances, got {sorted(widths) or 'no site'}.")
    log_KD = np.log(np.array([site["std"] for site in noise.values()], dtype=np.float64))
    total = log_KD.var()
    of_depth, of_channel = (float(log_KD.mean(axis).var() / total) if total > 0 else 0.0 for axis in (1, 0))
    correlations = [_rank_correlation(site["std"], site["scale"]) for site in noise.values()]
    known = [value for value in correlations if value is not None]
    ratios = np.exp(log_KD.mean(1)) / init_std
    return LearnedNoise(ratios.tolist(), of_depth, of_channel, float(np.mean(known)) if known else None)


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: that of the ranks; None where one is constant, or there is one value for all channels."""
    if len(a) != len(b) or min(a) == max(a) or min(b) == max(b):
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]  # tied ones share their middle rank

"""How far the k samples of a DIPNet disagree about each token, and whether that tells where it is wrong.

Shape legend: N supervised tokens, V vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel

from .. import predict
from ..architecture import network_of, shifts_labels
from ..batches import supervised
from ..uncertainty import auroc
from .predictions import Batch, num_targets, standing_still


class Disagreement(NamedTuple):
    """What k samples say of N supervised tokens, on the CPU; entropies in nats."""

    mutual_information: torch.Tensor  # (N,), what the samples disagree on, at most ln k
    total_entropy: torch.Tensor  # (N,), of the mean distribution
    variance: torch.Tensor  # (N,), of the probabilities, summed over V
    correct: torch.Tensor  # (N,), 1 where the mean's likeliest token is the target, else 0

    def auroc(self) -> float | None:
        """The probability that a wrong token has more mutual information than a right one; None if all are alike."""
        if self.correct.min() == self.correct.max():
            return None
        return auroc(1 - self.mutual_information / self.mutual_information.max().clamp(min=1e-30), self.correct)


def disagreement(model: PeftModel, batches: Iterable[Batch], num_samples: int = 8, seed: int = 0) -> Disagreement:
    """Measure the disagreement of k samples at every supervised token; see `dipnet_hf.predict`.

    Args:
        model (`PeftModel`): with a DIP adapter; not inside an ensemble.
        batches (`Iterable[Mapping]`): model inputs with `labels`.
        num_samples (`int`): k; 1 knows no disagreement.
        seed (`int`): which k samples.

    Raises:
        ValueError: the model has no DIP adapter or is in an ensemble; no labels.
    """
    parts = []
    with standing_still(model):
        for batch in batches:
            num_targets(model, batch)
            prediction = predict(model, batch, num_samples, seed)
            shift = shifts_labels(network_of(model))
            log_probs_NV, targets_N = supervised(prediction.log_probs, batch["labels"], shift)
            chosen = [
                supervised(values, batch["labels"], shift)[0]
                for values in (prediction.mutual_information, prediction.total_entropy, prediction.variance)
            ]
            parts.append([*chosen, (log_probs_NV.argmax(-1) == targets_N).float()])
    return Disagreement(*(torch.cat(columns).cpu() for columns in zip(*parts, strict=True)))

"""NEFTune: uniform noise on the token embeddings in training, by transformers' own implementation."""

import math
from dataclasses import dataclass

from torch import nn
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from ..architecture import input_embedding
from .regularizer import Regularizer


@dataclass
class NEFTune(Regularizer):
    """NEFTune (Jain et al. 2023, arXiv 2310.05914, algorithm 1).

    The embeddings of a row of `L` tokens (padding counted) and `D` channels get noise, in training alone:
    `x + alpha / sqrt(L D) * u`, `u ~ U(-1, 1)` for every token and channel. To the bit what transformers' `Trainer`
    does given `neftune_noise_alpha`; here it is saved with the model, and works in a loop of one's own.

    Cost: 1 pass; no memory that stays.

    Args:
        alpha (`float`): the paper tries 5, 10 and 15. Give it here or to `TrainingArguments`: both would add noise.

    Raises:
        ValueError: a setting out of range, or a model without token embeddings.
    """

    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha of NEFTune must be positive and finite, got {self.alpha!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        embedding = input_embedding(model)
        if not isinstance(embedding, nn.Module) or isinstance(embedding, nn.modules.conv._ConvNd):
            raise ValueError(
                f"NEFTune adds noise to token embeddings, and {type(model).__name__} has none: noise at the input of "
                "any module is what DipConfig(target_modules=...) adds."
            )
        self._model = model
        self._hook = activate_neftune(model, self.alpha)

    def detach(self) -> None:
        """See `Regularizer`."""
        deactivate_neftune(self._model, self._hook)

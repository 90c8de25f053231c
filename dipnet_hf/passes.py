"""One kind of forward pass as one object: what it does to the model's inputs, and which draw each site gets.

`FreshPass` is the one of training and of sampling; `Ensemble` (ensemble.py) is the other. A tuner holds one at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from .draws import FreshDraw, SiteDraw
from .late_expansion import LateExpansion
from .noise import fold_in, new_key
from .projection import DipProjection

Inputs = tuple[tuple, dict[str, Any]]


class Pass(Protocol):
    """What decides a model's forward passes while it is attached."""

    def begin(
        self, args: tuple, kwargs: dict[str, Any], projections: list[DipProjection]
    ) -> tuple[Inputs | None, Sequence[SiteDraw]]:
        """Prepare one forward pass.

        Args:
            args, kwargs: the model's inputs.
            projections (`list[DipProjection]`): the sites where noise is on, none while it is off.

        Returns:
            `tuple`: the inputs that the model gets instead, None for its own; and the draw of every site.
        """

    def attached(self) -> AbstractContextManager[None]:
        """Context in which the pass is the model's."""


class KeySource:
    """The key of each forward pass: fresh from PyTorch's global generator, or a function of a seed and of n.

    Processes have different keys, as they are often seeded alike.

    Args:
        seed (`int`, *optional*): the n-th key is a function of it.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = None if seed is None else torch.tensor(seed)
        self._step = torch.tensor(0)

    def next(self) -> torch.Tensor:
        """Draw the next forward pass's key."""
        if self._seed is None:
            key = new_key()
        else:
            key = fold_in(self._seed, self._step)
            self._step = self._step + 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            key = fold_in(key, torch.distributed.get_rank())
        return key


class FreshPass:
    """Every row has noise of its own.

    Args:
        keys (`KeySource`): what the noise of each pass is drawn from.
        antithetic (`bool`): the second half of the rows has the negative noise of the first half.
        expansion (`LateExpansion`, *optional*): the rows are copies, which part at the first projected layer.
    """

    def __init__(self, keys: KeySource, antithetic: bool = False, expansion: LateExpansion | None = None) -> None:
        self.keys = keys
        self._antithetic = antithetic
        self._expansion = expansion

    def begin(
        self, args: tuple, kwargs: dict[str, Any], projections: list[DipProjection]
    ) -> tuple[Inputs | None, Sequence[SiteDraw]]:
        """See `Pass`."""
        if self._expansion is not None:
            self._expansion.stop()  # of a pass that failed
        if not projections:
            return None, []
        keys = fold_in(self.keys.next(), torch.arange(len(projections))).unbind()
        draws = [FreshDraw(key, self._antithetic) for key in keys]
        if self._expansion is None or args or not self._expansion.is_possible_in_training(kwargs):
            return None, draws
        return ((), self._expansion.start_from_copies(kwargs)), draws

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Pass`."""
        if self._expansion is None:
            yield
            return
        with self._expansion.attached():
            yield

"""One kind of forward pass as one object: what it does to the model's inputs, and which draw each site gets.

`FreshPass` is the one of training and of sampling; `Ensemble` (ensemble.py) is the other. A tuner has one at a time in
each context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .draws import FreshDraw, SiteDraw
from .late_expansion import Inputs, LateExpansion
from .noise import KeySource
from .projection import DipProjection


class Pass(Protocol):
    """What decides a model's forward passes. Threads may run it at the same time."""

    @property
    def expansion(self) -> LateExpansion | None:
        """What repeats rows at the layers, if anything does."""

    def begin(
        self, args: tuple, kwargs: dict[str, Any], projections: list[DipProjection]
    ) -> tuple[Inputs | None, Sequence[SiteDraw]]:
        """Prepare one forward pass.

        Args:
            args, kwargs: the model's inputs.
            projections (`list[DipProjection]`): the sites where noise is on, in the order of the modules.

        Returns:
            `tuple`: the inputs that the model gets instead, None for its own; and the draw of every site.
        """

    def end(self, output: Any) -> Any:
        """End the forward pass that began last in this thread: what the model returns instead, None for `output`."""


@dataclass
class FreshPass:
    """Every row has noise of its own.

    Args:
        keys (`KeySource`): what the noise of each pass is drawn from.
        antithetic (`bool`): the second half of the rows has the negative noise of the first half.
        expansion (`LateExpansion`, *optional*): the rows are copies, which part at the first projected layer.
    """

    keys: KeySource
    antithetic: bool = False
    expansion: LateExpansion | None = None

    def begin(
        self, args: tuple, kwargs: dict[str, Any], projections: list[DipProjection]
    ) -> tuple[Inputs | None, Sequence[SiteDraw]]:
        """See `Pass`."""
        self.end(None)  # a pass that failed
        if not projections:
            return None, []
        draws = [FreshDraw(key, self.antithetic) for key in self.keys.next(len(projections))]
        return None if self.expansion is None else self.expansion.expand_copies(args, kwargs), draws

    def end(self, output: Any) -> Any:
        """See `Pass`."""
        if self.expansion is not None:
            self.expansion.stop()

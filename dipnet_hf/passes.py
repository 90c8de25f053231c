"""One kind of forward pass as one object: what it does to the model's inputs, and which draw each site gets.

`FreshPass` is the one of training and of sampling; `Ensemble` (ensemble.py) is the other. A tuner has one at a time in
each context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .architecture import ROW_INPUTS, TEXT_INPUTS
from .draws import FreshDraw, SiteDraw
from .late_expansion import Inputs, LateExpansion
from .layout import Layout, padding_mask
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
    """Every row has noise of its own, or shares it with the rows that it is compared with.

    Args:
        keys (`KeySource`): what the noise of each pass is drawn from.
        antithetic (`bool`): the second half of the rows has the negative noise of the first half.
        expansion (`LateExpansion`, *optional*): the rows are copies, which part at the first projected layer.
        num_compared (`int`): into how many equal parts, which share their noise, the rows fall.
    """

    keys: KeySource
    antithetic: bool = False
    expansion: LateExpansion | None = None
    num_compared: int = 1

    def begin(
        self, args: tuple, kwargs: dict[str, Any], projections: list[DipProjection]
    ) -> tuple[Inputs | None, Sequence[SiteDraw]]:
        """See `Pass`."""
        self.end(None)  # a pass that failed
        if not projections:
            return None, []
        layout = _layout(args, kwargs)
        if layout is not None and not any(projection.site.spares_padding for projection in projections):
            layout = layout._replace(mask=None)  # draws are remembered, and would keep it alive
        draws = [
            FreshDraw(
                *(key, self.antithetic, layout, projection.known_dims, projection.site.spares_padding),
                num_compared=self.num_compared,
            )
            for key, projection in zip(self.keys.next(len(projections)), projections, strict=True)
        ]
        return None if self.expansion is None else self.expansion.expand_copies(args, kwargs), draws

    def end(self, output: Any) -> Any:
        """See `Pass`."""
        if self.expansion is not None:
            self.expansion.stop()


def _layout(args: tuple, kwargs: dict[str, Any]) -> Layout | None:
    """The layout of a pass on these inputs, None where none of them is a tensor."""
    text = next((kwargs[name] for name in TEXT_INPUTS if kwargs.get(name) is not None), None)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim() > 0]
    first = next(iter((*args, *kwargs.values())), None)  # whatever it is called
    if text is None and isinstance(first, torch.Tensor) and first.dim() > 0 and not first.is_floating_point():
        text = first
    if text is None:
        return Layout(tensors[0].shape[0]) if tensors else None
    if text.dim() < 2:
        return Layout(len(text))
    num_rows, length = text.shape[:2]
    others = [value for name, value in kwargs.items() if name not in ROW_INPUTS and isinstance(value, torch.Tensor)]
    # Images are numbers, and a decoder's tokens are of another length than its encoder's.
    is_text = all(
        value.shape[:2] == text.shape[:2] and not value.is_floating_point() for value in others if value.dim() > 1
    )
    return Layout(num_rows, length, padding_mask(kwargs, length), is_text=is_text)

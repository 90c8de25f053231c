"""A site's noise in one forward pass: fresh, a function of position, or repeated when a layer is recomputed.

Shape legend: S samples, B batch, L sequence, D hidden size.
"""

import threading
from collections import deque
from typing import NamedTuple, Protocol

import torch

from .noise import PositionNoise, Positions, add_noise, fold_in, project, shaped_std

# Far more forward passes than ever wait for their backward pass at the same time.
_MAX_REMEMBERED_FORWARDS = 256


class SiteDraw(Protocol):
    """What decides a site's noise in one forward pass."""

    def project(self, x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int) -> torch.Tensor:
        """Draw u of eq. (1)."""

    def repeated(self, number: int) -> "SiteDraw":
        """The draw for the site's `number`-th use in the same forward pass."""


class FreshDraw(NamedTuple):
    """Fresh noise for every row: see `noise.draw_noise`."""

    key: torch.Tensor
    antithetic: bool

    def project(self, x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int) -> torch.Tensor:
        """See `SiteDraw`."""
        return project(x, logvar, scale, self.key, self.antithetic, channel_dim)

    def repeated(self, number: int) -> "FreshDraw":
        """See `SiteDraw`."""
        return self._replace(key=fold_in(self.key, number))


class PositionDraw(NamedTuple):
    """One site's noise in a pass of k samples: a function of the sample and of each token's position."""

    num_samples: int
    noise: PositionNoise
    positions: Positions | None  # None for inputs without positions, such as images

    def project(self, x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int) -> torch.Tensor:
        """See `SiteDraw`."""
        if self.positions is None:
            noise = self.noise.whole(x.shape[1:], x.device)
            std = shaped_std(x, logvar, scale, channel_dim)
            return add_noise(x.unflatten(0, (self.num_samples, -1)), noise, std).flatten(0, 1)
        noise = self.noise.at(self.positions, x.shape[-1], x.device)
        rows, length = x.shape[0] // self.num_samples, noise.shape[2]
        if x.dim() == 2:  # experts and OPT's layers get the tokens of all rows in one dimension
            rows = rows // length
        if x.numel() != self.num_samples * rows * length * x.shape[-1]:
            raise ValueError(
                f"An ensemble draws noise for every token, but a site's input of shape {tuple(x.shape)} does not hold "
                f"{self.num_samples} samples of {length} tokens. Choose sites that see every token."
            )
        x_SBLD = x.reshape(self.num_samples, rows, length, x.shape[-1])
        return add_noise(x_SBLD, noise, shaped_std(x, logvar, scale, -1)).view(x.shape)

    def repeated(self, number: int) -> "PositionDraw":
        """See `SiteDraw`."""
        return self._replace(noise=PositionNoise(fold_in(self.noise.key, number), self.num_samples))


class RememberedForward(NamedTuple):
    """What a forward pass that may be recomputed has drawn, by site name."""

    thread: threading.Thread
    first_node: int  # the number of the first node of the graph that it builds; every thread counts for itself
    draws: dict[str, SiteDraw | None]


class RecomputeMemory:
    """The draws of recent forward passes, found again when a checkpointed layer is recomputed.

    A layer is recomputed within a backward pass, while autograd evaluates a node of the graph that the layer's forward
    pass built. Nodes are numbered in the order of their creation, so the node's number tells which forward pass that
    was, even if others have begun since. (A reentrant checkpoint within another creates its nodes late: the latest
    forward pass is taken then.) Every thread numbers its nodes from zero, and the backward pass may run in yet another
    thread: if several threads ran forward passes with gradients, the number tells nothing.
    """

    def __init__(self) -> None:
        self._forwards: deque[RememberedForward] = deque(maxlen=_MAX_REMEMBERED_FORWARDS)
        self.blind = False  # set by a compiled forward pass, which cannot be remembered

    def remember(self, draws: dict[str, SiteDraw | None]) -> None:
        """Note the draws, by site name, of the forward pass that begins now; a site without noise has none."""
        number = torch.autograd._get_sequence_nr()
        self._forwards.append(RememberedForward(threading.current_thread(), number, draws))

    def note_repeated(self, name: str) -> None:
        """Note that the site ran several times in this thread's latest pass, so that no one draw repeats its noise."""
        this_thread = threading.current_thread()
        latest = next((forward for forward in self._newest_first() if forward.thread is this_thread), None)
        if latest is not None and name in latest.draws:
            latest.draws[name] = None

    def recall(self, node: torch.autograd.graph.Node, name: str) -> SiteDraw | None:
        """The draw that the site had in the forward pass that made `node`, None if noise was off."""
        number = node._sequence_nr()
        # Those that began before the node was created, the latest of them first.
        candidates = [forward for forward in self._newest_first() if forward.first_node <= number]
        draws = candidates[0].draws if candidates else None
        if self.blind:
            raise RuntimeError(
                f"Site '{name}' is recomputed in the backward pass of a compiled model, which does not tell which "
                "draw to repeat. Project whole decoder layers, or switch compilation or checkpointing off."
            )
        if len({forward.thread for forward in candidates}) > 1:
            raise RuntimeError(
                f"Site '{name}' is recomputed in the backward pass, and several threads ran forward passes of this "
                "model with gradients, so it is not known which one is repeated. Run those that need no gradients "
                "under torch.no_grad(), or disable gradient checkpointing."
            )
        if draws is None or draws.get(name, "off") is None:
            raise RuntimeError(
                f"Site '{name}' is recomputed in the backward pass, but it did not run exactly once in the model's "
                "forward pass, so its noise cannot be repeated. Disable gradient checkpointing."
            )
        return draws.get(name)

    def _newest_first(self) -> list[RememberedForward]:
        return list(self._forwards)[::-1]  # a copy, as other threads add to it

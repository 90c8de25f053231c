"""A site's noise in one forward pass: fresh, a function of position, or repeated when a layer is recomputed.

Shape legend: S samples, B batch, L sequence, D hidden size.
"""

import math
import threading
from collections import deque
from typing import NamedTuple, Protocol

import torch

from .layout import Layout, TokenDims
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
    """Fresh noise for every row: see `noise.draw_noise`. The rows fall into `num_compared` parts with equal noise."""

    key: torch.Tensor
    antithetic: bool
    layout: Layout | None = None  # None for inputs that are no tensors: rows come first
    known_dims: TokenDims | None = None
    spares_padding: bool = False
    num_compared: int = 1

    def project(self, x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int) -> torch.Tensor:
        """See `SiteDraw`."""
        rows_dim = self._rows_dim(x, channel_dim) if self.antithetic or self.num_compared > 1 else 0
        if rows_dim == 0:
            u = self._project_rows(x, logvar, scale, channel_dim)
        else:
            rows_first = x.movedim(channel_dim, -1).movedim(rows_dim, 0)
            u = self._project_rows(rows_first, logvar, scale, -1)
            u = u.movedim(0, rows_dim).movedim(-1, channel_dim)
        if not self.spares_padding or self.layout is None or self.layout.mask is None:
            return u
        is_token = _mask_for(x.movedim(channel_dim, -1), self.layout, self.known_dims)
        return u if is_token is None else torch.where(is_token.movedim(-1, channel_dim), u, x)

    def _project_rows(
        self, x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int
    ) -> torch.Tensor:
        """Draw u for an input with its rows first."""
        if self.num_compared == 1:
            return project(x, logvar, scale, self.key, self.antithetic, channel_dim)
        if len(x) % self.num_compared:
            raise ValueError(
                f"Answers that are compared share their noise row by row, but a site's input of {tuple(x.shape)} "
                f"does not have {self.num_compared} equal parts. Set padding_free=False."
            )
        parts = x.chunk(self.num_compared)
        return torch.cat([project(part, logvar, scale, self.key, self.antithetic, channel_dim) for part in parts])

    def _rows_dim(self, x: torch.Tensor, channel_dim: int) -> int:
        shape = x.movedim(channel_dim, -1).shape[:-1]
        if self.layout is None:
            return 0
        rows_dim = self.layout.rows_dim(shape, self.known_dims)
        if rows_dim is None:
            raise ValueError(
                "Samples in pairs, and answers that are compared, have their noise row by row, and a site's input of "
                f"shape {tuple(x.shape)} does not tell which of it belongs to which of {self.layout.num_rows} rows. "
                "Set sampling='independent', or choose sites that see every token."
            )
        return rows_dim

    def repeated(self, number: int) -> "FreshDraw":
        """See `SiteDraw`."""
        return self._replace(key=fold_in(self.key, number))


def _mask_for(x: torch.Tensor, layout: Layout, known_dims: TokenDims | None) -> torch.Tensor | None:
    """Which tokens of an input with its channels last are no padding, shaped to broadcast; None if it has not all."""
    assert layout.mask is not None
    dims = layout.token_dims(x.shape[:-1], known_dims)
    if dims is None:
        return None
    shape = [1] * x.dim()
    shape[dims.rows], shape[dims.length] = layout.mask.shape
    mask = layout.mask if dims.rows < dims.length else layout.mask.T
    return mask.to(x.device).bool().reshape(shape)


class PositionDraw(NamedTuple):
    """One site's noise in a pass of k samples: a function of the sample and of each token's position."""

    num_samples: int
    noise: PositionNoise
    positions: Positions | None  # None for inputs without positions, such as images
    layout: Layout
    known_dims: TokenDims | None = None
    spares_padding: bool = False

    def project(self, x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int) -> torch.Tensor:
        """See `SiteDraw`."""
        if self.positions is None:
            noise = self.noise.whole(x.shape[1:], x.device)
            std = shaped_std(x, logvar, scale, channel_dim)
            return add_noise(x.unflatten(0, (self.num_samples, -1)), noise, std).flatten(0, 1)
        channels_last = x.movedim(channel_dim, -1)
        dims, positions = self._find(channels_last)
        # Of shape (S * B, L, ..., D): what stands between the tokens and the channels has noise of its own.
        if dims is None:
            tokens = channels_last.reshape(self.layout.num_rows, -1, x.shape[-1])
        else:
            tokens = channels_last.movedim(dims, (0, 1))
        noise = self.noise.at(positions, math.prod(tokens.shape[2:]), x.device).unflatten(-1, tokens.shape[2:])
        if self.spares_padding and self.layout.mask is not None:
            mask_BL = self.layout.mask.to(x.device)[:, -tokens.shape[1] :]
            noise = noise * mask_BL.view(1, *mask_BL.shape, *[1] * (noise.dim() - 3))
        samples = tokens.unflatten(0, (self.num_samples, -1))
        u = add_noise(samples, noise, shaped_std(x, logvar, scale, -1)).flatten(0, 1)
        u = u.reshape(channels_last.shape) if dims is None else u.movedim((0, 1), dims)
        return u.movedim(-1, channel_dim)

    def _find(self, x: torch.Tensor) -> tuple[TokenDims | None, Positions]:
        """The dimensions of the tokens in an input with its channels last, and their positions; None: all in one."""
        assert self.positions is not None
        dims = self.layout.token_dims(x.shape[:-1], self.known_dims)
        num_rows, length, kept = self.layout.num_rows, self.layout.length, self.layout.num_kept
        if dims is not None or (x.dim() == 2 and len(x) == num_rows * (length or 0)):
            return dims, self.positions
        if kept is not None and x.shape[:2] == (num_rows, kept):
            return TokenDims(0, 1), self.positions.last(kept)
        raise ValueError(
            f"An ensemble draws noise for every token, but a site's input of shape {tuple(x.shape)} does not hold "
            f"{self.num_samples} samples of {num_rows // self.num_samples} rows of {length} tokens. Choose sites that "
            "see these tokens, or average passes of model.sampling(seed)."
        )

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

    def __reduce__(self):
        return type(self), ()  # a copy of the model has run no forward pass, and a thread cannot be copied

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

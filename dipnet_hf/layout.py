"""Where the rows and the tokens of a forward pass stand in a site's input, which need not begin with the rows.

XLNet has the length first, Gemma 3n its streams; an expert or a router sees all tokens in one row.

Shape legend: R rows, L sequence, D channels.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class TokenDims(NamedTuple):
    """Which dimensions of an input are its rows and its sequence, the channels not counted."""

    rows: int
    length: int


def find_token_dims(shape: Sequence[int], num_rows: int, length: int) -> list[TokenDims]:
    """List the dimensions that may be rows and sequence: two neighbours of these sizes, in either order.

    A dimension of one entry, such as a single head's, may stand between them.

    Args:
        shape (`Sequence[int]`): of an input, without its channels.
        num_rows (`int`): R.
        length (`int`): L.
    """
    found = []
    for first, second in itertools.combinations(range(len(shape)), 2):
        if any(size != 1 for size in shape[first + 1 : second]):
            continue
        if (shape[first], shape[second]) == (num_rows, length):
            found.append(TokenDims(first, second))
        if (shape[first], shape[second]) == (length, num_rows):
            found.append(TokenDims(second, first))
    return found


class Layout(NamedTuple):
    """What the inputs of one forward pass tell of its rows and tokens."""

    num_rows: int  # R, those of all samples
    length: int | None = None  # L; None for inputs without a sequence, such as images
    mask: torch.Tensor | None = None  # of shape (R, L) or (R / S, L), 0 for padding
    num_kept: int | None = None  # layers that write nothing for later tokens may see only so many, the last
    is_text: bool = False  # there are no other inputs, whose sites have rows of their own

    def token_dims(self, shape: Sequence[int], known: TokenDims | None) -> TokenDims | None:
        """The dimensions of rows and sequence in an input, None if it has not both.

        Args:
            shape (`Sequence[int]`): of the input, without its channels.
            known (`TokenDims`, *optional*): what they are, where the sizes allow several.
        """
        if self.length is None:
            return None
        found = find_token_dims(shape, self.num_rows, self.length)
        if known in found:
            return known
        if found and shape[0] == self.num_rows and 0 not in found[0]:
            return None  # as many heads as rows, say
        return next(iter(found), None)

    def rows_dim(self, shape: Sequence[int], known: TokenDims | None) -> int | None:
        """The dimension whose halves are those of the rows, None if that cannot be told; see `token_dims`."""
        dims = self.token_dims(shape, known)
        if dims is not None:
            return dims.rows
        if shape[0] == self.num_rows:
            return 0
        if self.is_text and len(shape) == 1:  # an expert may see any tokens
            return 0 if self.length is not None and shape[0] == self.num_rows * self.length else None
        if shape[0] % self.num_rows == 0:  # windows or patches, row by row
            return 0
        return list(shape).index(self.num_rows) if list(shape).count(self.num_rows) == 1 else None


def padding_mask(inputs: dict[str, Any], length: int) -> torch.Tensor | None:
    """The part of a model's `attention_mask` that speaks of this pass's tokens, not of those in a cache."""
    mask = inputs.get("attention_mask")
    return mask[:, -length:] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

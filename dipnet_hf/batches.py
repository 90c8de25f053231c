"""Batches of S samples: every row repeated once per sample, and the positions at which there is a target.

Shape legend: S samples, B batch, L sequence, V vocabulary, N supervised tokens. A batch of S samples is laid out
sample by sample: rows 0..B-1 are sample 0, rows B..2B-1 sample 1, and so on.
"""

from typing import Any

import torch

IGNORE_INDEX = -100


def expand_batch(batch: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """Repeat every row of `batch` once per sample, sample by sample.

    With packed or padding-free data, where a row holds several sequences, the boundaries of each sample's sequences
    continue where those of the sample before ended.

    Args:
        batch (`dict`): model inputs with `labels`, whose first dimension is the batch.
        num_samples (`int`): S.
    """
    if num_samples == 1:
        return batch
    if not isinstance(batch.get("labels"), torch.Tensor):
        raise ValueError(
            f"num_samples={num_samples} repeats the rows of `labels`, a tensor, but the batch has none, only "
            f"{sorted(batch)}. Use num_samples=1."
        )
    rows = batch["labels"].shape[0]
    expanded = {**batch, **_boundaries(batch)}
    for name, value in expanded.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        if name.startswith("cu_seq_lens"):
            starts, total = value[:-1], value[-1:]
            expanded[name] = torch.cat([starts + s * total for s in range(num_samples)] + [num_samples * total])
        elif value.shape[0] == rows:
            expanded[name] = value.repeat(num_samples, *[1] * (value.dim() - 1))
        else:
            raise ValueError(
                f"num_samples={num_samples} repeats the rows of a batch, but {name} of shape {tuple(value.shape)} "
                f"does not have one for each of the {rows} rows. Use num_samples=1."
            )
    return expanded


def _boundaries(batch: dict[str, Any]) -> dict[str, Any]:
    """The boundaries of one row's sequences, if only its positions tell them.

    Flash attention finds them in the positions of a single row, but not in those of several rows.
    """
    positions = batch.get("position_ids")
    known = any(name.startswith("cu_seq_lens") for name in batch)
    if known or positions is None or positions.dim() != 2 or len(positions) > 1 or (positions == 0).sum() < 2:
        return {}
    starts = (positions[0] == 0).nonzero().flatten().to(torch.int32)
    boundaries = torch.cat([starts, starts.new_tensor([positions.shape[1]])])
    longest = int(boundaries.diff().max())
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def targets_of(batch: dict[str, Any], shift: bool) -> tuple[Any, bool]:
    """The labels of a batch, and whether those of position t are the targets of position t - 1.

    Args:
        batch (`dict`): model inputs with `labels`, and with `shift_labels` where they are shifted already.
        shift (`bool`): the model shifts its `labels`.
    """
    return (batch["shift_labels"], False) if "shift_labels" in batch else (batch["labels"], shift)


def num_supervised(labels: Any, shift: bool) -> int:
    """The number of supervised labels: of tokens, rows or entries of a tensor, or of items of a list."""
    if not isinstance(labels, torch.Tensor):
        return len(labels)
    return int(((labels[:, 1:] if shift else labels) != IGNORE_INDEX).sum())


def supervised(outputs: torch.Tensor, labels: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the supervised positions: outputs of shape `(rows * N, ...)` and their targets of shape `(rows * N,)`.

    Args:
        outputs (`torch.Tensor`): logits or hidden states of shape `(rows, L, ...)`, or `(rows, V)` for classes.
        labels (`torch.Tensor`): of shape `(rows, L)` or `(rows,)`, -100 where unsupervised.
        shift (`bool`): the labels of position t are the targets of position t - 1.
    """
    if shift:
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    mask = labels != IGNORE_INDEX
    return outputs[mask], labels[mask]

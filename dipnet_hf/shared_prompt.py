"""Several noise samples of an answer after one pass over its prompt: the prompt's noise is shared, so is its cost.

A row becomes its prompt, its answer, and S - 1 more copies of the answer that attend to the prompt and to themselves.
A copy begins with the prompt's last token, which predicts the answer's first: there noise is a copy's own again.

Shape legend: S samples, B batch, L sequence, W = L + (S - 1) * C the lengthened sequence, C the longest copy.
"""

import inspect
from typing import Any

import torch
from torch import nn

IGNORE_INDEX = -100
_INPUTS = {"input_ids", "attention_mask", "labels"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_shares_prompts(model: Any) -> None:
    """Check that a model takes a mask of its own and positions that repeat.

    Raises:
        ValueError: attention is of another kind (flash, flex, ALiBi), or the model has recurrent layers, or it adds
            the load-balancing loss of a mixture of experts, whose tokens the mask does not count.
    """
    config = _text_config(model)
    attention = getattr(config, "_attn_implementation", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    known = attention in ("eager", "sdpa") and layer_types <= _LAYER_TYPES and not getattr(config, "alibi", False)
    if not known or "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"shared_prompt_noise needs eager or sdpa attention in all layers and position ids: "
            f"{type(model).__name__} has attention {attention!r} and layers {sorted(layer_types) or 'of one kind'}. "
            "Set shared_prompt_noise=False."
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "shared_prompt_noise does not know the load-balancing loss: set the model's output_router_logits=False."
        )


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def lengthen(model: nn.Module, inputs: dict[str, Any], num_samples: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Give every row `num_samples` copies of its answer, which begins at its first label.

    Args:
        model (`nn.Module`): the network, whose windows must hold the lengthened row and whose dtype the mask has.
        inputs (`dict`): `input_ids` and `labels` of shape `(B, L)`, and `attention_mask` if there is padding.
        num_samples (`int`): S.

    Returns:
        `tuple`: inputs of shape `(B, W)` with `labels`, `position_ids` and a mask of shape `(B, 1, W, W)`; and each
        token's sample, int64 of shape `(B, W)`, -1 for what the samples share.

    Raises:
        ValueError: there are other inputs, or a row is longer than a sliding window.
    """
    if others := [name for name, value in inputs.items() if name not in _INPUTS and isinstance(value, torch.Tensor)]:
        raise ValueError(
            f"shared_prompt_noise takes {sorted(_INPUTS)}, got {others[0]} too. Set shared_prompt_noise=False."
        )
    ids_BL, labels_BL = inputs["input_ids"], inputs["labels"]
    window = getattr(_text_config(model), "sliding_window", None)
    if window is not None and ids_BL.shape[1] > window:
        raise ValueError(
            f"shared_prompt_noise takes rows within the sliding window of {window}, got {ids_BL.shape[1]}."
        )
    device, length = ids_BL.device, ids_BL.shape[1]
    mask_BL = inputs.get("attention_mask")
    real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    places_L = torch.arange(length, device=device)
    supervised_BL = labels_BL != IGNORE_INDEX
    ends_B = torch.where(real_BL, places_L, -1).amax(1)  # the last token that is not padding
    firsts_B = torch.where(supervised_BL, places_L, ends_B[:, None] + 1).amin(1)
    starts_B = (firsts_B - 1).clamp(min=0)  # the token that predicts the answer's first
    copy_length = int((ends_B - starts_B).amax()) + 1
    copied_BC = starts_B[:, None] + torch.arange(copy_length, device=device)
    inside_BC = copied_BC <= ends_B[:, None]
    copied_BC = copied_BC.clamp(max=length - 1)
    inside_BC &= real_BL.gather(1, copied_BC)

    source_BW = torch.cat([places_L.expand_as(ids_BL), copied_BC.repeat(1, num_samples - 1)], 1)
    real_BW = torch.cat([real_BL, inside_BC.repeat(1, num_samples - 1)], 1)
    first_BL = torch.where(places_L < starts_B[:, None], -1, 0)
    copies = torch.arange(1, num_samples, device=device).repeat_interleave(copy_length)
    sample_BW = torch.cat([first_BL, copies.expand(len(ids_BL), -1)], 1)
    positions_BL = (real_BL.long().cumsum(1) - 1).clamp(min=0)
    is_start_BW = (source_BW == starts_B[:, None]) & (sample_BW > 0)
    labels_BW = labels_BL.gather(1, source_BW).masked_fill(is_start_BW | ~real_BW, IGNORE_INDEX)
    lengthened = {
        **inputs,
        "input_ids": ids_BL.gather(1, source_BW),
        "labels": labels_BW,
        "position_ids": positions_BL.gather(1, source_BW),
        "attention_mask": _mask(model, real_BW, sample_BW, source_BW),
    }
    return lengthened, sample_BW


def _mask(model: Any, real_BW: torch.Tensor, sample_BW: torch.Tensor, source_BW: torch.Tensor) -> torch.Tensor:
    """What a token attends to: what is shared and its own sample, up to its own place, added to the scores."""
    same_BWW = (sample_BW[:, None, :] == -1) | (sample_BW[:, None, :] == sample_BW[:, :, None])
    earlier_BWW = source_BW[:, None, :] <= source_BW[:, :, None]
    itself_WW = torch.eye(real_BW.shape[1], dtype=torch.bool, device=real_BW.device)  # padding must see something
    seen_BWW = (same_BWW & earlier_BWW & real_BW[:, None, :]) | itself_WW
    dtype = model.dtype
    return torch.where(seen_BWW, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def by_sample(
    outputs_BW: torch.Tensor, labels_BW: torch.Tensor, sample_BW: torch.Tensor, num_samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the supervised positions sample by sample: outputs of shape `(S * N, ...)` and targets `(S * N,)`."""
    outputs_BW, labels_BW, sample_BW = outputs_BW[:, :-1], labels_BW[:, 1:], sample_BW[:, 1:]
    masks = [(labels_BW != IGNORE_INDEX) & (sample_BW == sample) for sample in range(num_samples)]
    return torch.cat([outputs_BW[mask] for mask in masks]), torch.cat([labels_BW[mask] for mask in masks])

"""Rows without padding: a batch's sequences one after the other, and packing, which joins sequences to full rows."""

from itertools import pairwise
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithFlattening, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def is_padding_free(model: PreTrainedModel) -> bool:
    """Whether sequences of one row are kept apart: by a flash attention, where no other layer mixes tokens."""
    return is_flash_attention_requested(model.config) and not _layers_with_a_state(model)


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model in which the sequences of a row would see each other, or cost what packing saves.

    Raises:
        ValueError: it has no flash attention, or layers that are no attention and carry a state from token to token.
    """
    if not is_flash_attention_requested(model.config):
        raise ValueError(
            f"packing needs a flash attention, which keeps the sequences of a row apart, and this model has "
            f"{model.config._attn_implementation}. Set attn_implementation: flash_attention_2; or leave packing out, "
            "with training.train_sampling_strategy: group_by_length."
        )
    if layers := _layers_with_a_state(model):
        raise ValueError(
            f"packing does not fit {model.config.model_type}: its layers ({', '.join(layers)}) carry what they read "
            "from one sequence of a row into the next. Leave packing out."
        )


def _layers_with_a_state(model: PreTrainedModel) -> list[str]:
    """Name the kinds of layers that are no attention and yet mix tokens, such as convolutions."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return sorted(kinds - ATTENTION_LAYERS) or ["recurrent"] * model._is_stateful


def pack(tokens: Dataset, max_length: int) -> Dataset:
    """Join sequences to rows of at most `max_length` tokens, by TRL's best-fit decreasing; none is cut.

    Returns:
        `Dataset`: rows whose `position_ids` begin at 0 with every sequence.

    Raises:
        ValueError: TRL is not installed.
    """
    try:
        from trl import pack_dataset
    except ImportError as error:
        raise ValueError("packing is TRL's: install it with pip install '.[trl]', or leave packing out.") from error
    packed = pack_dataset(tokens.select_columns(["input_ids", "labels"]), max_length, "bfd")
    return packed.map(
        lambda row: {"position_ids": [place for length in row["seq_lengths"] for place in range(length)]},
        remove_columns="seq_lengths",
        desc="Packing",
    )


class PaddingFreeCollator(DataCollatorWithFlattening):
    """Put a batch's sequences into one row, those of packed rows too, and tell flash attention where each ends."""

    def __init__(self) -> None:
        super().__init__(return_flash_attn_kwargs=True)

    def __call__(self, features: list[dict[str, Any]], *args, **kwargs):
        """Collate rows, packed or not."""
        return super().__call__([part for row in features for part in _sequences(row)], *args, **kwargs)


def _sequences(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "position_ids" not in row:
        return [row]
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    return [
        {name: row[name][start:end] for name in ("input_ids", "labels")}
        for start, end in pairwise([*starts, len(row["input_ids"])])
    ]

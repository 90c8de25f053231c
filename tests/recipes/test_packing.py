"""Packed rows: every sequence is there once and whole, and a batch of them is that of the sequences themselves."""

import pytest
import torch
from datasets import Dataset

from recipes.packing import PaddingFreeCollator, check_packing, is_padding_free, pack
from tests.tiny_models import build


def make_tokens(lengths=(5, 2, 7, 3, 1, 6, 4)):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * (length // 2) + ids[length // 2 :]}
        )
    return Dataset.from_list(rows)


def sequences(batch):
    """The (tokens, labels) of each sequence of a flattened batch, by its boundaries."""
    bounds = batch["cu_seq_lens_q"].tolist()
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return sorted((ids[start:end], labels[start:end]) for start, end in zip(bounds, bounds[1:]))


def test_a_batch_of_packed_rows_is_that_of_their_sequences():
    pytest.importorskip("trl")
    tokens = make_tokens()
    packed = pack(tokens, max_length=8)
    assert len(packed) == 4 and all(len(row["input_ids"]) <= 8 for row in packed)
    collator = PaddingFreeCollator()
    batch, expected = collator(list(packed)), collator(list(tokens))
    assert sequences(batch) == sequences(expected)
    assert int(batch["max_length_q"]) == int(expected["max_length_q"]) == 7
    positions = [
        place
        for start, end in zip(*[batch["cu_seq_lens_q"].tolist()[i:] for i in (0, 1)])
        for place in range(end - start)
    ]
    assert batch["position_ids"][0].tolist() == positions


def tiny(name, attention="flash_attention_2"):
    """A tiny model that says that it has an attention; none is run."""
    model = build(name)
    model.config._attn_implementation_internal = attention
    return model


def test_attention_alone_keeps_sequences_apart():
    model = tiny("llama")
    check_packing(model)
    assert is_padding_free(model)
    assert not is_padding_free(tiny("llama", "sdpa"))
    with pytest.raises(ValueError, match="packing needs a flash attention, .* this model has sdpa. Set attn_implem"):
        check_packing(tiny("llama", "sdpa"))


@pytest.mark.parametrize("name, layers", [("lfm2", "conv"), ("mamba2", "linear_attention|recurrent")])
def test_models_whose_layers_carry_a_state_are_refused(name, layers):
    model = tiny(name)
    assert not is_padding_free(model)
    with pytest.raises(ValueError, match=rf"packing does not fit .*: its layers \({layers}\) carry what they read"):
        check_packing(model)

"""Batches of several samples: which rows and boundaries there are, and what has no rows to repeat."""

import pytest
import torch

from dipnet_hf.batches import expand_batch


def test_expand_batch_repeats_sample_by_sample():
    batch = {
        "input_ids": torch.arange(6).view(2, 3),
        "labels": torch.arange(6).view(2, 3),
        "position_ids": torch.arange(6).view(2, 3),
        "cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "max_length_q": 3,
    }
    out = expand_batch(batch, 3)
    assert torch.equal(out["input_ids"], torch.cat([batch["input_ids"]] * 3))
    assert torch.equal(out["cu_seq_lens_q"], torch.tensor([0, 2, 5, 7, 10, 12, 15], dtype=torch.int32))
    assert out["max_length_q"] == 3
    assert expand_batch(batch, 1) is batch


def test_boundaries_that_only_positions_tell_are_made_known():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    expanded = expand_batch(batch, 2)
    for side in "qk":
        assert expanded[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5, 8, 10]
        assert expanded[f"max_length_{side}"] == 3
    assert "cu_seq_lens_q" not in expand_batch({**batch, "position_ids": torch.arange(5)[None]}, 2)


def test_what_cannot_be_repeated_is_refused():
    batch = {"labels": torch.zeros(2, 3), "position_ids": torch.zeros(3, 2, 3)}  # as of some vision-language models
    with pytest.raises(
        ValueError, match=r"position_ids of shape \(3, 2, 3\) does not have one for each of the 2 rows"
    ):
        expand_batch(batch, 2)
    with pytest.raises(ValueError, match="repeats the rows of `labels`.*Use num_samples=1"):
        expand_batch({"input_ids": torch.zeros(2, 3)}, 2)

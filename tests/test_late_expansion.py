"""Expanding the batch at the layers: what a layer is given for one row each, and for which forward passes."""

import torch

from dipnet_hf.architecture import describe
from dipnet_hf.late_expansion import LateExpansion
from tests.tiny_models import build


def make(name="llama", num_samples=3):
    model = build(name)
    return LateExpansion(model, [layer for _, layer in describe(model).layers[1:]], num_samples)


def test_masks_are_repeated_wherever_a_layer_is_given_them():
    rows = make()
    rows.start(4)
    mask, rotation, bias = torch.ones(4, 7), torch.ones(4, 8), torch.ones(4, 1, 7, 7)
    args, kwargs = rows._expand_at_layer(None, (torch.ones(4, 7, 32), mask.bool()), {"m": mask.long(), "b": bias})
    assert [len(value) for value in (*args, *kwargs.values())] == [12] * 4
    assert rows._repeat_nested(rotation) is rotation  # (L, head_dim), for all rows
    rows.stop()
    assert rows._expand_at_layer(None, (mask,), {}) is None


def test_the_first_copy_of_the_inputs_keeps_all_labels():
    ids = torch.arange(6).view(2, 3).repeat(3, 1)
    inputs = {"input_ids": ids, "attention_mask": None, "labels": ids, "use_cache": False}
    args, first = make().expand_copies((), inputs)
    assert args == ()
    assert torch.equal(first["input_ids"], ids[:2]) and first["labels"] is ids
    assert first["attention_mask"] is None and first["use_cache"] is False


def test_passes_whose_rows_are_not_known_to_be_copies_are_repeated_at_the_inputs():
    rows = make()
    ids = torch.ones(6, 3).long()
    assert rows.expand_copies((), {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(3)})
    assert rows.expand_copies((ids,), {}) is None
    for other in (
        {"pixel_values": torch.ones(2, 3)},
        {"cu_seq_lens_q": torch.tensor([0, 3])},
        {"position_ids": torch.ones(3, 6, 3).long()},
        {"output_hidden_states": True},
    ):
        assert rows.expand_copies((), {"input_ids": ids, **other}) is None
    assert make("gpt_bigcode").expand_copies((), {"input_ids": ids}) is None  # gives its output the inputs' rows
    assert make("falcon").expand_copies((), {"input_ids": ids}) is None  # its layers are given position biases

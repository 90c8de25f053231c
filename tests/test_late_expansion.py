"""Expanding the batch at the layers: what a layer is given for one row each, and for which forward passes."""

import torch
from torch import nn

from dipnet_hf.architecture import decoder_layers
from dipnet_hf.late_expansion import LateExpansion
from tests.tiny_models import build


def upper_expansion(model, num_samples=3):
    """The expansion at the layers of a model from the second one on."""
    return LateExpansion(model, [layer for _, layer in decoder_layers(model)[1:]], num_samples)


class Given(nn.Module):
    """A layer that returns what it was given."""

    def forward(self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None):
        return hidden_states, attention_mask, position_ids, position_embeddings


def test_masks_are_repeated_wherever_a_layer_is_given_them():
    layer = Given()
    expansion = LateExpansion(build("llama"), [layer], num_samples=3)
    hidden, mask, bias = torch.randn(4, 7, 32), torch.randn(4, 7) > 0, torch.randn(4, 1, 7, 7)
    rotation = torch.randn(4, 8)  # (L, head_dim), for all rows
    with expansion.attached():
        expansion.start(4)
        repeated = layer(hidden, mask, position_ids=mask.long(), position_embeddings=(bias, rotation))
        expansion.stop()
        assert layer(hidden)[0] is hidden
    for ours, value in zip(repeated[:3], (hidden, mask, mask.long())):
        assert torch.equal(ours, torch.cat([value] * 3))
    assert torch.equal(repeated[3][0], torch.cat([bias] * 3)) and repeated[3][1] is rotation


def test_the_first_copy_of_the_inputs_keeps_all_labels():
    ids = torch.arange(6).view(2, 3).repeat(3, 1)
    inputs = {"input_ids": ids, "attention_mask": None, "labels": ids, "use_cache": False}
    first = upper_expansion(build("llama")).start_from_copies(inputs)
    assert torch.equal(first["input_ids"], ids[:2]) and first["labels"] is ids
    assert first["attention_mask"] is None and first["use_cache"] is False


def test_passes_whose_rows_are_not_known_to_be_copies_are_repeated_at_the_inputs():
    expansion = upper_expansion(build("llama"))
    ids = torch.ones(6, 3).long()
    assert expansion.is_possible_in_training({"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(3)})
    for other in (
        {"pixel_values": torch.ones(2, 3)},
        {"cu_seq_lens_q": torch.tensor([0, 3])},
        {"position_ids": torch.ones(3, 6, 3).long()},
        {"output_hidden_states": True},
    ):
        assert not expansion.is_possible_in_training({"input_ids": ids, **other})
    for name in ("gpt_bigcode", "falcon"):  # gives its output the inputs' rows; its layers are given position biases
        assert not upper_expansion(build(name)).is_possible_in_training({"input_ids": ids})


def test_rows_of_flex_attention_are_repeated_at_the_inputs():
    """Its mask is one object for all rows, made before the layers, in which no row can be repeated."""
    model = build("llama")
    inputs = {"input_ids": torch.ones(6, 3).long()}
    assert upper_expansion(model).is_possible(inputs) and upper_expansion(model).is_possible_in_training(inputs)
    model.set_attn_implementation("flex_attention")
    assert not upper_expansion(model).is_possible(inputs)
    assert not upper_expansion(model).is_possible_in_training(inputs)

"""Expanding the batch at the layers: what a layer is given for one row each, and for which forward passes."""

import torch
from torch import nn

from dipnet_hf.architecture import decoder_layers, layers_from
from dipnet_hf.late_expansion import LateExpansion
from tests.tiny_models import build


def upper_expansion(model, num_samples=3):
    """The expansion at the layers of a model from the second one on."""
    return LateExpansion(model, layers_from(model, [decoder_layers(model)[1][0]]), num_samples)


class Given(nn.Module):
    """A layer that returns what it was given."""

    def forward(self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None):
        return hidden_states, attention_mask, position_ids, position_embeddings


def test_masks_are_repeated_wherever_a_layer_is_given_them():
    layer = Given()
    expansion = LateExpansion(build("llama"), [layer], num_samples=3)
    hidden, mask, bias = torch.randn(4, 7, 32), torch.randn(4, 7) > 0, torch.randn(4, 1, 7, 7)
    rotation = torch.randn(4, 8)  # (L, head_dim), for all rows
    layer.register_forward_pre_hook(expansion.expand_at_layer, with_kwargs=True)
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
    args, first = upper_expansion(build("llama")).expand_copies((), inputs)
    assert args == ()
    assert torch.equal(first["input_ids"], ids[:2]) and first["labels"] is ids
    assert first["attention_mask"] is None and first["use_cache"] is False


def test_passes_whose_rows_are_not_known_to_be_copies_are_repeated_at_the_inputs():
    expansion = upper_expansion(build("llama"))
    ids = torch.ones(6, 3).long()
    assert expansion.expand_copies((), {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(3)})
    assert expansion.expand_copies((ids,), {}) is None
    for other in (
        {"pixel_values": torch.ones(2, 3)},
        {"cu_seq_lens_q": torch.tensor([0, 3])},
        {"position_ids": torch.ones(3, 6, 3).long()},
        {"output_hidden_states": True},
    ):
        assert expansion.expand_copies((), {"input_ids": ids, **other}) is None
    for name in ("gpt_bigcode", "falcon"):  # gives its output the inputs' rows; its layers are given position biases
        assert upper_expansion(build(name)).expand_copies((), {"input_ids": ids}) is None


def test_rows_of_flex_attention_are_repeated_at_the_inputs():
    """Its mask is one object for all rows, made before the layers, in which no row can be repeated."""
    model = build("llama")
    ids = torch.ones(6, 3).long()
    expansion = upper_expansion(model)
    with torch.no_grad():
        assert expansion.expand({"input_ids": ids}, 6)["input_ids"] is ids
        assert expansion.expand_copies((), {"input_ids": ids}) is not None
        model.set_attn_implementation("flex_attention")
        assert len(expansion.expand({"input_ids": ids}, 6)["input_ids"]) == 18
        assert expansion.expand_copies((), {"input_ids": ids}) is None

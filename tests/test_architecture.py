"""What is asked of a network: its stack of layers, its head, its loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dipnet_hf.architecture import decoder_layers, plain_head
from tests.tiny_models import NUM_LAYERS, build


class Nested(nn.Module):
    """A model whose blocks hold lists of as many modules as it has layers."""

    def __init__(self, num_blocks, has_layers):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=NUM_LAYERS)
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS)) for _ in range(num_blocks)
        )
        if has_layers:
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS))


def test_a_list_within_another_is_no_stack_of_layers():
    model = Nested(num_blocks=2, has_layers=True)
    assert decoder_layers(model) == [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    outer = Nested(num_blocks=NUM_LAYERS, has_layers=False)
    assert decoder_layers(outer) == [(f"experts.{i}", block) for i, block in enumerate(outer.experts)]
    with pytest.raises(ValueError, match=f"No stack of {NUM_LAYERS} layers was found in Nested.*target_modules"):
        decoder_layers(Nested(num_blocks=2, has_layers=False))


@pytest.mark.parametrize("change", ["meta", "hook", "class", "shape"])
def test_a_head_that_is_not_a_plain_linear_layer_is_left_alone(change):
    base = build("llama")
    head = base.lm_head
    if change == "meta":
        head.to("meta")
    elif change == "hook":
        head.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "class":
        base.lm_head = type("OtherLinear", (nn.Linear,), {})(32, 64, bias=False)
    else:
        head.weight = nn.Parameter(torch.zeros(0))  # as sharded by DeepSpeed
    assert plain_head(base) is None and plain_head(build("llama")) is not None

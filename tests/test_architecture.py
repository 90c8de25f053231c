"""What is asked of a network: its stack of layers, its head, its loss."""

import pytest
import torch
from torch import nn

from dipnet_hf.architecture import plain_head
from tests.tiny_models import build


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

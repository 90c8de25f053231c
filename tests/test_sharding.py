"""What one process can show; what is sharded needs two, in `test_distributed.py` and `test_zero.py`."""

import torch
from torch import nn

from dipnet_hf.sharding import fill, is_in_zero, is_sharded, local, reshard, whole, whole_shape


def test_a_plain_tensor_is_whole():
    tensor = torch.zeros(3)
    assert whole(tensor) is tensor and local(tensor) is tensor
    fill(tensor, torch.ones(()))
    assert tensor.tolist() == [1, 1, 1]


def test_a_plain_model_is_not_sharded():
    model = nn.Linear(2, 2)
    assert not is_sharded(model)
    reshard(model)  # changes nothing
    assert model(torch.zeros(2)).shape == (2,)


class InZero(nn.Parameter):
    """Like a parameter that ZeRO-3 keeps: empty until it is gathered, and not a tensor of another kind."""

    ds_status, ds_shape = "NOT_AVAILABLE", torch.Size([3])

    def all_gather(self):
        self.data = torch.arange(3.0)


def test_what_zero_3_keeps_is_gathered_in_place():
    parameter = InZero(torch.empty(0))
    assert is_in_zero(parameter) and not is_in_zero(torch.empty(0))
    assert whole_shape(parameter) == (3,) and whole_shape(torch.empty(0)) == (0,)
    assert whole(parameter) is parameter and parameter.tolist() == [0, 1, 2]
    model = nn.Linear(2, 2)
    model.weight = parameter
    assert is_sharded(model)

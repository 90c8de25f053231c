"""What is not sharded; what is needs two processes, in `test_distributed.py`."""

import torch
from torch import nn

from dipnet_hf.sharding import fill, is_sharded, local, reshard, whole


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

"""Parameters whose values lie in parts on several processes, as FSDP2 keeps them: read whole, and written whole.

FSDP2 brings parameters together for a module's own forward and backward pass only. What this package computes from
them elsewhere asks here. Every process must make these calls, in the same order.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the values of all processes; itself where it is not sharded.

    Its gradient goes back to the shards as the mean over the processes, as FSDP2 and DDP reduce those of a forward
    pass. (`full_tensor()` by itself takes each process's own gradient for its shard.)
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write values, the same on every process, into a tensor; they broadcast to its shape."""
    if isinstance(tensor, DTensor) and not isinstance(values, DTensor):
        values = distribute_tensor(values.expand(tensor.shape).contiguous(), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of the tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model or parts of it, so that it runs only through the module sharded last."""
    is_inside = any(isinstance(module, FSDPModule) for module in model.modules())
    return is_inside or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let go of whole parameters that FSDP2 keeps after a forward pass, so that what is written now lasts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""Parameters whose values lie in parts on several processes, as FSDP2 and ZeRO-3 keep them: read and written whole.

Both bring parameters together for a module's own forward and backward pass only. What this package computes from
them elsewhere asks here. Every process must make these calls, in the same order.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the values of all processes; itself where it is not sharded.

    Its gradient goes back to the shards as the mean over the processes, as FSDP2 and DDP reduce those of a forward
    pass. (`full_tensor()` by itself takes each process's own gradient for its shard.) ZeRO-3 fills the parameter
    itself, and lets go of it when its module has run, or with the optimizer's step.
    """
    if is_in_zero(tensor):
        parameter: Any = tensor
        parameter.all_gather()  # nothing where it is whole
        return tensor
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write values, the same on every process, into a tensor; they broadcast to its shape."""
    if is_in_zero(tensor):
        _fill_in_zero(tensor, values)
        return
    if isinstance(tensor, DTensor) and not isinstance(values, DTensor):
        values = distribute_tensor(values.expand(tensor.shape).contiguous(), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def _fill_in_zero(parameter: Any, values: torch.Tensor) -> None:
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
        parameter.copy_(values)
    if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):  # it steps from a copy of its own
        deepspeed.utils.safe_set_local_fp32_param(parameter, parameter.ds_tensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of the tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of the tensor with the values of all processes."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_in_zero(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter: it is empty wherever its module does not run."""
    return hasattr(tensor, "ds_status")


def gather_below(module: nn.Module) -> None:
    """Have ZeRO-3 gather all parameters below a module when it runs, from its next run on.

    Those of a `ParameterDict`, which never runs, ZeRO-3 would notice in the first pass that uses them, and fail in the
    next one if passes without them came before.
    """
    for parameter in module.parameters():
        if is_in_zero(parameter):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has sharded the model or parts of it, so that it runs only through the outermost."""
    is_inside = any(isinstance(module, FSDPModule) for module in model.modules())
    return is_inside or any(isinstance(p, DTensor) or is_in_zero(p) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let go of whole parameters that FSDP2 keeps after a forward pass, so that what is written now lasts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

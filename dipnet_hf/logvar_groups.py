"""The log-variances in an optimizer: groups of their own, and what a site's channels share of their gradients."""

import itertools
import operator
import warnings
from typing import Any

import torch

from .sharding import local, whole

# Lists in an optimizer's group with an entry per parameter: of PyTorch for named parameters, and of PEFT's LoRA-FA.
_BESIDE_PARAMS = ("param_names", "names", "scaling_factors")


def give_own_groups(optimizer: Any, logvars: list[torch.nn.Parameter], learning_rate: float) -> None:
    """Put the log-variances into groups of their own, without weight decay, with the settings of those they leave."""
    own = {"weight_decay": 0.0, "lr": learning_rate}
    groups = [part | own for group in optimizer.param_groups if (part := _take_out(group, logvars))["params"]]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]] + groups
    held = {id(logvar) for group in groups for logvar in group["params"]}
    if left_out := [logvar for logvar in logvars if id(logvar) not in held]:
        is_named = any("param_names" in group for group in optimizer.param_groups)
        names = [(f"dip_logvar.{i}", logvar) for i, logvar in enumerate(left_out)]
        optimizer.add_param_group({"params": names if is_named else left_out} | own)


def _take_out(group: dict[str, Any], logvars: list[torch.nn.Parameter]) -> dict[str, Any]:
    """Take the log-variances out of an optimizer's group, and return one like it that holds them alone."""
    ids = {id(logvar) for logvar in logvars}
    is_logvar = [id(parameter) in ids for parameter in group["params"]]
    part = dict(group)
    for name in {"params", *_BESIDE_PARAMS} & set(group):
        part[name] = list(itertools.compress(group[name], is_logvar))
        group[name] = list(itertools.compress(group[name], map(operator.not_, is_logvar)))
    return part


def warn_of_given_groups(groups: list[dict[str, Any]], logvars: list[torch.nn.Parameter]) -> None:
    """Warn of an optimizer's groups in which the log-variances would not learn, or would decay."""
    decays = {id(parameter): group.get("weight_decay", 0.0) for group in groups for parameter in group["params"]}
    advice = (
        "Give them a group of their own: {'params': model.logvars(), 'weight_decay': 0.0, 'lr': "
        "config.logvar_learning_rate}, or let the trainer make the optimizer."
    )
    if any(id(logvar) not in decays for logvar in logvars):
        warnings.warn(f"The optimizer that was given does not train the log-variances. {advice}", stacklevel=3)
    elif any(decays[id(logvar)] for logvar in logvars):
        warnings.warn(f"The optimizer that was given decays the log-variances. {advice}", stacklevel=3)


@torch.no_grad()
def share_level(logvars: list[torch.nn.Parameter]) -> None:
    """Add to every channel's gradient `sqrt(D)` times their mean, before an optimizer's step.

    With one noise sample the gradient of one channel's log-variance is nearly all noise (SmolLM2-135M: the mean is
    0.02 of the standard deviation), that of the level they share is not (0.4). So the level learns within a hundred
    steps of Adam, which would take thousands for each channel by itself. A gradient of zero stays zero: the optimum is
    the same.

    Args:
        logvars (`list`): parameters of shape `(D,)`, one per site; those without a gradient are passed over.
    """
    for logvar in logvars:
        if logvar.grad is not None:
            local(logvar.grad).add_(shared_level(whole(logvar.grad)))


def shared_level(gradient: torch.Tensor) -> torch.Tensor:
    """What `share_level` adds to a gradient of shape `(D,)`: a scalar, and linear, so gradients may add up later."""
    return gradient.mean() * gradient.numel() ** 0.5 * (gradient.numel() > 1)

"""The log-variances' groups in an optimizer, and what a site's channels share of their gradients."""

import pytest
import torch

from dipnet_hf.logvar_groups import give_own_groups, share_level, warn_of_given_groups


def parameters(*sizes):
    return [torch.nn.Parameter(torch.zeros(size)) for size in sizes]


def groups_of(optimizer):
    return [
        ([parameter.numel() for parameter in group["params"]], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


def test_they_leave_their_groups_and_keep_those_settings_that_are_not_theirs():
    first, second, third, left_out = parameters(1, 2, 3, 4)
    groups = [{"params": [first, second], "betas": (0.5, 0.6)}, {"params": [third], "weight_decay": 0.7}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.2)
    give_own_groups(optimizer, [second, third, left_out], learning_rate=0.3)
    assert groups_of(optimizer) == [([1], 0.1, 0.2), ([2], 0.3, 0.0), ([3], 0.3, 0.0), ([4], 0.3, 0.0)]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.6)] * 2 + [(0.9, 0.999)] * 2


def test_names_follow_their_parameters():
    weight, logvar, left_out = parameters(1, 2, 3)
    optimizer = torch.optim.SGD([("weight", weight), ("logvar", logvar)], lr=0.1)
    give_own_groups(optimizer, [logvar, left_out], learning_rate=0.3)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["logvar"], ["dip_logvar.0"]]


@pytest.mark.parametrize(("decay", "is_given", "match"), [(0.1, True, "decays"), (0.0, False, "does not train")])
def test_groups_in_which_they_would_not_learn_are_warned_of(decay, is_given, match):
    weight, logvar = parameters(1, 2)
    optimizer = torch.optim.SGD([weight, logvar] if is_given else [weight], lr=0.1, weight_decay=decay)
    with pytest.warns(UserWarning, match=f"The optimizer that was given {match} the log-variances"):
        warn_of_given_groups(optimizer.param_groups, [logvar])


def test_the_channels_of_a_site_learn_their_level_together():
    channels, alone, idle = (torch.nn.Parameter(torch.zeros(size)) for size in (4, 1, 4))
    channels.grad, alone.grad = torch.tensor([1.0, 2.0, -1.0, 2.0]), torch.tensor([3.0])
    share_level([channels, alone, idle])
    assert torch.equal(channels.grad, torch.tensor([3.0, 4.0, 1.0, 4.0]))  # mean 1, root of 4 is 2
    assert torch.equal(alone.grad, torch.tensor([3.0])) and idle.grad is None

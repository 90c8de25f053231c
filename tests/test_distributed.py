"""Two gloo processes: one objective, one calibration, two noises."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dipnet_hf import dip_loss
from tests.helpers import collate, dip_model, make_rows, make_trainer, run_in_two_processes


def make_model(noise, **config):
    """A model that is calibrated by its trainer, or, with `noise_scale="absolute"`, not at all."""
    config = {"num_samples": 2, "stability_loss_weight": 0.5} | config
    return dip_model(**config, **({} if noise else {"init_noise_std": 0.0, "prior_weight": 0.0}))


def train(folder, batch_size, noise, result):
    """Train two steps; save the weights, the logs, the scales and one noisy forward of each process."""
    model = make_model(noise)
    trainer = make_trainer(model, make_rows(), folder, per_device_train_batch_size=batch_size, optim="sgd")
    trainer.train()
    torch.manual_seed(0)
    with torch.no_grad(), model.sampling():
        noisy = model(**collate(list(make_rows())[:4])).logits
    logs = [
        {k: v for k, v in log.items() if k in ("loss", "nll", "prior", "stability")}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    torch.save({"weights": model.state_dict(), "logs": logs, "noisy": noisy}, result)


def train_rank(rank, folder):
    """What each of two processes does."""
    for noise in (False, True):
        train(folder, 4, noise, f"{folder}/{noise}-two-{rank}.pt")
    for static_graph in (False, True):
        result = gradients_of(
            DistributedDataParallel(make_model(True, noise_scale="absolute").train(), static_graph=static_graph), rank
        )
        torch.save(result, f"{folder}/gradients-{static_graph}-{rank}.pt")


def gradients_of(model, rank):
    """The gradients of the second step, whose reduction a static graph has learnt from the first."""
    rows = list(make_rows())
    for _ in range(2):
        model.zero_grad()
        dip_loss(model, collate(rows[4 * rank : 4 * rank + 4])).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    run_in_two_processes(train_rank, folder)
    return folder


@pytest.fixture(params=[False, True], ids=["noise-off", "noise-on"])
def results(request, runs):
    """Whether noise was on, the results of both processes, and of one process on the joined batches."""
    noise = request.param
    train(runs, 8, noise, f"{runs}/{noise}-one.pt")
    names = ("two-0", "two-1", "one")
    return noise, *(torch.load(f"{runs}/{noise}-{name}.pt", weights_only=True) for name in names)


def test_ranks_agree_on_calibration_and_weights(results):
    _, first, second, one = results
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
        if "dip_scale" in name:
            # Both loaders give all rows of one epoch, so two processes have measured what one has.
            torch.testing.assert_close(tensor, one["weights"][name], atol=1e-6, rtol=1e-5)


def test_two_processes_equal_one_on_the_joined_batch_without_noise(results):
    noise, first, _, one = results
    if noise:
        assert first["logs"] != one["logs"]
        return
    for ours, theirs in zip(first["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-9)
    for name, tensor in first["weights"].items():
        torch.testing.assert_close(tensor, one["weights"][name], atol=1e-6, rtol=1e-5)


def test_ranks_draw_different_noise_from_the_same_seed(results):
    noise, first, second, _ = results
    assert torch.equal(first["noisy"], second["noisy"]) != noise


@pytest.mark.parametrize("static_graph", [False, True])
def test_gradients_are_averaged_though_the_loss_is_computed_from_hidden_states(runs, static_graph):
    first, second = (torch.load(f"{runs}/gradients-{static_graph}-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
    assert any("lm_head" in name for name in first) and any("dip_logvar" in name for name in first)

"""Two gloo processes: one objective, one calibration, two noises."""

import os
import socket

import pytest
import torch
import torch.multiprocessing

from dipnet_hf import DipConfig, DipTrainer, get_dip_model
from tests.test_trainer import collate, make_rows, make_trainer
from tests.tiny_models import build


def train(folder, batch_size, noise, result):
    """Train two steps; save the weights, the logs, the scales and one noisy forward of each process."""
    config = {"num_samples": 2, "stability_loss_weight": 0.5, "weights": "full"}
    config |= {"init_noise_std": 0.3} if noise else {"init_noise_std": 0.0, "alpha": 0.0, "beta": 0.0}
    model = get_dip_model(build("llama"), DipConfig(**config))
    trainer = make_trainer(model, make_rows(), folder, DipTrainer, per_device_train_batch_size=batch_size, optim="sgd")
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


def run_rank(rank, port, folder):
    """One of two processes, as a launcher starts it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    for noise in (False, True):
        train(folder, 4, noise, f"{folder}/{noise}-two-{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, folder), nprocs=2)
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

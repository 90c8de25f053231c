"""DeepSpeed's ZeRO-3 on two CPU processes, which has every parameter in parts, against DDP."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dipnet_hf import dip_loss
from dipnet_hf.sharding import is_in_zero, is_sharded, whole, whole_shape
from tests.helpers import WEIGHTS, collate, dip_model, make_rows, record, run_in_processes
from tests.tiny_models import build, build_with_outliers

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    # Nothing stays whole for being small, or for being needed soon.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
}
LORA = WEIGHTS["lora"]("llama")
CASES = {
    "lora": {"weights": LORA},
    "full": {},
    "frozen": {"weights": "frozen", "granularity": "layer"},
    "tied-head": {"base": "gemma3_text"},
    "one-sample": {"num_samples": 1, "stability_loss_weight": 0.0, "weights": LORA},
    "found-level": {"base": "outliers", "init_noise_std": "auto", "weights": LORA},
    "checkpointed": {"weights": LORA, "checkpointed": True},
    "loaded-in-parts": {"weights": LORA, "in_parts": True},
    "embedding-in-parts": {"weights": "frozen", "target_sites": "embedding", "in_parts": True},
}


def results(case, zero, rank):
    """Calibrate, and train three steps; the losses, the noise and the weights in the end."""
    import deepspeed

    checkpointed, in_parts = case.get("checkpointed", False), case.get("in_parts", False)
    config = {name: value for name, value in case.items() if name not in ("checkpointed", "in_parts", "base")}
    name = case.get("base", "llama")
    base = build_with_outliers() if name == "outliers" else build(name)
    if zero and in_parts:  # as `from_pretrained` gives it where TrainingArguments were made before
        deepspeed.zero.Init(module=base, config_dict_or_path=CONFIG)
        assert all(is_in_zero(parameter) for parameter in base.parameters())
    defaults = {"num_samples": 2, "stability_loss_weight": 0.5, "prior_std": 0.1, "prior_weight": 1.0}
    model = dip_model(base, **defaults | config).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = list(make_rows())[8 * rank : 8 * rank + 8]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if zero:
        if in_parts:
            with pytest.raises(ValueError, match="ZeRO-3 has sharded this model"):
                model.calibrate([collate(rows)])
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        assert is_sharded(model) and model.needs_calibration
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        model.calibrate([collate(rows)], wrapped=model)
    else:
        model.calibrate([collate(rows)])
        engine = DistributedDataParallel(model)
    outputs = record(model, ["base_model.model"], at_output=True)["base_model.model"]
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        loss = dip_loss(engine, collate(rows[4 * (step % 2) :][:4]))
        losses.append([term.item() for term in loss])
        if zero:
            engine.backward(loss.loss)
            engine.step()
        else:
            loss.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert outputs[-1].logits.shape[1] == 0  # whole logits are of no token
    return {
        "losses": torch.tensor(losses),
        "noise": model.noise_summary(),
        "shapes": {name: tuple(whole_shape(p)) for name, p in model.named_parameters()},
        "weights": {name: whole(p).detach().clone() for name, p in model.named_parameters()},
    }


def train_rank(rank, folder):
    """What each process does."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for name, case in CASES.items():
        for zero in (False, True):
            torch.save(results(case, zero, rank), f"{folder}/{name}-{zero}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    run_in_processes(2, train_rank, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_zero_3_trains_as_ddp_does(runs, name):
    for rank in range(2):
        expected, actual = (torch.load(f"{runs}/{name}-{zero}-{rank}.pt") for zero in (False, True))
        torch.testing.assert_close(actual["losses"], expected["losses"], atol=1e-6, rtol=1e-6)
        assert actual["shapes"] == expected["shapes"]
        for parameter, values in expected["weights"].items():
            torch.testing.assert_close(actual["weights"][parameter], values, atol=1e-6, rtol=1e-5, msg=parameter)
        for ours, theirs in zip(actual["noise"], expected["noise"], strict=True):
            assert ours.pop("name") == theirs.pop("name") and ours == pytest.approx(theirs, rel=1e-5)

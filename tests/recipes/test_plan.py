"""The plan of a run: what a launch leaves on a device, and what is told and refused."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from recipes import finetune, plan
from recipes.config import load_config
from recipes.footprint import Footprint
from recipes.plan import Launch, changes, read_launch, take

PEAK = {"weights": 1000, "optimizer": 80, "gradients": 40, "activations": 300, "logits": 7}
FOOTPRINT = Footprint(500, 10, PEAK, evaluation=1500, cache=60, layer=25, num_operations=1)


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    """Take away what a launcher may have said to this process."""
    for name in (
        "WORLD_SIZE",
        "RANK",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_MIXED_PRECISION",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def show(model_folder, tmp_path, capsys):
    """Return a function that runs `--plan` on the tiny model, of which only `config.json` is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    config = {
        "model": str(tmp_path / "model"),
        "dataset": "nowhere",
        "max_length": 64,
        "weights": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"},
        "dip": {},
        "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))

    def run(*arguments):
        finetune.main([str(path), *arguments])
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch(1, "one process")),
        ({"WORLD_SIZE": "4", "ACCELERATE_MIXED_PRECISION": "bf16"}, Launch(4, "DDP", "bf16")),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}, Launch(4, "FSDP2")),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            Launch(2, "ZeRO-3"),
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, Launch(1, "ZeRO-2")),
    ],
)
def test_a_launch_is_read(environment, launch):
    assert read_launch(environment) == launch


@pytest.mark.parametrize(
    ("launch", "weights", "optimizer", "gradients"),
    [
        (Launch(), 1000, 80, 40),
        (Launch(4, "DDP"), 1000, 80, 40 + 4 * 10),
        (Launch(4, "ZeRO-1"), 1000, 20, 40),
        (Launch(4, "ZeRO-2"), 1000, 20, 10),
        (Launch(4, "ZeRO-3"), 250 + 2 * 25, 20, 10),
        (Launch(4, "FSDP2"), 250 + 2 * 25, 20, 10),
        (Launch(1, "FSDP2"), 1000, 80, 40),
    ],
    ids=lambda value: value.strategy if isinstance(value, Launch) else "",
)
def test_processes_share_what_their_strategy_shares(launch, weights, optimizer, gradients):
    kept = take(FOOTPRINT, launch)
    training = {"weights": weights, "optimizer": optimizer, "gradients": gradients, "activations": 300, "logits": 7}
    assert kept.training == training
    assert kept.evaluation == 1500 - (1080 - weights - optimizer)
    assert kept.generation == weights + optimizer + 60
    assert kept.peak == max(sum(training.values()), kept.evaluation, kept.generation)


def test_a_plan_needs_neither_weights_nor_data(show, model_folder):
    lines = show("--plan").splitlines()
    assert lines[0].endswith("1 x CPU, one process") or torch.cuda.is_available()
    num_parameters = AutoModelForCausalLM.from_pretrained(model_folder).num_parameters()
    assert lines[1].startswith(f"{num_parameters:,} parameters, ")
    rows = {line[:28].strip(): line[28:].split() for line in lines}
    kinds = ("weights", "optimizer", "gradients", "activations", "logits")
    for column in (0, 1):
        parts = sum(float(rows[kind][column]) for kind in kinds)
        assert float(rows["training step"][column]) == pytest.approx(parts, abs=0.03)
    assert "tokens/s" in lines[-1] or "fits" in lines[-1]


def test_what_would_fit_is_told(show, monkeypatch):
    monkeypatch.setattr(plan, "GIB", 2**20)
    told = show("--plan", "2")
    assert "It does not fit in 2.0 GiB" in told
    advice = [line for line in told.splitlines() if line.startswith("  ") and " GiB" in line and "=" in line]
    assert [line.split()[-1] for line in advice] == [
        "training.activation_checkpointing=true",
        "training.gradient_accumulation_steps=2",
        "bfloat16}",
        "max_length=32",
    ]
    for line in advice:
        assert ("fits" in line) == (float(line.split()[0]) <= 2)


def test_what_is_advised_can_be_given_to_set(show, tmp_path):
    config = load_config(str(tmp_path / "config.yaml"))
    for change, changed in changes(config).items():
        overrides = [change] if change.startswith("quantization") else change.split()
        assert load_config(str(tmp_path / "config.yaml"), overrides) == changed


def test_only_the_first_process_tells(show, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert show("--plan", "80") == ""
    monkeypatch.setenv("RANK", "0")
    told = show("--plan", "80")
    assert "4 x " in told and ", DDP" in told and told.endswith("It fits in 80.0 GiB.\n")


def test_a_plan_of_what_cannot_run_is_refused(show, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"3 processes were started on this machine, and it has 2 device\(s\)"):
        show("--plan")


@pytest.mark.parametrize("memory", ["0", "-1", "nan", "much"])
def test_an_amount_of_memory_is_a_positive_number(show, memory):
    with pytest.raises(SystemExit):
        show(f"--plan={memory}")

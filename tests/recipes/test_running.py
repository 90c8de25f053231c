"""Checkpoints, a model that is saved whole, and launches of several processes."""

import contextlib
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import save_file
from torch.distributed.fsdp import StateDictType
from transformers import TrainerState

from recipes.running import check_devices, last_whole_checkpoint, save_model, train, warn_of_other_processes

ROOT = Path(__file__).parents[2]


def save_checkpoint(folder, step):
    """Write what tells a whole checkpoint, in the Trainer's order."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_file({"weight": torch.ones(100)}, checkpoint / "adapter_model.safetensors")
    torch.save({"cpu": torch.random.get_rng_state()}, checkpoint / "rng_state.pth")
    TrainerState(global_step=step).save_to_json(str(checkpoint / "trainer_state.json"))
    return checkpoint


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for step in (100, 20, 3):
        save_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


@pytest.mark.parametrize("file", ["trainer_state.json", "rng_state.pth", "adapter_model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "half"])
def test_a_torn_checkpoint_is_passed_over(tmp_path, caplog, file, share):
    whole, torn = save_checkpoint(tmp_path, 2), save_checkpoint(tmp_path, 4) / file
    data = torn.read_bytes()
    torn.write_bytes(data[: int(share * len(data))])
    assert last_whole_checkpoint(tmp_path) == str(whole)
    assert "checkpoint-4 was not saved to its end" in caplog.text


def test_a_checkpoint_without_its_last_file_is_passed_over(tmp_path):
    (save_checkpoint(tmp_path, 4) / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) is None


def test_a_full_disk_is_told_from_other_errors(tmp_path):
    class Full:
        args = SimpleNamespace(output_dir=tmp_path)

        def __init__(self, message):
            self.message = message

        def train(self, resume_from_checkpoint):
            raise RuntimeError(self.message)

    with pytest.raises(OSError, match="checkpoint could not be written to .*: is the disk full"):
        train(Full("basic_ios::clear: iostream error"), None)
    with pytest.raises(RuntimeError, match="another"):
        train(Full("another"), None)


def test_another_number_of_processes_is_warned_of(tmp_path, caplog):
    checkpoint = save_checkpoint(tmp_path, 4)
    warn_of_other_processes(str(checkpoint), 1)
    assert not caplog.text
    warn_of_other_processes(str(checkpoint), 2)
    assert "saved by a run of 1 process(es) and is resumed by 2" in caplog.text
    (checkpoint / "rng_state.pth").unlink()
    for rank in range(4):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    caplog.clear()
    warn_of_other_processes(str(checkpoint), 4)
    assert not caplog.text
    warn_of_other_processes(str(checkpoint), 2)
    assert "saved by a run of 4 process(es)" in caplog.text


def test_a_sharded_model_is_saved_whole_after_checkpoints_in_parts(tmp_path):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")

    def save(folder):
        assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
        Path(folder).mkdir()
        (Path(folder) / "adapter_model.safetensors").touch()

    trainer = SimpleNamespace(
        is_fsdp_enabled=True,
        save_model=save,
        is_world_process_zero=lambda: True,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), wait_for_everyone=lambda: None),
    )
    save_model(trainer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT


@pytest.mark.parametrize(
    ("environment", "num_devices", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 2, r"4 processes were started on this machine, and it has 2 device\(s\)"),
        ({"ACCELERATE_USE_FSDP": "true"}, 0, "asks for FSDP, which accelerate leaves out on a CPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, 2, "asks for DeepSpeed"),
        ({"LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"}, 2, None),
        ({"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, 2, None),
        ({"LOCAL_WORLD_SIZE": "2"}, 0, None),
        ({}, 1, None),
    ],
)
def test_a_launch_that_would_do_another_thing_is_refused(monkeypatch, environment, num_devices, message):
    for name in ("LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: num_devices)
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_devices()


LAUNCHES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def test_every_launch_is_there():
    names = {"single", "ddp", "fsdp2", "zero2", "zero3", "two_nodes_fsdp2"}
    assert {path.stem for path in LAUNCHES} == names


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_a_launch_file_whole(path):
    config = load_config_from_file(str(path))  # refuses a key that it does not know
    command = path.read_text().splitlines()[0]
    assert command.startswith(f"# accelerate launch --config_file recipes/accelerate/{path.name} ")
    parser = launch_command_parser()
    args = parser.parse_args([*shlex.split(command)[3:]])
    assert args.training_script == "recipes/finetune.py"
    options = vars(args)
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(options)
    strategy = {"DEEPSPEED": "deepspeed_config", "FSDP": "fsdp_config"}.get(config.distributed_type.name)
    assert all(bool(getattr(config, name)) == (name == strategy) for name in ("deepspeed_config", "fsdp_config"))

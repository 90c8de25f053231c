"""Checkpoints of which a killed process left a part, and a model that is saved whole."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from recipes.running import last_whole_checkpoint, train


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

"""benchmarks/same_numbers.py: the same code has the same numbers, and a change of one bit is seen."""

import pytest
import torch

from benchmarks import same_numbers

# transformers 5.23 has renamed the method that switches checkpointing on.
pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")


def test_numbers_repeat_and_tell_one_config_from_another():
    pairs = same_numbers.numbers("llama", same_numbers.CONFIGS["pairs"])
    assert pairs == same_numbers.numbers("llama", same_numbers.CONFIGS["pairs"])
    other = same_numbers.numbers("llama", same_numbers.CONFIGS["pairs"] | {"init_noise_std": 0.1000001})
    assert pairs.keys() == other.keys()
    same = {name for name in pairs if pairs[name] == other[name]}
    assert "noise-free logits" in same and same <= {"noise-free logits", "ensemble text"}


def test_a_digest_sees_the_last_bit():
    tensor = torch.ones(3)
    assert same_numbers.digest(tensor) == same_numbers.digest(tensor.clone())
    changed = torch.nextafter(tensor, torch.tensor([1.0, 1.0, 2.0]))
    assert same_numbers.digest(tensor) != same_numbers.digest(changed)

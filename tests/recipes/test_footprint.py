"""What a step takes, found without data, against the same step run with data, and against known answers."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, set_seed

from dipnet_hf import dip_loss, get_dip_model
from recipes.config import EvaluationConfig, FinetuneConfig
from recipes.footprint import Meter, build, measure

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
DIP = {"init_noise_std": 0.1, "noise_scale": "absolute"}


@pytest.fixture(scope="module")
def config(model_folder):
    """A run of the tiny Llama: 16 channels, 2 layers, 2 heads, 257 tokens."""
    return FinetuneConfig(
        model=str(model_folder),
        dataset="none",
        training={"output_dir": "none", "per_device_train_batch_size": 4, "use_cpu": True},
        weights=LORA,
        dip=DIP,
        max_length=48,
        evaluation=EvaluationConfig(max_new_tokens=16, batch_size=3),
    )


def footprint(config):
    return measure(config, config.training_arguments(), for_gpu=False)


@pytest.fixture(scope="module")
def kept(config):
    """What the run takes as it is."""
    return footprint(config)


def with_training(config, **training):
    return replace(config, training={**config.training, **training})


def train_with_data(config):
    """The same step on real tensors: the operations, and the peak by PyTorch's counter and by the meter's own."""
    set_seed(0)
    network = AutoModelForCausalLM.from_pretrained(config.model, attn_implementation=config.attn_implementation)
    model = get_dip_model(network, config.dip_config()).train()
    ids = torch.ones(4, config.max_length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    dip_loss(model, batch)  # it probes the model once
    with FlopCounterMode(display=False) as counter:
        dip_loss(model, batch).loss.backward()
    model.zero_grad()
    with Meter() as meter:
        dip_loss(model, batch).loss.backward()
    return counter.get_total_flops(), meter


@pytest.mark.parametrize(("weights", "num_samples"), [(LORA, 2), ("full", 1)], ids=["lora", "full"])
def test_a_step_takes_what_it_takes_with_data(config, weights, num_samples):
    config = replace(config, weights=weights, attn_implementation="eager", dip={**DIP, "num_samples": num_samples})
    planned = footprint(config)
    num_operations, meter = train_with_data(config)
    assert planned.num_operations == num_operations == meter.num_operations
    held = sum(tensor.nbytes for tensor in (*build(config).parameters(), *build(config).buffers()))
    assert planned.peak["weights"] == held
    found = sum(planned.peak.values()) - held - planned.peak["optimizer"]
    # The meter sees the weights of the model with data only where they are used.
    assert found == pytest.approx(sum(meter.peak.values()) - held, rel=0.05)


def test_the_optimizer_holds_two_numbers_per_trained_one(config, kept):
    model = build(config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert kept.num_trainable == sum(map(torch.Tensor.numel, parameters))
    assert kept.peak["optimizer"] == 8 * kept.num_trainable + 4 * len(parameters)


def test_an_optimizer_of_another_library_is_refused(config):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="PyTorch's optimizers, got optim=.*adamw_8bit"):
        footprint(with_training(config, optim="adamw_8bit"))


def test_recomputing_trades_operations_for_memory(config, kept):
    recomputed = footprint(with_training(config, activation_checkpointing=True))
    assert recomputed.peak["activations"] < 0.8 * kept.peak["activations"]
    assert kept.num_operations < recomputed.num_operations < 2 * kept.num_operations


def test_half_precision_halves_the_base_and_the_activations(config, kept):
    half = footprint(with_training(replace(config, dtype="bfloat16"), bf16=True))
    assert half.num_operations == kept.num_operations
    assert half.peak["weights"] < 0.7 * kept.peak["weights"]  # the adapter stays in float32
    assert half.peak["activations"] < 0.9 * kept.peak["activations"]


def test_plain_training_has_whole_logits(config, kept):
    plain = footprint(replace(config, dip=None))
    assert kept.num_trainable - plain.num_trainable == 2 * 16  # a log-variance per channel of two layers
    assert plain.peak["logits"] >= 4 * 48 * 257 * 4


def test_the_cache_holds_keys_and_values_of_prompt_and_answer(kept):
    layers, keys_and_values, channels, float32 = 2, 2, 16, 4
    assert kept.cache == 3 * (48 + 16) * layers * keys_and_values * channels * float32


def test_a_quantized_base_has_the_bytes_of_bitsandbytes(config, kept):
    functional = pytest.importorskip("bitsandbytes.functional", reason="quantized models need bitsandbytes")
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    planned = footprint(replace(config, quantization=bits))
    network = AutoModelForCausalLM.from_pretrained(config.model)
    saved = 0
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = functional.quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True, blocksize=64
            )
            saved += module.weight.nbytes - packed.nbytes - state.absmax.nbytes - state.state2.absmax.nbytes
    assert kept.peak["weights"] - planned.peak["weights"] == pytest.approx(saved, rel=0.01)
    assert planned.num_operations == kept.num_operations


def test_the_meter_keeps_the_most_that_was_alive():
    with Meter() as meter:
        a = torch.ones(1000)
        b = a + a
        view = b[:10]
        del a
        c = torch.ones(500)
        del b
        freed = weakref.ref(c)
        del c
    assert meter.peak == {"activations": 8000}
    assert freed() is None and view.numel() == 10

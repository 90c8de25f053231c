"""Memory and seconds of a training step of the paper's six models, with LoRA and QLoRA, plain and with noise.

    python benchmarks/paper_models.py            # table and benchmarks/results/paper_models-cuda.json

Weights are random: neither memory nor time depends on them, and nothing is downloaded. On a CPU the same models are
measured with two small layers, which shows that the script runs and no more.
"""

import argparse
import gc
import itertools
import statistics
import sys
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import seconds, write_results
from benchmarks.step import step
from dipnet_hf import DipConfig, DipTrainer, get_dip_model
from recipes.running import prepare_quantized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH_SIZE, LENGTH = (4, 512) if DEVICE == "cuda" else (2, 16)
NUM_WARMUP, NUM_STEPS = 2, 3

GEMMA3_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}
GEMMA3_TEXT = {"vocab_size": 262_208, "head_dim": 256, "sliding_window": 1024, "query_pre_attn_scalar": 256}


def _llama(**sizes) -> LlamaConfig:
    return LlamaConfig(vocab_size=128_256, num_key_value_heads=8, max_position_embeddings=131_072, **sizes)


def _qwen2(**sizes) -> Qwen2Config:
    return Qwen2Config(max_position_embeddings=32_768, **sizes)


def _gemma3(**sizes) -> Gemma3Config:
    return Gemma3Config(text_config=GEMMA3_TEXT | sizes, vision_config=GEMMA3_VISION, mm_tokens_per_image=256)


# As the `config.json` of each has it; what is left out is the class's own default. Keys: names on the Hub.
PAPER_MODELS: dict[str, PretrainedConfig] = {
    "Qwen/Qwen2.5-3B": _qwen2(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B": _qwen2(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.2-3B": _llama(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B": _llama(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    ),
    "google/gemma-3-4b-pt": _gemma3(
        hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4,
    ),
    "google/gemma-3-12b-pt": _gemma3(
        hidden_size=3840, intermediate_size=15_360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8,
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure every row, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PAPER_MODELS, default=list(PAPER_MODELS))
    args = parser.parse_args(arguments)
    cases = list(itertools.product(args.models, ("LoRA", "QLoRA"), ("plain", "dip")))
    rows = []
    for case in tqdm(cases):
        rows.append(row := measure(*case))
        tqdm.write(
            f"{row['model']:<25} {row['weights']:<6} {row['side']:<6} {row['peak_gib']:7.1f} GiB"
            f"{row['seconds_per_step']:9.3f} s a step"
        )
    write_results(__file__, {"batch_size": BATCH_SIZE, "length": LENGTH, "num_steps": NUM_STEPS}, rows=rows)


def measure(name: str, weights: str, side: str) -> dict:
    """Train a few steps; the peak counts all tensors, and not what the allocator keeps beside them."""
    gc.collect()  # the trainer of the row before is in reference cycles
    trainer = build(name, weights, side)
    vocab_size = trainer.model.config.get_text_config().vocab_size
    batch = {"input_ids": torch.randint(3, vocab_size, (BATCH_SIZE, LENGTH), device=DEVICE)}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"].clone()}
    if "gemma" in name:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # no images
    if side == "dip":
        trainer.model.calibrate([batch])
    times = train(trainer, batch)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {
        "model": name,
        "weights": weights,
        "side": side,
        "peak_gib": peak / 2**30,
        "seconds_per_step": statistics.median(times[NUM_WARMUP:]),
        "seconds_of_steps": times[NUM_WARMUP:],
    }


def train(trainer: Trainer, batch: dict[str, torch.Tensor]) -> list[float]:
    """The seconds of each step. The peak is of all steps but the first, which has what building took as well."""
    times = [seconds(lambda: step(trainer, batch))]
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return times + [seconds(lambda: step(trainer, batch)) for _ in range(NUM_WARMUP + NUM_STEPS - 1)]


def build(name: str, weights: str, side: str) -> Trainer:
    """A trainer with its optimizer: LoRA of rank 16 on all linear layers, in bfloat16, without checkpointing."""
    set_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(shape_of(name), dtype=torch.bfloat16)
    if weights == "QLoRA":
        quantize(model)
        prepare_quantized(model)
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    # The level as a number: a model with random weights has none to find.
    model = (
        get_dip_model(model, DipConfig(weights=adapter, init_noise_std=0.02))
        if side == "dip"
        else get_peft_model(model, adapter)
    )
    arguments = TrainingArguments("runs/benchmark", report_to=[], disable_tqdm=True, bf16=DEVICE == "cuda")
    trainer = (DipTrainer if side == "dip" else Trainer)(model, arguments)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def shape_of(name: str) -> PretrainedConfig:
    """The model's own shape, or two small layers of it on a CPU."""
    config = PAPER_MODELS[name]
    if DEVICE == "cpu":
        text = config.get_text_config()
        text.update(dict(num_hidden_layers=2, hidden_size=256, head_dim=16, intermediate_size=256, vocab_size=512))
        text.layer_types = text.layer_types[:2] if getattr(text, "layer_types", None) else None
        if text is not config:
            config.vision_config.update(
                dict(num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=2)
            )
    return config


def quantize(model: PreTrainedModel) -> None:
    """Put NF4 with double quantization in place of every linear layer but the head, as `from_pretrained` does."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            bias = module.bias is not None
            packed = Linear4bit(
                module.in_features,
                module.out_features,
                bias,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=packed).to(
                DEVICE
            )
            packed.bias = module.bias
            model.set_submodule(path, packed)
    model.is_loaded_in_4bit = True


if __name__ == "__main__":
    main()

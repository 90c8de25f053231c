"""What a run will take on each of its devices, told before anything is loaded: `--plan` of `recipes/finetune.py`.

What a step takes where nothing is shared is the matter of `recipes/footprint.py`. Here are the launch, the devices,
the table, and what would make a run fit.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from transformers import TrainingArguments

from recipes.config import FinetuneConfig
from recipes.footprint import KINDS, Footprint, measure
from recipes.running import check_devices

GIB = 2**30
# What each strategy leaves one part of on every process.
SHARED = {
    "one process": (),
    "DDP": (),
    "ZeRO-1": ("optimizer",),
    "ZeRO-2": ("optimizer", "gradients"),
    "ZeRO-3": ("optimizer", "gradients", "weights"),
    "FSDP2": ("optimizer", "gradients", "weights"),
}
# The operations of dense matrix products in a second that NVIDIA states for an H100 SXM.
NOMINAL_SPEEDS = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}
SHARE_OF_SPEED = 0.2  # steps of 4 x 512 tokens on an H200 reached 0.06 to 0.27 (benchmarks/paper_models.py)
ADVICE_PROCESSES = 4


class Launch(NamedTuple):
    """How the processes of a run share it."""

    num_processes: int = 1
    strategy: str = "one process"
    mixed_precision: str = "no"


class Device(NamedTuple):
    """What a process runs on."""

    name: str
    is_gpu: bool
    memory: int | None  # bytes
    speed: float  # operations of a matrix product in a second
    speed_is: str  # where it comes from


class Take(NamedTuple):
    """The bytes of one device."""

    training: dict[str, int]  # by kind
    evaluation: int
    generation: int

    @property
    def peak(self) -> int:
        """The most of all three."""
        return max(sum(self.training.values()), self.evaluation, self.generation)


def print_plan(config: FinetuneConfig, memory: float | None) -> None:
    """Print the table of a run, and what would make it fit; of several processes the first one does.

    Args:
        config (`FinetuneConfig`): the run.
        memory (`float`, *optional*): the GiB of each GPU; None plans for the devices of this machine.
    """
    if memory is None:
        check_devices()
    launch = read_launch(os.environ)
    if int(os.environ.get("RANK", 0)):
        return
    training = training_arguments(config, launch)
    device = find_device(matrix_dtype(config, training), memory)
    print("\n".join(describe(config, launch, training, device)))


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read what `accelerate launch` says to its processes."""
    num_processes = int(environment.get("WORLD_SIZE", 1))
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if environment.get("ACCELERATE_USE_FSDP", "false") == "true":
        return Launch(num_processes, "FSDP2", precision)
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return Launch(num_processes, "DDP" if stage == "0" else f"ZeRO-{stage}", precision)
    return Launch(num_processes, "DDP" if num_processes > 1 else "one process", precision)


def training_arguments(config: FinetuneConfig, launch: Launch) -> TrainingArguments:
    """Build the `TrainingArguments` as one process has them, which looks for no device and no other process."""
    precision = {launch.mixed_precision: True} if launch.mixed_precision in ("bf16", "fp16") else {}
    with _alone():
        return replace(config, training={**precision, **config.training, "use_cpu": True}).training_arguments()


@contextmanager
def _alone() -> Iterator[None]:
    """Context without what a launcher has told this process."""
    with mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
                del os.environ[name]
        yield


def matrix_dtype(config: FinetuneConfig, training: TrainingArguments) -> torch.dtype:
    """The dtype of most matrix products."""
    if training.fp16:
        return torch.float16
    quantization = config.quantization_config()
    if quantization is not None and not training.bf16:
        return quantization.bnb_4bit_compute_dtype
    is_half = training.bf16 or (config.weights != "full" and config.dtype in ("bfloat16", "float16"))
    return torch.bfloat16 if is_half else torch.float32


def find_device(dtype: torch.dtype, memory: float | None) -> Device:
    """Find what a process would run on here, or describe a GPU of `memory` GiB."""
    if torch.cuda.is_available():
        num_bytes = torch.cuda.get_device_properties(0).total_memory if memory is None else int(memory * GIB)
        return Device(torch.cuda.get_device_name(), True, num_bytes, matrix_speed("cuda", dtype, 8192), "measured")
    if memory is not None:
        return Device(f"GPU of {memory:g} GiB", True, int(memory * GIB), NOMINAL_SPEEDS[dtype], "assumed, an H100's")
    return Device("CPU", False, None, matrix_speed("cpu", dtype, 1024), "measured")


def matrix_speed(device: str, dtype: torch.dtype, size: int) -> float:
    """Measure the operations of a square matrix product in a second."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def take(footprint: Footprint, launch: Launch) -> Take:
    """What a footprint leaves on each of the processes that share it."""
    shared = SHARED[launch.strategy]
    kept = {
        kind: -(-num_bytes // launch.num_processes) if kind in shared else num_bytes
        for kind, num_bytes in footprint.peak.items()
    }
    if launch.strategy == "DDP":  # its buckets
        kept["gradients"] += 4 * footprint.num_trainable
    if "weights" in shared and launch.num_processes > 1:  # the layer that runs, and the one that is fetched meanwhile
        kept["weights"] += 2 * footprint.layer
    spared = sum(footprint.peak[kind] - kept[kind] for kind in ("weights", "optimizer"))
    held = kept["weights"] + kept["optimizer"]
    generation = held + footprint.cache if footprint.cache else 0
    return Take(kept, footprint.evaluation - spared, generation)


def describe(config: FinetuneConfig, launch: Launch, training: TrainingArguments, device: Device) -> list[str]:
    """Write the plan, line by line."""
    footprint = measure(config, training, device.is_gpu)
    mine = take(footprint, launch)
    twin = None
    if config.dip is not None and config.weights != "frozen":
        plain = replace(config, dip=None, evaluation=replace(config.evaluation, num_samples=None))
        twin = take(measure(plain, training, device.is_gpu), launch)
    lines = [
        f"{config.model}, {launch.num_processes} x {device.name}, {launch.strategy}",
        f"{footprint.num_parameters:,} parameters, {footprint.num_trainable:,} learn",
        *memory_lines(mine, twin),
        *time_lines(config, footprint, launch, training, device),
    ]
    if device.memory is None:
        return lines
    if mine.peak <= device.memory:
        return [*lines, f"It fits in {device.memory / GIB:.1f} GiB."]
    lines.append(f"It does not fit in {device.memory / GIB:.1f} GiB. What each of these alone would make of it:")
    return [*lines, *advice(config, footprint, launch, device)]


def memory_lines(mine: Take, twin: Take | None) -> list[str]:
    """Write what a device holds, beside the same without noise."""
    rows = {f"  {kind}": (mine.training[kind], twin and twin.training[kind]) for kind in KINDS}
    rows["training step"] = sum(mine.training.values()), twin and sum(twin.training.values())
    rows["evaluation batch"] = mine.evaluation, twin and twin.evaluation
    if mine.generation:
        rows["generation, with its cache"] = mine.generation, twin and twin.generation
    lines = [f"{'GiB per device, at the peak':<28}{'the run':>9}{'' if twin is None else '  without noise':>15}"]
    for name, (run, plain) in rows.items():
        lines.append(f"{name:<28}{run / GIB:>9.2f}{'' if plain is None else f'{plain / GIB:.2f}':>15}".rstrip())
    return lines


def time_lines(
    config: FinetuneConfig, footprint: Footprint, launch: Launch, training: TrainingArguments, device: Device
) -> list[str]:
    """Write how long a step would take."""
    num_batches = training.gradient_accumulation_steps
    num_rows = training.per_device_train_batch_size * num_batches * launch.num_processes
    num_operations = footprint.num_operations * num_batches
    seconds = num_operations / (SHARE_OF_SPEED * device.speed)
    num_tokens = num_rows * config.max_length
    return [
        f"{num_operations / 1e12:,.2f} TFLOP per step and device, {num_rows} rows of {config.max_length} tokens",
        f"{seconds:,.2f} s per step, {num_tokens / seconds:,.0f} tokens/s, at {SHARE_OF_SPEED:.0%} of a "
        f"matrix product's {device.speed / 1e12:,.2f} TFLOP/s ({device.speed_is})",
    ]


def advice(config: FinetuneConfig, footprint: Footprint, launch: Launch, device: Device) -> list[str]:
    """Write what each change would make of the peak."""
    peaks = {
        change: take(measure(changed, training_arguments(changed, launch), device.is_gpu), launch).peak
        for change, changed in changes(config).items()
    }
    if "weights" not in SHARED[launch.strategy]:
        shared = Launch(max(ADVICE_PROCESSES, launch.num_processes), "FSDP2")
        peaks[f"recipes/accelerate/fsdp2.yaml on {shared.num_processes} devices"] = take(footprint, shared).peak
    return [
        f"  {peak / GIB:>7.2f} GiB{', fits' if peak <= (device.memory or 0) else '':<7}{change}"
        for change, peak in peaks.items()
    ]


def changes(config: FinetuneConfig) -> dict[str, FinetuneConfig]:
    """The changes of a configuration that spare memory, by what to give `--set`."""
    training = config.training
    num_rows, num_batches = (
        training.get(name, default)
        for name, default in (("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1))
    )
    found: dict[str, FinetuneConfig] = {}
    if not (training.get("activation_checkpointing") or training.get("gradient_checkpointing")):
        found["training.activation_checkpointing=true"] = _with_training(config, activation_checkpointing=True)
    if num_rows > 1:
        smaller = {"per_device_train_batch_size": num_rows // 2, "gradient_accumulation_steps": num_batches * 2}
        found[" ".join(f"training.{name}={value}" for name, value in smaller.items())] = _with_training(
            config, **smaller
        )
    if config.quantization is None and isinstance(config.weights, dict):
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
        found["quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_compute_dtype: bfloat16}"] = (
            replace(config, quantization=bits)
        )
    found[f"max_length={config.max_length // 2}"] = replace(config, max_length=config.max_length // 2)
    return found


def _with_training(config: FinetuneConfig, **training) -> FinetuneConfig:
    return replace(config, training={**config.training, **training})

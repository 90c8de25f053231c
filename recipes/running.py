"""What the recipes that train or load a model share: its folder, tokenizer and dtype, training and the result file."""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerState,
)

from recipes.config import DistillConfig, FinetuneConfig, dump_config
from report.output_folder import check_files, write_whole

logger = logging.getLogger(__name__)


def check_output_dir(output_dir: Path, config: FinetuneConfig | DistillConfig) -> None:
    """Refuse a folder with a finished run, or with an interrupted run of another configuration."""
    advice = "Delete or move that folder, or choose another with --set training.output_dir=FOLDER."
    if (output_dir / "results.json").exists():
        raise ValueError(f"{output_dir} already holds a finished run (results.json). {advice}")
    started = output_dir / "config.yaml"
    if started.exists() and started.read_text(encoding="utf-8") != dump_config(config):
        raise ValueError(
            f"{output_dir} holds an interrupted run of another configuration; give {started} to resume it. {advice}"
        )


def check_devices() -> None:
    """Refuse a launch that accelerate would carry out otherwise than it says, and without a word."""
    num_processes, num_devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not num_devices
    if num_processes > num_devices and not on_cpu:
        raise ValueError(
            f"{num_processes} processes were started on this machine, and it has {num_devices} device(s), which they "
            f"would share. Give accelerate launch --num_processes {num_devices} times the number of machines, or run "
            "on the CPU with ACCELERATE_USE_CPU=true."
        )
    strategies = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    for variable, strategy in strategies.items():
        if on_cpu and os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"The launch asks for {strategy}, which accelerate leaves out on a CPU: every process would hold the "
                "whole model. Run it on GPUs, or start without it (recipes/accelerate/single.yaml, or torchrun)."
            )


def load_tokenizer(config: FinetuneConfig):
    """Load the tokenizer; one without a pad token pads with eos."""
    if config.model.startswith((".", "/", "~")) and not Path(config.model).is_dir():
        raise ValueError(f"No model folder at {config.model}; give one with a model and its tokenizer, or a Hub id.")
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {config.model} has no eos token, and an answer must end in one.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_dtype(config: FinetuneConfig) -> torch.dtype | str:
    """Keep trained weights in float32, where small updates survive; an adapter's base is as configured or saved."""
    return torch.float32 if config.weights == "full" else config.dtype or "auto"


def load_base(run: FinetuneConfig) -> PreTrainedModel:
    """Load the model that the run started from; a quantized one as PEFT prepares it for training."""
    if Path(run.model).is_dir():
        check_files(run.model)
    model = AutoModelForCausalLM.from_pretrained(
        run.model,
        dtype=model_dtype(run),
        quantization_config=run.quantization_config(),
        attn_implementation=run.attn_implementation,
        trust_remote_code=run.trust_remote_code,
    )
    return model if run.quantization is None else prepare_quantized(model)


def prepare_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a quantized model and compute what is not quantized in float32, as PEFT does."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # bitsandbytes 0.50: on some CPUs a pass in eval mode packs the weights for a kernel that has no gradient.
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer turns it on


def check_can_be_saved(model: PreTrainedModel, run: FinetuneConfig) -> None:
    """Refuse a whole model that transformers would not save after the training."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            f"The generation_config.json of {run.model} is invalid, and transformers does not save such a model: "
            f"correct it first. {error}"
        ) from error


def load_dip_run(folder: str, run: FinetuneConfig) -> PeftModel:
    """Load the network of a finished run, with its noise."""
    check_files(folder)
    return PeftModel.from_pretrained(load_base(run), folder).eval()


def load_plain_run(folder: str, run: FinetuneConfig, is_trainable: bool = False) -> PreTrainedModel | PeftModel:
    """Load the network of a finished run or distillation that has no projections; what it had trained may learn."""
    check_files(folder)
    if run.weights == "full":
        return load_base(replace(run, model=folder)).requires_grad_(is_trainable)
    return PeftModel.from_pretrained(load_base(run), folder, is_trainable=is_trainable)


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """Find the newest checkpoint that was saved to its end; one that a killed process was writing is passed over."""
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_whole(checkpoint):
            return str(checkpoint)
        logger.warning(f"{checkpoint} was not saved to its end and is passed over.")
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Tell by the Trainer's state, which its main process writes last, and by the files themselves."""
    try:
        check_files(checkpoint)
    except ValueError:
        return False
    pickled = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return (checkpoint / "trainer_state.json").is_file() and all(map(zipfile.is_zipfile, pickled))


def warn_of_other_processes(checkpoint: str, num_processes: int) -> None:
    """Warn if the checkpoint's run had another number of processes, each of which has saved its random state."""
    states = [path.stem for path in Path(checkpoint).glob("rng_state*.pth")]
    saved = max((1 if state == "rng_state" else int(state.rpartition("_")[2]) + 1 for state in states), default=None)
    if saved not in (None, num_processes):
        logger.warning(
            f"{checkpoint} was saved by a run of {saved} process(es) and is resumed by {num_processes}: its steps "
            f"have another number of rows and another noise now. Start {saved} to go on as it would have."
        )


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint if there is one.

    A run that was interrupted after its last step, or after it was stopped early, is only loaded: resumed at
    `max_steps` amid an epoch, the Trainer of transformers 5.23 would train a step more.
    """
    if checkpoint is not None:
        warn_of_other_processes(checkpoint, trainer.args.world_size)
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= state.max_steps or was_stopped(state):
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                trainer._load_best_model()
            return
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if "iostream error" not in str(error):
            raise
        # All that torch.save says of a full disk.
        raise OSError(
            f"A checkpoint could not be written to {trainer.args.output_dir}: is the disk full? The run resumes from "
            "the one before."
        ) from error


def was_stopped(state: TrainerState) -> bool:
    """Whether early stopping had ended the training when this state was saved."""
    callbacks: Any = state.stateful_callbacks  # a mapping, once it was saved
    saved = callbacks.get(EarlyStoppingCallback.__name__)
    if saved is None:
        return False
    return saved["attributes"]["early_stopping_patience_counter"] >= saved["args"]["early_stopping_patience"]


@contextmanager
def whole_weights(trainer: Trainer) -> Iterator[None]:
    """Context in which the Trainer saves a model that FSDP has sharded in one file, whatever its checkpoints are."""
    if not trainer.is_fsdp_enabled:
        yield
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    of_checkpoints = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    yield
    plugin.set_state_dict_type(of_checkpoints)


def save_model(trainer: Trainer, output_dir: Path) -> None:
    """Save the trained model and its tokenizer beside their final names, and rename them when all are whole."""
    beside = output_dir / "model.partial"
    with whole_weights(trainer):
        trainer.save_model(str(beside))
    if trainer.is_world_process_zero():
        for path in beside.iterdir():
            os.replace(path, output_dir / path.name)
        beside.rmdir()
    trainer.accelerator.wait_for_everyone()


def write_results(path: Path, results: dict) -> None:
    """Write a result file as JSON that a person can read: one entry per line, but lists of numbers on one."""
    text = json.dumps(results, indent=1)
    # The line breaks tell a list from a string.
    text = re.sub(r"\[\n\s+([-+.\deE,\s]+?)\n\s*\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    write_whole(path, text)

"""The network of a finished run, whichever recipe wrote it, and the configuration that says what it was trained on."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dipnet_hf.regularizers.saved import attach_saved
from recipes.config import FinetuneConfig, load_config, load_distill_config
from recipes.running import load_base
from report.output_folder import check_files


class FinishedRun(NamedTuple):
    """The folder of a finished run, and the configuration of its fine-tuning: of a distillation, its teacher's."""

    folder: str
    config: FinetuneConfig
    is_distilled: bool
    heldout: Path  # the held-out problems, if there were any

    @property
    def has_noise(self) -> bool:
        """Whether its network has projections."""
        return self.config.dip is not None and not self.is_distilled


def read_run(folder: str) -> FinishedRun:
    """Read what a run was.

    Raises:
        ValueError: there is no finished run, or its base is quantized.
    """
    path = Path(folder) / "config.yaml"
    if not (Path(folder) / "results.json").is_file() or not path.is_file():
        raise ValueError(
            f"{folder} holds no finished run: give the output folder of recipes/finetune.py or recipes/distill.py."
        )
    is_distilled = "teacher" in yaml.safe_load(path.read_text(encoding="utf-8"))
    if is_distilled:
        path = Path(load_distill_config(str(path)).teacher) / "config.yaml"
    config = load_config(str(path))
    if config.quantization is not None:
        raise ValueError(f"{folder} was trained on a quantized base, which has no second derivatives.")
    return FinishedRun(folder, config, is_distilled, heldout=path.parent / "data" / "test.jsonl")


def load_network(run: FinishedRun) -> Any:
    """Load a run's network in float32; what it had trained wants gradients."""
    config = replace(run.config, dtype="float32", attn_implementation="sdpa")
    check_files(run.folder)
    if (Path(run.folder) / "adapter_config.json").is_file():
        network: Any = PeftModel.from_pretrained(load_base(config), run.folder, is_trainable=True)
    else:
        network = AutoModelForCausalLM.from_pretrained(
            run.folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=config.trust_remote_code,
        )
    if (method := attach_saved(network, run.folder)) is not None:
        for parameter in method.added:  # no weights, whose surroundings are looked at
            parameter.requires_grad_(False)
    return network.eval()

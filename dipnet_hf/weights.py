"""The adapter of the network's own weights, nested in `DipConfig`: checks, injection, export.

PEFT holds one tuner a model, so the DIP tuner owns this adapter and asks the adapter's own tuner class where needed.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import cast

import torch
from peft import PeftConfig, PeftType, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .config import DipConfig

# The heads that PEFT adds to `modules_to_save` only after an adapter was injected, maybe into them.
_HEADS_ADDED_LATE = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def tuner_of(config: PeftConfig) -> type[BaseTuner]:
    """The tuner class of a PEFT config."""
    return PEFT_TYPE_TO_TUNER_MAPPING[cast(PeftType, config.peft_type)]


def check_weights(model: nn.Module, config: DipConfig, others: list) -> None:
    """Raise a `ValueError` for weights that cannot train in `model`, or not beside the `others`, its `DipConfig`s."""
    weights = config.weights
    if isinstance(weights, PeftConfig) and (tuner_of(weights).uses_shared_state or weights.peft_type == "ADALORA"):
        raise ValueError(
            f"weights={type(weights).__name__}(...) keeps state on a tuner of its own, and a model has one tuner. Use "
            "a method whose state is in its layers, such as LoraConfig or IA3Config."
        )
    if weights == "full" and others:
        raise ValueError('weights="full" changes the base weights, so it cannot be one adapter of several.')
    if weights == "full" and any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError('weights="full" cannot train a quantized model. Use weights=LoraConfig(...).')
    if any(other.weights == "full" for other in others):
        raise ValueError('The model holds an adapter with weights="full", which has changed the base weights.')


def set_task(config: DipConfig) -> None:
    """Tell the weights' config the task: PEFT puts no adapter on its new head, and trains and saves that whole."""
    if not isinstance(config.weights, PeftConfig):
        return
    config.weights.task_type = config.task_type
    saved = config.modules_to_save or []
    if missing := [head for head in _HEADS_ADDED_LATE.get(config.task_type or "", ()) if head not in saved]:
        config.modules_to_save = [*saved, *missing]


def check_sites(config: DipConfig, site_names: list[str]) -> None:
    """Refuse sites inside modules that PEFT trains and saves whole: it copies them, and the projection with them."""
    tokens = getattr(config.weights, "trainable_token_indices", None) or ()
    saved = [*(config.modules_to_save or ()), *(tokens if isinstance(tokens, dict) else ())]
    if tokens and not isinstance(tokens, dict):
        saved.append("embed_tokens")
    parts = {name.rpartition(".")[2] for name in saved}
    if inside := [name for name in site_names if parts & set(name.split("."))]:
        raise ValueError(
            f"The sites {inside} lie in modules that the weights' config trains as a whole ({saved}). Choose "
            "other sites, or take these modules out of modules_to_save and trainable_token_indices; a task_type adds "
            "its head to them."
        )


def inject_weights(model: nn.Module, weights: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
    """Inject the weights' adapter into `model`.

    Raises:
        ValueError: the config does not fit the model; PEFT's reason, and what `weights` may be instead.
    """
    try:
        with _own_peft_config(model):
            inject_adapter_in_model(weights, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    except ValueError as error:
        raise ValueError(
            f"weights: {type(weights).__name__} does not fit {type(model).__name__}. {error} Give a PEFT config that "
            'names layers of this model (the default is LoRA on all linear ones), "full" or "frozen".'
        ) from error


@contextlib.contextmanager
def _own_peft_config(model: nn.Module) -> Iterator[None]:
    """Keep the weights' own tuner from taking the model's `peft_config` for its own and writing into it."""
    kept = model.__dict__.pop("peft_config", None)
    try:
        yield
    finally:
        model.__dict__.pop("peft_config", None)
        if kept is not None:
            model.peft_config = kept


def export_weights(model: nn.Module, config: DipConfig, adapter_name: str, save_directory: str | os.PathLike) -> None:
    """Write the weights' adapter as a folder of stock PEFT."""
    weights = cast(PeftConfig, copy.deepcopy(config.weights))
    weights.base_model_name_or_path = config.base_model_name_or_path
    weights.inference_mode = True
    with _own_peft_config(model):
        model.peft_config = {adapter_name: weights}  # type: ignore[assignment]
        state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    os.makedirs(save_directory, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": tensor.detach().clone().contiguous()
        for name, tensor in state_dict.items()
        if "dip_projection" not in name
    }
    save_file(tensors, os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    weights.save_pretrained(str(save_directory))


def embeddings_to_save(
    model: nn.Module, weights: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The embedding tables that PEFT saves because the weights' adapter is on them; of itself it asks `DipConfig`."""
    adapters = model.peft_config
    model.peft_config = {adapter_name: weights}  # type: ignore[assignment]
    try:
        saved = get_peft_model_state_dict(model, state_dict, adapter_name)
    finally:
        model.peft_config = adapters
    return {name: tensor for name, tensor in saved.items() if name in state_dict}


def check_fits(model: nn.Module, config: DipConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Refuse an adapter of a model of another shape before a weight is written."""
    own = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if "dip_projection" in name and name.endswith(f".{adapter_name}")
    }
    saved = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if "dip_projection" in name}
    if own == saved:
        return
    other = next(name for name in [*saved, *own] if own.get(name) != saved.get(name))
    raise ValueError(
        f"The adapter was trained on a model of another shape: '{other}' has shape {saved.get(other)} in the file and "
        f"{own.get(other)} in this model (None: no such site). Load it on {config.base_model_name_or_path!r}."
    )


def upgrade_noise(model: nn.Module, config: DipConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Bring saved noise up to date, in place.

    Version 0.1 had one scale for all channels and kept no initial std; after it the initial std was a scalar, which
    FSDP2 does not shard.
    """
    for name, tensor in model.state_dict().items():
        if name not in state_dict or state_dict[name].dim() > 0:
            continue
        if name.endswith(f"dip_scale.{adapter_name}"):
            state_dict[name] = state_dict[name].expand(tensor.shape).clone()
            level = name.replace("dip_scale", "dip_init_std")
            state_dict[level] = torch.tensor([float(config.init_noise_std)])
        elif name.endswith(f"dip_init_std.{adapter_name}"):
            state_dict[name] = state_dict[name].reshape(1)

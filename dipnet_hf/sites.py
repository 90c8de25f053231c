"""Which modules' inputs are projected: from a model and a config to a list of sites, without a list of architectures.

Layers are found by what transformers guarantees (`num_hidden_layers`, `get_decoder`, `get_input_embeddings`) and their
parts by what they are, so that a new architecture needs no entry here.
"""

import difflib
import re
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import DipConfig
from .projection import DipProjection, Site

_NAME_IT = (
    "Name the modules whose inputs should be projected with target_modules=[...] or a regex, as in PEFT; "
    "[name for name, _ in model.named_modules()] lists them."
)


def find_sites(model: nn.Module, config: DipConfig) -> list[Site]:
    """List the sites that `config` asks for in `model`, in the order of the modules.

    Args:
        model (`nn.Module`): the base model, with or without injected adapters.
        config (`DipConfig`): `target_sites` or `target_modules`, and `layers_to_transform`.

    Raises:
        ValueError: nothing matches, a layer is out of range, or the architecture has no such part; the message says
            what there is and what to do.
    """
    if config.target_modules is not None:
        return _named_sites(model, config)
    if config.target_sites == "embedding":
        embedding = _embedding(model)
        if embedding is None:
            raise ValueError(f"{type(model).__name__} has no input embedding. {_NAME_IT}")
        return [_embedding_site(model, _name_of(model, embedding))]

    layers = _select(decoder_layers(model), config)
    if config.target_sites == "linear":
        sites = [Site(f"{name}.{part}", *width) for name, layer in layers for part, width in _linears(layer)]
    else:
        hidden_size = _text_config(model).hidden_size
        part_of = {"decoder_layer": lambda layer: "", "attention": _attention, "mlp": _mlp}[str(config.target_sites)]
        parts = [(name, part_of(layer)) for name, layer in layers]
        sites = [Site(f"{name}.{part}".rstrip("."), hidden_size) for name, part in parts if part is not None]
    if not sites:
        layer = layers[0][1]
        raise ValueError(
            f"{type(layer).__name__} has no part that target_sites={config.target_sites!r} could mean; its parts are "
            f"{[name for name, _ in layer.named_children()]}. {_NAME_IT}"
        )
    return sites


def decoder_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """Find the stack of layers of a transformer: the outermost `ModuleList` of `num_hidden_layers` entries.

    Returns:
        `list[tuple[str, nn.Module]]`: the layers with their names in `model`.

    Raises:
        ValueError: there is no such stack.
    """
    config = _text_config(model)
    num_layers = getattr(config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if getattr(config, "is_encoder_decoder", False):
        num_layers = getattr(config, "num_decoder_layers", num_layers)
        roots = [decoder]
    else:
        roots = [decoder, model]
    for root in (root for root in roots if root is not None):
        lists = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
        for name, module in lists:
            inside_another = any(name.startswith(f"{outer}.") for outer, _ in lists)
            if len(module) == num_layers and not inside_another:
                stack = _name_of(model, module)
                return [(f"{stack}.{i}", layer) for i, layer in enumerate(module)]
    raise ValueError(f"No stack of {num_layers} layers was found in {type(model).__name__}. {_NAME_IT}")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _embedding(model: Any) -> Any:
    """The table of token embeddings; None where there is none, as for images."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        return None
    return embedding if hasattr(embedding, "weight") else None


def _embedding_site(model: Any, name: str) -> Site:
    return Site(name, model.get_submodule(name).weight.shape[1], at_output=True)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _select(layers: list[tuple[str, nn.Module]], config: DipConfig) -> list[tuple[str, nn.Module]]:
    if config.layers_to_transform is None:
        return layers
    wanted = _layer_list(config)
    beyond = [i for i in wanted if not 0 <= i < len(layers)]
    if beyond or not wanted:
        raise ValueError(f"layers_to_transform={wanted} must be layers from 0 to {len(layers) - 1} of this model.")
    return [layers[i] for i in sorted(set(wanted))]


def _layer_list(config: DipConfig) -> list[int]:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else list(layers or [])


def _attention(layer: nn.Module) -> str | None:
    return next((name for name, child in layer.named_children() if "attention" in type(child).__name__.lower()), None)


def _mlp(layer: nn.Module) -> str | None:
    """The feed-forward block by its name; or else what stands for it: the first weight matrix past attention."""
    candidates = [
        (name, type(child).__name__)
        for name, child in layer.named_children()
        if "attention" not in type(child).__name__.lower()
        and not re.search(r"attn|mamba|ssm", name)
        and any(parameter.dim() >= 2 for parameter in child.parameters())
    ]
    by_name = [
        name for name, kind in candidates if re.search(r"mlp|ffn|feed_?forward|moe|expert", f"{name} {kind}", re.I)
    ]
    return next(iter(by_name or [name for name, _ in candidates]), None)


def _linears(layer: nn.Module) -> list[tuple[str, tuple[int, int]]]:
    widths = [(name, input_channels(module)) for name, module in _outside_adapters(layer) if _is_linear(module)]
    return [(name, width) for name, width in widths if width is not None]


def _is_linear(module: nn.Module) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, (nn.Linear, Conv1D))


def _outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The named modules without those of an adapter: `q_proj`, but not `q_proj.lora_A` or `q_proj.base_layer`."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [
        (name, module)
        for name, module in model.named_modules()
        if not name.startswith(inside or "\0") and not isinstance(module, DipProjection)
    ]


def _named_sites(model: nn.Module, config: DipConfig) -> list[Site]:
    modules = [(name, module) for name, module in _outside_adapters(model) if name]
    matched = [(name, module) for name, module in modules if check_target_module_exists(config, name)]
    if config.layers_to_transform is not None:
        _check_layers_exist(config, [name for name, _ in matched])
    if not matched:
        targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
        names = sorted({part for name, _ in modules for part in (name, name.rpartition(".")[2]) if not part.isdigit()})
        nearest = [match for target in targets for match in difflib.get_close_matches(target, names, n=3)]
        raise ValueError(
            f"target_modules={config.target_modules!r} match no module of {type(model).__name__}."
            + (f" The nearest names are {nearest}." if nearest else f" Its names are like {names[:10]}.")
        )
    embedding = _embedding(model)
    return [
        _embedding_site(model, name)
        if module is embedding
        else Site(name, *(input_channels(module) or _hidden_size(model, name)))
        for name, module in matched
    ]


def _check_layers_exist(config: DipConfig, matched_names: list[str]) -> None:
    wanted = _layer_list(config)
    found = {int(part) for name in matched_names for part in name.split(".") if part.isdigit()}
    missing = sorted(set(wanted) - found)
    if missing:
        raise ValueError(
            f"layers_to_transform={wanted}: target_modules={config.target_modules} match nothing in layers {missing}."
        )


def input_channels(module: nn.Module) -> tuple[int, int] | None:
    """The number of channels of a module's input and their dimension, as far as the module itself tells.

    A block tells by its first layer with weights if channels are dimension 1 there, as for a convolution.
    """
    leaf: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    children = [child for child in leaf.children() if not isinstance(child, DipProjection)]
    if children:
        first = next((child for child in children if next(child.parameters(), None) is not None), None)
        channels = None if first is None else input_channels(first)
        return channels if channels is not None and channels[1] == 1 else None
    if isinstance(leaf, nn.modules.conv._ConvNd):
        return leaf.in_channels, 1
    if isinstance(leaf, nn.modules.batchnorm._NormBase):
        return leaf.num_features, 1
    if isinstance(leaf, Conv1D):
        return leaf.nx, -1
    if hasattr(leaf, "in_features"):
        return leaf.in_features, -1
    if isinstance(getattr(leaf, "weight", None), nn.Parameter) and leaf.weight.dim() == 1:  # LayerNorm, RMSNorm
        return leaf.weight.shape[0], -1
    return None


def _hidden_size(model: nn.Module, name: str) -> tuple[int, int]:
    hidden_size = getattr(_text_config(model), "hidden_size", None)
    if hidden_size is None:
        raise ValueError(
            f"The width of the input of '{name}' ({type(model.get_submodule(name)).__name__}) is not known: name the "
            "first linear, convolution or normalization layer within it instead."
        )
    return hidden_size, -1

"""Which modules' inputs are projected: from a model and a config to a list of sites."""

import difflib
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .architecture import (
    NAME_MODULES,
    attention_of,
    decoder_layers,
    hidden_size,
    input_channels,
    input_embeddings,
    is_behind_padding_mask,
    linears_of,
    mlp_of,
    modules_outside_adapters,
    name_of,
    reads_cache,
    reads_encoder,
)
from .config import DipConfig
from .projection import Site
from .sharding import whole_shape


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
        embeddings = input_embeddings(model)
        if not embeddings:
            raise ValueError(f"{type(model).__name__} has no input embedding. {NAME_MODULES}")
        return [_site(model, name_of(model, embedding)) for embedding in embeddings]

    layers = _select(decoder_layers(model), config)
    names = []
    for name, layer in layers:
        if config.target_sites == "decoder_layer":
            names.append(name)
        elif config.target_sites == "linear":
            names += [f"{name}.{part}" for part in linears_of(layer, reads_encoder(model))]
        else:
            part = attention_of(layer) if config.target_sites == "attention" else mlp_of(layer)
            if part is not None:
                names.append(f"{name}.{part}")
    if not names:
        layer = layers[0][1]
        raise ValueError(
            f"{type(layer).__name__} has no part that target_sites={config.target_sites!r} could mean; its parts are "
            f"{[name for name, _ in layer.named_children()]}. {NAME_MODULES}"
        )
    return [_site(model, name) for name in names]


def _site(model: nn.Module, name: str) -> Site:
    """The site at a module. A `Sequential` would run a projection that it holds, so its first module holds it."""
    module: Any = model.get_submodule(name)
    if any(module is embedding for embedding in input_embeddings(model)):
        return Site(name, whole_shape(module.weight)[1], at_output=True)
    while type(module).forward is nn.Sequential.forward and len(module):
        first, module = next(iter(module.named_children()))
        name = f"{name}.{first}"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"'{name}' ({type(module).__name__}) is a container, which takes whatever it holds for a part of the "
            "model, so noise cannot enter it. Name the modules in it, or the one around it."
        )
    if hasattr(module, "backward_pass"):
        raise ValueError(
            f"'{name}' ({type(module).__name__}) is a reversible layer, which computes its input anew in the backward "
            "pass, without the noise. Choose its parts as the sites, as target_sites='attention' does."
        )
    channels = input_channels(module) or _hidden_size(model, name)
    return Site(
        name,
        *channels,
        spares_padding=is_behind_padding_mask(model, name),
        reads_cache=reads_cache(model, name),
    )


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


def _named_sites(model: nn.Module, config: DipConfig) -> list[Site]:
    modules = [(name, module) for name, module in modules_outside_adapters(model) if name]
    # Not the config itself: PEFT would pass over what the weights' config trains whole, which `check_sites` refuses.
    fields = ("target_modules", "layers_to_transform", "layers_pattern")
    wanted = SimpleNamespace(**{name: getattr(config, name) for name in fields})
    matched = [(name, module) for name, module in modules if check_target_module_exists(wanted, name)]
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
    return list(dict.fromkeys(_site(model, name) for name, _ in matched))


def _check_layers_exist(config: DipConfig, matched_names: list[str]) -> None:
    wanted = _layer_list(config)
    found = {int(part) for name in matched_names for part in name.split(".") if part.isdigit()}
    missing = sorted(set(wanted) - found)
    if missing:
        raise ValueError(
            f"layers_to_transform={wanted}: target_modules={config.target_modules} match nothing in layers {missing}."
        )


def _hidden_size(model: nn.Module, name: str) -> tuple[int, int]:
    size = hidden_size(model)
    if size is None:
        raise ValueError(
            f"The width of the input of '{name}' ({type(model.get_submodule(name)).__name__}) is not known: name the "
            "first linear, convolution or normalization layer within it instead."
        )
    return size, -1

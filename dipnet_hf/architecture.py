"""Every question that this package asks of a network: its layers, their parts, its head, its loss.

The answers come from what transformers guarantees and from what modules are; where a family of models is peculiar, a
constant at the top of this file says so. To support a new family is to change this file alone.
"""

import inspect
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .chunked_loss import OutputHead
from .sharding import whole_shape

NAME_MODULES = (
    "Name the modules whose inputs should be projected with target_modules=[...] or a regex, as in PEFT; "
    "[name for name, _ in model.named_modules()] lists them."
)
# What projection.py registers at a site: no part of the model, so no question is about it.
_PROJECTION_NAME = "dip_projection"
TEXT_INPUTS = ("input_ids", "inputs_embeds")
# Inputs with a row per sequence.
ROW_INPUTS = (*TEXT_INPUTS, "attention_mask", "position_ids")
# States that recurrent models carry under other names than `past_key_values`, and that tell no position.
RECURRENT_STATES = ("cache_params", "state")

# What decoder layers are given that is one for all rows, or has a row for each in its first dimension. A layer that
# takes anything else (position biases, shared keys) may hold rows in a place that is not known.
_KNOWN_LAYER_INPUTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "past_key_values",
    "layer_past",
    "use_cache",
    "cache_position",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_attentions",
    "output_router_logits",
    "kwargs",
}
# Models that give their layers' output the shape of the inputs' rows.
_FIXED_OUTPUT_SHAPE = {"gpt_bigcode"}
# Rows and sequence of what decoder layers get, where they do not come first: the length does, or the streams.
_TOKEN_DIMS: dict[str | None, tuple[int, int]] = {"xlnet": (1, 0), "gemma3n_text": (1, 2)}
# Modules whose output is a choice, through which no gradient passes.
_CHOOSER = re.compile(r"Indexer|PhimoeTopKRouter|LongcatFlashTopkRouter")
# What layers of BART's kind call their attention to an encoder, which they have without an encoder too.
_CROSS_ATTENTION = "encoder_attn"
# Factors of the logits by the names that configs give them, and whether they multiply or divide.
_LOGIT_FACTORS = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
# transformers' losses whose labels can be the classes of the model's outputs, one per output.
_CLASS_LOSSES = (ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss, ForTokenClassification)
# Whose hooks on a head leave its output as it is.
_SHARDERS = ("torch.distributed.fsdp", "deepspeed.")
_NUM_PROBED = 8  # tokens; more than one, as a padding token's embedding may be zero


# ---- the config ----


def setting(model: Any, name: str) -> Any:
    """A setting of the model's config, None where there is no config or no such setting."""
    return getattr(getattr(model, "config", None), name, None)


def text_config(model: Any) -> Any:
    """The config of the text model: of the decoder, if there is an encoder too. None where there is no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def is_encoder_decoder(model: Any) -> bool:
    """Whether the model reads one sequence and writes another."""
    return bool(setting(model, "is_encoder_decoder"))


def takes_tokens(model: Any) -> bool:
    """Whether the model's `forward` has `input_ids`; a model of images or of sound has none."""
    return "input_ids" in inspect.signature(model.forward).parameters


def network_of(model: Any) -> Any:
    """The network itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_names(model: Any) -> list[str]:
    """The names of what the model's `forward` takes by position; none if some have no name."""
    parameters = inspect.signature(model.forward).parameters.values()
    has_nameless = any(p.kind is p.POSITIONAL_ONLY for p in parameters)
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and not has_nameless]


def hidden_size(model: Any) -> int | None:
    """The number of channels between the layers, if the config tells."""
    return getattr(text_config(model), "hidden_size", None)


def context_length(model: Any) -> int | None:
    """The most tokens that a sequence may have, None where there is no limit.

    Rotary positions that are scaled reach further than the config's `max_position_embeddings`; how far, each kind of
    scaling says in a way of its own.
    """
    config = text_config(model) if isinstance(model, PreTrainedModel) else None
    if "rope_type" in (rope := getattr(config, "rope_parameters", None) or {}):
        rope = {"all layers": rope}  # not one for each kind of layer, as Gemma 3 has it
    if any((kind or {}).get("rope_type", "default") != "default" for kind in rope.values()):
        return None
    length = getattr(config, "max_position_embeddings", None)
    return length if length is not None and length > 0 else None  # XLNet's is -1


def token_dims(model: Any) -> tuple[int, int] | None:
    """The dimensions of rows and sequence in what its layers get, None for the usual ones or where it is not known."""
    config = text_config(model) if isinstance(model, PreTrainedModel) else None
    return _TOKEN_DIMS.get(getattr(config, "model_type", None))


# ---- layers and their parts ----


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module within the model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def input_embedding(model: Any) -> Any:
    """The table of token embeddings; None where there is none, as for images."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        return None
    return embedding if hasattr(embedding, "weight") else None


def input_embeddings(model: Any) -> list[nn.Module]:
    """The tables of token embeddings: the encoder's and the decoder's, if there are both."""
    parts = [model.get_encoder(), model.get_decoder()] if is_encoder_decoder(model) else [model]
    tables = dict.fromkeys(input_embedding(part) for part in parts)
    is_of_sound = nn.modules.conv._ConvNd  # as the first layer of Whisper's encoder
    return [table for table in tables if table is not None and not isinstance(_base_layer(table), is_of_sound)]


def decoder_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """Find the stack of layers of a transformer: the outermost `ModuleList` of as many entries as the config says.

    In a composite model it is the one of the text model: of the module whose config is the text's.

    Returns:
        `list[tuple[str, nn.Module]]`: the layers with their names in `model`.

    Raises:
        ValueError: there is no such stack, or there are several and none is known to be the text's.
    """
    config = text_config(model)
    roots = [decoder for decoder in [_innermost_decoder(model), model] if decoder is not None]
    # Of a decoder alone, such as BART's, `num_hidden_layers` are the encoder's; of LongCat-Flash, twice `num_layers`.
    names = ["decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers"]
    if getattr(config, "is_encoder_decoder", False):
        names, roots = ["num_decoder_layers", "num_hidden_layers"], roots[:1]
    known = [getattr(config, name, None) for name in names]
    lengths = list(dict.fromkeys(length for length in known if length is not None))
    for length, root in itertools.product(lengths, roots):
        module = _stack(model, root, length, type(config))
        if module is not None:
            stack = name_of(model, module)
            return [(f"{stack}.{i}", layer) for i, layer in enumerate(module)]
    if not lengths:
        raise ValueError(f"The config of {type(model).__name__} does not say how many layers it has. {NAME_MODULES}")
    wanted = " or ".join(map(str, lengths))
    raise ValueError(f"No stack of {wanted} layers was found in {type(model).__name__}. {NAME_MODULES}")


def _stack(model: nn.Module, root: nn.Module, length: int, config_class: type) -> nn.ModuleList | None:
    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [
        (name, module)
        for name, module in lists
        if len(module) == length and not any(name.startswith(f"{outer}.") for outer, _ in lists)
    ]
    own = [(name, module) for name, module in stacks if isinstance(_config_around(root, name), config_class)]
    if len({name.rpartition(".")[0] for name, _ in own}) < len(own):  # XLM has a list for each part of a layer
        own = [(name, module) for name, module in own if attention_of(module[0])]
    if not own and len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} has several stacks of {length} layers, {[name for name, _ in stacks]}. "
            f"{NAME_MODULES}"
        )
    return (own or stacks)[0][1] if stacks else None


def layers_if_any(model: Any) -> list[nn.Module]:
    """The stack of layers, empty where there is none."""
    try:
        return [layer for _, layer in decoder_layers(model)]
    except ValueError:
        return []


def _innermost_decoder(model: Any) -> Any:
    """What `get_decoder` gives, asked again of what it gives: the decoder of a language model may have an encoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder is None or decoder is model else _innermost_decoder(decoder) or decoder


def _config_around(root: nn.Module, name: str) -> Any:
    """The config of the module closest around the one called `name` that has one."""
    parts = name.split(".")[:-1]
    modules = [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    return next((module.config for module in modules if getattr(module, "config", None) is not None), None)


def attention_of(layer: nn.Module) -> str | None:
    """The name of a layer's attention, None if it has none."""
    return next((name for name, child in layer.named_children() if "attention" in type(child).__name__.lower()), None)


def mlp_of(layer: nn.Module) -> str | None:
    """The name of a layer's feed-forward block, or of what stands for it: the first weight matrix past attention."""
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


def linears_of(layer: nn.Module, reads_encoder: bool = True) -> list[str]:
    """The names of a layer's linear layers whose inputs can learn: those that run and pass gradients on.

    Args:
        layer (`nn.Module`): a decoder layer.
        reads_encoder (`bool`): its model gives it an encoder's output to attend to.
    """
    return [
        name
        for name, module in modules_outside_adapters(layer)
        if isinstance(_base_layer(module), (nn.Linear, Conv1D))
        and not _learns_nothing(layer, name)
        and (reads_encoder or _CROSS_ATTENTION not in name.split("."))
    ]


def reads_encoder(model: Any) -> bool:
    """Whether decoder layers attend to an encoder too; those of BART as a causal language model could, and do not."""
    return is_encoder_decoder(model) or bool(setting(model, "add_cross_attention"))


def _learns_nothing(layer: nn.Module, name: str) -> bool:
    """Whether a linear layer only chooses tokens or experts, or is never called: a selective scan takes its weight."""
    parts = name.split(".")
    holders = [layer.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
    if any(_CHOOSER.search(type(holder).__name__) for holder in holders):
        return True
    return parts[-1] == "dt_proj" and hasattr(layer.get_submodule(".".join(parts[:-1])), "A_log")


def modules_outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The named modules without those of an adapter: `q_proj`, but not `q_proj.lora_A` or `q_proj.base_layer`."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [
        (name, module)
        for name, module in model.named_modules()
        if not name.startswith(inside or "\0") and name.rpartition(".")[2] != _PROJECTION_NAME
    ]


def input_channels(module: nn.Module) -> tuple[int, int] | None:
    """The number of channels of a module's input and their dimension, as far as the module itself tells.

    A block tells by its first layer with weights if channels are dimension 1 there, as for a convolution. One along
    the sequence beside linear layers does not tell: it is inside a mixer of tokens, whose channels are the last.
    """
    leaf: Any = _base_layer(module)
    children = [child for name, child in leaf.named_children() if name != _PROJECTION_NAME]
    if children:
        kinds = {type(part) for part in leaf.modules()}
        if any(issubclass(kind, nn.Conv1d) for kind in kinds) and any(issubclass(kind, nn.Linear) for kind in kinds):
            return None
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
    weight = getattr(leaf, "weight", None)
    if isinstance(weight, nn.Parameter) and len(whole_shape(weight)) == 1:  # LayerNorm, RMSNorm
        return whole_shape(weight)[0], -1
    return None


def is_behind_padding_mask(model: nn.Module, name: str) -> bool:
    """Whether a module stands where padding has been set to zero, because a convolution along the sequence follows.

    Such mixers of tokens (Mamba's, gated delta nets, short convolutions) mask their padding as it enters, not later.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    return any(isinstance(_base_layer(child), nn.Conv1d) for child in parent.children())


def reads_cache(model: nn.Module, name: str) -> bool:
    """Whether a module sees cached tokens again: multi-head latent attention expands all latents at each step."""
    parent, _, own_name = name.rpartition(".")
    return own_name == "kv_b_proj" and hasattr(model.get_submodule(parent), "expand_kv")


def _base_layer(module: Any) -> nn.Module:
    """The layer that an adapter of the weights has wrapped."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


# ---- rows ----


def layers_from(model: nn.Module, site_names: list[str]) -> list[nn.Module]:
    """The decoder layers from the first one with a site on, if they can run on more rows than the model was given.

    They cannot if they are given something that is not known, which may hold rows, or if the model's own shape is that
    of its inputs. None either where noise enters below the second layer.
    """
    try:
        layers = decoder_layers(model) if shifts_labels(model) else []
    except ValueError:
        return []
    firsts = []
    for name in site_names:
        inside = [i for i, (layer, _) in enumerate(layers) if f"{name}.".startswith(f"{layer}.")]
        firsts.append(inside[0] if inside else 0)
    first = min(firsts, default=0)
    if first == 0 or setting(model, "model_type") in _FIXED_OUTPUT_SHAPE:
        return []
    upper = [layer for _, layer in layers[first:]]
    known = all(set(inspect.signature(layer.forward).parameters) <= _KNOWN_LAYER_INPUTS for layer in upper)
    return upper if known else []


def needs_whole_rows(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a forward pass looks at the rows outside its layers: all layers' outputs, or one mask for all."""
    whole = ("output_router_logits", "output_hidden_states", "output_attentions")
    asked = any(inputs.get(name) or setting(model, name) for name in whole)
    return asked or setting(model, "_attn_implementation") == "flex_attention"


def recomputes_without_hooks(model: nn.Module, layers: list[nn.Module]) -> bool:
    """Whether gradient checkpointing recomputes the layers without what their pre-hooks did to the inputs."""
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    hooks_are_outside = "__call__" not in vars(GradientCheckpointingLayer) and all(
        isinstance(layer, GradientCheckpointingLayer) for layer in layers
    )
    return checkpointed and not hooks_are_outside


# ---- the head and the loss ----


def plain_head(model: Any) -> nn.Linear | None:
    """The output head, if it is a linear layer and nothing else: no adapter, not quantized, not offloaded."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or not has_data(head.weight):
        return None
    if not all(hook.__module__.startswith(_SHARDERS) for hook in head._forward_hooks.values()):
        return None
    return head if whole_shape(head.weight) == (head.out_features, head.in_features) else None


def output_head(model: Any, head: nn.Linear) -> OutputHead:
    """What turns the head's input into logits, as the model's config has it and under the autocast of now."""
    config = model.config.get_text_config()
    factors = {name: getattr(config, name, None) for name in _LOGIT_FACTORS}
    scales = [factor ** _LOGIT_FACTORS[name] for name, factor in factors.items() if factor is not None]
    device_type = head.weight.device.type
    autocast = torch.is_autocast_enabled(device_type)
    return OutputHead(
        weight_VD=head.weight,
        bias_V=head.bias,
        dtype=torch.get_autocast_dtype(device_type) if autocast else head.weight.dtype,
        scale=scales[0] if scales else 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


class ModelProbe(NamedTuple):
    """What one forward pass of a few tokens tells of a model."""

    has_run: bool = False  # a model whose weights are elsewhere is not asked
    logits_are_plain: bool = False  # `output_head` gives the model's logits
    # The model's own loss, apart from the load-balancing one, is the shifted cross entropy, averaged over the tokens.
    loss_is_plain: bool = False


def probe(model: Any, head: nn.Linear | None, run: Callable[..., Any]) -> ModelProbe:
    """Run the model on a few tokens, and compare its logits and its loss with the plain ones.

    Args:
        model (`nn.Module`): a network that takes tokens, without noise.
        head (`nn.Linear`, *optional*): its `plain_head`.
        run (`Callable`): calls the network; where that is sharded, with all processes at once.
    """
    embedding: Any = getattr(input_embedding(model), "weight", None)
    if not isinstance(embedding, torch.Tensor) or len(whole_shape(embedding)) != 2 or not has_data(embedding):
        return ModelProbe()
    ours: list[torch.Tensor] = []

    def compute_logits(module: nn.Linear, args: tuple) -> None:
        ours.append(output_head(model, module).logits(args[0].to(module.weight.device)))

    hook = None if head is None else head.register_forward_pre_hook(compute_logits)
    ids = torch.arange(min(whole_shape(embedding)[0], _NUM_PROBED), device=embedding.device)
    labels = ids.square() % len(ids)  # neither the next token nor the same one
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[embedding.device] if embedding.is_cuda else []),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # a reentrant checkpoint asks for gradients
            outputs = run(input_ids=ids[None], labels=labels[None])
    finally:
        if hook is not None:
            hook.remove()
    logits, loss = (
        outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32)),
        own_loss(model, outputs),
    )
    plain_loss = F.cross_entropy(logits[0, :-1], labels[1:].to(logits.device))
    return ModelProbe(
        has_run=True,
        logits_are_plain=len(ours) == 1 and _are_close(ours[0].to(logits), logits, _tolerance(outputs.logits, 1e-4)),
        loss_is_plain=loss is not None and _are_close(loss.to(plain_loss), plain_loss, _tolerance(loss, 1e-5)),
    )


def _tolerance(output: torch.Tensor, of_float32: float) -> float:
    """The relative tolerance of what a model gives out; FSDP2 may round its loss to a half precision too."""
    return of_float32 if output.dtype in (torch.float32, torch.float64) else 1e-2


def _are_close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether all entries agree; infinite ones, of a mask, agree with nothing."""
    return bool(torch.isfinite(b).all()) and torch.allclose(a, b, rtol=tolerance, atol=1e-5)


def has_data(weight: torch.Tensor) -> bool:
    """Whether a weight is in this process, all or its shard: not on the meta device, and not empty."""
    return not weight.is_meta and whole_shape(weight).numel() > 0


def shifts_labels(model: Any) -> bool:
    """Whether the labels of position t are the targets of position t - 1, as for a causal language model."""
    if is_encoder_decoder(model):
        return False
    loss_type = getattr(model, "loss_type", None)
    if loss_type is None:  # a class whose name tells transformers nothing, such as GPT2LMHeadModel
        return isinstance(model, PreTrainedModel) and model.can_generate()
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss


def has_class_loss(model: Any, logits: Any, labels: Any) -> bool:
    """Whether the model's labels are classes, one per vector of its logits, as far as shapes and its name tell."""
    known = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "")
    if known not in (None, *_CLASS_LOSSES) or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return False
    return isinstance(logits, torch.Tensor) and logits.shape[:-1] == labels.shape and logits.shape[-1] > 1


def own_loss(model: Any, outputs: Any) -> Any:
    """The loss that a model returned, without the load-balancing loss of a mixture of experts; None if it did not."""
    loss, router_loss = getattr(outputs, "loss", None), getattr(outputs, "aux_loss", None)
    if loss is None or router_loss is None:
        return loss
    return loss - router_loss_weight(model) * router_loss.to(loss.device)


def adds_router_loss(model: Any) -> bool:
    """Whether the model adds the load-balancing loss of a mixture of experts to its own."""
    return bool(getattr(text_config(model), "output_router_logits", False))


def router_loss_weight(model: Any) -> float:
    """The weight of the load-balancing loss of a mixture of experts: what the model itself keeps, or its config's."""
    own = [getattr(model, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef")]
    known = [weight for weight in own if weight is not None]
    return known[0] if known else text_config(model).router_aux_loss_coef

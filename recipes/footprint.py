"""What one training step takes, in memory and in operations, found by running it on tensors that hold no data.

The network, its noise, its loss and its optimizer are the real ones. Each operation tells the shapes of its results,
and what is alive at the same time is added up. Launches, devices and what fits are the matter of `recipes/plan.py`.

Shape legend: B batch, L sequence, S samples, D hidden size, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock
from weakref import finalize

import torch
from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.training_args import OptimizerNames

from dipnet_hf import DipConfig, chunked_loss, get_dip_model
from dipnet_hf.architecture import ModelProbe, decoder_layers, network_of
from dipnet_hf.batches import expand_batch
from dipnet_hf.data_loss import run
from dipnet_hf.hidden_states import HiddenStateCapture
from dipnet_hf.objective import data_terms_of_logits
from dipnet_hf.projection import DipProjection
from recipes.config import FinetuneConfig

_aten = torch.ops.aten
# How PyTorch counts operations; of attentions it knows those of GPUs, whose first arguments are the same.
_COUNTS = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[_aten._scaled_dot_product_flash_attention_backward]
    ),
}
KINDS = ("weights", "optimizer", "gradients", "activations", "logits")


class Footprint(NamedTuple):
    """What a run takes on one device that holds everything; bytes."""

    num_parameters: int
    num_trainable: int
    peak: dict[str, int]  # by kind, at the moment of a training step at which they are most
    evaluation: int  # the peak of an evaluation batch's loss
    cache: int  # the keys and values of a batch that generates
    layer: int  # the weights of the largest layer
    num_operations: int  # floating-point ones, of a batch's forward and backward pass


class Quantized(nn.Linear):
    """Stands for a linear layer of bitsandbytes: its bytes, and its weights in full where and while they are used.

    Args:
        linear (`nn.Linear`): what it replaces.
        num_bytes (`int`): of the quantized weights with their scales.
        dtype (`torch.dtype`): of the product.
    """

    def __init__(self, linear: nn.Linear, num_bytes: int, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = nn.Parameter(torch.empty(num_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = linear.bias
        self.compute_dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product in the dtype that is computed in, returned in that of the input."""
        shape = self.out_features, self.in_features
        product = _QuantizedProduct.apply(x.to(self.compute_dtype), self.weight, shape)
        return (product if self.bias is None else product + self.bias.to(product.dtype)).to(x.dtype)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, shape):
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None


class Meter(TorchDispatchMode):
    """Adds up the operations, and the bytes of the storages that are alive, by kind; keeps these at their peak.

    (PyTorch's own `FlopCounterMode` keeps what a checkpointed layer has recomputed alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"  # of what is allocated from now on
        self.num_operations = 0
        self._kinds: dict[int, str] = {}
        self._alive: Counter[str] = Counter()
        self.peak: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if count := _COUNTS.get(func._overloadpacket):
            self.num_operations += count(*args, **(kwargs or {}), out_val=result)
        tree_map_only(torch.Tensor, self.note, result)
        return result

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, until it is freed."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._kinds:
            return
        self._kinds[key] = self.kind
        self._alive[self.kind] += num_bytes
        finalize(storage, self._free, key, num_bytes)
        if self._alive.total() > sum(self.peak.values()):
            self.peak = dict(self._alive)

    def _free(self, key: int, num_bytes: int) -> None:
        self._alive[self._kinds.pop(key)] -= num_bytes

    def move(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor under another kind."""
        storage = tensor.untyped_storage()
        self._alive[self._kinds[storage._cdata]] -= storage.nbytes()
        self._alive[kind] += storage.nbytes()
        self._kinds[storage._cdata] = kind


def measure(config: FinetuneConfig, training: TrainingArguments, for_gpu: bool) -> Footprint:
    """Run a step of a configuration without data.

    Every row has `max_length` tokens, and all of them are learned: the most that a batch can be.

    Args:
        config (`FinetuneConfig`): what is trained.
        training (`TrainingArguments`): its `training` section.
        for_gpu (`bool`): compute the loss in the chunks of a GPU, not of a CPU.

    Raises:
        ValueError: the optimizer is not one of PyTorch's.
    """
    model = build(config)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with FakeTensorMode(), _as_after_calibration(for_gpu):
        _give_tensors(model)
        if training.activation_checkpointing:
            # The name before transformers 5.23 is the second one.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(training.activation_checkpointing_kwargs or {"use_reentrant": False})
        meter = Meter()
        meter.kind = "weights"
        for tensor in (*model.parameters(), *model.buffers()):
            meter.note(tensor)
        autocast = torch.autocast("cpu", torch.float16 if training.fp16 else torch.bfloat16, _is_mixed(training))
        with meter, _kinds_of_logits_and_gradients(model, meter):
            optimizer = _warm_optimizer(model, training, meter)
            _train(model, config, training, optimizer, meter, autocast)
            num_operations, peak = meter.num_operations, {kind: meter.peak.get(kind, 0) for kind in KINDS}
            meter.peak = {}
            _evaluate(model, config, training, autocast)
            evaluation = sum(meter.peak.values())
        cache = _cache(model, config)
        layer = max(_num_bytes(part) for _, part in decoder_layers(network_of(model)))
    num_parameters = sum(parameter.numel() for parameter in build_network(config).parameters())
    return Footprint(num_parameters, num_trainable, peak, evaluation, cache, layer, num_operations)


def build_network(config: FinetuneConfig) -> PreTrainedModel:
    """Build the network that a configuration loads, from its `config.json` alone, on the meta device."""
    model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    dtype = torch.float32 if config.weights == "full" else getattr(torch, config.dtype or "", model_config.dtype)
    # A flash attention keeps what PyTorch's does.
    attention = config.attn_implementation
    attention = "sdpa" if attention is not None and "flash" in attention else attention
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
        )


def build(config: FinetuneConfig) -> Any:
    """Build what a configuration trains, with its adapters and its noise, on the meta device."""
    network = build_network(config)
    quantization = config.quantization_config()
    if quantization is not None:
        network = _quantize(network, quantization)
    weights = config.peft_config()
    if config.dip is not None:
        known = {"init_noise_std": 0.1, "prior_std": 0.1, "noise_scale": "absolute"}  # as calibration makes it
        return get_dip_model(network, DipConfig(weights=weights, **{**config.dip, **known}))
    return get_peft_model(network, weights) if isinstance(weights, PeftConfig) else network


def _quantize(model: Any, fields: BitsAndBytesConfig) -> PreTrainedModel:
    """Replace the layers that bitsandbytes would quantize, and prepare the model as PEFT does."""
    in_float32 = list(model._keep_in_fp32_modules or [])
    skipped = HfQuantizer.get_modules_to_not_convert(model, fields.llm_int8_skip_modules, in_float32)
    # 4 bits a weight and a float32 scale for 64 of them; or, quantized twice, 8 bits, with a float32 for 256 of these.
    scale = (1 + 4 / 256) / 64 if fields.bnb_4bit_use_double_quant else 4 / 64
    per_weight = 0.5 + scale if fields.load_in_4bit else 1.0
    dtype = fields.bnb_4bit_compute_dtype if fields.load_in_4bit else torch.float16
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and should_convert_module(name, skipped):
            model.set_submodule(name, Quantized(module, int(module.weight.numel() * per_weight), dtype))
    model.is_loaded_in_4bit = True
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _give_tensors(model: nn.Module) -> None:
    """Replace what is on the meta device, which no autocast and no kernel knows, by tensors of the device of now."""
    given: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (vars(module)["_parameters"], vars(module)["_buffers"]):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = given.setdefault(id(tensor), _without_data(tensor))


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def _as_after_calibration(for_gpu: bool) -> Iterator[None]:
    """Context in which is taken for granted what a run finds out from its data."""
    known = ModelProbe(has_run=True, logits_are_plain=True, loss_is_plain=True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(DipProjection, "calibrated", True))
        stack.enter_context(mock.patch.object(HiddenStateCapture, "probe", lambda *_: known))
        if for_gpu:
            limits = {"cpu": chunked_loss.MAX_CHUNK_LOGITS_GPU}
            stack.enter_context(mock.patch.dict(chunked_loss.MAX_CHUNK_LOGITS, limits))
        yield


def _is_mixed(training: TrainingArguments) -> bool:
    return training.bf16 or training.fp16


@contextmanager
def _kinds_of_logits_and_gradients(model: Any, meter: Meter) -> Iterator[None]:
    def count_logits(*_) -> None:
        meter.kind = "logits"

    hooks = [network_of(model).get_output_embeddings().register_forward_pre_hook(count_logits)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda leaf: meter.move(leaf.grad, "gradients")))
    yield
    for hook in hooks:
        hook.remove()


def _batch(num_rows: int, config: FinetuneConfig) -> dict[str, torch.Tensor]:
    ids_BL = torch.ones(num_rows, config.max_length, dtype=torch.int64)
    return {"input_ids": ids_BL, "attention_mask": ids_BL.clone(), "labels": ids_BL.clone()}


def _train(
    model: Any,
    config: FinetuneConfig,
    training: TrainingArguments,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    autocast: torch.autocast,
) -> None:
    """Run a step with an optimizer that has its state."""
    meter.peak, meter.num_operations, meter.kind = {}, 0, "activations"
    model.train()
    with autocast:
        loss = _loss(model, config, _batch(training.per_device_train_batch_size, config), meter)
    meter.kind = "activations"
    loss.backward()
    del loss
    optimizer.step()
    optimizer.zero_grad()


def _warm_optimizer(model: Any, training: TrainingArguments, meter: Meter) -> torch.optim.Optimizer:
    """Make the optimizer, and let it make its state."""
    optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(training, network_of(model))
    if not optimizer_class.__module__.startswith("torch.optim"):
        raise ValueError(
            f"--plan knows PyTorch's optimizers, got optim={OptimizerNames(training.optim).value}; take adamw_torch."
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trainable, **arguments)
    meter.kind = "optimizer"
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _loss(model: Any, config: FinetuneConfig, batch: dict[str, torch.Tensor], meter: Meter) -> torch.Tensor:
    """The training loss, of noisy passes as `dipnet_hf.loss` has it but for the selection of the learned tokens."""
    dip = config.dip_config()
    if dip is None:
        return model(**batch).loss
    batch = expand_batch(batch, dip.num_samples)
    labels_BL = batch["labels"]
    with model.base_model.sampled_rows():
        states, head, outputs = run(model, batch, True, model.base_model.hidden_state_capture, labels_BL.shape)
    states_RD, targets_R = states[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten()
    del states
    meter.kind = "logits"
    stability = dip.num_samples, dip.stability_loss_weight, dip.stability_target
    if head is None:
        return data_terms_of_logits(states_RD, targets_R, *stability).total
    terms = chunked_loss.chunked_loss(states_RD, targets_R, head, *stability)
    return terms.total + outputs.logits.sum() + model.base_model.prior_loss()


def _evaluate(model: Any, config: FinetuneConfig, training: TrainingArguments, autocast: torch.autocast) -> None:
    """Run an evaluation batch, whose logits are whole."""
    with torch.no_grad(), autocast:
        model.eval()(**_batch(training.per_device_eval_batch_size, config))


def _cache(model: Any, config: FinetuneConfig) -> int:
    """The bytes of the keys and values of the rows that generate at once, each of the longest prompt and answer."""
    if not config.evaluation.tasks:
        return 0
    ids_BL = torch.ones(1, config.max_length + config.evaluation.max_new_tokens, dtype=torch.int64)
    with torch.no_grad():
        cache = model.eval()(input_ids=ids_BL, use_cache=True, logits_to_keep=1).past_key_values
    row = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return row * config.evaluation.batch_size


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())

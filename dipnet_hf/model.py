"""DipModel, the PEFT tuner, and get_dip_model: inject, sample, calibrate, save, load, merge."""

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_adapters_not_merged, _delete_auxiliary_adapter
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from . import objective
from .architecture import (
    TEXT_INPUTS,
    input_names,
    is_encoder_decoder,
    layers_from,
    layers_if_any,
    takes_tokens,
    token_dims,
)
from .calibration import calibrate, noise_sweep
from .calibration_loss import CalibrationLoss
from .config import DipConfig
from .contexts import ContextValue
from .draws import RecomputeMemory
from .ensemble import Ensemble, average_of
from .generation import GenerationGuard
from .hidden_states import HiddenStateCapture
from .late_expansion import Inputs, LateExpansion
from .layout import TokenDims
from .noise import KeySource
from .passes import FreshPass, Pass
from .projection import DipProjection
from .sampled_rows import check_prompt
from .sharding import gather_below, is_in_zero, is_sharded, whole
from .sites import find_sites
from .weights import (
    check_fits,
    check_sites,
    check_weights,
    embeddings_to_save,
    export_weights,
    inject_weights,
    set_task,
    tuner_of,
    upgrade_noise,
)

_MAX_SILENT_PASSES = 8


def get_dip_model(
    model: nn.Module, config: DipConfig, calibration: Iterable | None = None, adapter_name: str = "default"
) -> PeftModel:
    """Make the inputs of a model's layers learnable Gaussians, and its own weights trainable as `config.weights` says.

    Args:
        model (`nn.Module`): the base model, changed in place as by `peft.get_peft_model`.
        config (`DipConfig`): what is projected and how it learns. It is copied.
        calibration (`Iterable`, *optional*): batches for `calibrate`. Without them call it later; `DipTrainer` does.
        adapter_name (`str`): as in PEFT.

    Returns:
        `peft.PeftModel`, whose tuner is a `DipModel`.

    Raises:
        TypeError: `model` or `config` is of another kind.
        ValueError: `config` does not fit the model, which is unchanged then; or calibration fails, see `calibrate`.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise TypeError(
            "get_dip_model needs the base model, got one that holds a PEFT adapter. Give the adapter's config as "
            "DipConfig(weights=...), or call merge_and_unload() first."
        )
    if not isinstance(config, DipConfig):
        raise TypeError(f"config must be a DipConfig, got {type(config).__name__}. Put it in DipConfig(weights=...).")
    config = copy.deepcopy(config)
    if isinstance(model, PreTrainedModel) and not takes_tokens(model):
        _check_no_task(model, config)
    elif config.task_type is None and isinstance(model, PreTrainedModel) and model.can_generate():
        config.task_type = "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    if calibration is not None:
        peft_model.calibrate(calibration)
    return peft_model


def _check_no_task(model: nn.Module, config: DipConfig) -> None:
    if config.task_type is not None:
        raise ValueError(
            f"task_type={config.task_type!r} makes PEFT pass input_ids, and {type(model).__name__} takes none. Leave "
            "task_type out, and name a new head in the weights' modules_to_save."
        )


class DipModel(BaseTuner):
    """The tuner behind `get_dip_model`. A `PeftModel` forwards its methods.

    It owns the adapter of the weights too. PEFT holds one tuner per model, so the weights' config is nested in
    `DipConfig`, and their adapter is injected here and saved in the same file.
    """

    prefix = "dip_"
    # Activating, disabling and deleting an adapter acts on the projections and on the weights' own layers.
    tuner_layer_cls = BaseTunerLayer

    # ---- injection ----

    def __init__(self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], *args, **kwargs):
        if isinstance(peft_config, PeftConfig):  # PEFT's `inject_adapter_in_model`, which makes no `PeftModel`
            raise ValueError(
                "A DIPNet adapter cannot be put into a model by transformers' own add_adapter, load_adapter, "
                "AutoModelForCausalLM.from_pretrained(adapter) or pipeline(model=adapter): its weights would not be "
                "loaded. Load it with peft's AutoPeftModelForCausalLM.from_pretrained(adapter) or "
                "PeftModel.from_pretrained(model, adapter), and make a new one with get_dip_model."
            )
        super().__init__(model, peft_config, *args, **kwargs)
        self._input_names = input_names(model)
        # They stay: hooks that come and go with a context would do so within the forward pass of another thread.
        self._hooks = [
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            model.register_forward_hook(self._end_forward),
            *(
                layer.register_forward_pre_hook(self._begin_layer, prepend=True, with_kwargs=True)  # before the noise
                for layer in layers_if_any(model)
            ),
        ]
        self._generation_guard = GenerationGuard(model, self._pass, self._noise_on)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._projections: list[DipProjection] = []
        self._noise_on: ContextValue[bool | None] = ContextValue(None)
        self._noisy_adapter: ContextValue[str | None] = ContextValue(None)
        self._pass: ContextValue[Pass] = ContextValue(FreshPass(KeySource()))
        self._memory = RecomputeMemory()
        self._num_silent_passes: int | None = 0  # with noise on and no site that ran; None: one has run
        self._calibration_keys: dict[str, list[Any]] = {}
        self.hidden_state_capture = HiddenStateCapture(model, without_noise=self.deterministic)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Inject the weights' adapter, then the projections, so that noise enters the layer with its adapter."""
        config = self._dip_config(adapter_name)
        self._check_new_adapter_config(config)
        check_weights(model, config, [self._dip_config(name) for name in self.peft_config if name != adapter_name])
        # A copy of an adapter is added with its very config, as TRL's reference is; which may be changed before that.
        key = config.calibration_key
        copied = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        self._copied = next((name for name in copied if self._calibration_keys[name] == key), None)
        self._calibration_keys[adapter_name] = key
        set_task(config)
        self._sites = {site.name: site for site in find_sites(model, config)}
        check_sites(config, list(self._sites))
        hosts = [model.get_submodule(projection.site.name) for projection in self._projections]
        if isinstance(config.weights, PeftConfig):
            inject_weights(model, config.weights, adapter_name, kwargs.get("low_cpu_mem_usage", False))
            if getattr(config.weights, "layer_replication", None):  # the model has other layers now
                self._sites = {site.name: site for site in find_sites(model, config)}
        for projection, host in zip(self._projections, hosts, strict=True):
            wrapped = model.get_submodule(projection.site.name)
            if wrapped is not host:  # the weights' adapter has wrapped the layer
                projection.detach_from(host)
                projection.attach(wrapped)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # In the order of the modules, on which seeded draws depend, not in the order in which adapters came.
        self._projections = [module for module in model.modules() if isinstance(module, DipProjection)]
        if config.weights == "full" and not config.inference_mode:
            model.requires_grad_(True)
            for projection in self._projections:  # what calibration finds is not learned
                projection.dip_scale.requires_grad_(False)
                projection.dip_init_std.requires_grad_(False)

    def _check_new_adapter_config(self, config: DipConfig) -> None:
        super()._check_new_adapter_config(config)
        if any(type(m).forward.__module__.startswith("unsloth") for m in self.model.modules()):
            raise ValueError("Unsloth rewrites the layers' forward, so noise never runs. Load the model without it.")
        if getattr(self.model, "_tp_size", None) not in (None, 1):
            raise ValueError(
                "Tensor parallelism is not supported: its ranks would draw different noise for one token."
            )
        if getattr(self.model, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "The model was loaded with a distributed_config, whose processes may share a row (expert and tensor "
                "parallelism) and draw different noise for it. Load it without, and let accelerate shard it by FSDP2."
            )

    def _prepare_adapter_config(self, peft_config: DipConfig, model_config: dict) -> DipConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: DipConfig, key: str) -> bool:
        return key in self._sites

    def _check_target_module_compatiblity(self, peft_config: DipConfig, model: nn.Module, target_name: str) -> None:
        pass  # PEFT's check is about replacing weights, which a projection does not

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # PEFT warns about merging into tied weights, and a projection merges into none

    def _check_tied_modules(self, model: nn.Module, peft_config: DipConfig) -> None:
        pass  # the weights' own tuner has checked what they train

    def _create_and_replace(
        self, peft_config: DipConfig, adapter_name: str, target: nn.Module, *args, current_key: str, **kwargs
    ) -> None:
        projection = getattr(target, "dip_projection", None)
        if projection is None:
            dims = token_dims(self.model)
            projection = DipProjection(
                *(self._sites[current_key], self._noise_on, self._noisy_adapter, self._memory),
                token_dims=None if dims is None else TokenDims(*dims),
            )
            projection.train(target.training)
            projection.attach(target)
        parameter = next(target.parameters(), None)
        device = None if parameter is None else parameter.device
        projection.add_adapter(adapter_name, peft_config, device, self._copied)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # only to put a layer back; PEFT's expects a `weight` in every layer

    # ---- adapters ----

    def _active_projections(self) -> list[DipProjection]:
        return [projection for projection in self._projections if projection.adapter is not None]

    def _dip_config(self, adapter_name: str) -> DipConfig:
        return cast(DipConfig, self.peft_config[adapter_name])

    @property
    def active_dip_config(self) -> DipConfig:
        """The config of the active adapter.

        Raises:
            ValueError: no adapter is active, because the last one was deleted.
        """
        if not self.active_adapters:
            raise ValueError(
                "The model's last DIP adapter was deleted: call add_adapter(name, config) and set_adapter(name)."
            )
        return self._dip_config(self.active_adapters[0])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter. Only one can be active: two would add two independent noises to one input."""
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(f"One DIP adapter can be active at a time, got {list(adapter_name)}.")
        self._num_silent_passes = 0
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, its noise and its weights. Another one becomes active if there is any."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist, the model holds {list(self.peft_config)}.")
        _check_adapters_not_merged(self.model, adapter_name)
        del self.peft_config[adapter_name]
        self._calibration_keys.pop(adapter_name, None)
        remaining = list(self.peft_config)
        if adapter_name in self.active_adapters and remaining:
            self.set_adapter(remaining[0], inference_mode=self.peft_config[remaining[0]].inference_mode)
        for module in list(self.model.modules()):
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(adapter_name)
        _delete_auxiliary_adapter(self.model, adapter_name, new_active_adapters=remaining[:1])
        self.active_adapter = remaining[:1]

    # ---- noise ----

    def _begin_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Inputs | None:
        """Start the pass: give every site its draw, and the model the inputs that the pass wants."""
        node = None if torch.compiler.is_compiling() else torch._C._current_autograd_node()
        # A running autograd node means that the backward pass is recomputing the whole model, for a checkpoint around
        # it. That is not a new pass: the sites recall the draws of the one that is recomputed.
        if node is not None:
            if node.name() == "CheckpointFunctionBackward":
                raise RuntimeError(
                    "The whole model is recomputed by a reentrant checkpoint, which does not tell which forward pass "
                    "is repeated, so its noise cannot be. Use use_reentrant=False, or checkpoint the layers."
                )
            return None
        if not torch.compiler.is_compiling() and any(is_in_zero(logvar) for logvar in self.logvars()[:1]):
            for projection in self._projections:
                gather_below(projection)
        projections = [projection for projection in self._projections if projection.sampling]
        if len(args) <= len(self._input_names):  # else some have no name
            args, kwargs = (), dict(zip(self._input_names, args, strict=False)) | kwargs
        changed, draws = self._pass.get().begin(args, kwargs, projections)
        for projection, draw in zip(projections, draws, strict=True):
            projection.set_draw(draw)
        if torch.compiler.is_compiling():
            self._memory.blind = True
        elif torch.is_grad_enabled():  # another pass is never recomputed, and its draws may hold noise
            names = [projection.site.name for projection in projections]
            self._memory.remember(dict(zip(names, draws, strict=True)))
        return changed

    def _begin_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Inputs | None:
        """Give a decoder layer the inputs that the pass wants."""
        expansion = self._pass.get().expansion
        return None if expansion is None else expansion.expand_at_layer(layer, args, kwargs)

    def _end_forward(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """End the pass that began last, and return what it makes of the output."""
        is_compiling = torch.compiler.is_compiling()
        if self._num_silent_passes is not None and torch.is_grad_enabled() and not is_compiling:
            self._check_noise_ran()
        return self._pass.get().end(output)

    def _check_noise_ran(self) -> None:
        """Refuse to train a network whose sites are all passed by, as by kernels that replace the layers' forward."""
        sampling = [projection for projection in self._projections if projection.sampling]
        is_compiled = any(module._compiled_call_impl is not None for module in self.model.modules())
        if is_compiled or any(projection.has_run for projection in sampling):
            self._num_silent_passes = None
        elif sampling and self._num_silent_passes is not None:
            self._num_silent_passes += 1  # some passes may do without: a text without an image, a dropped layer
            if self._num_silent_passes == _MAX_SILENT_PASSES:
                raise RuntimeError(
                    f"Noise is on, but none of the {len(sampling)} sites ran in {_MAX_SILENT_PASSES} forward passes: "
                    "something calls the layers' forward without their hooks, or never calls "
                    f"'{sampling[0].site.name}'. Make the model with get_dip_model after it was patched, or choose "
                    "sites that run."
                )

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; an ensemble looks at the prompt first."""
        if isinstance(self._pass.get(), Ensemble):
            check_prompt(
                next((prompt for prompt in (inputs, *map(kwargs.get, TEXT_INPUTS)) if prompt is not None), None)
            )
        return self.model.generate(inputs, *args, **kwargs)

    @contextlib.contextmanager
    def sampling(self, seed: int | None = None) -> Iterator[None]:
        """Noise on, in `train()` and in `eval()`.

        Args:
            seed (`int`, *optional*): makes the draws of the n-th forward pass in this context a function of the seed,
                n and the process's rank. Without it every forward pass draws from PyTorch's global generator.
        """
        self._check_no_ensemble()
        with self._noise_on.set_to(True), self._pass.set_to(FreshPass(KeySource(seed))):
            yield

    @property
    def in_ensemble(self) -> bool:
        """Whether the model answers for the mean of several samples now, see `ensemble`."""
        return isinstance(self._pass.get(), Ensemble)

    def _check_no_ensemble(self) -> None:
        if self.in_ensemble:
            raise ValueError("This model is in an ensemble, whose seed decides its noise: leave it first.")

    def deterministic(self) -> contextlib.AbstractContextManager[None]:
        """Noise off, in `train()` and in `eval()` (Algorithm 3)."""
        return self._noise_on.set_to(False)

    @contextlib.contextmanager
    def ensemble(self, num_samples: int, average: str = "prob", seed: int = 0) -> Iterator[None]:
        """Answer with the mean of k noisy samples (Algorithm 2), in `forward` and `generate`; shapes do not change.

        Inside this context the model's `logits` are those of the mean, `labels` give the loss of the mean, and
        `generate` chooses each token once, greedily or by sampling. A token's noise is a function of the seed, the
        site, the sample and the token's position, so that a cached step, another batch or another padding sees the
        same noise. A cache holds k rows per prompt. Without gradients, the layers below the first projected one run
        once per prompt.

        Args:
            num_samples (`int`): k.
            average (`str`): `"prob"`, logits of the mean probability, or `"logit"`, the mean of the logits.
            seed (`int`): which k samples.

        Raises:
            ValueError: an argument out of range; an encoder-decoder; no active DIP adapter; another ensemble around
                this one. Within: beam search and other searches over several continuations, assisted decoding, static
                and quantized caches, packed batches, a prompt that is empty or longer than the context.
        """
        with self.ensemble_samples(num_samples, seed, average_of(average)):
            yield

    @contextlib.contextmanager
    def ensemble_samples(
        self, num_samples: int, seed: int = 0, combine: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits
    ) -> Iterator[None]:
        """As `ensemble`, but with the samples' logits of shape `(k, B, ...)`, or what `combine` makes of them."""
        self._check_no_ensemble()
        ensemble = Ensemble(self.model, self._active_projections(), num_samples, combine, seed)
        with self._noise_on.set_to(True), self._pass.set_to(ensemble):
            try:
                yield
            finally:
                ensemble.stop()

    @contextlib.contextmanager
    def sampled_rows(self, num_compared: int = 1) -> Iterator[None]:
        """Context of a training pass on `num_samples` equal copies of a batch's rows; `dip_loss` enters it.

        The rows are laid out sample by sample. Layers below the first projected one run on one copy, so dropout there
        is the same for all samples. The outputs have all rows. Only the active adapter has noise: another one that is
        set meanwhile is a reference, which has none.

        Args:
            num_compared (`int`): the rows are so many equal parts, whose n-th rows are compared with each other (a
                chosen and a rejected answer), so that they share their noise.

        Raises:
            ValueError: the model is in an ensemble.
        """
        outer = self._pass.get()
        if not isinstance(outer, FreshPass):
            raise ValueError("The training objective cannot be computed inside model.ensemble(): leave it first.")
        config = self.active_dip_config
        antithetic, expansion = False, None
        if config.num_samples > 1:
            names = [projection.site.name for projection in self._active_projections()]
            expansion = LateExpansion(self.model, layers_from(self.model, names), config.num_samples)
            antithetic = config.uses_pairs
        fresh = FreshPass(outer.keys, antithetic, expansion, num_compared)
        with self._noisy_adapter.set_to(self.active_adapters[0]), self._pass.set_to(fresh):
            yield

    def calibrate(self, batches: Iterable, wrapped: nn.Module | None = None) -> None:
        """Find the noise that fits this model: its scale, and with `init_noise_std="auto"` its level.

        A channel's scale is 1.4826 times the median absolute deviation of the site's input over a random sample of up
        to 512 tokens, without noise, dropout and padding. The level is the std whose noise raises the mean loss of
        these batches by `init_loss_increase`, on labels drawn from the model's own predictions: where it is sure and
        wrong, noise lowers the loss of the true ones. Encoder-decoders, and labels that are no classes, keep the true
        ones. It is found in at most ten more passes. An adapter that is calibrated again keeps its variances.

        Args:
            batches (`Iterable`): model inputs with `labels` (a number as `init_noise_std` needs none): mappings, or
                single tensors. A few: all are used and kept meanwhile. Each process may bring its own, but each must
                call this.
            wrapped (`nn.Module`, *optional*): the module that `fully_shard` was called on last, if FSDP2 has sharded
                the model, or that DeepSpeed's engine was made of, under ZeRO-3; it runs through that alone.

        Raises:
            ValueError: noise is disabled or in an ensemble; the model is sharded and `wrapped` was not given; there is
                no batch, a site never ran, its input is not finite or of another width, or all its channels are
                constant; the loss is not finite; with `"auto"`, there are no labels, or no noise raises the loss so
                far. The adapter is then as it was before.
            TypeError: a batch is neither a mapping nor a tensor.
        """
        self._check_calibration()
        batches = list(batches)
        calibrate(
            self.model,
            self.active_dip_config,
            self._active_projections(),
            batches,
            self._calibration_loss(batches, wrapped),
        )

    def noise_sweep(
        self,
        batches: Iterable,
        stds: Sequence[float],
        per_site: bool = True,
        wrapped: nn.Module | None = None,
    ) -> list[dict[str, Any]]:
        """Measure the loss by the level of the noise, at all sites together and at each alone; nothing is changed.

        Args:
            batches (`Iterable`): as for `calibrate`, with `labels`; two passes over them per site and std. Each
                process must call this.
            stds (`Sequence[float]`): positive, in units of the scale, which is known from `calibrate`.
            per_site (`bool`): at each site alone too.
            wrapped (`nn.Module`, *optional*): see `calibrate`.

        Returns:
            `list[dict]`: rows of `site` (its name, or `"all"`), `std` and `loss`, in nats per supervised token. The
            first has `std` 0.

        Raises:
            ValueError: the model is not calibrated, noise is disabled or in an ensemble, there are no labels, or a std
                is not positive and finite.
        """
        self._check_calibration()
        if self.needs_calibration:
            raise ValueError("noise_sweep needs the scale of the noise: call model.calibrate(batches) first.")
        batches = list(batches)
        return noise_sweep(
            self.model, self._active_projections(), batches, stds, per_site, self._calibration_loss(batches, wrapped)
        )

    def _check_calibration(self) -> None:
        projections = self._active_projections()
        if not projections or projections[0].disable_adapters:
            raise ValueError(
                "Noise is disabled, so it cannot be measured: leave disable_adapter(), or set an adapter."
            )
        self._check_no_ensemble()

    def _calibration_loss(self, batches: list, wrapped: nn.Module | None) -> CalibrationLoss:
        if wrapped is None and is_sharded(self.model):
            raise ValueError(
                "FSDP2 or ZeRO-3 has sharded this model, which runs only through the module that fully_shard was "
                "called on last, or that DeepSpeed's engine was made of: give that as wrapped=..., or calibrate "
                "before the model is sharded. DipTrainer does it by itself."
            )

        def noise(on: bool) -> contextlib.AbstractContextManager[None]:
            return self.sampling(seed=0) if on else self.deterministic()

        return CalibrationLoss(self.model, batches, self.hidden_state_capture, noise, wrapped or self.model)

    def load_calibration(self, path: str) -> None:
        """Take what calibration found from the file of a saved adapter, and leave everything else."""
        with safe_open(path, framework="pt") as file:
            for projection in self._active_projections():
                prefix = f"base_model.model.{projection.site.name}.dip_projection."
                projection.restore_calibration(
                    file.get_tensor(f"{prefix}dip_scale"), file.get_tensor(f"{prefix}dip_init_std")
                )

    @property
    def needs_calibration(self) -> bool:
        """Whether noise cannot be drawn yet because its scale or level was not found."""
        return not all(projection.calibrated for projection in self._active_projections())

    @property
    def init_noise_std(self) -> float | None:
        """The std at which the active adapter's variances began, in units of the scale; None until it is known."""
        std = next((projection.init_std for projection in self._active_projections()), math.nan)
        return None if math.isnan(std) else std

    def noise_summary(self) -> list[dict[str, Any]]:
        """List one row per site: `name`, `scale`, and the `mean`, `min` and `max` of the noise's std over channels.

        `scale` is the median over the site's channels, in the units of its input. The std is in units of the channel's
        own scale (which is 1 for absolute noise).
        """
        rows = []
        for projection in self._active_projections():
            std = torch.exp(whole(projection.logvar).detach() / 2)
            row = {"name": projection.site.name, "scale": float(whole(projection.scale).median())}
            rows.append(row | {"mean": float(std.mean()), "min": float(std.min()), "max": float(std.max())})
        return rows

    def logvars(self) -> list[nn.Parameter]:
        """The active adapter's log-variances, one parameter per site."""
        return [projection.logvar for projection in self._active_projections()]

    def prior_loss(self) -> torch.Tensor:
        """Eq. (3) of the active adapter, a scalar.

        Raises:
            ValueError: the prior is around a level that calibration has not found yet.
        """
        config = self.active_dip_config
        prior_std = self.init_noise_std if config.prior_std is None else config.prior_std
        if prior_std is None:
            raise ValueError(
                "The prior is around the noise's initial level, which was never found: call model.calibrate(batches) "
                "first (DipTrainer does it by itself), or give a number as init_noise_std or prior_std."
            )
        # Zero variance has no prior: its logarithm is infinite, and it never learns.
        alpha, beta = objective.kl_weights(prior_std, config.prior_weight) if prior_std else (0.0, 0.0)
        logvars = [whole(logvar) for logvar in self.logvars()]
        return objective.prior_loss(logvars, alpha, beta, config.prior_reduction)

    # ---- save, load, merge ----

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        if config.weights == "frozen":
            return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.weights == "full":
            # Tied weights appear under one name, as in `named_parameters`.
            names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
            return {name: tensor for name, tensor in state_dict.items() if name in names}
        own = tuner_of(config.weights)._get_adapter_state_dict(
            model=model,
            config=config.weights,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        return own | embeddings_to_save(model, config.weights, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        if isinstance(config.weights, str):
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        else:
            remapped = tuner_of(config.weights)._remap_adapter_state_dict_for_load(
                model=model, config=config.weights, adapter_name=adapter_name, state_dict=state_dict
            )
        upgrade_noise(model, config, adapter_name, remapped)
        check_fits(model, config, adapter_name, remapped)
        if config.weights == "full":
            # In place: with `low_cpu_mem_usage` PEFT puts new parameters into the model, which tears tied ones apart.
            names = [name for name in remapped if "dip_projection" not in name]
            model.load_state_dict({name: remapped.pop(name) for name in names}, strict=False)
        return remapped

    def disable_adapter_layers(self) -> None:
        """Disable noise and adapter weights; weights trained with `weights="full"` stay, and a warning says so."""
        super().disable_adapter_layers()
        if self.active_dip_config.weights == "full":
            warnings.warn(
                'Disabling an adapter with weights="full" removes its noise only: the base weights have changed.',
                stacklevel=2,
            )

    def export_weights_adapter(self, save_directory: str | os.PathLike) -> None:
        """Write the active adapter's weights as a folder of stock PEFT that loads without this package.

        Args:
            save_directory (`str`): gets `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            ValueError: `weights` is `"full"` or `"frozen"`, so there is no such adapter.
        """
        config, adapter_name = self.active_dip_config, self.active_adapters[0]
        if isinstance(config.weights, str):
            raise ValueError(
                f"weights={config.weights!r} has no PEFT adapter to export. merge_and_unload().save_pretrained(...) "
                "writes the whole network."
            )
        export_weights(self.model, config, adapter_name, save_directory)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        hosts = [self.model.get_submodule(projection.site.name) for projection in self._projections]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        self._generation_guard.remove()
        for projection, host in zip(self._projections, hosts, strict=True):
            projection.detach_from(host)
        self._projections = []  # what is asked of this tuner from now on finds no noise
        return model

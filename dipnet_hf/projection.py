"""The module at one site: it owns the log-variances and the scale of every adapter, and hooks on to its layer.

A pre-hook replaces the layer's input. Module names, weight keys and wrapping policies (FSDP's, say) stay as they are,
which wrapping the layer would change.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import DipConfig
from .contexts import ContextValue, PerThread
from .draws import RecomputeMemory, SiteDraw
from .layout import TokenDims
from .sharding import fill, whole


class Site(NamedTuple):
    """A place where noise enters: the input (or, for an embedding, the output) of the module called `name`."""

    name: str
    num_channels: int
    channel_dim: int = -1
    at_output: bool = False
    spares_padding: bool = False  # padding gets no noise: the model has set it to zero, and mixes tokens behind
    reads_cache: bool = False  # sees earlier tokens again, which a cache has kept


@dataclass
class SiteUse(PerThread):
    """A site's draw in the forward pass that a thread runs now, and how often it was used."""

    draw: SiteDraw | None = None
    number: int = 0
    has_run: bool = False


class DipProjection(nn.Module, BaseTunerLayer):
    """Projects one site's input to a learnable Gaussian, eq. (1).

    Every adapter has a `dip_logvar` (float32, whatever the model's dtype: small steps of it vanish in bfloat16), a
    `dip_scale`, one value per channel of the site, and `dip_init_std`, the standard deviation at which its variances
    began. They are NaN as long as calibration has to find them. The latter two do not learn. They are parameters all
    the same, because FSDP2 can shard, and load from one process, nothing else.
    """

    adapter_layer_names = ("dip_logvar",)
    other_param_names = ("dip_scale", "dip_init_std")

    def __init__(
        self,
        site: Site,
        noise_on: ContextValue[bool | None],
        noisy_adapter: ContextValue[str | None],
        memory: RecomputeMemory,
        token_dims: TokenDims | None = None,
    ) -> None:
        super().__init__()
        self.site = site
        self.noise_on = noise_on  # of the whole model; None: on in `train()`, off in `eval()`
        self.noisy_adapter = noisy_adapter  # if there is one, the others have no noise
        self.memory = memory
        self.dip_logvar = nn.ParameterDict()
        self.dip_scale = nn.ParameterDict()
        self.dip_init_std = nn.ParameterDict()
        self._init_stds: dict[str, float] = {}  # NaN where an adapter is not calibrated
        self._use = SiteUse()  # not attributes of the module, which are slow to set
        self.observer: Callable[[torch.Tensor], None] | None = None  # is shown the site's inputs by calibration
        self.known_dims = token_dims  # of the architecture, or what calibration saw
        self.register_load_state_dict_post_hook(_note_calibration)

    def add_adapter(
        self, adapter_name: str, config: DipConfig, device: torch.device | None, copied: str | None = None
    ) -> None:
        """Create the adapter's parameters, at `init_noise_std` everywhere.

        A copy of another adapter, `copied`, begins with what calibration has found for that.
        """
        size = self.site.num_channels if config.granularity == "channel" else 1
        if copied is not None:
            std, scale = self.dip_init_std[copied].detach().clone(), self.dip_scale[copied].detach().clone()
        else:
            level_is_known = not isinstance(config.init_noise_std, str)
            level = config.init_noise_std if level_is_known else torch.nan
            std = torch.tensor([level], dtype=torch.float32, device=device)
            scale_is_known = config.noise_scale == "absolute" and level_is_known
            scale = torch.full(
                (self.site.num_channels,), 1.0 if scale_is_known else torch.nan, dtype=torch.float32, device=device
            )
        self.dip_logvar[adapter_name] = nn.Parameter(2 * torch.log(std.expand(size)))
        self.dip_scale[adapter_name] = nn.Parameter(scale, requires_grad=False)
        self.dip_init_std[adapter_name] = nn.Parameter(std, requires_grad=False)
        self.note_calibration()

    def attach(self, module: nn.Module) -> None:
        """Register on `module` as the sub-module `dip_projection` and project its input, or an embedding's output."""
        module.add_module("dip_projection", self)
        if self.site.at_output:
            self._hook = module.register_forward_hook(self._project_output)
        else:
            self._hook = module.register_forward_pre_hook(self._project_input, with_kwargs=True)

    def detach_from(self, module: nn.Module) -> None:
        """Undo `attach`."""
        self._hook.remove()
        del module.dip_projection

    def _project_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Decoder layers call their attention with keywords only; the first tensor of others is what they work on too.
        tensors = [value for value in kwargs.values() if isinstance(value, torch.Tensor)]
        x = args[0] if args else kwargs.get("hidden_states", tensors[0])
        u = self._project(x)
        # An attention may be given one tensor as its queries, its keys and its values.
        changed = {name: u if value is x else value for name, value in kwargs.items()}
        return tuple(u if value is x else value for value in args), changed

    def _project_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return self._project(output)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self._use.has_run = True
        return self(x, from_host=True)

    @property
    def adapter(self) -> str | None:
        """The active adapter, if it projects this site."""
        return next((name for name in self.active_adapters if name in self.dip_logvar), None)

    @property
    def logvar(self) -> nn.Parameter:
        """The active adapter's log-variances, of shape `(D,)` or `(1,)`."""
        return self.dip_logvar[str(self.adapter)]

    @property
    def scale(self) -> torch.Tensor:
        """The active adapter's scale, of shape `(D,)`."""
        return self.dip_scale[str(self.adapter)]

    @property
    def init_std(self) -> float:
        """The std at which the active adapter's variances began, in units of the scale; NaN until it is calibrated."""
        return self._init_stds[str(self.adapter)]

    @property
    def level_is_known(self) -> bool:
        """Whether the active adapter's variances have a value: given as a number, found by calibration, or loaded."""
        return math.isfinite(whole(self.dip_init_std[str(self.adapter)]))

    @property
    def calibrated(self) -> bool:
        """Whether the active adapter's noise is known."""
        return not math.isnan(self.init_std)

    @property
    def sampling(self) -> bool:
        """Whether noise is on."""
        on = self.noise_on.get()
        if not (self.training if on is None else on) or self.disable_adapters:
            return False
        adapter = self.adapter
        return adapter is not None and self.noisy_adapter.get() in (None, adapter)

    def set_draw(self, draw: SiteDraw) -> None:
        """Set the draw for the forward pass that starts now."""
        self._use.draw, self._use.number, self._use.has_run = draw, 0, False

    @property
    def has_run(self) -> bool:
        """Whether the site ran in this thread's latest forward pass with noise; a compiled one does not tell."""
        return self._use.has_run

    def forget_draw(self) -> None:
        """Let go of the latest forward pass's draw; an ensemble's holds noise."""
        self._use.draw = None

    def forward(self, x: torch.Tensor, *, from_host: bool = False) -> torch.Tensor:
        """Return `x`, or a draw of u ~ N(x, scale^2 exp(logvar)) while noise is on; shape and dtype are those of `x`.

        Args:
            x (`torch.Tensor`): the site's input.
            from_host (`bool`): the hook on the site's module calls, not a module that runs whatever it holds.

        Raises:
            ValueError: noise is on but calibration has not found it yet, or accelerate has offloaded it; the input is
                not as wide as the site; or another than the hook calls.
        """
        if not from_host:
            raise ValueError(
                f"'{self.site.name}' runs all modules that it holds, and the projection is one of them, so noise "
                "cannot enter it. Name the first module in it as the site instead."
            )
        draw = self._current_draw()
        if draw is None and self.observer is None:
            return x
        if x.shape[self.site.channel_dim] != self.site.num_channels:
            raise ValueError(
                f"Site '{self.site.name}' should have {self.site.num_channels} channels along dimension "
                f"{self.site.channel_dim}, and its input has the shape {tuple(x.shape)}. Name the first linear, "
                "convolution or normalization layer within it as the site instead, with target_modules."
            )
        if self.observer is not None:
            self.observer(x)
        if draw is None:
            return x
        adapter = str(self.adapter)
        if not self.calibrated:
            raise ValueError(
                f"The noise of site '{self.site.name}' was never calibrated. Train with DipTrainer, or in place of "
                "TRL's SFTTrainer with DipSFTTrainer, which do it by themselves; or call model.calibrate(batches) "
                "with a few labelled training batches first; or give a number as init_noise_std together with "
                'noise_scale="absolute".'
            )
        if self.dip_logvar[adapter].is_meta:
            raise ValueError(
                f"The noise of site '{self.site.name}' is offloaded, and accelerate brings back what a module's own "
                "forward pass needs alone. Give cpu_offload, disk_offload or dispatch_model "
                'preload_module_classes=["DipProjection"].'
            )
        logvar, scale = self.dip_logvar[adapter].to(x.device), self.dip_scale[adapter].to(x.device)
        return draw.project(x, logvar, scale, self.site.channel_dim)

    def _current_draw(self) -> SiteDraw | None:
        """The draw for this use of the site: a new one, or, where a checkpointed layer is recomputed, the same one."""
        node = None if torch.compiler.is_compiling() else torch._C._current_autograd_node()
        if node is not None:
            return self.memory.recall(node, self.site.name)
        if not self.sampling:
            return None
        use = self._use
        if use.draw is None:
            raise RuntimeError(f"Site '{self.site.name}' ran before the model's first forward pass began.")
        use.number += 1
        if use.number == 1:
            return use.draw
        # A site that runs again in one forward pass (a shared layer, a direct call) needs noise of its own there.
        if not torch.compiler.is_compiling():
            self.memory.note_repeated(self.site.name)
        return use.draw.repeated(use.number)

    def set_noise(self, scale: torch.Tensor | None = None, std: float | None = None) -> None:
        """Set the active adapter's scale, of shape `(D,)` or one for all, and its initial std; None leaves them."""
        adapter = str(self.adapter)
        with torch.no_grad():
            if scale is not None:
                fill(self.dip_scale[adapter], scale)
            if std is not None:
                fill(self.dip_init_std[adapter], torch.tensor(std, dtype=torch.float32))
                fill(self.dip_logvar[adapter], torch.tensor(2 * math.log(std), dtype=torch.float32))
        self.note_calibration()

    def restore_calibration(self, scale: torch.Tensor, init_std: torch.Tensor) -> None:
        """Set what calibration found for the active adapter, and leave its variances."""
        with torch.no_grad():
            fill(self.dip_scale[str(self.adapter)], scale)
            fill(self.dip_init_std[str(self.adapter)], init_std)
        self.note_calibration()

    def noise_state(self) -> list[torch.Tensor]:
        """A copy of the active adapter's noise, for `restore_noise`."""
        return [whole(tensor).detach().clone() for tensor in self._noise()]

    def restore_noise(self, state: list[torch.Tensor]) -> None:
        """Set the active adapter's noise to what it was."""
        with torch.no_grad():
            for tensor, value in zip(self._noise(), state, strict=True):
                fill(tensor, value)
        self.note_calibration()

    def _noise(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        adapter = str(self.adapter)
        return self.dip_scale[adapter], self.dip_init_std[adapter], self.dip_logvar[adapter]

    def note_calibration(self) -> None:
        """Remember whose noise is known, so that a forward pass need not wait for the device to tell."""
        for adapter, scale in self.dip_scale.items():
            known = not scale.is_meta and bool(torch.isfinite(whole(scale)).all())
            self._init_stds[adapter] = float(whole(self.dip_init_std[adapter])) if known else math.nan

    def _apply(self, fn, recurse=True):
        # A cast of the model (`.to(torch.bfloat16)`, `.half()`) moves logvar and scale but keeps them float32.
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # there is no base layer, and `forward` brings both tensors to its input

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to do: noise has no weight to merge, and merged weights answer without it only in `eval()`."""

    def unmerge(self) -> None:
        """Nothing to do, see `merge`."""


def _note_calibration(module: DipProjection, incompatible_keys: Any) -> None:
    module.note_calibration()

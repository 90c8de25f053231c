"""What the matrix asks its properties of: a network without noise, a kind of site in it, and the outcome of asking."""

import contextlib
import copy
import functools
import inspect
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import dipnet_hf
from dipnet_hf import DipConfig, dip_loss, get_dip_model
from dipnet_hf.architecture import is_encoder_decoder
from dipnet_hf.projection import DipProjection

PACKAGE_FOLDER = dipnet_hf.__path__[0]

Batch = dict[str, torch.Tensor]


class NotAsked(Exception):
    """The network cannot do this without noise either."""


class Outcome(NamedTuple):
    """`ok`, `refused`, `base` (the network cannot do it without noise either) or `failed`, and why."""

    kind: str
    reason: str = ""


def ask(check: Callable[["Case"], None], case: "Case") -> Outcome:
    """Check one property. A ValueError, TypeError or RuntimeError that this package itself raises is a refusal."""
    try:
        check(case)
    except NotAsked as reason:
        return Outcome("base", shortened(reason))
    except Exception as error:  # noqa: BLE001 - a fault of any kind is an outcome
        where = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = where.filename.startswith(PACKAGE_FOLDER) and (where.line or "").startswith("raise ")
        if is_ours and isinstance(error, (ValueError, TypeError, RuntimeError)):
            return Outcome("refused", shortened(error))
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        return Outcome("failed", f"{type(error).__name__}: {shortened(error)} [{place}]")
    return Outcome("ok")


def shortened(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...")


class Network:
    """A network without noise, a batch for it, and what is asked of it once for all kinds of sites."""

    def __init__(self, model: nn.Module, batch: Batch):
        self.model = model
        self.batch = batch
        self._refusals: dict[str, str | None] = {}
        self.weights: Any = "full"
        with contextlib.suppress(Exception):  # where PEFT itself fails, all weights are trained
            lora = LoraConfig(target_modules="all-linear", r=4)
            get_peft_model(copy.deepcopy(model), copy.deepcopy(lora)).train()(**batch).loss.backward()
            self.weights = lora

    @property
    def parameters(self) -> set[str]:
        """The names of what `forward` takes."""
        return set(inspect.signature(self.model.forward).parameters)

    @property
    def takes_mask(self) -> bool:
        """Whether rows may be padded."""
        return "attention_mask" in self.parameters and "attention_mask" in self.batch

    def plain(self) -> nn.Module:
        """A copy with PEFT's own adapter, if the weights have one; what stock PEFT can do is asked of it."""
        model = copy.deepcopy(self.model)
        return model if self.weights == "full" else get_peft_model(model, copy.deepcopy(self.weights))

    def once(self, name: str, check: Callable[[], None]) -> None:
        """Raise `NotAsked` where `check` fails, which is run once for the network."""
        if name not in self._refusals:
            try:
                check()
                self._refusals[name] = None
            except NotAsked as reason:
                self._refusals[name] = str(reason)
            except Exception as error:  # noqa: BLE001 - networks fail in every way
                self._refusals[name] = f"{type(error).__name__}: {shortened(error)}"
        if (reason := self._refusals[name]) is not None:
            raise NotAsked(reason)

    @functools.cached_property
    def blind_modules(self) -> set[str]:
        """The modules whose input gets no gradient without noise either."""
        model = copy.deepcopy(self.model).train()
        added: dict[str, torch.Tensor] = {}

        def add_nothing(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> tuple[tuple, dict]:
            """Add zeros of its own to the input, which get a gradient where the input has one that is used here."""
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            if not tensors:
                return args, kwargs
            x = kwargs.get("hidden_states", tensors[0]) if not args else tensors[0]
            zeros = added.setdefault(name, torch.zeros((), requires_grad=True))
            u = x + zeros
            return tuple(u if value is x else value for value in args), {
                key: u if value is x else value for key, value in kwargs.items()
            }

        def add_nothing_behind(module: nn.Module, args: tuple, output: torch.Tensor, name: str) -> torch.Tensor:
            return output + added.setdefault(name, torch.zeros((), requires_grad=True))

        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(functools.partial(add_nothing_behind, name=name))
            elif name:
                module.register_forward_pre_hook(functools.partial(add_nothing, name=name), with_kwargs=True)
        model(**self.batch).loss.backward()
        learning = {name for name, zeros in added.items() if zeros.grad is not None and zeros.grad != 0}
        return {name for name, _ in model.named_modules()} - learning


class Case:
    """A network and a kind of site."""

    def __init__(self, network: Network, sites: dict[str, Any]):
        self.network = network
        self.sites = sites  # `target_sites` or `target_modules`
        self.batch = network.batch

    def make(self, base: nn.Module | None = None, calibration: list[Batch] | None = None, **config: Any) -> PeftModel:
        """A model with noise, without a prior, whose gradient is not quite zero where it starts."""
        fields = {"init_noise_std": 0.2, "prior_weight": 0.0} | self.sites | config
        base = copy.deepcopy(self.network.model) if base is None else base
        batches = [cast(batch, next(base.parameters()).dtype) for batch in calibration or [self.batch]]
        weights = copy.deepcopy(self.network.weights)
        return get_dip_model(base, DipConfig(weights=weights, **fields), calibration=batches)

    @functools.cached_property
    def fresh(self) -> PeftModel:
        """A calibrated model in eval mode that was not trained."""
        return self.make().eval()

    @functools.cached_property
    def trained(self) -> PeftModel:
        """A calibrated model in eval mode whose adapters have moved."""
        return moved(copy.deepcopy(self.fresh))

    def check_training(self) -> None:
        """Raise `NotAsked` where the network cannot be trained without noise either."""
        self.network.once("training", lambda: copy.deepcopy(self.network.model).train()(**self.batch).loss.backward())

    @property
    def first_row(self) -> torch.Tensor:
        """The first row's tokens, which is not padded, of shape `(1, L)`."""
        if "input_ids" not in self.batch:
            raise NotAsked("no tokens")
        return self.batch["input_ids"][:1]

    def logits(self, model: nn.Module, num_rows: int | None = None, start: int = 0) -> torch.Tensor:
        """The logits of the batch's rows, without gradients."""
        labels = () if is_encoder_decoder(self.network.model) else ("labels",)
        inputs = {name: value[start:num_rows] for name, value in self.batch.items() if name not in labels}
        with torch.no_grad():
            return model(**inputs).logits

    def tokens_logits(self, model: nn.Module, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The logits of a pass over tokens alone, which writes no cache."""
        if "use_cache" in self.network.parameters:
            inputs.setdefault("use_cache", False)
        with torch.no_grad():
            return model(input_ids=input_ids, **inputs).logits


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def projections_of(model: nn.Module) -> list[DipProjection]:
    return [module for module in model.modules() if isinstance(module, DipProjection)]


def moved(model: nn.Module) -> Any:
    """The model with what it trains away from where that starts: the weights a little, the log-variances more."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.3 if "logvar" in name else 0.05 if "lora_" in name else 0.01
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float, what: str) -> None:
    """Compare by the largest entry."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference = difference_of(a, b)
    assert difference <= tolerance, f"{what}: {difference:.2e} apart"


def assert_finite(a: torch.Tensor) -> None:
    assert torch.isfinite(a).all(), "not finite"


def difference_of(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / (b.abs().max() + 1e-12))


def backward(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a training step, always of the same noise."""
    model.train()
    model.zero_grad()
    torch.manual_seed(11)
    loss = dip_loss(model, batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return loss.detach(), gradients


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    for name in want.keys() | got.keys():
        ours, theirs = (gradients.get(name, torch.zeros(())) for gradients in (got, want))
        if max(ours.abs().max(), theirs.abs().max()) > 1e-6:
            assert name in got and name in want, f"{name} has a gradient in one of them only"
            assert_close(ours, theirs, tolerance, f"gradient of {name}")

"""The shape of every method that DIPNet is compared with: what it does to the network, to a loss, to a gradient.

A loop of one's own needs three lines, of which the last stands for `model(**batch).loss.backward()`:

    regularizer = SAM(rho=0.05)
    regularizer.attach(model, optimizer)
    regularizer.backward(model, batch)

`regularize(trainer, SAM(rho=0.05))` does the same inside transformers' `Trainer` and its subclasses.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG_NAME, STATE_NAME = "regularizer.json", "regularizer.safetensors"


@dataclass
class Batch:
    """One batch, on which the network can be run as often as a method wants.

    Args:
        inputs (`dict`): the model's inputs, with `labels`.
        run (`Callable`): runs the network and returns the data loss, as the trainer or the loop has it, and the
            model's outputs; the latter may be None unless `outputs=True` is given.
        share (`float`): what a penalty that does not depend on the batch is multiplied by: 1 divided by the number of
            accumulated batches where their losses are added up.
        num_items (`float`, *optional*): the supervised tokens of all batches of the step, where the data loss is
            divided by them; None where it is a mean over the batch's own.
    """

    inputs: dict[str, Any]
    run: Callable[..., tuple[torch.Tensor, Any]]
    share: float = 1.0
    num_items: float | None = None

    def loss(self) -> torch.Tensor:
        """The data loss, a scalar."""
        return self.run()[0]

    def weight(self, num_tokens: int) -> float:
        """What a sum over this batch's supervised tokens is multiplied by, so that it is averaged as the loss is."""
        return 1 / (max(num_tokens, 1) if self.num_items is None else self.num_items)


class Regularizer:
    """One method. Subclasses are dataclasses, whose fields are its settings, and override what they need.

    A method belongs to one model at a time, see `attach`.
    """

    changes_network: ClassVar[bool] = False
    """Whether the trained network gives other answers without the method."""
    needs_lora: ClassVar[bool] = False
    """Whether it acts on the matrices of LoRA, and refuses a model without them."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change the model as the method wants.

        Args:
            model (`nn.Module`): any network, with or without an adapter, on its device.
            optimizer (`torch.optim.Optimizer`, *optional*): see `watch`; needed by the methods that say so.
        """
        before = set(model.parameters())
        self.install(model)
        self.added = [parameter for parameter in model.parameters() if parameter not in before]
        if optimizer is not None:
            self.watch(optimizer)

    def install(self, model: nn.Module) -> None:
        """What a method does to a network that it is attached to: hooks, and parameters of its own."""

    def detach(self) -> None:
        """Give the model back as it was, but for what it has learned."""

    added: Sequence[nn.Parameter] = ()
    """The parameters that the method has added to the model."""
    _is_watching = False

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `before_step` and `after_step` around every step of the optimizer, and have it train what was added."""
        self._is_watching = True
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        learning: list[Any] = [parameter for parameter in self.added if parameter.requires_grad]
        if missing := [parameter for parameter in learning if id(parameter) not in known]:
            is_named = any("param_names" in group for group in optimizer.param_groups)
            named: list[Any] = [(f"{self.name}.{number}", parameter) for number, parameter in enumerate(missing)]
            optimizer.add_param_group({"params": named if is_named else missing})
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.before_step(optimizer))
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    def check_watching(self) -> None:
        """Raise ValueError unless an optimizer is watched: for methods that act on the weights at its steps."""
        if not self._is_watching:
            raise ValueError(f"{type(self).__name__} acts at the steps of the optimizer: attach(model, optimizer).")

    # ---- the network that training is for, where that is not the one that trains ----

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Context in which the model is as `finish` would leave it: so it is evaluated and saved during training."""
        yield

    def finish(self) -> None:
        """Give the model, at the end of training, the weights that it is used with. Doing it again changes nothing."""

    # ---- what a method does ----

    def loss(self, batch: Batch) -> torch.Tensor:
        """What a batch is trained on, a scalar: its data loss, by default."""
        return batch.loss()

    def refine_gradient(self, recompute: Callable[[], None]) -> None:
        """Change the gradients of a step, once they are complete and before they are clipped.

        Args:
            recompute (`Callable`): computes them anew, with the weights as they are when it is called: on the same
                batches and with the same dropout and noise, which PyTorch's generators decide. (Within
                `model.sampling(seed)` each pass of DIPNet has other noise.) Buffers, such as the running statistics of
                batch normalization, stay as the first pass left them.
        """

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Act on the weights right before the optimizer does."""

    def after_step(self) -> None:
        """Act on the weights right after the optimizer did."""

    # ---- a loop of one's own ----

    def backward(self, model: nn.Module, *batches: dict[str, Any], forward: Callable[..., Any] | None = None) -> float:
        """Compute the gradients of one step, in place of `model(**batch).loss.backward()`.

        Args:
            model (`nn.Module`): the network that runs; also wrapped.
            batches (`dict`): inputs with `labels`. Several are accumulated: their losses are averaged.
            forward (`Callable`, *optional*): `(model, batch)` to an object with `loss`, and with `logits` where the
                method needs them, such as `dip_loss`; None runs `model(**batch)`.

        Returns:
            `float`: the loss of the first pass.
        """
        forward = forward or (lambda model, batch: model(**batch))
        states: list[RandomState] = []

        def compute_loss(inputs: dict[str, Any]) -> torch.Tensor:
            def run(outputs: bool = False) -> tuple[torch.Tensor, Any]:
                result = forward(model, inputs)
                return result.loss, result

            loss = self.loss(Batch(inputs, run)) / len(batches)
            loss.backward()
            return loss.detach()

        def recompute() -> None:
            zero_gradients(model)
            with kept(list(model.buffers())):
                for inputs, state in zip(batches, states, strict=True):
                    with state.restored():
                        compute_loss(inputs)

        total = 0.0
        for inputs in batches:
            states.append(RandomState(next(model.parameters()).device))
            total += compute_loss(inputs).item()
        self.refine_gradient(recompute)
        return total

    # ---- files ----

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the method has learned or remembers, by name."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `state_dict` gave; the method is attached."""

    def save(self, folder: str | Path) -> None:
        """Write the method's name and settings, and its state, beside the model."""
        values = {"name": self.name, **asdict(self)}  # type: ignore[call-overload]
        Path(folder, CONFIG_NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        state = {name: tensor.detach().contiguous().clone() for name, tensor in self.state_dict().items()}
        if state:
            save_file(state, Path(folder, STATE_NAME))

    def load(self, folder: str | Path) -> None:
        """Take up the state that `save` wrote into a folder.

        Raises:
            ValueError: another method, or other settings of this one, wrote it; or none.
        """
        path = Path(folder, CONFIG_NAME)
        values = {"name": self.name, **asdict(self)}  # type: ignore[call-overload]
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if saved != json.loads(json.dumps(values)):
            raise ValueError(f"{folder} was trained with the regularizer {saved}, and this run has {values}.")
        state = Path(folder, STATE_NAME)
        self.load_state_dict(load_file(state) if state.is_file() else {})

    @property
    def name(self) -> str:
        """What the method is called in configurations."""
        from . import METHODS  # the dict lists the files of the methods, which import this one

        return next((name for name, method in METHODS.items() if method is type(self)), type(self).__name__)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that learn, by name: not the log-variances of DIPNet's noise, which are no weights."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "dip_logvar" not in name
    }


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float32, or as it is where it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def require_weights(model: nn.Module, method: str) -> None:
    """Raise ValueError for a method that acts on weights, where none learn."""
    if not weights(model):
        raise ValueError(f"{method} acts on the weights that learn, and {type(model).__name__} has none.")


def with_gradients(model: nn.Module) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """The weights that learn and took part in the last backward pass, and their gradients."""
    pairs = [(parameter, parameter.grad) for parameter in weights(model).values() if parameter.grad is not None]
    return [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]


def zero_gradients(model: nn.Module) -> None:
    """Forget the gradients of all parameters."""
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def kept(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Context after which parameters have, to the bit, the values that they had before it."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


class RandomState:
    """The random generators of this moment: torch's own, and that of a device.

    Args:
        device (`torch.device`): the one that the network runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = torch.get_rng_state()
        self._on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context in which the generators stand where they stood; afterwards they go on as if it had not been."""
        if self._on_device is None:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._on_cpu)
                yield
            return
        with torch.random.fork_rng(devices=[self._device.index], device_type=self._device.type):
            torch.set_rng_state(self._on_cpu)
            torch.get_device_module(self._device).set_rng_state(self._on_device, self._device)
            yield

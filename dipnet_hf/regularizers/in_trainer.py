"""A regularizer inside transformers' Trainer and any subclass of it, TRL's and this package's among them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from transformers import Trainer

from ..trainer import losses_are_added
from .regularizer import Batch, RandomState, Regularizer, kept, zero_gradients

# What trainers of TRL and of this package add up for their logs at every pass.
_COUNTED = ("_metrics", "_total_train_tokens", "_term_sums")


def regularize(trainer: Trainer, regularizer: Regularizer) -> None:
    """Train with a regularizer: `regularize(trainer, SAM(rho=0.05))`, and then `trainer.train()` as always.

    It is saved with the model and its checkpoints (`regularizer.json`, `regularizer.safetensors`), and a run that is
    resumed goes on with its state.

    Args:
        trainer (`Trainer`): with its model, before it trains.
        regularizer (`Regularizer`): belongs to this trainer from now on.

    Raises:
        ValueError: the trainer has a regularizer already, makes its models itself, or shards its model; it draws new
            batches in every pass (GRPO), and the method repeats them; or its learning rate schedule was made for an
            optimizer that lacks parameters of the method.
    """
    name, given = type(regularizer).__name__, vars(trainer)
    if trainer.model_init is not None:
        raise ValueError("A trainer with model_init makes a new model for every run: give it a model.")
    if "training_step" in given:
        raise ValueError("This trainer has a regularizer: one at a time.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        strategy = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"{name} needs whole weights and gradients on every process, and {strategy} takes "
            "them apart or away: train on one process, or on several with DDP."
        )
    if _refines(regularizer) and "_buffered_inputs" in given:
        raise ValueError(
            f"{name} repeats the passes of a step, and {type(trainer).__name__} generates new batches for each: it "
            "cannot train with it."
        )
    regularizer.attach(trainer.model)
    if regularizer.added and trainer.lr_scheduler is not None:
        regularizer.detach()
        raise ValueError(
            f"{name} adds parameters, which the given learning rate schedule does not know: give the trainer an "
            "optimizer alone, or let it make both."
        )
    if trainer.optimizer is not None:
        regularizer.watch(trainer.optimizer)
    _Regularized(trainer, regularizer).stand_in()


def _refines(regularizer: Regularizer) -> bool:
    """Whether a method computes the gradients of a step more than once."""
    return type(regularizer).refine_gradient is not Regularizer.refine_gradient


class _Regularized:
    """What stands in for methods of one trainer."""

    def __init__(self, trainer: Trainer, regularizer: Regularizer) -> None:
        self._trainer: Any = trainer
        self._regularizer = regularizer
        self._steps: list[tuple[Any, Any, RandomState]] = []  # the batches of the step so far
        self._has_trained = False
        self._is_as_finished = False
        self._names = (
            *("train", "compute_loss", "training_step", "create_optimizer", "evaluate", "evaluation_loop"),
            *("save_model", "_load_from_checkpoint", "_load_best_model"),
        )
        self._originals = {name: getattr(trainer, name) for name in self._names}

    def stand_in(self) -> None:
        vars(self._trainer).update({name: getattr(self, name) for name in self._names})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._has_trained and type(self._regularizer).finish is not Regularizer.finish:
            raise ValueError(
                f"{type(self._regularizer).__name__} has given the model the weights that it is used with: make a new "
                "trainer to train it further."
            )
        self._has_trained = True
        output = self._originals["train"](*args, **kwargs)
        self._regularizer.finish()
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        was_given = self._trainer.optimizer is not None
        optimizer = self._originals["create_optimizer"](*args, **kwargs)
        if not was_given:
            self._regularizer.watch(self._trainer.optimizer)
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        original = self._originals["compute_loss"]
        if not self._trainer.model.training or return_outputs:
            return original(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

        num_runs = 0

        def run(outputs: bool = False) -> tuple[Any, Any]:
            nonlocal num_runs
            num_runs += 1
            with nullcontext() if num_runs == 1 else self._uncounted():
                # A copy, as losses may take the labels out.
                result = original(model, dict(inputs), return_outputs=outputs, num_items_in_batch=num_items_in_batch)
            return result if outputs else (result, None)

        trainer = self._trainer
        is_added = losses_are_added(trainer, num_items_in_batch)
        share = 1 / trainer.current_gradient_accumulation_steps if is_added else 1.0
        num_items = num_items_in_batch
        if num_items is not None and trainer.args.average_tokens_across_devices:
            num_items = num_items / trainer.accelerator.num_processes  # gradients are averaged over the processes
        return self._regularizer.loss(Batch(inputs, run, share, num_items))

    def training_step(self, model, inputs, num_items_in_batch=None):
        original = self._originals["training_step"]
        if not _refines(self._regularizer):
            return original(model, inputs, num_items_in_batch)
        try:
            self._steps.append((inputs, num_items_in_batch, RandomState(next(model.parameters()).device)))
            loss = original(model, inputs, num_items_in_batch)
            if self._trainer.accelerator.sync_gradients:
                steps, self._steps = self._steps, []
                self._regularizer.refine_gradient(lambda: self._recompute(model, steps))
        except BaseException:
            self._steps = []  # the step is over: smaller batches may be tried
            raise
        return loss

    def _recompute(self, model, steps: list[tuple[Any, Any, RandomState]]) -> None:
        """Compute the gradients of a step anew, with what it drew; processes share them after the last batch."""
        zero_gradients(model)
        with kept(list(model.buffers())):
            for number, (inputs, num_items, state) in enumerate(steps, start=1):
                is_last = number == len(steps)
                synchronized = nullcontext() if is_last else self._trainer.accelerator.no_sync(model)
                with self._uncounted(), synchronized, state.restored():
                    self._originals["training_step"](model, inputs, num_items)

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Context of a pass that logs do not count, since they have counted its batch."""
        counted = {name: copy.deepcopy(value) for name, value in vars(self._trainer).items() if name in _COUNTED}
        yield
        vars(self._trainer).update(counted)

    @contextmanager
    def _as_finished(self) -> Iterator[None]:
        """Context in which the model is the one that is used; within it again, nothing changes."""
        if self._is_as_finished:
            yield
            return
        self._is_as_finished = True
        try:
            with self._regularizer.finished():
                yield
        finally:
            self._is_as_finished = False

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_finished():  # its callbacks too
            return self._originals["evaluate"](*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_finished():
            return self._originals["evaluation_loop"](*args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        with self._as_finished():
            self._originals["save_model"](output_dir, *args, **kwargs)
        if self._trainer.args.should_save:
            self._regularizer.save(output_dir or self._trainer.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with self._as_finished():
            self._originals["_load_from_checkpoint"](resume_from_checkpoint, *args, **kwargs)
        self._regularizer.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self._as_finished():
            self._originals["_load_best_model"]()
        self._regularizer.load(self._trainer.state.best_model_checkpoint)

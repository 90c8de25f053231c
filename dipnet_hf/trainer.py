"""The objective inside transformers' Trainer and any subclass of it.

The data term is whatever loss the trainer computes, on S copies of every row. The mixin adds the prior and the
stability term.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import ProgressCallback, Trainer, TrainerCallback

from .architecture import adds_router_loss, shifts_labels
from .batches import expand_batch
from .config import DipConfig
from .logvar_groups import give_own_groups, share_level, shared_level, warn_of_given_groups
from .loss import class_outputs, sampled_data_terms
from .model import DipModel
from .objective import stability_outputs, stability_penalty
from .progress import NoiseProgress
from .replay import Replayed, may_be_read_once
from .sharding import whole
from .trl_trainers import TRL_TRAINERS, check_ensemble, check_trl_trainer, find_trl_trainer, model_inputs

if TYPE_CHECKING:  # a Trainer to the type checker, a mixin to Python
    _Base = Trainer
else:
    _Base = object

_logger = logging.getLogger(__name__)
_TERMS = ("nll", "prior", "stability")
_NUM_CALIBRATION_BATCHES = 8


class DipTrainerMixin(_Base):
    """Trains a model from `get_dip_model` with eqs. (2) to (4). It stands before a Trainer class among the bases.

    Evaluation is noise-off and reports the base trainer's own loss. The terms, and the noise's std, are logged beside
    the training loss, and the progress bar shows them. The log-variances have their own optimizer group. A model that
    needs it is calibrated on the first batches of the training data.

    In TRL's trainers a reference has no noise, and the chosen and the rejected answer of a pair share theirs.

    Raises:
        TypeError: the model has no DIP adapter.
        ValueError: a trainer of TRL that does not work with noise, or not with this config; no adapter is active; or
            the model is split among processes in a way that is not supported (DDP, FSDP2 and ZeRO are).
    """

    _is_set_up = False
    _trl_trainers = TRL_TRAINERS

    def __init__(self, *args, **kwargs):
        model, ref_model = (*args, None, None)[:2]  # where TRL's trainers with a reference have them
        model, ref_model = kwargs.get("model", model), kwargs.get("ref_model", ref_model)
        tuner = getattr(model, "base_model", None)
        config, calibrated, kept = kwargs.get("peft_config"), False, {}
        if isinstance(tuner, DipModel):
            config, calibrated = tuner.active_dip_config, not tuner.needs_calibration
            kept = {name: tensor.clone() for name, tensor in tuner.state_dict().items() if "dip_logvar" in name}
        self._trl = find_trl_trainer(type(self), self._trl_trainers)
        if self._trl is not None and isinstance(config, DipConfig):
            check_trl_trainer(self._trl, config, calibrated, ref_model is not None)
        super().__init__(*args, **kwargs)
        # TRL casts the trainable parameters of a quantized model to bfloat16, where small steps of logvar vanish.
        for name, parameter in self._tuner().named_parameters():
            if "dip_logvar" in name and parameter.dtype != torch.float32:
                parameter.data = kept.get(name, parameter.data).float()
        if self.args.n_gpu > 1:
            raise ValueError(
                f"DataParallel over {self.args.n_gpu} GPUs is not supported: start one process a GPU with "
                "`accelerate launch` or `torchrun`."
            )
        check_strategy(self.accelerator)
        self._term_sums: torch.Tensor | None = None  # since the last log
        self._first_step_of_sums = 0
        self._run_of_sums: Any = None  # the state of the run that they belong to
        self._sharded_calibration = ShardedCalibration()
        self.add_callback(self._sharded_calibration)
        self.add_callback(NoiseReport())
        callbacks = self.callback_handler.callbacks
        # Of that class itself: a bar of a class of the user's own stays.
        callbacks[:] = [
            NoiseProgress(callback.max_str_len) if type(callback) is ProgressCallback else callback
            for callback in callbacks
        ]
        self._is_set_up = True

    def _tuner(self) -> DipModel:
        tuner = getattr(self.model, "base_model", None)
        if not isinstance(tuner, DipModel):
            raise TypeError(
                f"{type(self).__name__} needs a model from get_dip_model, got {type(self.model).__name__}."
            )
        return tuner

    def train(self, *args, **kwargs):
        """As the base trainer's; calibrates first if the noise's scale or level is not known.

        A model that is going to be sharded is calibrated when it is: before that a process may have no weights, or
        no room for all.
        """
        if self._is_going_to_be_sharded:
            with self._first_batches() as batches:
                self._sharded_calibration.batches = list(batches)
        elif self.model_init is None and self._tuner().needs_calibration:
            self._calibrate()
        return super().train(*args, **kwargs)

    def call_model_init(self, *args, **kwargs):
        """As the base trainer's; the model of a new run, which is not the one before it, is calibrated too."""
        model = super().call_model_init(*args, **kwargs)
        if self._is_set_up:
            self.model = model.to(self.args.device) if self.place_model_on_device else model
            if self._tuner().needs_calibration and not self._is_going_to_be_sharded:
                self._calibrate()
        return model

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        """As the base trainer's; FSDP2's part of a checkpoint lacks what does not learn, such as the noise's scale."""
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if self.is_fsdp_enabled:
            self._load_calibration(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint, *args, **kwargs):
        """As the base trainer's; ZeRO-3's part of a checkpoint, just loaded, lacks the noise's scale too."""
        super()._load_optimizer_and_scheduler(checkpoint, *args, **kwargs)
        if self._is_in_zero3 and checkpoint is not None:
            self._load_calibration(checkpoint)

    def _load_calibration(self, checkpoint: str) -> None:
        adapter = os.path.join(checkpoint, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(adapter):
            self._tuner().load_calibration(adapter)

    def _save(self, output_dir=None, state_dict=None):
        """As the base trainer's; from ZeRO-3 that has gathered what learns alone, which the noise's scale does not."""
        if self._is_in_zero3:
            model: Any = self.model
            fixed = {
                name: whole(parameter).detach().cpu()
                for name, parameter in model.named_parameters()
                if "dip_projection" in name and not parameter.requires_grad
            }
            if state_dict is not None:  # on the main process
                state_dict |= fixed
        super()._save(output_dir, state_dict)

    @property
    def _is_in_zero3(self) -> bool:
        return self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3

    @property
    def _is_going_to_be_sharded(self) -> bool:
        return self.is_fsdp_enabled or self._is_in_zero3

    def _calibrate(self) -> None:
        with self.accelerator.autocast(), self._first_batches() as batches:
            self._tuner().calibrate(batches)

    @contextmanager
    def _first_batches(self) -> Iterator[Iterator[Any]]:
        """The batches for calibration; the training run draws what it would have drawn without this."""
        with torch.random.fork_rng(devices=[]):
            # A worker process reads a copy.
            if self.args.dataloader_num_workers == 0 and may_be_read_once(self.train_dataset):
                self.train_dataset = Replayed(self.train_dataset)
            loader = self.get_train_dataloader()
            yield map(self._calibration_batch, itertools.islice(loader, _NUM_CALIBRATION_BATCHES))
        # A loader that was left before its end still counts as being read.
        gradient_state = self.accelerator.gradient_state
        if any(loader is active for active in gradient_state.dataloader_references):
            gradient_state._remove_dataloader(loader)

    def _calibration_batch(self, batch: Any) -> Any:
        """A batch of the training data as the model's inputs."""
        return batch if self._trl is None else model_inputs(batch)

    def compute_ref_log_probs(self, *args, **kwargs):
        """As TRL's, before training and in evaluation: a reference has no noise."""
        with self._tuner().deterministic():
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args, **kwargs):
        """As the base trainer's, with the log-variances in a group of their own, without weight decay.

        With `logvar_learning_rate=0` they do not learn, and no gradient of theirs counts when gradients are clipped.
        What the channels of a site have in common counts more in a step than in the gradient, see `share_level`. An
        optimizer that was given is left as it is, and a warning says so where the log-variances would not learn, or
        would decay.

        Raises:
            ValueError: the optimizer does not take the parameters; its reason, and what may be meant.
        """
        logvars = [logvar for logvar in self._tuner().logvars() if logvar.requires_grad]
        if self.optimizer is not None:
            warn_of_given_groups(self.optimizer.param_groups, logvars)
            return super().create_optimizer(*args, **kwargs)
        learning_rate = self._tuner().active_dip_config.logvar_learning_rate
        if learning_rate == 0:
            for logvar in logvars:
                logvar.requires_grad_(False)
            logvars = []
        try:
            super().create_optimizer(*args, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"The optimizer could not be made: {error} The log-variances of the noise are vectors, which an "
                "optimizer of matrices, such as Muon, does not take. Use one that does, such as AdamW."
            ) from error
        optimizer: Any = self.optimizer  # what an override returns may be nothing
        give_own_groups(optimizer, logvars, learning_rate)
        if self.is_deepspeed_enabled:  # its ZeRO takes the gradients away before the optimizer's step
            for logvar in logvars:
                logvar.register_hook(lambda gradient: gradient + shared_level(gradient))
        else:
            # The parameters of the moment: FSDP2 puts others in the place of those of now.
            optimizer.register_step_pre_hook(lambda *_: share_level(self._tuner().logvars()))
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective in training, in one forward; the base trainer's loss in evaluation."""
        if not self._tuner().training:
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        tuner = self._tuner()
        if self._can_compute_own_terms(inputs, return_outputs):
            loss, nll, stability = self._own_terms(model, inputs, num_items_in_batch)
            outputs = None
        else:
            inputs = expand_batch(inputs, tuner.active_dip_config.num_samples)
            loss, nll, stability, outputs = self._base_terms(model, inputs, num_items_in_batch, return_outputs)
        prior = tuner.prior_loss()
        if losses_are_added(self, num_items_in_batch):
            prior = prior / self.current_gradient_accumulation_steps
        self._record(
            torch.stack([term.detach().float().to(loss.device) for term in (nll, prior, stability)]),
            num_items_in_batch,
        )
        loss = loss + prior
        return (loss, outputs) if return_outputs else loss

    def _evaluation_loss(self, model, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch) -> Any:
        """The base trainer's loss, of the mean inside `model.ensemble`."""
        if self._trl is not None and self._tuner().in_ensemble:
            check_ensemble(self._trl)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    def _can_compute_own_terms(self, inputs: dict[str, Any], return_outputs: bool) -> bool:
        """Whether nobody asks for the outputs and the data loss is known to be the plain negative log-likelihood."""
        return False

    def _data_loss_is_plain(self, inputs: dict[str, Any]) -> bool:
        """Whether transformers' `Trainer` takes eq. (2) alone, of labels that it shifts."""
        if self.label_smoother is not None or self.compute_loss_func is not None:
            return False
        if "labels" not in inputs or "shift_labels" in inputs:
            return False
        tuner = self._tuner()
        if not shifts_labels(tuner.model) or adds_router_loss(tuner.model):
            return False
        return tuner.hidden_state_capture.probe(self.model).loss_is_plain

    def _own_terms(
        self, model, inputs: dict[str, Any], num_items_in_batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Eqs. (2) + (4), and each of them detached, as `dip_loss` has them."""
        terms, _ = sampled_data_terms(model, inputs)
        scale = self._item_weight(terms.num_tokens, num_items_in_batch)
        return terms.total * scale, terms.nll * scale, terms.stability * scale

    def _base_terms(
        self, model, inputs: dict[str, Any], num_items_in_batch, return_outputs: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Eqs. (2) + (4), each of them, and the outputs: (2) is the base trainer's loss of S times the rows."""
        config = self._tuner().active_dip_config
        num_rows_items = None if num_items_in_batch is None else num_items_in_batch * config.num_samples
        needs_outputs = return_outputs or bool(config.stability_loss_weight)
        with self._tuner().sampled_rows(1 if self._trl is None else self._trl.num_compared):
            # A copy, as label smoothing and losses of one's own take the labels out.
            nll, outputs = self._data_loss(model, dict(inputs), num_rows_items, needs_outputs)
        stability = nll.new_zeros(())
        if config.stability_loss_weight:
            outputs_SN = self._supervised_outputs(outputs, inputs)
            num_tokens = len(outputs_SN) // config.num_samples
            penalty = config.stability_loss_weight * stability_penalty(outputs_SN, config.num_samples)
            stability = penalty * self._item_weight(num_tokens, num_items_in_batch)
        return nll + stability, nll, stability, outputs

    def _data_loss(
        self, model, inputs: dict[str, Any], num_items_in_batch, return_outputs: bool
    ) -> tuple[torch.Tensor, Any]:
        """Eq. (2) and the model's outputs, None unless asked for: TRL's trainers run another forward for them."""
        result: Any = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        return result if return_outputs else (result, None)

    def _supervised_outputs(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """f of eq. (4) at the supervised labels: `(S * N,)` log-probabilities or `(S * N, V)` logits."""
        model: Any = self.model
        target = self._tuner().active_dip_config.stability_target
        return stability_outputs(*class_outputs(model, outputs, inputs), target)

    def _item_weight(self, num_tokens: int, num_items_in_batch) -> Any:
        """What a sum over a batch's supervised tokens is multiplied by, as in the base trainer."""
        if num_items_in_batch is None:
            return 1 / max(num_tokens, 1)
        # The items of all processes are counted, and gradients are averaged over them.
        averaged = self.args.average_tokens_across_devices
        processes = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
        return processes / num_items_in_batch

    def _record(self, terms: torch.Tensor, num_items_in_batch) -> None:
        if not losses_are_added(self, num_items_in_batch):
            terms = terms / self.current_gradient_accumulation_steps
        # A second `train()`, or a restart with smaller batches, begins anew within steps that were not logged.
        if self._term_sums is None or self._run_of_sums is not self.state:
            self._term_sums, self._first_step_of_sums = torch.zeros_like(terms), self.state.global_step
            self._run_of_sums = self.state
        self._term_sums += terms

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add `nll`, `prior`, `stability` and `noise_std_{mean,min,max}` to the training logs."""
        if "loss" in logs and self._term_sums is not None:
            num_steps = self.state.global_step - self._first_step_of_sums
            means = self.accelerator.reduce(self._term_sums, reduction="mean") / num_steps
            logs |= dict(zip(_TERMS, means.tolist(), strict=True))
            rows = self._tuner().noise_summary()
            logs["noise_std_mean"] = sum(row["mean"] for row in rows) / len(rows)
            logs["noise_std_min"] = min(row["min"] for row in rows)
            logs["noise_std_max"] = max(row["max"] for row in rows)
            self._term_sums = None
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        """As the base trainer's, with this package's section, which the base trainer's would write over."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._tuner().active_dip_config.update_model_card(str(self.args.output_dir))


class ShardedCalibration(TrainerCallback):
    """Calibrates a model that FSDP2 or ZeRO-3 has sharded, on the batches that it was given before."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        """See the class; a checkpoint that the run resumes from was calibrated."""
        if self.batches and model.base_model.needs_calibration:
            model.base_model.calibrate(self.batches, wrapped=model)
        self.batches = []


class NoiseReport(TrainerCallback):
    """Says at the start of training, in one line, where noise enters and how much."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        """See the class."""
        rows, config = model.base_model.noise_summary(), model.base_model.active_dip_config
        mean = sum(row["mean"] for row in rows) / len(rows)
        prior_std = "where it began" if config.prior_std is None else f"{config.prior_std:.3g}"
        _logger.info(
            "Noise at %d sites, %s to %s: std %.3g (%s), %d per row; prior of weight %.3g around %s",
            *(len(rows), rows[0]["name"], rows[-1]["name"], mean, config.noise_scale),
            *(config.num_samples, config.prior_weight, prior_std),
        )


def losses_are_added(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether a Trainer adds the losses of the accumulated batches up; it averages them otherwise."""
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)  # since transformers 5.23
    return num_items_in_batch is not None if stated is None else stated


def check_strategy(accelerator: Any) -> None:
    """Refuse ways to split a model among processes that the objective is not right on."""
    state = accelerator.state
    if getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
        raise ValueError(
            "FSDP1 is not supported: it flattens the log-variances into pieces, of which the prior cannot be "
            "computed. Set fsdp_version: 2 in accelerate's configuration, or fsdp_config={'version': 2}."
        )
    if state.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError("Megatron-LM is not supported: it runs layers of its own, without noise. Use FSDP2.")
    parallelism = getattr(accelerator, "parallelism_config", None)
    names = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
    if given := [f"{name}={size}" for name in names if (size := getattr(parallelism, name, 1)) > 1]:
        raise ValueError(
            f"{' and '.join(given)} of parallelism_config: {', '.join(names.values())} parallelism are not supported, "
            "as processes that share a row would draw different noise for it. Use dp_shard_size and dp_replicate_size."
        )


class DipTrainer(DipTrainerMixin, Trainer):
    """transformers' `Trainer` with the DIP objective, computed without the whole batch's logits where it can be."""

    def _can_compute_own_terms(self, inputs: dict[str, Any], return_outputs: bool) -> bool:
        return not return_outputs and self._data_loss_is_plain(inputs)

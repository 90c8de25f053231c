"""What `DipTrainerMixin` knows of TRL's trainers: which of them work with noise, how their rows belong together, and
what of their batches is the model's.

TRL itself is not imported: its trainers are known by their names.
"""

from typing import Any, NamedTuple

from .batches import IGNORE_INDEX
from .config import DipConfig


class TrlTrainer(NamedTuple):
    """A trainer of TRL that works with noise, and how it uses the model."""

    name: str
    num_compared: int = 1  # equal parts of the rows are compared with each other: chosen and rejected answers
    has_reference: bool = False  # its loss compares the policy with a reference
    predicts_tokens: bool = True
    repeats_rows: bool = False  # its rows may be copies, of several samples


TRL_TRAINERS: tuple[TrlTrainer, ...] = (
    TrlTrainer("DPOTrainer", num_compared=2, has_reference=True),
    TrlTrainer("KTOTrainer", has_reference=True),
    TrlTrainer("ORPOTrainer", num_compared=2),
    TrlTrainer("CPOTrainer", num_compared=2),
    TrlTrainer("RewardTrainer", num_compared=2, predicts_tokens=False),
)


def find_trl_trainer(trainer_class: type, works: tuple[TrlTrainer, ...]) -> TrlTrainer | None:
    """The one of the trainers that work from which a class derives, None if it derives from none of TRL's.

    Raises:
        ValueError: it derives from another one of TRL's.
    """
    name = next((base.__name__ for base in trainer_class.__mro__ if base.__module__.startswith("trl.")), None)
    if name is None:
        return None
    for trainer in works:
        if trainer.name == name:
            return trainer
    if name == "SFTTrainer":
        raise ValueError("TRL's SFTTrainer needs more than DipTrainerMixin: use DipSFTTrainer.")
    names = ", ".join(trainer.name for trainer in TRL_TRAINERS)
    raise ValueError(
        f"TRL's {name} does not work with noise: only {names} (with DipTrainerMixin) and SFTTrainer (as "
        f"DipSFTTrainer) do. Train without noise by {name} itself, on model.merge_and_unload()."
    )


def check_trl_trainer(trainer: TrlTrainer, config: DipConfig, calibrated: bool, has_reference_model: bool) -> None:
    """Refuse a config that does not work, before TRL prepares its data.

    Args:
        trainer (`TrlTrainer`): what trains.
        config (`DipConfig`): of the adapter that is trained.
        calibrated (`bool`): whether its noise is known already.
        has_reference_model (`bool`): whether the reference is a model of its own.

    Raises:
        ValueError: the message says what works.
    """
    if config.num_samples > 1 and not trainer.repeats_rows:
        raise ValueError(
            f"{trainer.name} takes one noise sample per row, got num_samples={config.num_samples}: use num_samples=1, "
            "and no stability_loss_weight."
        )
    if trainer.has_reference and config.weights == "full" and not has_reference_model:
        raise ValueError(
            f'{trainer.name} compares with the model before training, which weights="full" changes: give it as '
            "ref_model, loaded a second time, or train an adapter, such as weights=LoraConfig(...)."
        )
    if not trainer.predicts_tokens and config.init_noise_std == "auto" and not calibrated:
        raise ValueError(
            f'{trainer.name} has no loss per token, by which init_noise_std="auto" is found: give a number, such as '
            "init_noise_std=0.1."
        )


def check_ensemble(trainer: TrlTrainer) -> None:
    """Refuse the evaluation of what has no mean inside `model.ensemble`."""
    if trainer.has_reference:
        raise ValueError(
            f"{trainer.name} compares with a reference, which is no ensemble: evaluate outside model.ensemble."
        )
    if not trainer.predicts_tokens:
        raise ValueError(
            f"{trainer.name} predicts rewards, which are no probabilities to average: evaluate outside model.ensemble."
        )


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model takes of a TRL trainer's batch: the prompts with their answers, which are the `labels`.

    Args:
        batch (`dict`): of `DPOTrainer` or `KTOTrainer` (with a `completion_mask`), of `ORPOTrainer` or `CPOTrainer`
            (with `chosen_labels`: the rejected answers are left out), or of another, whose `labels` stay.
    """
    if "chosen_labels" in batch:
        part = "chosen" if "chosen_input_ids" in batch else "prompt"  # of an encoder
        names = ("input_ids", "attention_mask")
        return {name: batch[f"{part}_{name}"] for name in names} | {"labels": batch["chosen_labels"]}
    others = ("completion_mask", "label", "margin")
    inputs = {name: batch[name] for name in batch if name not in others and not name.startswith(("KL_", "ref_"))}
    if "completion_mask" in batch:
        inputs["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    return inputs

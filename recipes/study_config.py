"""A study: which methods, which values of each one's tuned setting, which seeds; and its cells, one run each.

A cell is a configuration of `recipes/finetune.py` in a folder of its own. Nothing is run here.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, replace
from dataclasses import fields as fields_of
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from recipes.config import DistillConfig, FinetuneConfig, load_config
from recipes.yaml_values import check_keys, field_names, read_values

_OF_THE_STUDY = {
    "training.output_dir",
    "training.seed",
    "training.load_best_model_at_end",
    "heldout_split",
    "evaluation.num_samples",
}


@dataclass
class MethodConfig:
    """One method of a study.

    Args:
        setting (`str`): the dotted key of a `FinetuneConfig` that is tuned, such as `dip.init_noise_std`.
        values (`list`): what is tried for it; every method of a study has the same number.
        set (`dict`): other keys of the configuration, dotted, that make the method.
        num_samples (`int`, *optional*): also score the mean of so many noisy passes, and the network that is distilled
            from it.
    """

    setting: str
    values: list
    set: dict[str, Any] = field(default_factory=dict)
    num_samples: int | None = None


@dataclass
class StudyConfig:
    """One study of `recipes/study.py`.

    Args:
        base (`str`): a configuration of `recipes/finetune.py`, which holds problems out for validation.
        output_dir (`str`): the folder of the cells and of the report.
        references (`list[str]`): the methods that are each compared with all others.
        margin (`float`): nats per token; a difference within it is called equivalence.
        tuning_seeds (`list[int]`): each value of a method is tried with these.
        seeds (`list[int]`): the chosen values are run with these.
        methods (`dict`): the fields of `MethodConfig` by a method's name.
        num_finalists (`int`, *optional*): only the references, what is called `plain...`, and so many others run with
            `seeds`: those of the least validation NLL in one pass, once all are tuned. Null is all.
        set (`dict`): keys of the base that all methods change, dotted.
        final_set (`dict`): more of them for the runs with the chosen values, such as what costs time to score.
        num_smoothness_problems (`int`, *optional*): measure with so many held-out problems how smooth the networks of
            the runs with the chosen values are; null does not.
        distill (`dict`, *optional*): the fields of a `DistillConfig` but for the teacher, and the folder and seed of
            the training; null distils nothing.

    Raises:
        ValueError: a key is unknown, the methods have different numbers of trials, or a cell's configuration is none.
    """

    base: str
    output_dir: str
    references: list[str]
    margin: float
    tuning_seeds: list[int]
    seeds: list[int]
    methods: dict[str, MethodConfig]
    num_finalists: int | None = None
    num_smoothness_problems: int | None = None
    set: dict[str, Any] = field(default_factory=dict)
    final_set: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] | None = None

    def __post_init__(self):
        for name in ("tuning_seeds", "seeds"):
            _check_seeds(name, getattr(self, name))
        if not (isinstance(self.references, list) and self.references and set(self.references) <= self.methods.keys()):
            raise ValueError(
                f"references must list one or more of the methods {', '.join(self.methods)}, got {self.references!r}."
            )
        if not (isinstance(self.margin, (int, float)) and self.margin > 0):
            raise ValueError(f"margin must be positive, got {self.margin!r}.")
        for name, least in (("num_finalists", 0), ("num_smoothness_problems", 1)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= least):
                raise ValueError(f"{name} must be null, or {least} or more, got {value!r}.")
        num_trials = {name: len(method.values) for name, method in self.methods.items()}
        if len(set(num_trials.values())) > 1:
            raise ValueError(f"Every method needs as many values as the others, got {num_trials}.")
        for name, method in self.methods.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"A method's name is one of a folder: letters, digits, '_', '-' and '.', got {name!r}."
                )
            folders = {_folder_of(value) for value in method.values}
            if len(folders) < len(method.values):
                raise ValueError(f"The values of {name} are not all different: {method.values}.")
            if given := sorted(_OF_THE_STUDY & {*self.set, *self.final_set, *method.set, method.setting}):
                raise ValueError(f"{given[0]} is set by the study for every cell; leave it out.")
        for cell in tuning_cells(self):
            cell.config()
            final = cell._replace(phase="final")
            config = final.config()
            if self.num_smoothness_problems is not None and (config.quantization or config.weights == "frozen"):
                raise ValueError(
                    f"num_smoothness_problems: {cell.method} has a quantized base, which has no second derivatives, "
                    "or no trained weights to disturb. Leave it out."
                )
            if final.is_distilled:
                final.distill_config()


class Cell(NamedTuple):
    """One run: a method with one value of its setting and one seed."""

    study: StudyConfig
    phase: str  # "tuning", scored on validation problems, or "final", on test problems
    method: str
    value: Any
    seed: int

    @property
    def folder(self) -> Path:
        """Where the cell's lock, log and configuration are."""
        return Path(self.study.output_dir) / self.phase / self.method / _folder_of(self.value) / f"seed{self.seed}"

    @property
    def run_folder(self) -> Path:
        """Where the recipe writes."""
        return self.folder / "run"

    @property
    def student_folder(self) -> Path:
        """Where the distillation writes."""
        return self.folder / "student"

    @property
    def result_file(self) -> Path:
        """What remains of a cell; see `recipes.study_cell`."""
        return self.folder / "result.json"

    @property
    def is_distilled(self) -> bool:
        """Whether the mean of the noisy passes is also distilled into one network."""
        has_samples = self.study.methods[self.method].num_samples is not None
        return self.phase == "final" and self.study.distill is not None and has_samples

    @property
    def num_smoothness_problems(self) -> int | None:
        """With how many problems its networks' smoothness is measured; None if it is not."""
        return self.study.num_smoothness_problems if self.phase == "final" else None

    def config(self) -> FinetuneConfig:
        """Build the configuration of the recipe; every run ends with the weights of its best evaluation.

        Raises:
            ValueError: it is not one.
        """
        method, is_final = self.study.methods[self.method], self.phase == "final"
        keys = {**self.study.set, **(self.study.final_set if is_final else {}), **method.set}
        keys |= {method.setting: self.value, "evaluation.num_samples": method.num_samples}
        keys |= {"training.output_dir": str(self.run_folder), "training.seed": self.seed}
        keys |= {"training.load_best_model_at_end": True, "heldout_split": "test" if is_final else "validation"}
        config = _load_once(self.study.base, tuple(f"{key}={json.dumps(value)}" for key, value in keys.items()))
        if is_final:
            return config
        # The tasks with a file of their own are more test sets.
        tasks: dict[str, str | None] = {name: p for name, p in config.evaluation.tasks.items() if p is None}
        return replace(config, evaluation=replace(config.evaluation, tasks=tasks))

    def distill_config(self) -> DistillConfig:
        """Build the configuration of the distillation.

        Raises:
            ValueError: it is not one.
        """
        given = {"heldout_sizes": {"one": 1}, "compare_samples": [1], **(self.study.distill or {})}
        training = {**given.pop("training", {}), "output_dir": str(self.student_folder), "seed": self.seed}
        check_keys("distill", given, field_names(DistillConfig) - {"teacher"})
        return DistillConfig(teacher=str(self.run_folder), training=training, **given)


@cache
def _load_once(base: str, overrides: tuple[str, ...]) -> FinetuneConfig:
    """Load a configuration that is not to be changed: a study asks for those of its cells again and again."""
    return load_config(base, overrides)


def tuning_cells(study: StudyConfig) -> list[Cell]:
    """List every value of every method with the tuning seeds, one method after the other in turn."""
    numbers = range(len(study.methods[study.references[0]].values))
    return [
        Cell(study, "tuning", name, method.values[number], seed)
        for seed in study.tuning_seeds
        for number in numbers
        for name, method in study.methods.items()
    ]


def final_cells(study: StudyConfig, chosen: dict[str, dict[str, Any]]) -> list[Cell]:
    """List the chosen values, by method and answer, with all seeds: seed by seed, so that pairs are complete early."""
    cells = [
        Cell(study, "final", name, value, seed)
        for seed in study.seeds
        for name in study.methods
        for value in chosen.get(name, {}).values()
    ]
    return list({cell.folder: cell for cell in cells}.values())  # two answers may have chosen the same value


def load_study(path: str) -> StudyConfig:
    """Read a study's YAML file and check every key, and the configuration of every cell.

    Raises:
        ValueError: the file is missing, a key is unknown or missing, or a value is out of range.
    """
    values = read_values(path, [])
    check_keys("", values, field_names(StudyConfig))
    required = {
        its.name for its in fields_of(StudyConfig) if its.default is MISSING and its.default_factory is MISSING
    }
    if missing := sorted(required - values.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}; see recipes/configs/study-stories260k-gsm8k.yaml.")
    if not isinstance(values["methods"], dict):
        raise ValueError(
            f"methods must hold `name: {{setting: ..., values: [...]}}` lines, got {values['methods']!r}."
        )
    for name, fields in values["methods"].items():
        check_keys(f"methods.{name}", fields, field_names(MethodConfig))
        if not (
            isinstance(fields.get("setting"), str) and isinstance(fields.get("values"), list) and fields["values"]
        ):
            raise ValueError(f"methods.{name} needs a setting and a list of values to try for it, got {fields}.")
    methods = {name: MethodConfig(**fields) for name, fields in values["methods"].items()}
    return StudyConfig(**{**values, "methods": methods})


def _check_seeds(name: str, seeds: Sequence) -> None:
    is_list = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not is_list or len(set(seeds)) < len(seeds):
        raise ValueError(f"{name} must be a list of different seeds such as [0, 1, 2], got {seeds!r}.")


def _folder_of(value) -> str:
    return re.sub(r"[^\w.+-]", "_", value if isinstance(value, str) else json.dumps(value))

"""The recipes' configurations: dataclasses, a YAML file and `--set key=value`. No training code lives here.

Four sections of a fine-tuning hold other libraries' options under their own names: `weights` a PEFT config, `dip` a
`DipConfig`, `training` a `TrainingArguments`, `quantization` a `BitsAndBytesConfig`. Their keys are checked here too,
so a misspelled one stops the run before any work.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import Parameter, signature

import torch
import yaml
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import BitsAndBytesConfig, TrainingArguments

from dipnet_hf import DipConfig
from dipnet_hf.regularizers import METHODS, TFB, Regularizer
from dipnet_hf.regularizers.samples import SampledRegularizer
from recipes.yaml_values import check_keys, did_you_mean, field_names, read_values

DTYPES = ("float32", "bfloat16", "float16")
WATCHED = {"loss", "nll", "exact_match"}  # what training.metric_for_best_model may name, after "eval_" or without


@dataclass
class WatchConfig:
    """What is generated at every evaluation while a model trains.

    Args:
        num_problems (`int`): the first so many of the problems that the NLL is measured on.
        task (`str`): a task of `eval/tasks` over questions and answers, which tells whether an answer is right.
        filter (`str`): which of the task's filters finds what the answer says.
    """

    num_problems: int
    task: str = "gsm8k_local"
    filter: str = "strict-match"

    def __post_init__(self):
        _require_positive("evaluation.while_training.num_problems", self.num_problems, optional=False)


@dataclass
class EvaluationConfig:
    """What the trained model is scored on, by lm-evaluation-harness through `eval/scoring.py`.

    Args:
        tasks (`dict`): task of `eval/tasks` to a JSON Lines file of problems, null for the dataset's `test` split; a
            list stands for tasks with null; `[]` skips the scoring.
        num_samples (`int`, *optional*): also score the mean of so many noisy passes of `dip`, or without it of so many
            samples of a `regularizer` that has them, such as `layer_dropout`.
        limit (`int`, *optional*): problems per task; all of them when null.
        batch_size (`int`): rows generated at once; with `num_samples`, a prompt has so many. An eighth as many are
            scored at once.
        max_new_tokens (`int`): the longest answer.
        while_training (`WatchConfig`, *optional*): also log the exact match of a few problems at every evaluation of
            the training (`training.eval_strategy`), as `eval_exact_match`.
        early_stopping_patience (`int`, *optional*): end the training after so many evaluations in a row that were no
            better by `training.metric_for_best_model`, which is `loss`, `nll` or `exact_match`.
    """

    tasks: dict[str, str | None] = field(default_factory=lambda: {"gsm8k_local": None})
    num_samples: int | None = None
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int = 256
    while_training: WatchConfig | None = None
    early_stopping_patience: int | None = None

    def __post_init__(self):
        if self.while_training is not None and not isinstance(self.while_training, WatchConfig):
            self.while_training = _watch_config(self.while_training)
        if isinstance(self.tasks, list):
            self.tasks = dict.fromkeys(self.tasks)
        if not isinstance(self.tasks, dict):
            raise ValueError(
                f"evaluation.tasks must be a list or a mapping, got {self.tasks!r}; write [{self.tasks}]."
            )
        for name in ("num_samples", "limit", "batch_size", "max_new_tokens", "early_stopping_patience"):
            optional = name not in ("batch_size", "max_new_tokens")
            _require_positive(f"evaluation.{name}", getattr(self, name), optional)


@dataclass
class DataSetConfig:
    """One of the data sets of a run.

    Args:
        path (`str`): Hub id, folder or file.
        dataset_config (`str`, *optional*): its configuration; null: its only one, `main` or `default`.
        dataset_split (`str`): the split to train on.
        columns (`dict`, *optional*): names of its columns to those of `recipes/formats.py`; others are left out.
        weight (`float`, *optional*): its share in a mixture, relative to the other weights.
    """

    path: str
    dataset_config: str | None = None
    dataset_split: str = "train"
    columns: dict[str, str] | None = None
    weight: float | None = None

    def __post_init__(self):
        for name in ("path", "dataset_config", "dataset_split"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value or name == "dataset_config" and value is None):
                raise ValueError(f"The {name} of a data set must be text, got {value!r}.")
        if self.columns is not None and not _maps_text_to_text(self.columns):
            raise ValueError(f"columns must be a mapping such as {{problem: question}}, got {self.columns!r}.")
        if self.weight is not None and not (_is_number(self.weight) and 0 < self.weight < float("inf")):
            raise ValueError(f"The weight of {self.path} must be a positive number, got {self.weight!r}.")


@dataclass
class FinetuneConfig:
    """One run of `recipes/finetune.py`.

    Args:
        model (`str`): Hub id or folder of a causal language model and its tokenizer.
        dataset (`str` or `list`): Hub id, folder or file of rows in one of the formats of `recipes/formats.py`, with a
            `test` split for the held-out figures; or a mixture, a list of the fields of `DataSetConfig`. Either all of
            a mixture have a `weight`, or none, and then all rows are used.
        training (`dict`): any field of `transformers.TrainingArguments`; `output_dir` is required.
        weights (`dict` or `str`): how the network's own weights learn: the fields of a PEFT config with its
            `peft_type`, or `"full"`, or `"frozen"`.
        dip (`dict`, *optional*): fields of `DipConfig`; null is plain fine-tuning of the same weights.
        regularizer (`dict`, *optional*): another method to train with, alone or beside `dip`: its `name` in
            `dipnet_hf.regularizers.METHODS`, and its settings, such as `{name: sam, rho: 0.05}`.
        dataset_config, dataset_split, columns: of a single dataset, as in `DataSetConfig`.
        apply_chat_template (`bool`, *optional*): put rows that are no conversations into the model's chat template,
            as a user's turn and its answer, and score the tasks in it; null: if the rows are conversations.
        system_prompt (`str`, *optional*): the first turn of those rows and of the tasks in a chat template.
            Conversations bring their own.
        max_length (`int`): tokens; longer training sequences are dropped, longer held-out ones are cut.
        max_train_samples (`int`, *optional*): train on the first so many sequences that fit.
        packing (`bool`): join training sequences to rows of up to `max_length` tokens; needs a flash attention, and
            TRL, which chooses what is joined.
        max_eval_samples (`int`, *optional*): hold out the first so many test problems of each dataset, and of each
            file of `evaluation.tasks`.
        num_validation_samples (`int`, *optional*): keep the last so many training problems from training, for
            evaluation on the way (`training.eval_strategy`); null evaluates on the test problems. With
            `training.metric_for_best_model: nll` the best checkpoint is scored beside the last.
        validation_fraction (`float`, *optional*): keep such a part of the training problems instead, chosen by what a
            problem says: it stays on its side when others are added, and so do copies of it.
        heldout_split (`str`): which problems the figures of the finished model are of: `test`, or `validation`, which
            leaves the test problems alone while settings are chosen.
        evaluation (`EvaluationConfig`): what the trained model is scored on.
        dtype (`str`, *optional*): the data type of an adapter's base, as in transformers' `from_pretrained`; null is
            the one it was saved in. All weights are trained in float32.
        quantization (`dict`, *optional*): fields of transformers' `BitsAndBytesConfig`, `load_in_4bit: true` or
            `load_in_8bit: true` among them: the base of an adapter in so many bits (QLoRA). What stays unquantized is
            computed in float32, as PEFT prepares such a base.
        attn_implementation (`str`, *optional*): as in transformers' `from_pretrained`; null is the model's default.
            With a flash attention, training batches have no padding; with others that would cost more, and layers
            that carry a state would take it from one sequence into the next.
        trust_remote_code (`bool`): let the model's repository run its own code.
    """

    model: str
    dataset: str | list[dict]
    training: dict
    weights: dict | str
    dip: dict | None = None
    regularizer: dict | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    columns: dict[str, str] | None = None
    apply_chat_template: bool | None = None
    system_prompt: str | None = None
    max_length: int = 512
    packing: bool = False
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    num_validation_samples: int | None = None
    validation_fraction: float | None = None
    heldout_split: str = "test"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    dtype: str | None = None
    quantization: dict | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        for name in ("max_length", "max_train_samples", "max_eval_samples", "num_validation_samples"):
            _require_positive(name, getattr(self, name), optional=name != "max_length")
        self._check_data()
        if "output_dir" not in self.training:
            raise ValueError("training.output_dir is not set; give the folder for the model and its results.")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or null, got {self.dtype!r}.")
        if self.weights == "full" and self.dtype not in (None, "float32"):
            raise ValueError(f"weights: full trains in float32, got dtype: {self.dtype}; use training.bf16=true.")
        if self.quantization is not None:
            self._check_quantization(self.quantization)
        has_validation = self.num_validation_samples is not None or self.validation_fraction is not None
        if self.heldout_split not in ("test", "validation"):
            raise ValueError(f"heldout_split must be test or validation, got {self.heldout_split!r}.")
        if self.heldout_split == "validation" and not has_validation:
            raise ValueError("heldout_split: validation needs num_validation_samples or validation_fraction.")
        chooses = [key for key in ("metric_for_best_model", "load_best_model_at_end") if self.training.get(key)]
        if chooses and not has_validation:
            raise ValueError(
                f"training.{chooses[0]} would choose the best checkpoint on the test problems that it is then "
                "scored on; set num_validation_samples or validation_fraction."
            )
        if self.weights == "frozen" and self.dip is None:
            raise ValueError("weights: frozen with dip: null trains nothing; give a PEFT config or full, or set dip.")
        has_samples = self.dip is not None or isinstance(self.make_regularizer(), SampledRegularizer)
        if self.evaluation.num_samples is not None and not has_samples:
            have = ", ".join(name for name, method in METHODS.items() if issubclass(method, SampledRegularizer))
            raise ValueError(
                "evaluation.num_samples with dip: null: a plain model has no noisy passes; leave it out, or set a "
                f"regularizer that has samples: {have}."
            )
        self._check_watching()
        self.dip_config()  # for its errors
        if self.dip is not None and isinstance(self.make_regularizer(), TFB):
            raise ValueError("regularizer: tfb with dip: each has an ensemble of its own; leave one of them out.")

    def _check_watching(self) -> None:
        """Refuse what would be looked for at an evaluation and not be there."""
        evaluation, metric = self.evaluation, self.training.get("metric_for_best_model")
        asked = [name for name in ("while_training", "early_stopping_patience") if getattr(evaluation, name)]
        if asked and self.training.get("eval_strategy") in (None, False, "no"):
            raise ValueError(
                f"evaluation.{asked[0]} is for evaluations on the way, and there are none: set training.eval_strategy "
                "to steps or epoch."
            )
        if evaluation.early_stopping_patience is not None and metric is None:
            raise ValueError(
                "evaluation.early_stopping_patience needs to know what must get better: set "
                "training.metric_for_best_model to nll, loss or exact_match."
            )
        if metric is not None and (name := str(metric).removeprefix("eval_")) not in WATCHED:
            raise ValueError(
                f"training.metric_for_best_model is {metric!r}, which no evaluation reports; "
                f"{did_you_mean(name, WATCHED)}"
            )
        if metric in ("exact_match", "eval_exact_match") and evaluation.while_training is None:
            raise ValueError(
                f"training.metric_for_best_model: {metric} is measured by generating: set evaluation.while_training, "
                "such as {num_problems: 32}."
            )

    def _check_quantization(self, fields: dict) -> None:
        if self.weights == "full":
            raise ValueError("weights: full cannot train a quantized model; give a PEFT config, or drop quantization.")
        if sum(bool(fields.get(name)) for name in ("load_in_4bit", "load_in_8bit")) != 1:
            raise ValueError(f"quantization needs one of load_in_4bit: true and load_in_8bit: true, got {fields}.")
        self.quantization_config()

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """Build the `BitsAndBytesConfig`; None for a base that is not quantized."""
        return None if self.quantization is None else BitsAndBytesConfig(**self.quantization)

    def _check_data(self) -> None:
        data_sets = self.data_sets()
        if len({data_set.weight is None for data_set in data_sets}) > 1:
            raise ValueError("Some data sets have a weight and some have none: give one to all of them, or to none.")
        if len(data_sets) > 1 and self.num_validation_samples is not None:
            raise ValueError("num_validation_samples counts problems of one dataset; set validation_fraction instead.")
        if len(data_sets) > 1 and data_sets[0].weight is None and self.max_train_samples is not None:
            raise ValueError("max_train_samples would take the first data set alone: give each data set a weight.")
        for name, allowed in (("apply_chat_template", (True, False, None)), ("packing", (True, False))):
            if not any(getattr(self, name) is value for value in allowed):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.system_prompt is not None and not isinstance(self.system_prompt, str):
            raise ValueError(f"system_prompt must be text or null, got {self.system_prompt!r}.")
        fraction = self.validation_fraction
        if fraction is not None and not (_is_number(fraction) and 0 < fraction < 1):
            raise ValueError(f"validation_fraction must be between 0 and 1, or null, got {fraction!r}.")
        if fraction is not None and self.num_validation_samples is not None:
            raise ValueError("num_validation_samples and validation_fraction both hold problems out: set one of them.")

    def data_sets(self) -> list[DataSetConfig]:
        """List the data sets: those of a mixture, or the only one."""
        own = {name: getattr(self, name) for name in ("dataset_config", "dataset_split", "columns")}
        if not isinstance(self.dataset, list):
            return [DataSetConfig(self.dataset, **own)]
        defaults = {item.name: item.default for item in fields(DataSetConfig)}
        if given := [name for name, value in own.items() if value != defaults[name]]:
            raise ValueError(f"{given[0]} is of one dataset: in a mixture, write it beside the path of each.")
        if not self.dataset:
            raise ValueError("dataset is an empty list: give a Hub id, a folder or a file.")
        for values in self.dataset:
            check_keys("dataset", values, field_names(DataSetConfig))
            if "path" not in values:
                raise ValueError(f"A data set of the mixture has no path: {values!r}.")
        return [DataSetConfig(**values) for values in self.dataset]

    def peft_config(self) -> PeftConfig | str:
        """Build the PEFT config of `weights`; `"full"` and `"frozen"` stay as they are."""
        if isinstance(self.weights, str):
            return self.weights
        return PeftConfig.from_peft_type(**{"task_type": "CAUSAL_LM", **self.weights})

    def dip_config(self) -> DipConfig | None:
        """Build the `DipConfig` around the weights; None for plain fine-tuning."""
        return None if self.dip is None else DipConfig(weights=self.peft_config(), **self.dip)

    def make_regularizer(self) -> Regularizer | None:
        """Build the method beside `dip`; None for none."""
        if self.regularizer is None:
            return None
        settings = dict(self.regularizer)
        method = METHODS[settings.pop("name")]
        return method(**settings)

    def training_arguments(self) -> TrainingArguments:
        """Build the `TrainingArguments`; a resumed run goes on counting towards an early stop."""
        if self.evaluation.early_stopping_patience is None:
            return _training_arguments(self.training)
        return _training_arguments({"restore_callback_states_from_checkpoint": True, **self.training})


@dataclass
class DistillConfig:
    """One run of `recipes/distill.py`.

    Args:
        teacher (`str`): the folder of a finished run of `recipes/finetune.py` with `dip`, or with a `regularizer` that
            has samples; its `config.yaml` tells the base model and the data.
        training (`dict`): any field of `transformers.TrainingArguments`; `output_dir` is required.
        num_samples (`int`): k, the noisy passes whose mean is the target of a step.
        temperature (`float`): both distributions are flattened by it, as in Hinton et al. (arXiv 1503.02531).
        data_weight (`float`): the share of the data loss; 0 is the teacher alone, 1 plain fine-tuning.
        cache_top_p (`float`, *optional*): draw the targets once, and keep the likeliest tokens up to this probability;
            null draws them anew at every step.
        prompts (`str`, *optional*): a JSON Lines file of more questions; the ensemble writes their answers.
        max_new_tokens (`int`): the longest such answer.
        compare_samples (`list[int]`): the sizes of the ensemble that the result is compared with.
        heldout_sizes (`dict[str, int | None]`): name to how many of the first held-out problems to report on; null
            is all of them. Those that were cut at `max_length` do not count.
    """

    teacher: str
    training: dict
    num_samples: int = 4
    temperature: float = 1.0
    data_weight: float = 0.0
    cache_top_p: float | None = None
    prompts: str | None = None
    max_new_tokens: int = 256
    compare_samples: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    heldout_sizes: dict[str, int | None] = field(default_factory=lambda: {"all": None})

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens"):
            _require_positive(name, getattr(self, name), optional=False)
        if not isinstance(self.compare_samples, list) or not self.compare_samples:
            raise ValueError(f"compare_samples must be a list such as [2, 8], got {self.compare_samples!r}.")
        for number in self.compare_samples:
            _require_positive("compare_samples", number, optional=False)
        if not isinstance(self.heldout_sizes, dict) or not self.heldout_sizes:
            raise ValueError(f"heldout_sizes must be a mapping such as {{all: null}}, got {self.heldout_sizes!r}.")
        for size in self.heldout_sizes.values():
            _require_positive("heldout_sizes", size, optional=True)
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if not (_is_number(self.data_weight) and 0 <= self.data_weight <= 1):
            raise ValueError(f"data_weight must be between 0 and 1, got {self.data_weight}.")
        if self.cache_top_p is not None and not (_is_number(self.cache_top_p) and 0 < self.cache_top_p <= 1):
            raise ValueError(f"cache_top_p must be above 0 and at most 1, or null, got {self.cache_top_p}.")
        if "output_dir" not in self.training:
            raise ValueError("training.output_dir is not set; give the folder for the model and its results.")

    def training_arguments(self) -> TrainingArguments:
        """Build the `TrainingArguments`; the dataset has columns that the model does not take."""
        return _training_arguments({"remove_unused_columns": False, **self.training})


def _training_arguments(training: dict) -> TrainingArguments:
    """Build `TrainingArguments` with a data order that depends on nothing but the seed.

    With `data_seed` unset accelerate takes the seed of torch's global generator at that moment, which is the same for
    a plain and a DIP run only as long as neither reseeds it.
    """
    training = {
        name: "no" if name.endswith("_strategy") and value is False else value  # an unquoted `no` is False in YAML
        for name, value in training.items()
    }
    if training.get("metric_for_best_model") in ("nll", "eval_nll"):
        training = {"greater_is_better": False, **training}  # transformers knows of "loss" alone that less is better
    has_accelerator = torch.accelerator.is_available()
    if training.get("bf16") and "use_cpu" not in training and not has_accelerator:
        warnings.warn("There is no accelerator: training.bf16 trains on the CPU.", stacklevel=3)
        training = {"use_cpu": True, **training}  # or transformers would refuse it
    arguments = TrainingArguments(**{"dataloader_pin_memory": has_accelerator, **training})
    if arguments.data_seed is None:
        arguments.data_seed = arguments.seed
    return arguments


def load_config(path: str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a fine-tuning's YAML file, apply `key=value` overrides and check every key.

    Args:
        path (`str`): the YAML file.
        overrides (`list[str]`): `key=value`, the key dotted for sections (`training.learning_rate=1e-4`), the value
            YAML (`null`, `[a, b]`, `{a: 1}`).

    Raises:
        ValueError: the file is missing or not a mapping, an override is malformed, or a key is unknown.
    """
    values = read_values(path, overrides)
    _check_all_keys(values)
    evaluation = EvaluationConfig(**values.pop("evaluation", None) or {})
    return FinetuneConfig(**values, evaluation=evaluation)


def load_distill_config(path: str, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a distillation's YAML file; arguments and errors are those of `load_config`."""
    values = read_values(path, overrides)
    check_keys("", values, field_names(DistillConfig))
    if missing := sorted(name for name in ("teacher", "training") if values.get(name) is None):
        raise ValueError(f"The configuration lacks {', '.join(missing)}; see recipes/configs/ for complete ones.")
    check_keys("training", values["training"], field_names(TrainingArguments))
    return DistillConfig(**values)


def dump_config(config: FinetuneConfig | DistillConfig) -> str:
    """Write a configuration as the YAML that it is loaded from."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _check_all_keys(values: dict) -> None:
    required = {"model", "dataset", "training", "weights"}
    check_keys("", values, field_names(FinetuneConfig))
    if missing := sorted(name for name in required if values.get(name) is None):
        raise ValueError(f"The configuration lacks {', '.join(missing)}; see recipes/configs/ for complete ones.")
    check_keys("training", values["training"], field_names(TrainingArguments))
    if isinstance(values["weights"], dict):
        check_keys("weights", values["weights"], field_names(_peft_config_class(values["weights"])))
    elif values["weights"] not in ("full", "frozen"):
        raise ValueError(
            f"weights must be full, frozen or the fields of a PEFT config, got {values['weights']!r}; "
            "write for instance {peft_type: LORA, r: 16}."
        )
    if values.get("dip") is not None:
        # What `DipConfig` takes and does not keep: runs of earlier versions stay readable.
        names = field_names(DipConfig) | {"alpha", "beta", "antithetic", "shared_prompt_noise"}
        check_keys("dip", values["dip"], names - {"weights", *field_names(PeftConfig)})
    if values.get("regularizer") is not None:
        _check_regularizer(values["regularizer"])
    if values.get("quantization") is not None:
        check_keys("quantization", values["quantization"], _parameter_names(BitsAndBytesConfig))
    if values.get("evaluation") is not None:
        check_keys("evaluation", values["evaluation"], field_names(EvaluationConfig))


def _peft_config_class(weights: dict) -> type[PeftConfig]:
    known = {peft_type.value for peft_type in PeftType}
    peft_type = weights.get("peft_type")
    if peft_type not in known:
        raise ValueError(f"weights.peft_type is {peft_type!r}, no method of PEFT; {did_you_mean(peft_type, known)}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def _check_regularizer(values) -> None:
    name = values.get("name") if isinstance(values, dict) else values
    if name not in METHODS or not isinstance(values, dict):
        raise ValueError(
            f"regularizer must have a name, such as {{name: sam}}, got {values!r}; {did_you_mean(name, METHODS)}"
        )
    check_keys("regularizer", values, {"name", *field_names(METHODS[name])})


def _watch_config(values) -> WatchConfig:
    check_keys("evaluation.while_training", values, field_names(WatchConfig))
    if "num_problems" not in values:
        raise ValueError("evaluation.while_training lacks num_problems: write for instance {num_problems: 32}.")
    return WatchConfig(**values)


def _parameter_names(function: Callable) -> set[str]:
    parameters = signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind != Parameter.VAR_KEYWORD}


def _require_positive(name: str, value, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer{' or null' if optional else ''}, got {value!r}.")


def _maps_text_to_text(value) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

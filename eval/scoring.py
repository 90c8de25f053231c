"""Scores of a model in memory on the tasks of `eval/tasks/`. The harness does the work; this file only calls it."""

from typing import Any

from datasets import Dataset
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from dipnet_hf.answers import WritingLM
from eval.calibration import calibration, confidences, metric_of
from eval.task_files import GSM8K_COLUMNS, check_data_files, columns_of, resolve_tasks

_CALIBRATION = {"ece": "ece_width", "brier": "brier", "auroc": "auroc", "aurc": "aurc"}  # its figures' names here


def score(
    model,
    tokenizer,
    tasks: dict[str, str],
    limit: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a model greedily, in eval mode, by tasks that read one file; afterwards it is in its own mode again.

    Args:
        model: a transformers or PEFT causal language model.
        tokenizer: its tokenizer.
        tasks (`dict[str, str]`): name of a task under `eval/tasks/` to the JSON file with its problems.
        limit (`int`, *optional*): only the first problems of each file.
        batch_size (`int`): problems generated at once.
        max_new_tokens (`int`): the longest answer.
        apply_chat_template (`bool`): ask in the tokenizer's chat template.
        system_instruction (`str`, *optional*): put it before the question.

    Returns:
        `dict`: by task, the harness's numbers, such as `exact_match,strict-match` and its standard error, and `n`; by
            filter, where right and wrong answers can be told apart, `ece`, `brier`, `auroc` and `aurc`, and the lists
            `correct` and `confidence` of all problems in their order.

    Raises:
        ValueError: there is no such task, it reads a second file, or its file is missing, empty or broken. Raised
            before any generation.
    """
    loaded = _load_tasks(tasks, max_new_tokens)
    was_training = model.training  # the harness puts it in eval mode
    try:
        # Not `simple_evaluate`: it sets all global seeds, and spends seconds on a description of the machine.
        lm = _make_lm(model, tokenizer, apply_chat_template, batch_size)
        evaluated = evaluate(
            lm,
            loaded,
            limit=limit,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction,
        )
        scores = {name: _numbers(evaluated, name) for name in evaluated["results"]}
        for name, task in loaded["tasks"].items():
            scores[name] |= _calibration(lm, task, evaluated["samples"][name])
    finally:
        model.train(was_training)
    return scores


class Prompts:
    """The tokens that the harness would ask a model with; see `score` for the arguments."""

    def __init__(self, model, tokenizer, apply_chat_template: bool = False, system_instruction: str | None = None):
        was_training = model.training
        self._lm = _make_lm(model, tokenizer, apply_chat_template)
        model.train(was_training)
        self._settings = {
            "apply_chat_template": apply_chat_template,
            "system_instruction": system_instruction,
            "chat_template": self._lm.apply_chat_template if apply_chat_template else None,
        }

    def of_tasks(self, tasks: dict[str, str], limit: int) -> dict[str, list[list[int]]]:
        """Ask the first problems of each task, given with its file."""
        loaded = _load_tasks(tasks, max_new_tokens=1)["tasks"]
        for task in loaded.values():
            task.build_all_requests(limit=limit, **self._settings)
        return {
            name: [self._encode(request.args[0]) for request in task.instances if request.idx == 0]  # not every option
            for name, task in loaded.items()
        }

    def of_turns(self, turns: list[dict[str, str]]) -> list[int]:
        """Ask after some turns, in the chat template."""
        return self._encode(self._lm.apply_chat_template(turns))

    def _encode(self, prompt: str) -> list[int]:
        return self._lm.tok_batch_encode([prompt])[0][0].tolist()


class AnswerCheck:
    """Whether an answer is right, as a task over questions and answers scores it.

    Args:
        task (`str`): a task of `eval/tasks/`.
        filter_name (`str`): which of its filters finds what an answer says.

    Raises:
        ValueError: there is no such task or filter, or the task reads or scores something else.
    """

    def __init__(self, task: str, filter_name: str) -> None:
        (spec,) = resolve_tasks([task], {task: {"test": ""}})
        if columns_of(spec) != GSM8K_COLUMNS or spec["output_type"] != "generate_until":
            raise ValueError(
                f"{task} does not compare a written answer with the one of a {' and '.join(GSM8K_COLUMNS)}: take "
                "gsm8k_local or one like it."
            )
        # The task wants a document, and what is checked is given later.
        spec["custom_dataset"] = lambda **_: {"test": Dataset.from_list([dict.fromkeys(GSM8K_COLUMNS, "")])}
        self._task: Any = TaskManager(include_defaults=False).load([spec])["tasks"][task]
        self._metric = metric_of(self._task)
        filters = {pipeline.name: pipeline for pipeline in self._task._filters}
        if filter_name not in filters:
            raise ValueError(f"{task} has no filter {filter_name!r}; it has {', '.join(filters)}.")
        self._filter = filters[filter_name]

    @property
    def stop_strings(self) -> list[str]:
        """What ends an answer."""
        return list(self._task.config.generation_kwargs["until"])

    def __call__(self, answer: str, reference: str) -> bool:
        """Compare an answer with the one of the problem."""
        problem = {"question": "", "answer": reference}
        instance = Instance("generate_until", problem, (), 0, resps=[answer])
        self._filter.apply([instance])
        return bool(self._task.process_results(problem, [instance.filtered_resps[self._filter.name]])[self._metric])


def _load_tasks(tasks: dict[str, str], max_new_tokens: int) -> Any:
    specs = resolve_tasks(tasks, {name: {"test": path} for name, path in tasks.items()})
    check_data_files(specs)
    for spec in specs:
        if "generation_kwargs" in spec:
            spec["generation_kwargs"]["max_gen_toks"] = max_new_tokens
    return TaskManager(include_defaults=False).load(specs)


def _make_lm(model, tokenizer, apply_chat_template: bool, batch_size: int = 1) -> WritingLM:
    # A chat template writes the bos token itself, if there is one.
    add_bos_token = False if apply_chat_template else None
    return WritingLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos_token)


def _numbers(evaluated: dict, name: str) -> dict[str, float]:
    metrics = {metric: value for metric, value in evaluated["results"][name].items() if isinstance(value, float)}
    return {metric: float(value) for metric, value in metrics.items()} | {
        "n": evaluated["n-samples"][name]["effective"]
    }


def _calibration(lm: WritingLM, task: Task, samples: list[dict]) -> dict[str, Any]:
    metric = metric_of(task)
    if metric is None:
        return {}
    for sample, confidence in zip(samples, confidences(lm, task), strict=True):
        sample["confidence"] = confidence
    by_filter = calibration(samples, metric)
    numbers: dict[str, Any] = {
        f"{ours},{name}": figures[theirs]
        for name, figures in by_filter.items()
        for ours, theirs in _CALIBRATION.items()
        if figures.get(theirs) is not None
    }
    for name in by_filter:
        of_filter = sorted((row for row in samples if row["filter"] == name), key=lambda row: row["doc_id"])
        numbers[f"correct,{name}"] = [int(row[metric]) for row in of_filter]
        numbers[f"confidence,{name}"] = [row["confidence"] for row in of_filter]
    return numbers

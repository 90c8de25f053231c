"""Scores of a model in memory on the tasks of `eval/tasks/`. The harness does the work; this file only calls it."""

from lm_eval import evaluate
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from dipnet_hf.answers import WritingLM
from eval.calibration import calibration, confidences, metric_of
from eval.task_files import check_data_files, resolve_tasks


def score(
    model, tokenizer, tasks: dict[str, str], limit: int | None = None, batch_size: int = 64, max_new_tokens: int = 256
) -> dict[str, dict[str, float]]:
    """Score a model greedily, in eval mode, by tasks that read one file; afterwards it is in its own mode again.

    Args:
        model: a transformers or PEFT causal language model.
        tokenizer: its tokenizer.
        tasks (`dict[str, str]`): name of a task under `eval/tasks/` to the JSON file with its problems.
        limit (`int`, *optional*): only the first problems of each file.
        batch_size (`int`): problems generated at once.
        max_new_tokens (`int`): the longest answer.

    Returns:
        `dict`: by task, the harness's numbers, such as `exact_match,strict-match` and its standard error, `ece` by
            filter where it has one, and `n`.

    Raises:
        ValueError: there is no such task, it reads a second file, or its file is missing, empty or broken. Raised
            before any generation.
    """
    specs = resolve_tasks(tasks, {name: {"test": path} for name, path in tasks.items()})
    check_data_files(specs)
    for spec in specs:
        if "generation_kwargs" in spec:
            spec["generation_kwargs"]["max_gen_toks"] = max_new_tokens
    loaded = TaskManager(include_defaults=False).load(specs)
    was_training = model.training  # the harness puts it in eval mode
    try:
        # Not `simple_evaluate`: it sets all global seeds, and spends seconds on a description of the machine.
        lm = WritingLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        evaluated = evaluate(lm, loaded, limit=limit, log_samples=True)
        scores = {name: _numbers(evaluated, name) for name in evaluated["results"]}
        for name, task in loaded["tasks"].items():
            scores[name] |= _calibration_errors(lm, task, evaluated["samples"][name])
    finally:
        model.train(was_training)
    return scores


def _numbers(evaluated: dict, name: str) -> dict[str, float]:
    metrics = {metric: value for metric, value in evaluated["results"][name].items() if isinstance(value, float)}
    return {metric: float(value) for metric, value in metrics.items()} | {
        "n": evaluated["n-samples"][name]["effective"]
    }


def _calibration_errors(lm: WritingLM, task: Task, samples: list[dict]) -> dict[str, float]:
    metric = metric_of(task)
    if metric is None:
        return {}
    for sample, confidence in zip(samples, confidences(lm, task), strict=True):
        sample["confidence"] = confidence
    errors = {f"ece,{name}": figures["ece_width"] for name, figures in calibration(samples, metric).items()}
    return {name: error for name, error in errors.items() if error is not None}

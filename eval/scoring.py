"""Scores of a model in memory on the tasks of `eval/tasks/`. The harness does the work; this file only calls it."""

from pathlib import Path

from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from recipes.data import read_problems

TASKS = Path(__file__).parent / "tasks"


def score(
    model, tokenizer, tasks: dict[str, str], limit: int | None = None, batch_size: int = 64, max_new_tokens: int = 256
) -> dict[str, dict[str, float]]:
    """Score a model greedily, zero-shot, in eval mode; afterwards it is in its own mode again.

    Args:
        model: a transformers or PEFT causal language model.
        tokenizer: its tokenizer.
        tasks (`dict[str, str]`): name of a task under `eval/tasks/` to the JSON Lines file with its problems.
        limit (`int`, *optional*): only the first problems of each file.
        batch_size (`int`): problems generated at once.
        max_new_tokens (`int`): the longest answer.

    Returns:
        `dict`: by task, the harness's numbers, such as `exact_match,strict-match` and its standard error, and `n`.

    Raises:
        ValueError: there is no such task, or its file is missing, empty or broken. Raised before any generation.
    """
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(f"No task called {', '.join(unknown)}; eval/tasks/ has {', '.join(manager.all_tasks)}.")
    for path in tasks.values():
        read_problems(path)
    configs = [manager.task_index[name].cfg for name in tasks]
    # Whole configurations: lm-eval 0.4.13 does not look up the YAML of a name that is given with overrides.
    specs = [
        {
            **config,
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": max_new_tokens},
            "num_fewshot": 0,
        }
        for config, path in zip(configs, tasks.values(), strict=True)
    ]
    was_training = model.training  # HFLM puts it in eval mode
    try:
        # Not `simple_evaluate`: it sets all global seeds, and spends seconds on a description of the machine.
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        evaluated = evaluate(lm, manager.load(specs), limit=limit, log_samples=False)
    finally:
        model.train(was_training)
    sizes = {name: counts["effective"] for name, counts in evaluated["n-samples"].items()}
    return {
        name: {metric: float(value) for metric, value in numbers.items() if isinstance(value, float)}
        | {"n": sizes[name]}
        for name, numbers in evaluated["results"].items()
    }

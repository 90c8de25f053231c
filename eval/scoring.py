"""Scores of a model in memory on the tasks of `eval/tasks/`. The harness does the work; this file only calls it."""

from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from recipes.data import read_problems

TASKS = Path(__file__).parent / "tasks"


def score(
    model, tokenizer, tasks: dict[str, str], limit: int | None = None, batch_size: int = 64, max_new_tokens: int = 256
) -> dict[str, dict[str, float]]:
    """Score a model greedily, zero-shot, with its noise off; its mode and the random states stay as they were.

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
    was_training = model.training  # HFLM puts it in eval mode
    try:
        evaluated = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            # lm-eval 0.4.13 does not look up the YAML of a name given with overrides: hand over the whole of it.
            tasks=[
                {**manager.task_index[name].cfg, "dataset_kwargs": {"data_files": {"test": str(path)}}}
                for name, path in tasks.items()
            ],
            task_manager=manager,
            limit=limit,
            gen_kwargs={"max_gen_toks": max_new_tokens},
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    finally:
        model.train(was_training)
    sizes = {name: counts["effective"] for name, counts in evaluated["n-samples"].items()}
    return {
        name: {metric: float(value) for metric, value in numbers.items() if isinstance(value, float)}
        | {"n": sizes[name]}
        for name, numbers in evaluated["results"].items()
    }

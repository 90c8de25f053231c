"""Scores of a model in memory on the tasks of `eval/tasks/`. The harness does the work; this file only calls it.

The problems are JSON Lines files whose paths the caller gives, checked beforehand with `recipes.data.read_problems`.
"""

from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"


def score(
    model, tokenizer, tasks: dict[str, str], limit: int | None = None, batch_size: int = 64, max_new_tokens: int = 256
) -> dict[str, dict[str, float]]:
    """Score a model greedily, zero-shot.

    Args:
        model: a transformers or PEFT causal language model, in the mode it is to be scored in.
        tokenizer: its tokenizer.
        tasks (`dict[str, str]`): name of a task under `eval/tasks/` to the JSON Lines file with its problems.
        limit (`int`, *optional*): only the first problems of each file.
        batch_size (`int`): problems generated at once.
        max_new_tokens (`int`): the longest answer.

    Returns:
        `dict`: by task, the harness's numbers, such as `exact_match,strict-match` and its standard error, and `n`.

    Raises:
        ValueError: there is no such task.
    """
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(f"No task called {', '.join(unknown)}; eval/tasks/ has {', '.join(manager.all_tasks)}.")
    evaluated = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[
            {**manager.task_index[name].cfg, "dataset_kwargs": {"data_files": {"test": str(path)}}}
            for name, path in tasks.items()
        ],
        task_manager=manager,
        limit=limit,
        gen_kwargs={"max_gen_toks": max_new_tokens},
        bootstrap_iters=0,  # the standard error of a mean needs no bootstrap
        log_samples=False,
    )
    sizes = {name: counts["effective"] for name, counts in evaluated["n-samples"].items()}
    return {
        name: {metric: value for metric, value in numbers.items() if isinstance(value, (int, float))}
        | {"n": sizes[name]}
        for name, numbers in evaluated["results"].items()
    }

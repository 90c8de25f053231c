"""Scores of a model in memory on this project's lm-eval tasks; the harness does all the work, this file only calls it.

The tasks are the YAML files under `eval/tasks/`; the problems are JSON Lines files whose paths the caller gives.
"""

from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"


def score(model, tokenizer, tasks, limit=None, batch_size=128, max_new_tokens=256):
    tm = TaskManager(include_path=TASKS, include_defaults=False)
    specs = [{**tm.task_index[n].cfg, "dataset_kwargs": {"data_files": {"test": str(p)}}} for n, p in tasks.items()]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    r = simple_evaluate(lm, tasks=specs, task_manager=tm, limit=limit, gen_kwargs={"max_gen_toks": max_new_tokens}, random_seed=None, numpy_random_seed=None, torch_random_seed=None, log_samples=False)
    return r

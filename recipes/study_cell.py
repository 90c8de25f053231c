"""One cell of a study: fine-tune, distil where the study does, and put what both say into one small file."""

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer

from recipes import distill, finetune
from recipes.config import FinetuneConfig, dump_config
from recipes.data import make_collator, prepare_data
from recipes.evaluation import TOKENS_FILE, TokenMetrics, evaluate, save_tokens, score_tasks
from recipes.running import load_plain_run, load_tokenizer, write_results
from recipes.study_config import Cell
from recipes.study_smoothness import SETTINGS, measure_smoothness
from report.output_folder import write_whole
from report.study_rows import ONE_PASS

DISTILLED = "distilled"


def run_cell(cell: Cell) -> None:
    """Run a cell in its folder, from where it was interrupted; at the end it has a result file and no weights.

    Beside that is `tokens.safetensors`: by way of answering the figures of every held-out token, of shape `(N, 3)`
    (`recipes.evaluation.figures_of`), problem after problem.
    """
    begin, config, is_resumed = time.monotonic(), cell.config(), cell.run_folder.is_dir()
    if not (cell.run_folder / "results.json").is_file():
        finetune.main([_written(cell.folder / "config.yaml", dump_config(config))])
    run = _read(cell.run_folder)
    answers = {ONE_PASS: _answer(run["metrics"], run["scores"])}
    if config.evaluation.num_samples is not None:
        answers[f"mean of {config.evaluation.num_samples}"] = _answer(run["ensemble_metrics"], run["ensemble_scores"])
    tokens = load_file(cell.run_folder / TOKENS_FILE)
    result = {
        "answers": answers,
        "validation": _validation(run["log_history"]),
        "num_steps": run["metrics"]["num_steps"],
        "seconds": {"training": _train_seconds(run)},
        "noise": run["noise"] and [_noise(row, run["metrics"]["init_noise_std"]) for row in run["noise"]],
        "provenance": run["provenance"],
    }
    if cell.is_distilled:
        if not (cell.student_folder / "results.json").is_file():
            distill.main([_written(cell.folder / "distill.yaml", dump_config(cell.distill_config()))])
        result["seconds"]["distillation"] = _train_seconds(_read(cell.student_folder))
        result["distillation"] = asdict(cell.distill_config())
        answers[DISTILLED], tokens[DISTILLED] = _score_student(cell.student_folder, config)
    if cell.num_smoothness_problems is not None:
        result["smoothness"] = {"num_problems": cell.num_smoothness_problems, **SETTINGS}
        for answer, folder in ((ONE_PASS, cell.run_folder), (DISTILLED, cell.student_folder)):
            if answer in answers and math.isfinite(answers[answer]["nll"]):  # else it diverged
                answers[answer]["smoothness"] = measure_smoothness(str(folder), cell.num_smoothness_problems)
    result["seconds"]["cell"] = time.monotonic() - begin
    if is_resumed:  # what went before is not known
        result["seconds"] = dict.fromkeys(result["seconds"])
    save_tokens(cell.folder / TOKENS_FILE.name, tokens)
    write_results(cell.result_file, result)
    shutil.rmtree(cell.run_folder)
    shutil.rmtree(cell.student_folder, ignore_errors=True)


def _written(path: Path, text: str) -> str:
    write_whole(path, text)
    return str(path)


def _read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _train_seconds(run: dict) -> float | None:
    """The time of the training; None if it had ended before this process began."""
    return next((entry["train_runtime"] for entry in run["log_history"] if "train_runtime" in entry), None)


def _validation(log_history: list[dict]) -> list[dict[str, float]]:
    """The evaluations on the way: not those after the training, which are of other problems and answers.

    Where the training had ended before this process began, they are told by their step, which is the last one's.
    """
    by_step: dict[int, float] = {}
    for entry in log_history:
        if "train_runtime" in entry:
            break
        if "eval_nll" in entry:
            by_step.setdefault(entry["step"], entry["eval_nll"])
    return [{"step": step, "nll": nll} for step, nll in by_step.items()]


def _noise(row: dict, init_std: float) -> dict[str, Any]:
    return {"name": row["name"], "init_std": init_std, "std": row["mean"]}


def _answer(metrics: dict, scores: dict[str, dict]) -> dict[str, Any]:
    """Sort what a run says of one way of answering into figures, scores by task, and figures by problem."""
    figures = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    problems: dict[str, Any] = {name: metrics[f"problem_{name}"] for name in ("nll", "num_tokens")}
    by_task = {}
    for task, numbers in scores.items():
        by_task[task] = {
            name.removeprefix("eval_"): value for name, value in numbers.items() if not isinstance(value, list)
        }
        for name, value in numbers.items():
            kind, comma, filter_name = name.partition(",")
            if comma and isinstance(value, list):
                problems.setdefault(task, {}).setdefault(filter_name, {})[kind] = value
    return {**figures, "scores": by_task, "problems": problems}


def _score_student(folder: Path, config: FinetuneConfig) -> tuple[dict, torch.Tensor]:
    """Score a distilled network on what its teacher's run was scored on; also return its tokens' figures."""
    tokenizer = load_tokenizer(config)
    data = prepare_data(config, tokenizer)
    task_sets = finetune.prepare_tasks(config, tokenizer, data.chat)
    student = load_plain_run(str(folder), config)
    metrics = TokenMetrics()
    trainer = Trainer(
        student,
        config.training_arguments(),
        data_collator=make_collator(tokenizer),
        eval_dataset=data.heldout,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=metrics.reduce,
        compute_metrics=metrics,
    )
    evaluated = evaluate(trainer, data.heldout)
    tokens = torch.cat(metrics.problems)
    scores = score_tasks(trainer, tokenizer, config, data.chat, evaluated, task_sets)
    return _answer(evaluated, scores), tokens

"""Scores of a trained model on held-out problems: token by token after the true answer's, and by its own answers.

Shape legend: B batch, L sequence, V vocabulary, N supervised tokens.
"""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import EvalPrediction, Trainer

from dipnet_hf.uncertainty import brier_score, expected_calibration_error
from eval.scoring import score
from recipes.chat import IGNORED_LABEL
from recipes.config import FinetuneConfig
from recipes.tokens import Chat

Problems = list[torch.Tensor]  # of each problem the figures of its supervised tokens, `(N, 3)`

TOKENS_FILE = Path("data", "tokens.safetensors")  # not beside the weights, which some programs take by their ending
_DIGITS = 6  # of the figures of one problem


def figures_of(log_probs_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Say of each token the target's log-probability, the largest probability, and whether the target had it.

    Returns:
        `torch.Tensor` of shape `(N, 3)`, float32.
    """
    largest, predicted = log_probs_NV.max(dim=-1)
    of_target = log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    return torch.stack([of_target, largest.exp(), (predicted == targets_N).float()], dim=1)


def summarize_tokens(problems: Problems) -> dict[str, float]:
    """Average over the tokens of some problems: NLL in nats; accuracy, ECE and Brier score of the likeliest token.

    NLL, ECE and Brier score are NaN where a token's figures are, as of a model that diverged.
    """
    log_probs, confidence, correct = torch.cat(problems).double().unbind(1)
    has_diverged = confidence.isnan().any()
    return {
        "nll": -log_probs.mean().item(),
        "num_tokens": len(log_probs),
        "token_accuracy": correct.mean().item(),
        "token_ece": math.nan if has_diverged else expected_calibration_error(confidence, correct),
        "token_brier": math.nan if has_diverged else brier_score(confidence, correct),
    }


class TokenMetrics:
    """What a Trainer computes at every evaluation: `preprocess_logits_for_metrics` and `compute_metrics`."""

    problems: Problems  # of the last evaluation

    @staticmethod
    def reduce(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """Reduce a batch's logits to `figures_of`, -100 where there is no label: of shape `(B, L - 1, 3)`.

        A row at a time, as float32 logits of a batch are large.
        """
        figures = logits_BLV.new_full((*labels_BL[:, 1:].shape, 3), IGNORED_LABEL, dtype=torch.float32)
        for row, logits_LV, labels_L in zip(figures, logits_BLV, labels_BL[:, 1:], strict=True):
            is_target = labels_L != IGNORED_LABEL
            row[is_target] = figures_of(logits_LV[:-1][is_target].float().log_softmax(-1), labels_L[is_target])
        return figures

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Average over all supervised tokens of the held-out set; `eval_loss` is a mean of batch means instead."""
        rows = torch.as_tensor(prediction.predictions)
        self.problems = [row[row[:, 1] != IGNORED_LABEL] for row in rows]
        return summarize_tokens(self.problems)


def evaluate(trainer: Trainer, heldout: Dataset | None, name: str = "eval", num_samples: int = 1) -> dict[str, Any]:
    """Measure the tokens of a held-out set in its order, in eval mode; without one there is nothing to measure.

    In an ensemble a problem is `num_samples` rows of the model, so a batch has so many times fewer problems.

    Returns:
        `dict`: the figures of `summarize_tokens`, as `eval_nll`; by problem `problem_nll`, the sum over its tokens,
            and `problem_num_tokens`.
    """
    if heldout is None:
        return {}
    metrics: Any = trainer.compute_metrics
    args = trainer.args
    batch_size, strategy = args.per_device_eval_batch_size, args.train_sampling_strategy
    args.per_device_eval_batch_size = max(1, batch_size // num_samples)
    args.train_sampling_strategy = "sequential"  # by length, evaluation too would take another order with every seed
    vars(trainer).pop("_eval_dataloaders", None)  # kept with `dataloader_persistent_workers`, for another batch size
    trainer.evaluate(heldout, metric_key_prefix=name)
    args.per_device_eval_batch_size, args.train_sampling_strategy = batch_size, strategy
    return {
        **{f"eval_{figure}": value for figure, value in summarize_tokens(metrics.problems).items()},
        "problem_nll": [round(-problem[:, 0].double().sum().item(), _DIGITS) for problem in metrics.problems],
        "problem_num_tokens": [len(problem) for problem in metrics.problems],
    }


def score_tasks(
    trainer: Trainer,
    tokenizer,
    config: FinetuneConfig,
    chat: Chat | None,
    evaluated: dict,
    task_sets: dict[str, Dataset],
    num_samples: int = 1,
) -> dict[str, dict]:
    """Score the model on the problems of each task: by the tokens of the answers, and by generation.

    Args:
        chat (`Chat`, *optional*): ask in the chat template.
        evaluated (`dict`): the figures of the dataset's `test` split, for the tasks that read it.
        task_sets (`dict[str, Dataset]`): the tokenized problems of the other tasks.
        num_samples (`int`): rows per prompt, in an ensemble.

    Returns:
        `dict`: by task, what `evaluate` and `eval.scoring.score` say; only the main process generates.
    """
    evaluation = config.evaluation
    scores = {
        name: evaluate(trainer, task_sets[name], name, num_samples) if name in task_sets else evaluated
        for name in evaluation.tasks
    }
    if not evaluation.tasks or not trainer.is_world_process_zero():
        return scores
    heldout = str(Path(config.training["output_dir"]) / "data" / "test.jsonl")
    model: Any = trainer.model
    generated = score(
        model.eval(),
        tokenizer,
        {name: path or heldout for name, path in evaluation.tasks.items()},
        limit=evaluation.limit,
        batch_size=max(1, evaluation.batch_size // num_samples),
        max_new_tokens=evaluation.max_new_tokens,
        apply_chat_template=chat is not None,
        system_instruction=None if chat is None else chat.system_prompt,
    )
    return {name: {**scores[name], **generated[name]} for name in scores}


def save_tokens(path: Path, by_answer: dict[str, torch.Tensor]) -> None:
    """Write the figures of every held-out token, `(N, 3)`, problem after problem, for each way of answering."""
    beside = path.with_name(f"{path.name}.partial")
    save_file({answer: figures.contiguous() for answer, figures in by_answer.items()}, beside)
    beside.replace(path)

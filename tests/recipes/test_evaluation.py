"""Figures of held-out tokens: whose they are, and of a model that diverged."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from recipes.data import make_collator
from recipes.evaluation import TokenMetrics, evaluate
from tests.helpers import word_tokenizer
from tests.tiny_models import build


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_problems_keep_their_order_however_training_takes_its_rows(tmp_path, strategy, num_samples):
    lengths = [2, 6, 3, 7, 4, 5]
    rows = Dataset.from_list(
        [{"input_ids": list(range(3, 4 + n)), "labels": [-100, *range(4, 4 + n)]} for n in lengths]
    )
    tokenizer, metrics = word_tokenizer(), TokenMetrics()
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=4, train_sampling_strategy=strategy
    )
    trainer = Trainer(
        build("llama"),
        arguments,
        data_collator=make_collator(tokenizer),
        processing_class=tokenizer,
        preprocess_logits_for_metrics=metrics.reduce,
        compute_metrics=metrics,
    )
    assert evaluate(trainer, rows, num_samples=num_samples)["problem_num_tokens"] == lengths
    assert [len(problem) for problem in metrics.problems] == lengths
    assert (arguments.per_device_eval_batch_size, arguments.train_sampling_strategy) == (4, strategy)


@pytest.mark.parametrize("num_diverged", [1, 2])
def test_a_model_that_diverged_on_some_problems_has_no_figures_of_the_others(num_diverged):
    logits, labels = torch.zeros(2, 4, 8), torch.tensor([[-100, 1, 2, -100], [-100, 3, 4, 5]])
    logits[:num_diverged] = math.nan
    metrics = TokenMetrics()
    found = metrics(EvalPrediction(metrics.reduce(logits, labels).numpy(), labels.numpy()))
    assert [len(problem) for problem in metrics.problems] == [2, 3] and found["num_tokens"] == 5
    assert all(math.isnan(found[name]) for name in ("nll", "token_ece", "token_brier"))

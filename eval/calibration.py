"""How far a model's confidence in an answer tells whether it is right: figures by task and filter.

A confidence is the probability of the chosen option (multiple choice), the share of the votes for the answer (several
answers a problem), or the geometric mean probability of the answer's tokens under the network that wrote it.
"""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from lm_eval.api.filter import Filter, FilterEnsemble
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_filter
from lm_eval.api.task import Task
from lm_eval.filters.selection import MajorityVoteFilter

from dipnet_hf.answers import Answer, WritingLM
from dipnet_hf.uncertainty import (
    answer_confidence,
    area_under_risk_coverage,
    auroc,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)

NOT_FOUND = "[invalid]"  # what the harness' regex filters give where nothing matches
FIGURES = ("n", "accuracy", "mean_confidence", "ece_width", "ece_mass", "brier", "nll", "auroc", "aurc")


@register_filter("majority_vote_of_found")
class MajorityVoteOfFound(Filter):
    """The most frequent answer; of equally frequent ones the first.

    The harness' `majority_vote` counts `[invalid]`, what a regex gives where it finds no answer, as one more answer.
    Here it wins only alone.

    Args:
        num_votes (`int`): further repeats, by which the harness pads the shares of several processes, do not vote.
    """

    def __init__(self, num_votes: int) -> None:
        self.num_votes = num_votes

    def apply(self, resps, docs):
        return [[self._select(self.ballots(answers))] for answers in resps]

    def ballots(self, answers):
        """The answers that vote, None where none was found."""
        return [None if answer == NOT_FOUND else str(answer) for answer in answers[: self.num_votes]]

    def _select(self, ballots):
        found = [ballot for ballot in ballots if ballot is not None]
        return Counter(found).most_common(1)[0][0] if found else NOT_FOUND


def metric_of(task: Task) -> str | None:
    """Say which of a task's metrics tells that an answer is right, if any does."""
    candidates = {"multiple_choice": ("acc",), "generate_until": ("exact_match", "acc")}.get(task.OUTPUT_TYPE, ())
    return next((name for name in candidates if name in task.higher_is_better()), None)


def confidences(lm: WritingLM, task: Task) -> list[float | None]:
    """Compute this process's confidences after an evaluation, filter by filter, as the harness orders its samples.

    None is that of an answer whose log-likelihoods are not a number, as of a model that overflows.
    """
    by_doc: dict[int, list[Instance]] = defaultdict(list)
    for instance in task.instances:
        by_doc[instance.doc_id].append(instance)
    if task.OUTPUT_TYPE == "multiple_choice":
        return [_confidence_of_choice(instances, task) for instances in by_doc.values()] * len(task._filters)
    instances = [instances[0] for instances in by_doc.values()]
    votes = {pipeline.name: _votes(pipeline, instances) for pipeline in task._filters}
    answers = [instance.resps[0] for instance in instances]
    single = confidences_of_text(lm, answers) if None in votes.values() else []
    return [value for shares in votes.values() for value in (single if shares is None else shares)]


def calibration(samples: list[dict], metric: str) -> dict[str, dict]:
    """Compute the figures of one task, by filter.

    Args:
        samples (`list[dict]`): the harness' samples, each with its `confidence`.
        metric (`str`): which of their entries is 1 for a right answer and 0 for a wrong one. A filter under which it
            takes other values is left out.

    Returns:
        `dict`: by filter, `FIGURES`. `auroc` is None if all answers are right, or all wrong; so are all figures of
            the confidences if one of them is.
    """
    by_filter: dict[str, list[dict]] = defaultdict(list)
    for sample in samples:
        by_filter[sample["filter"]].append(sample)
    return {
        name: _figures([row["confidence"] for row in rows], [float(row[metric]) for row in rows])
        for name, rows in by_filter.items()
        if all(row.get(metric) in (0, 1) for row in rows)
    }


def _figures(confidences: list[float | None], correct: list[float]) -> dict[str, float | None]:
    num = len(correct)
    confidence = [value for value in confidences if value is not None]
    if len(confidence) < num:
        warnings.warn(
            f"The log-likelihoods of {num - len(confidence)} of {num} answers are not a number, so there are no "
            "figures of calibration. float16 overflows where bfloat16 does not.",
            stacklevel=3,
        )
        return {**dict.fromkeys(FIGURES), "n": num, "accuracy": sum(correct) / num}
    values = (
        num,
        sum(correct) / num,
        sum(confidence) / num,
        expected_calibration_error(confidence, correct, binning="width"),
        expected_calibration_error(confidence, correct, binning="mass"),
        brier_score(confidence, correct),
        negative_log_likelihood(confidence, correct),
        auroc(confidence, correct) if 0 < sum(correct) < num else None,
        area_under_risk_coverage(confidence, correct),
    )
    return dict(zip(FIGURES, values, strict=True))


def _confidence_of_choice(instances: Sequence[Instance], task: Task) -> float | None:
    """Normalize the options' likelihoods; those that follow, for `acc_mutual_info`, are of no context."""
    num_choices = len(task.doc_to_choice(instances[0].doc))
    ordered = sorted(instances, key=lambda instance: instance.idx)[:num_choices]
    log_likelihoods = torch.tensor([instance.resps[0][0] for instance in ordered], dtype=torch.float64)
    confidence = log_likelihoods.softmax(0).max().item()
    return None if math.isnan(confidence) else confidence


def _votes(pipeline: FilterEnsemble, instances: list[Instance]) -> list[float] | None:
    """Count the answers that a pipeline votes on; None if it does not vote."""
    answers, docs = [instance.resps for instance in instances], [instance.doc for instance in instances]
    for make_filter in pipeline.filters:
        step = make_filter()
        if isinstance(step, MajorityVoteOfFound):
            voting = [list(texts)[: step.num_votes] for texts in answers]
            return [
                answer_confidence([None if text == NOT_FOUND else str(text) for text in texts]) for texts in voting
            ]
        if isinstance(step, MajorityVoteFilter):
            return [answer_confidence([str(text) for text in texts]) for texts in answers]
        answers = step.apply(answers, docs)
    return None


def confidences_of_text(lm: WritingLM, answers: Sequence[Answer]) -> list[float | None]:
    """Score written answers by the tokens in which they were written; 0 for one that is empty."""
    # Something is scored in place of an empty answer, as the harness' processes wait for each other in every call.
    scored = [answer or Answer("?", [lm.prefix_token_id], [lm.prefix_token_id]) for answer in answers]
    scores = lm.answer_log_likelihoods(scored)
    return [_confidence_of_text(*pair) if pair[0] else 0.0 for pair in zip(answers, scores, strict=True)]


def _confidence_of_text(answer: Answer, log_likelihood: float) -> float | None:
    return None if math.isnan(log_likelihood) else answer_confidence([log_likelihood / len(answer.tokens)])

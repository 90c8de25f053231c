"""Eqs. (2) and (4) of one batch in one forward pass, without whole logits where the output head is a plain one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .batches import supervised
from .chunked_loss import OutputHead, chunked_loss
from .hidden_states import HiddenStateCapture
from .objective import Terms, data_terms_of_logits


class Predictions(NamedTuple):
    """What a forward pass predicts: hidden states, and the head that makes logits of them; or the logits."""

    states: Any  # of shape (rows, L, D); where `head` is None logits of shape (rows, L, V), or (rows, V) for classes
    head: OutputHead | None
    outputs: Any  # the model's own; they hold logits of no token where there is a head

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits of some of the states."""
        return states if self.head is None else self.head.logits(states)


def run(
    model: Callable[..., Any], inputs: dict[str, Any], shift: bool, capture: HiddenStateCapture, shape: torch.Size
) -> Predictions:
    """Run a model once.

    Args:
        model (`Callable`): a network, also wrapped.
        inputs (`dict`): its inputs.
        shift (`bool`): it is a causal language model, whose labels are shifted.
        capture (`HiddenStateCapture`): of the network.
        shape (`torch.Size`): that of the labels.
    """
    if not shift:
        outputs = model(**inputs)
        return Predictions(getattr(outputs, "logits", None), None, outputs)
    # Given labels, the model would compute a loss of its own from whole logits. Given a cache, transformers does not
    # look for several sequences in a row.
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if inputs.get("position_ids") is not None:
        inputs["use_cache"] = False
    with capture.capturing(shape):
        outputs = model(**inputs)
        captured = capture.pop()
    states, head = (getattr(outputs, "logits", None), None) if captured is None else captured
    return Predictions(states, head, outputs)


def data_terms(
    model: Callable[..., Any],
    inputs: dict[str, Any],
    shift: bool,
    capture: HiddenStateCapture,
    num_samples: int = 1,
    stability_weight: float = 0.0,
    stability_target: str = "log_prob",
) -> tuple[Terms, Any]:
    """Compute the data and the stability term in one forward pass.

    Args:
        model, inputs, shift, capture: see `run`; `inputs` hold `labels`, and S copies of every row, sample by sample.
        num_samples (`int`): S.
        stability_weight, stability_target: see `data_terms_of_logits`.

    Returns:
        `tuple`: the terms and the model's outputs.
    """
    labels = inputs["labels"]
    states, head, outputs = run(model, inputs, shift, capture, labels.shape)
    states_RD, targets_R = supervised(states, labels.to(states.device), shift)
    if head is None:
        return data_terms_of_logits(states_RD, targets_R, num_samples, stability_weight, stability_target), outputs
    terms = chunked_loss(states_RD, targets_R, head, num_samples, stability_weight, stability_target)
    # The logits of no token tie the loss to the outputs, from whose gradient DDP starts with a static graph.
    return terms._replace(total=terms.total + outputs.logits.sum().to(terms.total)), outputs

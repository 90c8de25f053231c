"""The `dip` model of lm-evaluation-harness: a network with its noise off, or k noisy samples of it.

Importing this file registers it with the harness.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from .answers import Answer, WritingLM
from .ensemble import AVERAGES
from .model import DipModel
from .noise import fold_in
from .regularizers.samples import SampledRegularizer
from .regularizers.saved import attach_saved, saved_method
from .responses import Responses
from .sampled_rows import is_integer

VOTE = "vote"
logger = logging.getLogger(__name__)


@register_model("dip")
class DipLM(WritingLM):
    """The harness' `hf` model, which answers by the mean of k noisy samples or by their vote.

    With `average="vote"` every sample writes an answer of its own, for self-consistency (arXiv 2203.11171): a task
    repeats its requests k times, and the j-th repeat is answered by sample j. Log-likelihoods have nothing to vote
    on; there a vote is the mean probability.

    Args:
        pretrained (`str` or model): the base model's folder or Hub id, or a model in memory, such as a `PeftModel`.
        num_samples (`int`, *optional*): k. Without it the noise is off, and every score is that of `hf`. A run with a
            regularizer that has samples, such as `blob`, has no other noise.
        average (`str`): `"prob"` or `"logit"`, as in `model.ensemble`, or `"vote"`.
        seed (`int`): which k samples.
        responses (`Responses`, *optional*): keeps finished responses, and hands them out again.
        peft (`str`, *optional*): the adapter's folder or Hub id.
        **kwargs: what `hf` takes: `revision`, `tokenizer`, `batch_size`, `dtype`, `max_length`, ...

    Raises:
        ValueError: an argument out of range, a folder that does not hold what it should, or `num_samples` without a
            DIP adapter; before anything is loaded. An adapter of a base model of another shape; after it is loaded.
            While answering: an empty prompt, more tokens to generate than the context holds, or a vote over another
            number of repeats than k.
    """

    _model: Any

    def __init__(
        self,
        pretrained: str | PreTrainedModel | PeftModel,
        *,
        num_samples: int | None = None,
        average: str = "prob",
        seed: int = 0,
        responses: Responses | None = None,
        peft: str | None = None,
        **kwargs,
    ) -> None:
        check_mode(num_samples, average, seed)
        run, revision = peft or pretrained, kwargs.get("revision", "main")
        has_samples = isinstance(run, str) and isinstance(saved_method(run, revision), SampledRegularizer)
        if isinstance(pretrained, str):
            _check_base(pretrained)
            adapter = None if peft is None else _read_adapter(peft, revision)
            has_noise = adapter is not None and adapter.peft_type == "DIP"
            self._all_weights = getattr(adapter, "weights", None) == "full"
        else:
            has_noise = isinstance(getattr(pretrained, "base_model", None), DipModel)
        if num_samples is not None and not (has_noise or has_samples):
            raise ValueError(
                f"num_samples={num_samples} draws the noise of a DIP adapter, and {peft or 'this model'} has none. "
                "Give a DIP adapter as peft=<folder>, or leave num_samples out."
            )
        super().__init__(pretrained, peft=peft, **kwargs)
        method = attach_saved(self._model, run, revision) if isinstance(run, str) else None
        self._sampler: Any = self._model if has_noise else method
        if hasattr(self, "accelerator"):  # on CPUs HFLM would have every process answer everything
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.num_samples = num_samples
        self.average = average
        self.seed = seed
        self.has_noise = has_noise
        self.responses = responses
        if responses is not None:
            self.set_cache_hook(responses)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations, under the mean of k samples if there are any."""
        answer = partial(super().loglikelihood, disable_tqdm=disable_tqdm)
        with self._network():
            return self._finish("loglikelihood", requests, answer)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, under the mean of k samples if there are any."""
        answer = partial(super().loglikelihood_rolling, disable_tqdm=disable_tqdm)
        with self._network():
            return self._finish("loglikelihood_rolling", requests, answer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write answers; in a vote the j-th repeat of each request by sample j."""
        self._check_generation(requests)
        answer = partial(super().generate_until, disable_tqdm=disable_tqdm)
        if self.num_samples is not None and self.average == VOTE:
            return self._vote(requests, self.num_samples, answer)
        with self._network():
            return self._finish("generate_until", requests, answer)

    def answer_log_likelihoods(self, answers: Sequence[Answer]) -> list[float]:
        """As `WritingLM` does, under the network that wrote them."""
        scores: dict[int, float] = {}
        for sample in sorted({answer.sample for answer in answers}, key=str):
            chosen = [number for number, answer in enumerate(answers) if answer.sample == sample]
            with self._network() if sample is None else self._sample(sample):
                values = super().answer_log_likelihoods([answers[number] for number in chosen])
            scores.update(zip(chosen, values, strict=True))
        return [scores[number] for number in range(len(answers))]

    def _create_model(self, pretrained: str, peft: str | None = None, revision: str = "main", **kwargs) -> None:
        """Load the model. HFLM cuts a vocabulary that is padded for speed, and then all weights of it do not fit.

        HFLM hands `load_in_4bit` and the like to `from_pretrained`, which takes them no more since transformers 5.
        """
        fields = kwargs.keys() & signature(BitsAndBytesConfig).parameters
        if quantization := {name: kwargs.pop(name) for name in fields}:
            kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)
        if peft is None or not self._all_weights:
            super()._create_model(pretrained, peft=peft, revision=revision, **kwargs)
            for module in self._model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    # bitsandbytes 0.50: some CPUs answer by a kernel in bfloat16, whatever the compute dtype, which
                    # fails on matrices of some sizes.
                    module.support_avx512bf16_for_cpu = False
            return
        super()._create_model(pretrained, revision=revision, **kwargs)
        num_embeddings = self._model.get_input_embeddings().num_embeddings
        if len(self.tokenizer) > num_embeddings:
            self._model.resize_token_embeddings(len(self.tokenizer))
        self._model = PeftModel.from_pretrained(self._model, peft, revision=revision)

    def _network(self) -> AbstractContextManager[None]:
        """The network that answers: the mean of k samples, or the one without noise."""
        if self.num_samples is not None:
            average = "prob" if self.average == VOTE else self.average
            return self._sampler.ensemble(self.num_samples, average, self.seed)
        return self.model.deterministic() if self.has_noise else nullcontext()

    def _sample(self, sample: int) -> AbstractContextManager[None]:
        """One sample of a vote."""
        return self._sampler.ensemble(1, seed=int(fold_in(torch.tensor(self.seed), sample)))

    def _vote(self, requests: list[Instance], num_samples: int, answer: Callable) -> list[str]:
        # Processes of unequal share pad it by further repeats of a request, so a repeat's number wraps around.
        num_seen: dict[int, int] = defaultdict(int)
        indices: list[list[int]] = [[] for _ in range(num_samples)]
        for index, request in enumerate(requests):
            indices[num_seen[id(request)] % num_samples].append(index)
            num_seen[id(request)] += 1
        answers: dict[int, str] = {}
        for sample, chosen in enumerate(indices):
            with self._sample(sample):
                texts = self._finish("generate_until", [requests[index] for index in chosen], answer, sample)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = Answer(text, text.prompt, text.tokens, sample)
        return [answers[index] for index in range(len(requests))]

    def _finish(self, kind: str, requests: list[Instance], answer: Callable, sample: int | None = None) -> list:
        """Answer the requests that no earlier run has finished."""
        if self.responses is None:
            return answer(requests)
        self.responses.sample = sample
        finished = [self.responses.take(kind, request.args) for request in requests]
        if kind == "generate_until":  # an earlier version kept texts without their tokens: they are written anew
            finished = [answer if isinstance(answer, Answer) else None for answer in finished]
        remaining = [request for request, response in zip(requests, finished, strict=True) if response is None]
        num_finished = len(requests) - len(remaining)
        if num_finished:
            logger.warning("%d of %d %s requests were finished before.", num_finished, len(requests), kind)
            if kind == "generate_until":  # or what is sampled now would repeat what was sampled then
                torch.manual_seed(torch.initial_seed() + num_finished)
        if not remaining and self.world_size > 1:
            remaining = requests[:1]  # the harness' processes wait for each other in every call
        fresh = iter(answer(remaining) if remaining else [])
        return [next(fresh) if response is None else response for response in finished]

    def _check_generation(self, requests: list[Instance]) -> None:
        for context, gen_kwargs in (request.args[:2] for request in requests):
            if not context and not self.tok_encode(context):
                raise ValueError(
                    "A prompt is empty: there is nothing to generate from. Give it a text or a bos token."
                )
            num_tokens = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)["max_gen_toks"]
            if self.backend == "causal" and num_tokens >= self.max_length:
                raise ValueError(
                    f"max_gen_toks={num_tokens} leaves no room for a prompt in the model's context of "
                    f"{self.max_length} tokens. Lower it with --gen_kwargs max_gen_toks=N."
                )
        if self.average == VOTE and (wrong := {request.repeats for request in requests} - {self.num_samples}):
            raise ValueError(
                f"average=vote gives the j-th of num_samples={self.num_samples} samples the j-th repeat of a "
                f"request, and the task repeats each {wrong.pop()} times. Use eval/run.py, or set "
                f"repeats: {self.num_samples} and a majority_vote filter in the task."
            )


def check_mode(num_samples: Any, average: Any, seed: Any) -> None:
    """Check the arguments that choose how samples answer.

    Raises:
        ValueError: one is out of range, or has no effect.
    """
    if num_samples is not None and (not is_integer(num_samples) or num_samples < 1):
        raise ValueError(f"num_samples must be an integer of at least 1, or left out: noise off. Got {num_samples!r}.")
    if average not in (*AVERAGES, VOTE):
        raise ValueError(f"average must be one of {', '.join([*AVERAGES, VOTE])}, got {average!r}.")
    if num_samples is None and average != "prob":
        raise ValueError(f"average={average} is over samples: say how many with num_samples=k.")
    if not is_integer(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}.")


def _check_base(pretrained: str) -> None:
    if (Path(pretrained) / "adapter_config.json").exists():
        raise ValueError(
            f"pretrained={pretrained} holds an adapter. Give it as peft={pretrained}, and the model it was trained on "
            "as pretrained=."
        )


def _read_adapter(peft: str, revision: str | None) -> PeftConfig:
    is_local = peft.startswith((".", "/", "~")) or Path(peft).exists()
    if is_local and not (Path(peft) / "adapter_config.json").is_file():
        raise ValueError(f"peft={peft} holds no adapter: it has no adapter_config.json.")
    return PeftConfig.from_pretrained(peft, revision=revision)

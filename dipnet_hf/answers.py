"""Answers that know their tokens: lm-evaluation-harness' `hf` model, which hands out texts alone.

A text does not tell the tokens in which it was written, nor how much of the prompt was kept: tokenizers put a space
before a text or drop it, and a prompt is cut to leave room for the answer.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models.huggingface import HFLM

GENERATED_PER_SCORED = 8  # rows of a batch: a generated row has the logits of one token, a scored one those of all


class Answer(str):
    """A text that a model wrote.

    Args:
        text (`str`): what is left of what was written: without thoughts, and up to the stop sequence.
        prompt (`list[int]`): all tokens before it: those of the prompt that the model was given, and of thoughts.
        tokens (`list[int]`): its own, none if it is empty; a part of the last one may be past its end.
        sample (`int`, *optional*): which one wrote it, in a vote.
    """

    def __new__(
        cls, text: str, prompt: Sequence[int] = (), tokens: Sequence[int] = (), sample: int | None = None
    ) -> "Answer":
        """Make the text, and note its tokens on it."""
        answer = super().__new__(cls, text)
        answer.prompt, answer.tokens, answer.sample = list(prompt), list(tokens), sample
        return answer

    prompt: list[int]
    tokens: list[int]
    sample: int | None

    def __getnewargs__(self):
        return str(self), self.prompt, self.tokens, self.sample


class WritingLM(HFLM):
    """The harness' `hf` model, whose `generate_until` returns `Answer`s."""

    batch_size_per_gpu: int | str  # a number, or "auto"
    cache_hook: CacheHook

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write answers, each with its tokens."""
        hook = self.cache_hook
        self.cache_hook = self._writing = _Writing(hook, self._answer)
        try:
            super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.cache_hook = hook
        return [self._writing.take(request.args) for request in requests]

    def answer_log_likelihoods(self, answers: Sequence[Answer]) -> list[float]:
        """The log-probabilities of answers that are not empty, in nats, summed over their tokens."""
        # None for the texts, which no cache may hold: they do not tell the tokens.
        requests: Any = [(None, answer.prompt, answer.tokens) for answer in answers]
        batch_size = self.batch_size_per_gpu
        if isinstance(batch_size, int):
            self.batch_size_per_gpu = max(1, batch_size // GENERATED_PER_SCORED)
        try:
            return [score for score, _ in self._loglikelihood_tokens(requests, disable_tqdm=True)]
        finally:
            self.batch_size_per_gpu = batch_size

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate, and note the tokens of every row."""
        generated = super()._model_generate(context, *args, **kwargs)
        start = context.shape[1] if self.backend == "causal" else 1  # a decoder's own first token
        for prompt, mask, tokens in zip(context, kwargs["attention_mask"], generated, strict=True):
            self._writing.rows.append((prompt[mask.bool()].tolist(), tokens[start:].tolist()))
        return generated

    def _answer(self, prompt: list[int], written: list[int], text: str) -> Answer:
        """Find the tokens of a text that the harness has cut out of what was written."""
        marker, thoughts = self.think_end_token, 0
        if isinstance(marker, int) and marker in written:
            thoughts = len(written) - written[::-1].index(marker)
        prompt, written = prompt + written[:thoughts], written[thoughts:]
        whole = self.tok_decode(written)
        rest = whole.split(marker)[-1] if isinstance(marker, str) else whole
        rest = whole if marker is None else rest.lstrip()
        start, end = token_span(self.tok_decode, written, whole, len(whole) - len(rest), text)
        return Answer(text, prompt + written[:start], written[start:end])


def token_span(
    decode: Callable[[list[int]], str], tokens: list[int], whole: str, place: int, text: str
) -> tuple[int, int]:
    """Find the tokens that hold a part of their text.

    Args:
        decode (`Callable`): tokens to text.
        tokens (`list[int]`): all of them.
        whole (`str`): their text.
        place (`int`): where in it the part begins; at 0 the tokens begin with the first, even if it has no text.
        text (`str`): the part.

    Returns:
        `tuple[int, int]`: the first token of it, and the one after its last.
    """

    def num_tokens_of(num_characters: int) -> int:
        """The fewest tokens whose text begins with so many characters of the whole."""
        beginning = whole[:num_characters]
        numbers = range(len(tokens) + 1)
        return bisect_left(numbers, True, key=lambda number: decode(tokens[:number]).startswith(beginning))

    if not text:
        return 0, 0
    first = num_tokens_of(place + 1) - 1 if place else 0
    return first, num_tokens_of(place + len(text))


class _Writing(CacheHook):
    """What a call of `generate_until` has written: the harness generates a batch, and then reports text by text."""

    def __init__(self, hook: CacheHook, make_answer: Callable[[list[int], list[int], str], Answer]) -> None:
        super().__init__(None)
        self.rows: deque[tuple[list[int], list[int]]] = deque()  # generated and not reported yet
        self._hook = hook
        self._make_answer = make_answer
        self._answers: dict[str, deque[Answer]] = defaultdict(deque)

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Join a text with its tokens."""
        answer = self._make_answer(*self.rows.popleft(), res)
        self._hook.add_partial(attr, req, answer)
        self._answers[hash_args(attr, req)].append(answer)

    def take(self, args: tuple) -> Answer:
        """The answer to a request; of equal requests, which the harness keeps in their order, the next one."""
        return self._answers[hash_args("generate_until", args)].popleft()

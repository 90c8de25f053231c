"""Answers written while a model trains: exact match on a few problems, at every evaluation of any `Trainer`.

How an answer is told right is the caller's matter; how it is written is this file's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from .architecture import context_length, network_of
from .modes import in_eval_mode

METRIC = "eval_exact_match"


def is_same_text(answer: str, reference: str) -> bool:
    """Whether two texts are the same, but for white space around them."""
    return answer.strip() == reference.strip()


class GenerationCallback(TrainerCallback):
    """Logs `eval_exact_match` at every evaluation: the share of problems that the model answers right.

        trainer.add_callback(GenerationCallback(trainer, prompts, answers))

    Answers are greedy and written in eval mode, so a model of this package has its noise off. Processes share the
    problems. Training goes on as if nothing had been generated. The figure is among the metrics of the evaluation, so
    `metric_for_best_model="exact_match"` finds it, and an `EarlyStoppingCallback` that was added after this one.

    Args:
        trainer (`Trainer`): one with a tokenizer as its `processing_class`.
        prompts (`list`): of texts, of conversations (lists of turns) or of token ids; the same at every evaluation.
        references (`list`): the answers, one for each prompt.
        is_right (`Callable[[str, Any], bool]`): tells an answer by its text and the reference; by default they must be
            the same.
        max_new_tokens (`int`): the longest answer.
        batch_size (`int`): answers written at once by a process.
        stop_strings (`list[str]`): an answer ends before the first of them; the special tokens are left out of it.

    Raises:
        ValueError: there are no problems, or not as many answers; a prompt leaves no room for its answer; the trainer
            has no tokenizer or shards its model; early stopping would look at the figure before it is there; or
            another figure has its name.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[Any],
        references: Sequence[Any],
        is_right: Callable[[str, Any], bool] = is_same_text,
        max_new_tokens: int = 256,
        batch_size: int = 16,
        stop_strings: Sequence[str] = (),
    ) -> None:
        _check(trainer, prompts, references, max_new_tokens, batch_size)
        self._trainer = trainer
        self._tokenizer: Any = trainer.processing_class
        self._is_right = is_right
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._stop_strings = stop_strings
        self._prompts = [self._encode(prompt) for prompt in prompts]
        self._references = list(references)
        _check_lengths(self._prompts, max_new_tokens, context_length(network_of(trainer.model)))

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuse early stopping that would come first."""
        callbacks = self._trainer.callback_handler.callbacks
        before = callbacks[: callbacks.index(self)]
        is_watched = args.metric_for_best_model in (METRIC, METRIC.removeprefix("eval_"))
        if is_watched and any(isinstance(callback, EarlyStoppingCallback) for callback in before):
            raise ValueError(
                f"EarlyStoppingCallback comes before GenerationCallback, so it would look for {METRIC} before that is "
                "there. Add it afterwards: trainer.add_callback(EarlyStoppingCallback(...))."
            )

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Generate, add the figure to the metrics and log it."""
        if METRIC in metrics:
            raise ValueError(f"compute_metrics reports {METRIC} already: give its figure another name.")
        metrics[METRIC] = self.exact_match()
        self._trainer.log({METRIC: metrics[METRIC]})

    def exact_match(self) -> float:
        """The share of problems that the model answers right now; every process must call this."""
        accelerator = self._trainer.accelerator
        own = slice(accelerator.process_index, None, accelerator.num_processes)
        answers = self._answers(self._prompts[own])
        num_right = sum(map(self._is_right, answers, self._references[own]))
        total = accelerator.reduce(torch.tensor(num_right, device=accelerator.device), reduction="sum")
        return total.item() / len(self._prompts)

    def _answers(self, prompts: list[list[int]]) -> list[str]:
        batches = [prompts[start : start + self._batch_size] for start in range(0, len(prompts), self._batch_size)]
        model: Any = self._trainer.model
        with in_eval_mode(model):
            return [answer for batch in batches for answer in self._generate(batch)]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[str]:
        model: Any = self._trainer.model
        inputs = self._tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        settings = {"max_new_tokens": self._max_new_tokens, "do_sample": False, "num_beams": 1, "use_cache": True}
        generated = model.generate(
            **inputs.to(self._trainer.args.device), pad_token_id=self._tokenizer.pad_token_id, **settings
        )
        prompt_length = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return [self._cut(text) for text in self._tokenizer.batch_decode(generated[:, prompt_length:])]

    def _cut(self, text: str) -> str:
        """The text before the first stop string, which may be a special token, without special tokens."""
        for stop in self._stop_strings:
            text = text.split(stop)[0]
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer(prompt)["input_ids"]
        if prompt and isinstance(prompt[0], dict):
            return self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        return list(prompt)


def _check(trainer: Trainer, prompts: Sequence, references: Sequence, max_new_tokens: int, batch_size: int) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "A sharded model (FSDP, DeepSpeed) cannot generate while it trains: leave GenerationCallback out, and "
            "score its checkpoints afterwards."
        )
    if len(prompts) != len(references) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(references)} references: give one for each, and some.")
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if getattr(trainer.processing_class, "pad_token_id", None) is None:
        raise ValueError(
            "GenerationCallback needs a tokenizer with a pad token: give the trainer processing_class=tokenizer, with "
            "tokenizer.pad_token = tokenizer.eos_token if it has none."
        )


def _check_lengths(prompts: list[list[int]], max_new_tokens: int, context: int | None) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"Prompt {number} has no tokens, and there is nothing to generate from.")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {number} has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} are more than "
                f"the {context} of the model's context: leave it out, or lower max_new_tokens."
            )

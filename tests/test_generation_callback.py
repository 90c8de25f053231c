"""Exact match while training: what is right, that it reaches whoever watches, and that training does not notice.

Two processes are in `test_distributed`.
"""

import types

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from dipnet_hf import DipTrainer, GenerationCallback
from tests.helpers import dip_model, make_rows, make_trainer, word_tokenizer
from tests.tiny_models import build, build_task

PROMPTS = [[5, 9], [7, 3, 8, 21], [4], [11, 12, 13]]
NUM_NEW = 5


@torch.no_grad()
def greedy(model, prompt):
    """The words that follow a prompt, one forward of the whole sequence a token, no cache and no padding."""
    tokens = list(prompt)
    for _ in range(NUM_NEW):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    return word_tokenizer().decode(tokens[len(prompt) :], skip_special_tokens=True)


class Spy(TrainerCallback):
    """Keeps what a logger such as TensorBoard's gets."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def make_evaluating_trainer(tmp_path, model=None, **arguments):
    """A trainer that evaluates, with a tokenizer."""
    model = dip_model() if model is None else model
    trainer_class = DipTrainer if hasattr(model, "peft_config") else Trainer
    trainer = make_trainer(model, make_rows(), tmp_path, trainer_class, **{"eval_strategy": "steps", **arguments})
    trainer.processing_class = word_tokenizer()
    return trainer


def watch(trainer, prompts=PROMPTS, references=("w3", "w3", "w3", "w3"), **settings):
    """Let a trainer generate, and return the callback."""
    callback = GenerationCallback(
        trainer, prompts, references, **{"max_new_tokens": NUM_NEW, "batch_size": 3, **settings}
    )
    trainer.add_callback(callback)
    return callback


@pytest.mark.parametrize("kind", ["plain", "dip"])
def test_the_share_is_that_of_a_slow_search_without_noise(tmp_path, kind):
    model = build("llama") if kind == "plain" else dip_model()
    references = [greedy(model.eval(), prompt) for prompt in PROMPTS]
    assert len(set(references)) > 1
    wrong = [*references[:3], "something else"]
    trainer = make_evaluating_trainer(tmp_path, model)
    for given, expected in ((references, 1.0), (wrong, 0.75), (wrong[3:] * 4, 0.0)):
        callback = watch(trainer, references=given)
        model.train()
        assert callback.exact_match() == expected and model.training
        model.eval()
        assert callback.exact_match() == expected and not model.training


def test_texts_conversations_and_tokens_are_asked_alike(tmp_path):
    trainer = make_evaluating_trainer(tmp_path)
    trainer.processing_class.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %} w9{% endif %}"
    tokens = trainer.processing_class("w5 w9")["input_ids"]
    seen = []
    prompts = ["w5 w9", [{"role": "user", "content": "w5"}], tokens]
    watch(trainer, prompts, [None] * 3, is_right=lambda answer, _: bool(seen.append(answer))).exact_match()
    assert len(seen) == 3 and len(set(seen)) == 1


def test_an_answer_ends_before_a_stop_string(tmp_path):
    model = dip_model().eval()
    text = greedy(model, PROMPTS[1])
    first, second = text.split()[:2]
    assert first != second
    trainer = make_evaluating_trainer(tmp_path, model)
    assert watch(trainer, PROMPTS[1:2], [first], stop_strings=["none", second]).exact_match() == 1.0


def test_an_answer_ends_before_a_special_token_that_generation_runs_over(tmp_path, monkeypatch):
    trainer = make_evaluating_trainer(tmp_path)
    written = torch.tensor([[*PROMPTS[0], 5, 1, 7, 2, 0]])  # <s> ends a turn here, and </s> a text
    monkeypatch.setattr(trainer.model, "generate", lambda **_: written)
    assert watch(trainer, PROMPTS[:1], ["w5"], stop_strings=["<s>"]).exact_match() == 1.0
    assert watch(trainer, PROMPTS[:1], ["w5  w7"]).exact_match() == 1.0


def test_an_encoder_decoder_writes_no_prompt(tmp_path):
    trainer = make_evaluating_trainer(tmp_path, build_task("t5"))
    seen = []
    watch(trainer, PROMPTS, [None] * 4, is_right=lambda answer, _: bool(seen.append(answer))).exact_match()
    model = trainer.model.eval()
    tokens = [model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)[0] for prompt in PROMPTS]
    assert any(seen)
    assert [text.split() for text in seen] == [
        word_tokenizer().decode(row, skip_special_tokens=True).split() for row in tokens
    ]


def test_every_logger_gets_the_figure_beside_the_loss(tmp_path):
    trainer = make_evaluating_trainer(tmp_path, eval_steps=1)
    watch(trainer)
    spy = Spy()
    trainer.callback_handler.callbacks.insert(0, spy)  # where those of `report_to` stand
    trainer.train()
    for entries in (spy.logs, trainer.state.log_history):
        for name in ("eval_loss", "eval_exact_match"):
            assert [entry["step"] for entry in entries if name in entry] == [1, 2]


def test_training_is_bit_for_bit_that_without_it(tmp_path):
    weights, states = [], []
    for is_watched in (False, True):
        base = build("llama")
        base.config.attention_dropout = 0.2
        for layer in base.model.layers:
            layer.self_attn.attention_dropout = 0.2
        trainer = make_evaluating_trainer(tmp_path, dip_model(base), eval_steps=1, max_steps=4)
        if is_watched:
            watch(trainer)
        trainer.train()
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        states.append(torch.get_rng_state())
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert torch.equal(*states)


def test_it_stops_a_run_early_and_chooses_the_best(tmp_path):
    arguments = {"metric_for_best_model": "exact_match", "load_best_model_at_end": True, "save_strategy": "steps"}
    trainer = make_evaluating_trainer(tmp_path, eval_steps=1, save_steps=1, max_steps=8, **arguments)
    watch(trainer).exact_match = iter([0.25, 0.5, 0.5, 0.25, 1.0]).__next__
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 4
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.5, 2)


def test_early_stopping_that_comes_first_is_refused(tmp_path):
    trainer = make_evaluating_trainer(tmp_path, metric_for_best_model="eval_exact_match")
    trainer.add_callback(EarlyStoppingCallback())
    watch(trainer)
    with pytest.raises(ValueError, match="EarlyStoppingCallback comes before .* Add it afterwards"):
        trainer.train()


def test_a_figure_of_that_name_is_not_written_over(tmp_path):
    trainer = make_evaluating_trainer(tmp_path)
    watch(trainer)
    trainer.compute_metrics = lambda prediction: {"exact_match": 0.0}
    with pytest.raises(ValueError, match="compute_metrics reports eval_exact_match already"):
        trainer.evaluate()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": PROMPTS[:3]}, "3 prompts and 4 references: give one for each"),
        ({"prompts": [], "references": []}, "0 prompts and 0 references: .* and some"),
        ({"prompts": [[5], [], [5], [5]]}, "Prompt 2 has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 10_000}, "Prompt 1 has 2 tokens, which with max_new_tokens=10000 are more than the"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, changes, message):
    trainer = make_evaluating_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        watch(trainer, **changes)


@pytest.mark.parametrize("strategy", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_sharded_model_is_refused(strategy):
    trainer = types.SimpleNamespace(**{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, strategy: True})
    with pytest.raises(ValueError, match="sharded model .* leave GenerationCallback out"):
        watch(trainer)


def test_a_trainer_without_a_pad_token_is_refused(tmp_path):
    trainer = make_evaluating_trainer(tmp_path)
    trainer.processing_class = None
    with pytest.raises(ValueError, match="needs a tokenizer with a pad token"):
        watch(trainer)

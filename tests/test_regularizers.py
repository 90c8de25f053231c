"""What holds for every regularizer: the shape they share, a Trainer around them, files; each has tests of its own."""

import json
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dipnet_hf import DipTrainer, dip_loss
from dipnet_hf.regularizers import METHODS, Regularizer, regularize
from dipnet_hf.regularizers.regularizer import RandomState, kept
from dipnet_hf.regularizers.saved import saved_method
from tests.helpers import collate, dip_model, make_rows, make_trainer, run_in_processes, word_tokenizer
from tests.tiny_models import build, make_batch


@pytest.fixture
def rows():
    return make_rows()


@dataclass
class Again(Regularizer):
    """Computes the gradient of every step once more, and changes nothing."""

    factor: float = 1.0

    def refine_gradient(self, recompute):
        recompute()


@dataclass
class Decay(Regularizer):
    """Adds half the squared norm of the weights, in the loss."""

    def install(self, model):
        self.model = model

    def loss(self, batch):
        return batch.loss() + batch.share * sum((p**2).sum() for p in self.model.parameters() if p.requires_grad) / 2


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """Give the methods of this file names."""
    monkeypatch.setitem(METHODS, "again", Again)
    monkeypatch.setitem(METHODS, "decay", Decay)


def lora_model():
    torch.manual_seed(0)
    return get_peft_model(build("llama"), LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"))


def noisy_model():
    torch.manual_seed(0)
    return dip_model(num_samples=2, stability_loss_weight=0.5)


def trained(model, rows, tmp_path, regularizer=None, trainer_class=Trainer, **arguments):
    torch.manual_seed(0)
    trainer = make_trainer(model, rows, tmp_path, trainer_class, **arguments)
    if regularizer is not None:
        regularize(trainer, regularizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("make_model", "trainer_class"), [(lora_model, Trainer), (noisy_model, DipTrainer)])
def test_a_second_pass_repeats_batches_dropout_and_noise(rows, tmp_path, make_model, trainer_class, accumulation):
    """To the bit: weights, logs of losses and terms, and the random state after the run."""
    arguments = dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=4, learning_rate=1e-2)
    once = trained(make_model(), rows, tmp_path, None, trainer_class, **arguments)
    state = torch.get_rng_state()
    twice = trained(make_model(), rows, tmp_path, Again(), trainer_class, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, parameter), other in zip(once.model.named_parameters(), twice.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    for log, other in zip(once.state.log_history[:2], twice.state.log_history[:2], strict=True):
        assert log == other


def test_a_loop_of_ones_own_takes_the_same_steps_as_the_trainer(rows, tmp_path):
    """Two accumulated batches per step, one of which has more tokens: the loop averages the batches' means."""
    trainer = trained(
        build("llama"), rows, tmp_path, Decay(), optim="sgd", per_device_train_batch_size=16, max_steps=1,
        learning_rate=1e-2, max_grad_norm=0.0,
    )  # fmt: skip
    model, regularizer = build("llama").train(), Decay()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    regularizer.attach(model, optimizer)
    loss = regularizer.backward(model, collate(list(rows)))
    optimizer.step()
    assert loss == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)
    for parameter, other in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-5)


def test_a_loop_averages_accumulated_batches(rows):
    """The gradient of two batches of the same size is the mean of theirs, also when it is computed again."""
    batches = [collate(list(rows)[:1] * 2), collate(list(rows)[8:9] * 2)]
    model = build("llama")
    together = Again()
    together.attach(model)
    together.backward(model, *batches)
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    sum(model(**batch).loss / 2 for batch in batches).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_loop_takes_the_objective_of_dipnet(rows):
    model, batch = noisy_model(), collate(list(rows)[:4])
    model.calibrate([batch])
    regularizer = Again()
    regularizer.attach(model)
    torch.manual_seed(1)
    loss = regularizer.backward(model.train(), batch, forward=dip_loss)
    torch.manual_seed(1)
    assert loss == pytest.approx(dip_loss(model, batch).loss.item())


def test_a_penalty_weighs_the_same_however_many_batches_are_accumulated(rows, tmp_path):
    weights = []
    for batch_size, steps in [(8, 1), (2, 4)]:
        arguments = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps)
        trainer = trained(build("llama"), rows, tmp_path, Decay(), optim="sgd", **arguments)
        weights.append(list(trainer.model.parameters()))
    for parameter, other in zip(*weights, strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-5)


def test_the_evaluation_is_that_of_the_trainer(rows, tmp_path):
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer)
    loss = trainer.evaluate()["eval_loss"]
    regularize(trainer, Decay())
    assert trainer.evaluate()["eval_loss"] == loss


def train_sam_in_process(rank, folder):
    """One of two processes, on half of the rows each; its weights are written by the first."""
    METHODS["again"] = Again
    trainer = trained(
        build("llama"), make_rows(), folder, METHODS["sam"](rho=0.5), optim="sgd",
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    if rank == 0:
        torch.save(trainer.model.state_dict(), folder / "weights.pt")


def test_two_processes_take_the_steps_of_one(rows, tmp_path):
    """SAM, whose second pass depends on the gradient of all processes; with accumulation."""
    run_in_processes(2, train_sam_in_process, tmp_path)
    ours = torch.load(tmp_path / "weights.pt", weights_only=True)
    alone = trained(build("llama"), rows, tmp_path, METHODS["sam"](rho=0.5), optim="sgd").model.state_dict()
    for name, tensor in alone.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)


def test_weights_come_back_to_the_bit_after_an_error():
    parameter = torch.nn.Parameter(torch.tensor([0.1, 1e8, -3.0]))
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match="out of memory"), kept([parameter]), torch.no_grad():
        parameter.add_(0.7)
        raise RuntimeError("out of memory")
    assert torch.equal(parameter, before)


def test_random_states_come_back():
    state = RandomState(torch.device("cpu"))
    first, second = torch.rand(3), torch.rand(3)
    with state.restored():
        assert torch.equal(torch.rand(3), first)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with state.restored():
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(first, second)


def test_another_setting_does_not_go_on_with_a_run(rows, tmp_path):
    trained(build("llama"), rows, tmp_path, Again(), max_steps=1, save_strategy="steps", save_steps=1)
    assert json.loads((tmp_path / "checkpoint-1" / "regularizer.json").read_text()) == {"name": "again", "factor": 1.0}
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer)
    regularize(trainer, Again(factor=2.0))
    with pytest.raises(ValueError, match=r"was trained with the regularizer .*1\.0.*, and this run has .*2\.0"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_run_without_a_regularizer_does_not_go_on_with_one(rows, tmp_path):
    trained(build("llama"), rows, tmp_path, None, max_steps=1, save_strategy="steps", save_steps=1)
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer)
    regularize(trainer, Again())
    with pytest.raises(ValueError, match="was trained with the regularizer None"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_trainers_that_make_models_are_refused(rows, tmp_path):
    trainer = make_trainer(None, rows, tmp_path, ModelMaker)
    with pytest.raises(ValueError, match="model_init makes a new model"):
        regularize(trainer, Again())


class ModelMaker(Trainer):
    def __init__(self, model, **arguments):
        super().__init__(model_init=lambda: LlamaForCausalLM(build("llama").config), **arguments)


@pytest.mark.parametrize(
    ("attribute", "strategy"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")]
)
def test_sharded_models_are_refused(rows, tmp_path, monkeypatch, attribute, strategy):
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer)
    monkeypatch.setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=f"Again needs whole weights and gradients .* {strategy} takes"):
        regularize(trainer, Again())


# ---- what went wrong once ----


class AtEvaluation(TrainerCallback):
    """Notes the weights that an evaluation's callbacks see."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.seen.append(next(model.parameters()).detach().clone())


def test_callbacks_of_an_evaluation_see_the_network_that_is_evaluated(rows, tmp_path):
    average = METHODS["weight_average"](decay=1.0)
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer, learning_rate=1e-2, eval_strategy="epoch")
    regularize(trainer, average)
    trainer.add_callback(callback := AtEvaluation())
    trainer.train()
    name = next(iter(average._weights))
    assert torch.equal(callback.seen[-1], average.state_dict()[f"mean.{name}"])
    assert not torch.equal(average.state_dict()[f"trained.{name}"], build("llama").state_dict()[name])


@pytest.mark.parametrize("name", ["weight_average", "weight_compander"])
def test_what_is_finished_is_not_trained_on_unnoticed(rows, tmp_path, name):
    trainer = trained(build("llama"), rows, tmp_path, METHODS[name]())
    with pytest.raises(ValueError, match="has given the model the weights that it is used with: make a new trainer"):
        trainer.train()


def test_a_step_after_a_failed_one_is_of_its_own_batches(rows, tmp_path):
    trainer = make_trainer(build("llama"), rows, tmp_path, FailsOnce)
    regularize(trainer, Again())
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.training_step(trainer.model, collate(list(rows)[:2]))
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, batch := collate(list(rows)[4:6]))
    other = build("llama").train()
    other(**batch).loss.backward()
    for parameter, expected in zip(trainer.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


class FailsOnce(Trainer):
    has_failed = False

    def compute_loss(self, *args, **kwargs):
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("out of memory")
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("name", ["blob", "normality", "weight_compander"])
def test_an_optimizer_that_was_there_learns_what_a_method_adds(rows, name):
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    method = METHODS[name]()
    method.attach(model, optimizer)
    before = [parameter.detach().clone() for parameter in method.added if parameter.requires_grad]
    assert before
    method.backward(model, collate(list(rows)[:4]))
    optimizer.step()
    after = [parameter for parameter in method.added if parameter.requires_grad]
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_a_schedule_that_lacks_what_a_method_adds_is_refused(rows, tmp_path):
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer)
    trainer.create_optimizer_and_scheduler(2)
    with pytest.raises(ValueError, match="adds parameters, which the given learning rate schedule does not know"):
        regularize(trainer, METHODS["normality"]())
    assert not any("normality" in name for name, _ in trainer.model.named_parameters())


@pytest.mark.parametrize("trainer_class", [None, Trainer], ids=["loop", "trainer"])
def test_statistics_of_batch_normalization_are_those_of_the_first_pass(trainer_class, tmp_path):
    batch = make_batch("resnet")
    model, other = build("resnet").train(), build("resnet").train()
    other(**batch)
    sam = METHODS["sam"](rho=0.5)
    if trainer_class is None:
        sam.attach(model)
        sam.backward(model, batch)
    else:
        trainer = trainer_class(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
        regularize(trainer, sam)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(model, batch)
    for (name, buffer), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_one_regularizer_at_a_time(rows, tmp_path):
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer)
    regularize(trainer, Again())
    with pytest.raises(ValueError, match="This trainer has a regularizer: one at a time"):
        regularize(trainer, Again())


def test_trainers_that_generate_batches_cannot_repeat_them(rows, tmp_path):
    trainer = make_trainer(build("llama"), rows, tmp_path, Trainer)
    trainer._buffered_inputs = None  # as TRL's GRPOTrainer has it
    with pytest.raises(ValueError, match="Again repeats the passes of a step, and Trainer generates new batches"):
        regularize(trainer, Again())


@dataclass
class OnesOwn(Regularizer):
    """A method that is not in the dict."""


def test_a_method_of_ones_own_is_saved_by_its_class(rows, tmp_path):
    trained(build("llama"), rows, tmp_path, OnesOwn(), save_strategy="steps", save_steps=2)
    assert json.loads((tmp_path / "checkpoint-2" / "regularizer.json").read_text()) == {"name": "OnesOwn"}
    with pytest.raises(ValueError, match="was trained with OnesOwn, which is no method of this package"):
        saved_method(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", ["sam", "gam", "gradient_norm"])
def test_methods_of_weights_need_some_that_learn(name):
    with pytest.raises(ValueError, match="acts on the weights that learn, and PeftModel.* has none"):
        METHODS[name]().attach(dip_model(weights="frozen"))


# TRL 1.16 sets it in every SFTConfig, which transformers 5.23 warns of.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["sam", "weight_compander", "normality", "layer_dropout", "l2_sp"])
def test_methods_work_around_trl(tmp_path, name):
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2
    )
    rows = Dataset.from_list([{"text": "w3 w4 w5 w6 w7"}] * 4)
    trainer = trl.SFTTrainer(build("llama"), config, train_dataset=rows, processing_class=word_tokenizer())
    regularize(trainer, METHODS[name]())
    trainer.train()
    changed = [not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), build("llama").parameters())]
    assert any(changed)

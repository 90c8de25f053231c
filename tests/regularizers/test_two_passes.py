"""What holds for all methods that compare two passes: with every source of randomness, and without one."""

import math

import pytest
import torch
from peft import LoraConfig, PveraConfig, get_peft_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from dipnet_hf import DipTrainer
from dipnet_hf.regularizers import RDrop, SelfDistillation, regularize
from tests.helpers import checkpointed, dip_model, lora_model, losses, make_rows, make_trainer
from tests.tiny_models import build, build_task, make_batch, make_task_batch


@pytest.fixture(params=[RDrop, SelfDistillation])
def method(request):
    """A class of methods of two passes."""
    return request.param


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("kind", ["layer_dropout", "dip"])
def test_checkpointing_repeats_the_randomness_of_each_pass(method, kind, options):
    found = []
    for is_checkpointed in (False, True):
        model = build("llama") if kind == "layer_dropout" else dip_model(calibration=[make_batch("llama", 16)])
        regularizer = method(alpha=10.0, layer_dropout=0.3 if kind == "layer_dropout" else 0.0)
        regularizer.attach(model)
        if is_checkpointed:
            checkpointed(model, options)
        torch.manual_seed(0)
        regularizer.backward(model.train(), make_batch("llama"))
        found.append([parameter.grad for parameter in model.parameters()])
    for gradient, other in zip(*found, strict=True):
        torch.testing.assert_close(gradient, other)


def test_equal_passes_leave_the_plain_loss(method):
    batch = make_batch("llama")
    model, regularizer = lora_model(lora_dropout=0.3).eval(), method()
    regularizer.attach(model)
    assert regularizer.backward(model, batch) == pytest.approx(model(**batch).loss.item())


def test_accumulated_batches_average_over_all_tokens(method, tmp_path):
    """Batches of rows with more and with fewer tokens, whose second passes see half of every adapter's input."""

    def train(batch_size, steps):
        trainer = make_trainer(
            lora_model(lora_dropout=0.3), make_rows(), tmp_path, Trainer, optim="sgd", max_grad_norm=0.0, max_steps=1,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        regularize(trainer, method(alpha=1e3))
        factors, factor = iter([1.0, 0.5] * steps), [1.0]
        trainer.model.register_forward_pre_hook(lambda *_: factor.__setitem__(0, next(factors)))
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.forward = lambda x: x * factor[0]
        trainer.train()
        return trainer

    once, accumulated = train(16, 1), train(4, 4)
    assert losses(once) == pytest.approx(losses(accumulated), rel=1e-4)
    for parameter, other in zip(once.model.parameters(), accumulated.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-5)


def test_beside_dip_the_trainer_logs_the_first_pass_alone(method, tmp_path):
    model = dip_model(prior_weight=0.0)
    trainer = make_trainer(model, make_rows(), tmp_path, DipTrainer, max_steps=1)
    regularize(trainer, method(alpha=1e-9))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["nll"] == pytest.approx(log["loss"], rel=0.05)


@pytest.fixture
def process_group():
    """A group of one process, in which DistributedDataParallel keeps count of the parameters too."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_looking_for_unused_parameters_changes_no_gradient(method, process_group):
    """As the Trainer does with every adapter: DIPNet's log-variances have no part in a pass without noise."""

    def gradients(wrap):
        model, regularizer = dip_model(calibration=[make_batch("llama", 16)]).train(), method()
        regularizer.attach(model)
        wrapped = wrap(model)
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(0)
            regularizer.backward(wrapped, make_batch("llama"))
        return [parameter.grad for parameter in model.parameters()]

    found = gradients(lambda model: DistributedDataParallel(model, find_unused_parameters=True))
    for gradient, expected in zip(found, gradients(lambda model: model), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_classes_without_tokens_are_compared_too(method):
    model, regularizer, batch = build_task("classes"), method(layer_dropout=0.2), make_task_batch("classes")
    regularizer.attach(model)
    assert regularizer.backward(model.train(), batch) > 0


def test_outputs_that_are_no_classes_are_refused(method):
    model, regularizer, batch = build_task("regression"), method(layer_dropout=0.2), make_task_batch("regression")
    regularizer.attach(model)
    with pytest.raises(ValueError, match="BertForSequenceClassification is not known to have one label for each"):
        regularizer.backward(model.train(), batch)


def attention_dropout():
    model = build("llama")
    model.model.layers[0].self_attn.attention_dropout = 0.1
    return model


def module_dropout():
    model = build("gpt2")
    model.transformer.drop.p = 0.1
    return model


@pytest.mark.parametrize(
    "make_model",
    [
        attention_dropout,
        module_dropout,
        lambda: lora_model(lora_dropout=0.1),
        lambda: lora_model(monteclora_config={"num_samples": 2}),
        lambda: get_peft_model(build("llama"), PveraConfig(r=4, target_modules=["q_proj"])),
        dip_model,
        lambda: dip_model(weights=LoraConfig(r=4, target_modules="all-linear")),
    ],
    ids=["attention", "module", "lora", "monteclora", "pvera", "dip", "dip_lora"],
)
def test_every_source_of_randomness_is_known(make_model):
    RDrop().attach(make_model())


@pytest.mark.parametrize(
    "make_model", [lambda: build("llama"), lambda: build("gpt2"), lora_model], ids=["llama", "gpt2", "lora"]
)
def test_a_network_without_randomness_is_refused(method, make_model):
    message = f"those of this model are equal: set {method.__name__}'s layer_dropout, or lora_dropout"
    with pytest.raises(ValueError, match=message):
        method().attach(make_model())


def test_more_samples_of_dip_are_refused(method):
    with pytest.raises(
        ValueError, match="DIPNet with num_samples=2 compares its samples by itself: set num_samples=1"
    ):
        method().attach(dip_model(num_samples=2))


def test_detach_takes_the_dropout_out(method):
    model, regularizer, batch = build("llama").train(), method(layer_dropout=0.5), make_batch("llama")
    plain = model(**batch).logits
    regularizer.attach(model)
    assert not torch.equal(model(**batch).logits, plain)
    assert torch.equal(model.eval()(**batch).logits, plain)
    regularizer.detach()
    assert torch.equal(model.train()(**batch).logits, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha of {name} must be positive and finite, got 0.0"),
        ({"alpha": math.nan}, "alpha of {name} must be positive"),
        ({"layer_dropout": 1.0}, "layer_dropout of {name} must be at least 0 and less than 1, got 1.0"),
        ({"layer_dropout": -0.1}, "layer_dropout of {name} must be"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message.format(name=method.__name__)):
        method(**settings)

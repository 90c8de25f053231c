"""R-Drop against closed forms and torch's divergence, with every source of randomness, and without one."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PveraConfig, get_peft_model
from transformers import Trainer

from dipnet_hf import DipTrainer
from dipnet_hf.regularizers import RDrop, r_drop, regularize
from dipnet_hf.regularizers.r_drop import symmetric_kl
from tests.helpers import checkpointed, dip_model, losses, make_rows, make_trainer, predictions
from tests.tiny_models import build, build_task, make_batch, make_task_batch


def lora(**settings):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(build("llama"), config)


def test_of_two_classes_it_is_the_closed_form():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) + KL(q||p) = (p - q) . ln(p / q) = ln(3) / 4."""
    logits, others = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[5.0, 5.0]])
    torch.testing.assert_close(symmetric_kl(logits, others), torch.tensor(math.log(3.0) / 4))


@pytest.mark.parametrize("chunk_logits", [1, 14, 10**6])
def test_it_is_torchs_divergence_both_ways(monkeypatch, chunk_logits):
    monkeypatch.setattr(r_drop, "_CHUNK_LOGITS", chunk_logits)
    logits, others = 3 * torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_p, log_q = logits.log_softmax(-1), others.log_softmax(-1)
    both = [F.kl_div(a, b, log_target=True, reduction="sum") for a, b in [(log_p, log_q), (log_q, log_p)]]
    torch.testing.assert_close(symmetric_kl(logits, others), sum(both))
    assert symmetric_kl(logits, logits.clone()) == 0
    assert torch.autograd.gradcheck(symmetric_kl, (logits.requires_grad_(), others.requires_grad_()))


def test_half_precision_is_taken_in_float32():
    logits, others = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = symmetric_kl(logits, others)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, symmetric_kl(logits.float(), others.float()))


@pytest.mark.parametrize("kind", ["lora_dropout", "layer_dropout", "dip"])
def test_the_loss_is_that_of_two_passes_by_hand(kind):
    """Of the mean over all supervised tokens; the passes draw one after the other."""
    batch = make_batch("llama")
    model = {"lora_dropout": lambda: lora(lora_dropout=0.3), "layer_dropout": lora, "dip": dip_model}[kind]()
    if kind == "dip":
        model.calibrate([make_batch("llama", 16)])
    regularizer = RDrop(alpha=3.0, layer_dropout=0.2 if kind == "layer_dropout" else 0.0)
    regularizer.attach(model)
    torch.manual_seed(1)
    found = regularizer.backward(model.train(), batch)
    torch.manual_seed(1)
    first, second = predictions(model, batch), predictions(model, batch)
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    nll = -sum(passed.gather(1, targets[:, None]).mean() for passed in (first, second)) / 2
    divergence = ((first.exp() - second.exp()) * (first - second)).sum(-1).mean()
    assert divergence > 1e-5
    assert found == pytest.approx((nll + 3 / 4 * divergence).item())


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_checkpointing_repeats_the_dropout_of_each_pass(options):
    found = []
    for is_checkpointed in (False, True):
        model, regularizer = build("llama"), RDrop(alpha=10.0, layer_dropout=0.3)
        regularizer.attach(model)
        if is_checkpointed:
            checkpointed(model, options)
        torch.manual_seed(0)
        regularizer.backward(model.train(), make_batch("llama"))
        found.append([parameter.grad for parameter in model.parameters()])
    for gradient, other in zip(*found, strict=True):
        torch.testing.assert_close(gradient, other)


def test_equal_passes_leave_the_plain_loss():
    batch = make_batch("llama")
    model, regularizer = lora(lora_dropout=0.3).eval(), RDrop()
    regularizer.attach(model)
    assert regularizer.backward(model, batch) == pytest.approx(model(**batch).loss.item())


def test_gradients_agree_with_finite_differences():
    """In float64, which a Llama and transformers' loss would leave: the slope along the gradient is its norm."""
    model, regularizer, batch = build("gpt2").double().train(), RDrop(alpha=5.0, layer_dropout=0.2), make_batch("gpt2")
    regularizer.attach(model)
    targets = batch["labels"][:, 1:].flatten()

    def forward(model, batch):
        logits = model(**batch).logits
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), targets))

    def loss():
        torch.manual_seed(1)
        return regularizer.backward(model, batch, forward=forward)

    loss()
    parameters = list(model.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    ends, step = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += sign * step * gradient / norm
        ends.append(loss())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(norm.item(), rel=1e-6)


def test_accumulated_batches_average_over_all_tokens(tmp_path):
    """Batches of rows with more and with fewer tokens, whose second passes see half of every adapter's input."""

    def train(batch_size, steps):
        trainer = make_trainer(
            lora(lora_dropout=0.3), make_rows(), tmp_path, Trainer, optim="sgd", max_grad_norm=0.0, max_steps=1,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        regularize(trainer, RDrop(alpha=1e3))
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


def test_beside_dip_the_trainer_logs_the_first_pass_alone(tmp_path):
    model = dip_model(prior_weight=0.0)
    trainer = make_trainer(model, make_rows(), tmp_path, DipTrainer, max_steps=1)
    regularize(trainer, RDrop(alpha=1e-9))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["nll"] == pytest.approx(log["loss"], rel=0.05)


def test_classes_without_tokens_are_compared_too():
    model, regularizer, batch = build_task("classes"), RDrop(layer_dropout=0.2), make_task_batch("classes")
    regularizer.attach(model)
    assert regularizer.backward(model.train(), batch) > 0


def test_outputs_that_are_no_classes_are_refused():
    model, regularizer, batch = build_task("regression"), RDrop(layer_dropout=0.2), make_task_batch("regression")
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
        lambda: lora(lora_dropout=0.1),
        lambda: lora(monteclora_config={"num_samples": 2}),
        lambda: get_peft_model(build("llama"), PveraConfig(r=4, target_modules=["q_proj"])),
        dip_model,
        lambda: dip_model(weights=LoraConfig(r=4, target_modules="all-linear")),
    ],
    ids=["attention", "module", "lora", "monteclora", "pvera", "dip", "dip_lora"],
)
def test_every_source_of_randomness_is_known(make_model):
    RDrop().attach(make_model())


@pytest.mark.parametrize(
    "make_model", [lambda: build("llama"), lambda: build("gpt2"), lora], ids=["llama", "gpt2", "lora"]
)
def test_a_network_without_randomness_is_refused(make_model):
    with pytest.raises(ValueError, match="those of this model are equal: set RDrop's layer_dropout, or lora_dropout"):
        RDrop().attach(make_model())


def test_more_samples_of_dip_are_refused():
    with pytest.raises(
        ValueError, match="DIPNet with num_samples=2 compares its samples by itself: set num_samples=1"
    ):
        RDrop().attach(dip_model(num_samples=2))


def test_detach_takes_the_dropout_out():
    model, regularizer, batch = build("llama").train(), RDrop(layer_dropout=0.5), make_batch("llama")
    plain = model(**batch).logits
    regularizer.attach(model)
    assert not torch.equal(model(**batch).logits, plain)
    assert torch.equal(model.eval()(**batch).logits, plain)
    regularizer.detach()
    assert torch.equal(model.train()(**batch).logits, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha of RDrop must be positive and finite, got 0.0"),
        ({"alpha": math.nan}, "alpha of RDrop must be positive"),
        ({"layer_dropout": 1.0}, "layer_dropout of RDrop must be at least 0 and less than 1, got 1.0"),
        ({"layer_dropout": -0.1}, "layer_dropout of RDrop must be"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RDrop(**settings)

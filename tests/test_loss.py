"""`dip_loss` against a plain reference that loops over samples and tokens, and micro-batches against the whole."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dipnet_hf import DipConfig, dip_loss
from dipnet_hf.architecture import ModelProbe
from tests.helpers import HasALossOfItsOwn, dip_model, gradients, unshifted_bart
from tests.tiny_models import build, build_task, make_batch, make_task_batch


class Noisy(nn.Module):
    """Stands for a DIP model: its logits differ between the rows of one sample and the next by fixed draws."""

    def __init__(self, config, logits):
        super().__init__()
        self.active_dip_config = config
        self.model = SimpleNamespace(loss_type="ForCausalLM" if logits.dim() == 3 else "ForSequenceClassification")
        self.logits = nn.Parameter(logits)
        self.hidden_state_capture = SimpleNamespace(
            capturing=lambda shape: contextlib.nullcontext(),
            pop=lambda: None,
            probe=lambda wrapped: ModelProbe(loss_is_plain=True),
        )
        self.passes = 0

    def sampled_rows(self):
        self.passes += 1
        return contextlib.nullcontext()

    def prior_loss(self):
        return self.logits.square().mean()

    def forward(self, input_ids, labels=None):
        return SimpleNamespace(logits=self.logits[: len(input_ids)])


def reference_loss(logits_SBLV, labels_BL, prior, weight, target):
    """Eqs. (2) to (4), token by token."""
    S = len(logits_SBLV)
    nlls, variances = [], []
    for b, row in enumerate(labels_BL):
        for t in range(1, len(row)):
            if row[t] == -100:
                continue
            log_probs = [F.log_softmax(logits_SBLV[s][b][t - 1].double(), -1)[row[t]] for s in range(S)]
            nlls += [-p for p in log_probs]
            f = log_probs if target == "log_prob" else [logits_SBLV[s][b][t - 1].double() for s in range(S)]
            if S > 1:
                mean = sum(f) / S
                variances.append(sum((v - mean).square().sum() for v in f) / (S - 1))
    nll = sum(nlls) / len(nlls)
    stability = weight * sum(variances) / len(variances) if S > 1 else nll * 0
    return nll + prior + stability, nll, prior, stability


@pytest.mark.parametrize("num_samples", [1, 2, 4])
@pytest.mark.parametrize("target", ["log_prob", "logits"])
def test_dip_loss_equals_the_reference_on_ragged_batches(num_samples, target):
    torch.manual_seed(0)
    B, L, V = 3, 7, 11
    labels = torch.randint(0, V, (B, L))
    labels[0, :4] = -100  # a prompt
    labels[1, 5:] = -100  # padding
    labels[2, 2] = -100
    weight = 0.3 if num_samples > 1 else 0.0
    config = DipConfig(
        weights="frozen",
        num_samples=num_samples,
        stability_loss_weight=weight,
        stability_target=target,
    )
    model = Noisy(config, torch.randn(num_samples * B, L, V))
    result = dip_loss(model, {"input_ids": torch.zeros(B, L, dtype=torch.long), "labels": labels})
    expected = reference_loss(model.logits.view(num_samples, B, L, V), labels, model.prior_loss(), weight, target)
    for ours, theirs in zip(result, expected):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    ours = torch.autograd.grad(result.loss, model.logits)[0]
    theirs = torch.autograd.grad(expected[0], model.logits)[0]
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)
    assert model.passes == 1


def test_micro_batches_add_up_to_the_large_batch():
    torch.manual_seed(0)
    B, L, V, S = 8, 6, 5, 2
    labels = torch.randint(0, V, (B, L))
    labels[torch.rand(B, L) < 0.4] = -100
    labels[3] = -100  # a row without a supervised token
    config = DipConfig(weights="frozen", num_samples=S, stability_loss_weight=0.5)
    logits = torch.randn(S, B, L, V)
    ids = torch.zeros(B, L, dtype=torch.long)

    class Fixed(Noisy):
        def prior_loss(self):
            return torch.tensor(1.7)

    whole = dip_loss(Fixed(config, logits.flatten(0, 1)), {"input_ids": ids, "labels": labels})
    num_items = (labels[:, 1:] != -100).sum()
    parts = [
        dip_loss(Fixed(config, logits[:, b]), {"input_ids": ids[b : b + 1], "labels": labels[b : b + 1]}, num_items)
        for b in range(B)
    ]
    for name in whole._fields:
        assert sum(getattr(part, name).item() for part in parts) == pytest.approx(
            getattr(whole, name).item(), rel=1e-5
        )


@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_router_losses_of_micro_batches_add_up_to_that_of_the_large_batch(num_samples):
    """The tokens of all micro-batches are the same here, and so is their load; their labels are not."""
    base = build("mixtral")
    base.config.output_router_logits, base.router_aux_loss_coef = True, 0.5
    model = dip_model(base, noise_scale="absolute", init_noise_std=0.0, num_samples=num_samples).train()
    part = make_batch("llama")
    num_supervised = (2, 4, 7)  # of the ten tokens at most
    parts = [{**part, "labels": part["labels"].masked_fill(torch.arange(10) >= 3 + n, -100)} for n in num_supervised]
    whole = {name: torch.cat([batch[name] for batch in parts]) for name in part}
    num_items = (whole["labels"][:, 1:] != -100).sum()
    aux_loss = model(**part).aux_loss.item()

    results = [dip_loss(model, whole), *(dip_loss(model, batch, num_items) for batch in parts)]
    router, *routers = [(result.loss - result.nll - result.prior - result.stability).item() for result in results]
    assert router == pytest.approx(0.5 * aux_loss, rel=1e-5) and router > 0.5
    assert sum(routers) == pytest.approx(router, rel=1e-5)
    shares = [(batch["labels"][:, 1:] != -100).sum().item() / num_items.item() for batch in parts]
    assert routers == pytest.approx([share * router for share in shares], rel=1e-4)


@pytest.mark.parametrize("num_items", [None, 0])
@pytest.mark.parametrize("whole_logits", [False, True])
def test_a_batch_without_a_supervised_token_costs_its_prior_alone(whole_logits, num_items):
    config = {"num_samples": 2, "stability_loss_weight": 0.5}
    batch = make_batch("llama")
    if whole_logits:
        model = Noisy(DipConfig(weights="frozen", **config), torch.randn(8, 10, 11))
        del batch["attention_mask"]
    else:
        model = dip_model(noise_scale="absolute", **config).train()
    result = dip_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}, num_items)
    assert result.nll == 0 and result.stability == 0
    # With no token in the whole step, as in one of its batches, the prior's share is none.
    assert result.loss == result.prior == (model.prior_loss() if num_items is None else 0)
    result.loss.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_of_classes_needs_no_shift():
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    result = dip_loss(Noisy(DipConfig(weights="frozen"), logits), {"input_ids": labels, "labels": labels})
    assert result.nll.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_labels_are_required():
    with pytest.raises(ValueError, match=r"needs `labels` in the batch, got \['input_ids'\]"):
        dip_loss(Noisy(DipConfig(weights="frozen"), torch.zeros(1, 2, 3)), {"input_ids": torch.zeros(1, 2)})


LABELLED = ["classes", "regression", "multi_label", "tokens", "masked", "t5", "bart", "marian", "whisper"]
NO_CLASSES = ["regression", "multi_label"]
OWN_LOSSES = {
    "another loss": lambda: HasALossOfItsOwn(build("llama").config),
    "labels not shifted": unshifted_bart,
}


def noiseless(base, **config):
    """A model whose noise and prior are zero, in training mode."""
    config = {"noise_scale": "absolute", "init_noise_std": 0.0, "prior_weight": 0.0} | config
    return dip_model(base, target_modules=r".*(layers?|block)\.\d+", **config).train()


def model_and_batch(name):
    if name in OWN_LOSSES:
        return OWN_LOSSES[name](), make_batch("llama")
    return build_task(name), make_task_batch(name)


@pytest.mark.parametrize("name", [*LABELLED, *OWN_LOSSES])
def test_the_data_term_is_the_models_own_loss(name):
    base, batch = model_and_batch(name)
    model = noiseless(base, num_samples=2)
    expected = model(**batch).loss
    wanted = gradients(model, expected)
    model.zero_grad()
    result = dip_loss(model, batch)
    assert result.nll.item() == result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in gradients(model, result.loss).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, wanted[parameter], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*NO_CLASSES, "tokens", "t5"])
def test_micro_batches_of_an_own_loss_add_up(name):
    model, batch = noiseless(build_task(name), num_samples=2), make_task_batch(name)
    num_items = (batch["labels"] != -100).sum()
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
    total = sum(dip_loss(model, part, num_items).loss.item() for part in parts)
    assert total == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("target", ["log_prob", "logits"])
@pytest.mark.parametrize("name", sorted({*LABELLED} - {*NO_CLASSES}))
def test_stability_is_the_variance_over_the_samples_of_a_model_of_classes(name, target):
    config = {"num_samples": 3, "stability_loss_weight": 0.7, "stability_target": target}
    model = dip_model(build_task(name), noise_scale="absolute", target_sites="linear", prior_weight=0.0, **config)
    batch = make_task_batch(name)
    with model.sampling(seed=5):
        logits = model(**{key: value.repeat(3, *[1] * (value.dim() - 1)) for key, value in batch.items()}).logits
    with model.sampling(seed=5):
        result = dip_loss(model, batch)
    supervised = batch["labels"] != -100
    samples = torch.stack([sample[supervised] for sample in logits.chunk(3)])
    log_probs = samples.log_softmax(-1).gather(-1, batch["labels"][supervised].expand(3, -1)[..., None])
    variance = (log_probs if target == "log_prob" else samples).var(0).sum(-1).mean()
    assert result.stability.item() == pytest.approx(0.7 * variance.item(), rel=1e-4) and variance > 0
    assert result.nll.item() == pytest.approx(-log_probs.mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", [*NO_CLASSES, *OWN_LOSSES])
def test_a_stability_term_without_known_classes_is_refused(name):
    base, batch = model_and_batch(name)
    model = noiseless(base, num_samples=2, stability_loss_weight=0.1)
    with pytest.raises(ValueError, match="is not known to predict classes.*set stability_loss_weight=0"):
        dip_loss(model, batch)


def test_labels_of_another_length_than_the_outputs_are_no_classes():
    base = build_task("tokens")
    base.loss_type = "ForCTC"  # of one length here, but labels of no output in particular
    model = noiseless(base, num_samples=2, stability_loss_weight=0.1)
    with pytest.raises(ValueError, match="is not known to predict classes"):
        dip_loss(model, make_task_batch("tokens"))


def test_an_own_loss_without_a_supervised_label_costs_nothing():
    model, batch = noiseless(build_task("tokens"), num_samples=2), make_task_batch("tokens")
    result = dip_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    result.loss.backward()
    assert result.loss == 0
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())

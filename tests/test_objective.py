"""Eqs. (2) to (4) against a plain reference that loops over samples and tokens."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from dipnet_hf import DipConfig, dip_loss, get_dip_model, kl_weights
from dipnet_hf.batches import expand_batch
from dipnet_hf.objective import prior_loss, stability_penalty
from tests.tiny_models import CAUSAL, build


def test_kl_weights_give_the_kl_divergence_up_to_a_constant():
    alpha, beta = kl_weights(prior_std=0.3, weight=2.0)
    gamma = 0.3**2
    prior = torch.distributions.Normal(0.0, 0.3)
    values = []
    for variance in (0.01, 0.09, 1.0):
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, math.sqrt(variance)), prior)
        values.append(alpha * variance - beta * math.log(variance) - 2.0 * float(kl))
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
    logvar = torch.tensor([math.log(gamma)], requires_grad=True)
    prior_loss([logvar], alpha, beta).backward()
    assert abs(float(logvar.grad)) < 1e-6  # the minimum is at lambda = gamma


@pytest.mark.parametrize("bad", [dict(prior_std=0.0, weight=1.0), dict(prior_std=-1.0, weight=1.0)])
def test_kl_weights_refuse_a_prior_without_width(bad):
    with pytest.raises(ValueError, match="prior_std must be positive"):
        kl_weights(**bad)
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        kl_weights(0.1, -1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_prior_loss_equals_eq_3(reduction):
    logvars = [torch.randn(5), torch.randn(3)]
    values = [0.7 * math.exp(v) - 0.2 * v for logvar in logvars for v in logvar.tolist()]
    expected = sum(values) / (len(values) if reduction == "mean" else 1)
    assert float(prior_loss(logvars, 0.7, 0.2, reduction)) == pytest.approx(expected, rel=1e-5)


def test_zero_variance_without_a_prior_costs_nothing():
    assert float(prior_loss([torch.full((3,), -math.inf)], 0.0, 0.0)) == 0.0


def test_stability_penalty_is_the_unbiased_variance():
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])  # 3 samples of 2 tokens
    assert float(stability_penalty(values.flatten(), 3)) == pytest.approx(4.0 + 3.0)
    logits = torch.randn(4 * 6, 7)
    assert float(stability_penalty(logits, 4)) == pytest.approx(float(logits.view(4, 6, 7).var(0).sum()), rel=1e-5)


def test_expand_batch_repeats_sample_by_sample():
    batch = {
        "input_ids": torch.arange(6).view(2, 3),
        "labels": torch.arange(6).view(2, 3),
        "position_ids": torch.arange(6).view(2, 3),
        "cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "max_length_q": 3,
    }
    out = expand_batch(batch, 3)
    assert torch.equal(out["input_ids"], torch.cat([batch["input_ids"]] * 3))
    assert torch.equal(out["cu_seq_lens_q"], torch.tensor([0, 2, 5, 7, 10, 12, 15], dtype=torch.int32))
    assert out["max_length_q"] == 3
    assert expand_batch(batch, 1) is batch


def test_boundaries_that_only_positions_tell_are_made_known():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    expanded = expand_batch(batch, 2)
    for side in "qk":
        assert expanded[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5, 8, 10]
        assert expanded[f"max_length_{side}"] == 3
    assert "cu_seq_lens_q" not in expand_batch({**batch, "position_ids": torch.arange(5)[None]}, 2)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_padding_free_row_costs_what_its_sequences_cost(num_samples):
    """Noise off: sequences in one row see nothing of each other, in whichever copy of the row."""
    config = DipConfig(init_noise_std=0.0, noise_scale="absolute", weights="full", num_samples=num_samples)
    model = get_dip_model(build("llama"), config).train()
    sequences = [torch.arange(3, 9), torch.arange(20, 24), torch.arange(40, 49)]
    row = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    labels = row.masked_fill(positions == 0, -100)
    packed = dip_loss(model, {"input_ids": row, "labels": labels, "position_ids": positions})
    num_tokens = sum(len(sequence) - 1 for sequence in sequences)
    alone = [dip_loss(model, {"input_ids": ids[None], "labels": ids[None]}, num_tokens) for ids in sequences]
    assert packed.nll.item() == pytest.approx(sum(result.nll.item() for result in alone), rel=1e-5)


class Noisy(nn.Module):
    """Stands for a DIP model: its logits differ between the rows of one sample and the next by fixed draws."""

    def __init__(self, config, logits):
        super().__init__()
        self.active_dip_config = config
        self.network = SimpleNamespace(shifts_labels=logits.dim() == 3)
        self.logits = nn.Parameter(logits)
        self.hidden_state_capture = SimpleNamespace(capturing=lambda shape: contextlib.nullcontext(), pop=lambda: None)
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


def test_a_batch_of_classes_needs_no_shift():
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    result = dip_loss(Noisy(DipConfig(weights="frozen"), logits), {"input_ids": labels, "labels": labels})
    assert result.nll.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)


def test_what_cannot_be_repeated_is_refused():
    batch = {"labels": torch.zeros(2, 3), "position_ids": torch.zeros(3, 2, 3)}  # as of some vision-language models
    with pytest.raises(
        ValueError, match=r"position_ids of shape \(3, 2, 3\) does not have one for each of the 2 rows"
    ):
        expand_batch(batch, 2)
    with pytest.raises(ValueError, match="repeats the rows of `labels`"):
        expand_batch({"input_ids": torch.zeros(2, 3)}, 2)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_targets_are_those_of_the_model_itself(num_samples):
    """Shifted for every causal model, not for an encoder-decoder or a masked one: the loss is the model's own."""
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=20,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_decoder_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )
    ids = torch.randint(1, 20, (2, 5))
    batch = {"input_ids": ids, "labels": torch.where(ids % 3 == 0, -100, ids)}
    for model in (*map(build, CAUSAL), bert, t5):
        expected = model(**batch).loss.item()
        config = DipConfig(weights="frozen", init_noise_std=0.0, noise_scale="absolute", num_samples=num_samples)
        assert dip_loss(get_dip_model(model, config).train(), batch).nll.item() == pytest.approx(expected, rel=1e-5)


def test_labels_are_required():
    with pytest.raises(ValueError, match=r"needs `labels` in the batch, got \['input_ids'\]"):
        dip_loss(Noisy(DipConfig(weights="frozen"), torch.zeros(1, 2, 3)), {"input_ids": torch.zeros(1, 2)})

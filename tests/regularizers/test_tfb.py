"""TFB: the same weights after its rotation, closed forms of its noise, the level that the search finds, files."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from dipnet_hf.regularizers import TFB
from dipnet_hf.regularizers.tfb import largest_allowed
from tests.tiny_models import build, make_batch


class OneLayer(nn.Module):
    """A linear layer as a model."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.linear(x))


def trained_model():
    """A Llama with LoRA that has learned something, in eval mode."""
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear")).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.1)
    return model


def attached(model, **settings):
    method = TFB(**settings)
    method.attach(model)
    return method


def rotated(rank=2):
    """A linear layer with a B of such a rank, rotated, with noise of level 0.5."""
    torch.manual_seed(0)
    model = get_peft_model(OneLayer(), LoraConfig(r=2, lora_alpha=6, target_modules=["linear"])).eval()
    method = attached(model)
    site = method.sites[0]
    nn.init.normal_(site.b_OR)
    if rank == 1:
        site.b_OR.data[:, 1] = 2 * site.b_OR[:, 0]
    before = site.b_OR @ site.a_RI
    method.load_state_dict({"sigma": torch.tensor(0.5)})
    torch.testing.assert_close(site.b_OR @ site.a_RI, before)
    return model, method, site


def test_the_rotation_leaves_the_weights_and_makes_the_columns_of_b_orthogonal():
    _, _, site = rotated()
    gram = site.b_OR.T @ site.b_OR
    torch.testing.assert_close(gram, torch.diag(gram.diag()), atol=1e-5, rtol=0)
    torch.testing.assert_close(gram.diag().sqrt(), torch.linalg.svdvals(site.b_OR))


@pytest.mark.parametrize("rank", [1, 2])
def test_noise_has_the_same_deviation_in_every_direction_of_b_and_none_in_others(rank):
    """Of an input x, (scaling sigma |x|)^2 along each left singular vector of B."""
    model, method, site = rotated(rank)
    x = torch.randn(1, 1, 6)
    with torch.no_grad(), method.ensemble_samples(4000):
        noise = model(x=x).logits[:, 0, 0]
    noise = noise - model(x=x).logits[0, 0]
    u = torch.linalg.svd(site.b_OR.detach()).U
    covariance = u.T @ noise.T.cov() @ u
    expected = torch.zeros(5, 5)
    expected[range(rank), range(rank)] = (3 * 0.5 * x.norm()) ** 2
    torch.testing.assert_close(covariance, expected, atol=5 * expected.max().item() * (2 / 4000) ** 0.5, rtol=0)
    assert covariance[rank:, rank:].abs().max() < 1e-6 * expected.max()


@pytest.mark.parametrize("largest", [1e-5, 0.0123, 0.9])
def test_the_search_finds_the_largest_allowed_level(largest):
    found = largest_allowed(lambda level: level**2 <= largest**2, 1e-6, 1.0, 12)
    assert found <= largest < found * 1e6 ** (1 / 2**12) * (1 + 1e-9)


def test_a_search_that_ends_at_its_edges():
    assert largest_allowed(lambda level: True, 1e-6, 1.0, 12) == 1.0
    with pytest.raises(ValueError, match="Even noise of 1e-06 costs more than is allowed"):
        largest_allowed(lambda level: False, 1e-6, 1.0, 12)


@torch.no_grad()
def test_the_fitted_level_costs_what_is_allowed():
    """The loss of the mean network, averaged over tokens, not over batches, rises by 0.05 within the search's step."""
    model, batches = trained_model(), [make_batch("llama", 4), make_batch("llama", 1)]
    for batch in batches:  # what the network says is what noise can only make less likely
        said = model(input_ids=batch["input_ids"]).logits.argmax(-1)
        batch["labels"][:, 1:] = said[:, :-1].where(batch["labels"][:, 1:] != -100, -100)
    plain = model(**batches[0]).logits
    method = attached(model, loss_increase=0.05, num_samples=3)

    def loss():
        sums = [model(**batch).loss * (batch["labels"][:, 1:] != -100).sum() for batch in batches]
        return sum(sums) / sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)

    before = loss()
    method.fit(batches)
    sigma = method.sigma
    torch.testing.assert_close(model(**batches[0]).logits, plain, atol=2e-6, rtol=1e-5)
    with method.ensemble(3):
        assert before + 0.045 < loss() <= before + 0.05 + 1e-6
        method.sigma = 1.01 * sigma
        assert loss() > before + 0.05


def test_it_is_saved_beside_the_adapter(tmp_path):
    model, batch = trained_model(), make_batch("llama")
    inputs = {"input_ids": batch["input_ids"]}
    method = attached(model)
    method.fit([batch])
    model.save_pretrained(tmp_path)
    method.save(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    again = attached(loaded)
    again.load(tmp_path)
    assert again.sigma == method.sigma
    first, second = (m.predict(inputs, 3).log_probs for m in (method, again))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_increase": 0.0}, "loss_increase of TFB must be positive, got 0.0"),
        ({"num_samples": 0}, "num_samples of TFB must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TFB(**settings)


def test_what_cannot_be_fitted_is_refused():
    model, batch = trained_model(), make_batch("llama")
    method = attached(model)
    with pytest.raises(ValueError, match=r"no level of noise yet: call fit\(batches\)"), method.ensemble(2):
        model(**batch)
    with pytest.raises(ValueError, match="No token of the batches has a label"):
        method.fit([{**batch, "labels": torch.full_like(batch["labels"], -100)}])
    fresh = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear")).eval()
    with pytest.raises(ValueError, match="B of this one is zero: train it first"):
        attached(fresh).fit([batch])
    model.train()
    with pytest.raises(ValueError, match="measures the network without dropout"):
        method.fit([batch])
    with pytest.raises(ValueError, match="TFB acts on the matrices of LoRA"):
        TFB().attach(build("llama"))


def test_a_rank_above_the_outputs_of_a_layer_leaves_the_weights_as_they_were():
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=24, target_modules=["k_proj"], init_lora_weights=False)).eval()
    batch = make_batch("llama")
    expected = model(**batch).logits
    method = TFB(loss_increase=0.5)
    method.attach(model)
    method._rotate()
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    method.sigma = 0.1
    assert all(method.std(number).isfinite().all() for number in range(len(method.sites)))

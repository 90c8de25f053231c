"""BLoB against torch's divergence, finite differences, closed forms of variances, and an interrupted run."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence
from transformers import Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from dipnet_hf.regularizers import BLoB, regularize
from dipnet_hf.regularizers.regularizer import Batch
from tests.helpers import dip_model, make_rows, make_trainer
from tests.tiny_models import build, make_batch


class OneLayer(nn.Module):
    """A linear layer as a model."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(6, 5, dtype=dtype)

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.linear(x))


def one_layer(dtype=torch.float32, **settings):
    """A linear layer with LoRA of rank 2 and scaling 3, and BLoB on it."""
    torch.manual_seed(0)
    model = get_peft_model(OneLayer(dtype), LoraConfig(r=2, lora_alpha=6, target_modules=["linear"]))
    model.base_model.model.linear.lora_B["default"].weight.data.normal_()
    method = BLoB(**{"init_std": 0.5} | settings)
    method.attach(model)
    if dtype == torch.float64:
        model.double()
    return model, method, method.sites[0]


def test_the_divergence_is_that_of_torch():
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))
    method = BLoB(prior_std=0.3)
    method.attach(model)
    expected = sum(
        kl_divergence(Normal(site.a_RI, method.std(number)), Normal(0.0, 0.3)).sum()
        for number, site in enumerate(method.sites)
    )
    torch.testing.assert_close(method.divergence(), expected)
    assert len(method.sites) == 21


def test_the_loss_adds_it_by_its_weight_and_the_batchs_share():
    model, method, _ = one_layer(kl_weight=0.25)
    batch = Batch({}, lambda: (torch.tensor(2.0), None), share=0.5)
    torch.testing.assert_close(method.loss(batch), 2.0 + 0.25 * 0.5 * method.divergence())


def test_gradients_are_those_of_finite_differences():
    """Of a Flipout pass and the divergence, in M, G and B, with the same draws."""
    model, method, site = one_layer(torch.float64, kl_weight=0.1)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    parameters = [site.a_RI, site.b_OR, method.state_dict()["linear.default"]]
    assert all(parameter.dtype == torch.float64 and parameter.requires_grad for parameter in parameters)

    def loss(*_):
        torch.manual_seed(0)
        return method.loss(Batch({}, lambda: (model(x=x).logits.square().sum(), None)))

    assert torch.autograd.gradcheck(loss, parameters)


def test_flipout_has_the_mean_network_and_the_closed_form_of_its_variance():
    """Var = scaling^2 sum_r B_r^2 sum_i (Omega_ri x_i)^2; within a row equal tokens agree, rows do not."""
    model, method, site = one_layer()
    x = torch.randn(6).expand(4000, 2, 6)
    with torch.no_grad():
        mean = model.eval()(x=x[:1]).logits[0, 0]
        first = model.train()(x=x).logits
        # The noise matrix is one for the batch, so its distribution shows over passes.
        outputs = torch.stack([model(x=x[:2, :1]).logits[:, 0] for _ in range(4000)])
    torch.testing.assert_close(first[:, 0], first[:, 1])
    variance = 9 * (site.b_OR.square() * (method.std(0).square() @ x[0, 0].square())).sum(1)
    for row in (0, 1):
        assert ((outputs[:, row].mean(0) - mean).abs() < 5 * (variance / 4000).sqrt()).all()
        assert ((outputs[:, row].var(0) - variance).abs() < 5 * variance * (2 / 4000) ** 0.5).all()
    between = ((outputs[:, 0] - mean) * (outputs[:, 1] - mean)).mean(0)
    assert (between.abs() < 5 * variance / 4000**0.5).all()
    # Over the rows of one pass, of which each has signs of its own, the mean is that of the network too.
    assert ((first[:, 0].mean(0) - mean).abs() < 5 * first[:, 0].std(0) / 4000**0.5).all()


def test_samples_of_the_ensemble_have_that_variance_too():
    model, method, site = one_layer()
    model.eval()
    x = torch.randn(1, 1, 6)
    with torch.no_grad(), method.ensemble_samples(4000):
        outputs = model(x=x).logits[:, 0, 0]
    variance = 9 * (site.b_OR.square() * (method.std(0).square() @ x[0, 0].square())).sum(1)
    assert ((outputs.mean(0) - model(x=x).logits[0, 0]).abs() < 5 * (variance / 4000).sqrt()).all()
    assert ((outputs.var(0) - variance).abs() < 5 * variance * (2 / 4000) ** 0.5).all()


def test_the_standard_deviations_begin_where_the_settings_say():
    _, method, _ = one_layer(init_std=0.04)
    assert method.std(0).min() >= 0.02 - 1e-6 and method.std(0).max() <= 0.04 + 1e-6


def test_the_divergence_alone_leads_to_the_prior():
    _, method, site = one_layer(prior_std=0.3)
    parameters = [site.a_RI, *method.state_dict().values()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        method.divergence().backward()
        optimizer.step()
    torch.testing.assert_close(method.std(0), torch.full((2, 6), 0.3), atol=1e-3, rtol=0)
    torch.testing.assert_close(site.a_RI, torch.zeros(2, 6), atol=1e-3, rtol=0)


def lora_trainer(folder, **arguments):
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear"))
    trainer = make_trainer(model, make_rows(), folder, Trainer, learning_rate=1e-2, **arguments)
    regularize(trainer, method := BLoB(init_std=0.05, kl_weight=1e-3))
    return trainer, method


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    trainer, method = lora_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    started = {name: root.detach().clone() for name, root in method.state_dict().items()}
    trainer.train()
    resumed, other = lora_trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, root in method.state_dict().items():
        assert root.dtype == torch.float32 and not torch.equal(root, started[name])
        assert torch.equal(other.state_dict()[name], root)
    for (name, parameter), same in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, same), name
    # The adapter's own file is one of stock PEFT.
    assert not [name for name in load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors") if "blob" in name]
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "checkpoint-4")
    again = BLoB(init_std=0.05, kl_weight=1e-3)
    again.attach(loaded.eval())
    again.load(tmp_path / "checkpoint-4")
    inputs = {"input_ids": make_batch("llama")["input_ids"]}
    trainer.model.eval()
    assert torch.equal(again.predict(inputs, 2).log_probs, method.predict(inputs, 2).log_probs)


def test_it_learns_beside_dip_and_is_no_part_of_its_adapter(tmp_path):
    batch = make_batch("llama")
    model = dip_model("llama", [batch], weights=LoraConfig(r=4, target_modules="all-linear"))
    method = BLoB()
    method.attach(model)
    method.backward(model.train(), batch)
    assert all(root.grad.abs().max() > 0 for root in method.state_dict().values())
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "blob" in name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_std": 0.0}, "prior_std of BLoB must be positive, got 0.0"),
        ({"init_std": float("nan")}, "init_std of BLoB must be positive, got nan"),
        ({"kl_weight": -1.0}, "kl_weight of BLoB must be at least 0, got -1.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BLoB(**settings)


def test_other_adapters_are_refused():
    with pytest.raises(ValueError, match="BLoB acts on the matrices of LoRA, and LlamaForCausalLM has none"):
        BLoB().attach(build("llama"))
    embedding = get_peft_model(build("llama"), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"BLoB knows plain LoRA .*embed_tokens \(Embedding\) is of another kind"):
        BLoB().attach(embedding)
    dora = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"q_proj \(Linear\) is of another kind: .* use_dora off"):
        BLoB().attach(dora)
    experts = get_peft_model(build("mixtral"), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="is of another kind: leave the layer out"):
        BLoB().attach(experts)

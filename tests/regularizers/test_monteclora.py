"""MonteCLoRA's variational loss against torch's divergences and PEFT's own sum, and what its draws repeat."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributions import MultivariateNormal, kl_divergence
from transformers import Trainer

from dipnet_hf.regularizers import MonteCLoRA, regularize
from tests.helpers import checkpointed, dip_model, losses, make_rows, make_trainer
from tests.tiny_models import build, make_batch


def config(**settings):
    monteclora = {"num_samples": 2, "buffer_size": 1, "kl_loss_weight": 0.1} | settings
    return LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, monteclora_config=monteclora)


def drawn(**settings):
    torch.manual_seed(0)
    return get_peft_model(build("llama"), config(**settings))


def test_the_loss_is_that_of_peft_added():
    batch, model = make_batch("llama"), drawn(use_entropy=True).train()
    regularizer = MonteCLoRA()
    regularizer.attach(model)
    model(**batch)  # uses the draw that PEFT makes with the model
    torch.manual_seed(1)
    found = regularizer.backward(model, batch)
    torch.manual_seed(1)
    expected = model(**batch).loss + model.base_model._get_monteclora_loss()
    assert found == pytest.approx(expected.item())
    assert model.base_model._get_monteclora_loss() > 0.1


def test_the_divergence_of_the_draws_is_torchs():
    """Of what the last pass has drawn from, times the number of samples."""
    model = drawn().train()
    model(**make_batch("llama"))
    sampler = model.base_model.model.model.layers[0].mlp.up_proj.lora_monteclora_sampler["default"]
    covariance = sampler.gaussian_var_prior.detach()
    normal = MultivariateNormal(torch.zeros(4), covariance)
    expected = 2 * kl_divergence(normal, MultivariateNormal(torch.zeros(4), torch.eye(4)))
    torch.testing.assert_close(sampler.multivariate_kl(covariance), expected, atol=1e-4, rtol=1e-4)


def test_the_variances_learn_from_it():
    found = []
    for penalty in (None, MonteCLoRA()):
        model, batch = drawn(sample_scaler=0.0).train(), make_batch("llama")
        if penalty is None:
            model(**batch).loss.backward()
        else:
            penalty.attach(model)
            penalty.backward(model, batch)
        grads = [parameter.grad for name, parameter in model.named_parameters() if name.endswith("std_prior")]
        found.append(sum(grad.norm() for grad in grads))
    assert found[0] == 0 < found[1]


def test_it_weighs_the_same_however_many_batches_are_accumulated(tmp_path, monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.monteclora.MontecloraSampler.get_variational_loss", lambda self: (3.0, 0.0))
    runs = []
    for penalty, batch_size, steps in [(None, 16, 1), (MonteCLoRA(), 16, 1), (MonteCLoRA(), 4, 4)]:
        arguments = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, max_steps=1)
        trainer = make_trainer(drawn(sample_scaler=0.0), make_rows(), tmp_path, Trainer, **arguments)
        if penalty is not None:
            regularize(trainer, penalty)
        trainer.train()
        runs.append(losses(trainer)[0])
    assert runs[1:] == pytest.approx([runs[0] + 3.0] * 2, rel=1e-4)


def test_beside_dip_it_finds_the_adapter_inside():
    model, regularizer = dip_model(weights=config()), MonteCLoRA()
    regularizer.attach(model)
    model.calibrate([make_batch("llama", 16)])
    assert regularizer.backward(model.train(), make_batch("llama")) > 4.2


@pytest.mark.parametrize(("buffer_size", "agree"), [(1, True), (150, False)])
def test_checkpointing_repeats_the_draws_of_a_buffer_of_one_alone(buffer_size, agree):
    """After the first pass, which uses the draw that PEFT makes with the model."""
    found = []
    for is_checkpointed in (False, True):
        model, batch = drawn(buffer_size=buffer_size, sample_scaler=1.0).train(), make_batch("llama")
        if is_checkpointed:
            checkpointed(model, {"use_reentrant": False})
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(1)
            model(**batch).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*found, atol=1e-5, rtol=1e-4) == agree


@pytest.mark.parametrize(
    "make_model", [lambda: build("llama"), lambda: get_peft_model(build("llama"), LoraConfig(r=2))]
)
def test_a_model_that_draws_no_lora_is_refused(make_model):
    with pytest.raises(ValueError, match="MonteCLoRA regularizes what LoRA draws, .* set monteclora_config of LoRA"):
        MonteCLoRA().attach(make_model())

"""NEFTune against transformers' own, and its noise's range."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from dipnet_hf.regularizers import NEFTune, regularize
from tests.helpers import dip_model, losses, make_rows, make_trainer, record
from tests.tiny_models import build, make_batch

MODELS = {
    "full": lambda: build("llama"),
    "lora": lambda: get_peft_model(build("llama"), LoraConfig(r=4, target_modules="all-linear")),
    "dip": lambda: dip_model(),
}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_it_is_transformers_own(tmp_path, kind):
    """To the bit, after two steps of the same seed; noise that changes the loss."""
    runs = []
    for alpha, regularizer in [(5.0, None), (None, NEFTune(alpha=5.0)), (None, None)]:
        torch.manual_seed(0)
        trainer = make_trainer(MODELS[kind](), make_rows(), tmp_path, Trainer, neftune_noise_alpha=alpha)
        if regularizer is not None:
            regularize(trainer, regularizer)
        trainer.train()
        runs.append(trainer)
    theirs, ours, plain = runs
    assert losses(ours) == losses(theirs) != losses(plain)
    for parameter, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("kind", MODELS)
def test_noise_is_uniform_at_the_embedding_and_in_training_alone(kind):
    model, regularizer, batch = MODELS[kind](), NEFTune(alpha=5.0), make_batch("llama")
    if kind == "dip":
        model.calibrate([make_batch("llama", 16)])
    name = next(name for name, _ in model.named_modules() if name.endswith("embed_tokens"))
    plain = record(model, [name], at_output=True)[name]
    logits = model.eval()(**batch).logits
    regularizer.attach(model)
    noisy = record(model, [name], at_output=True)[name]
    assert torch.equal(model(**batch).logits, logits)
    model.train()(**batch)
    assert torch.equal(noisy[0], plain[0])
    noise = (noisy[1] - plain[0]) * (10 * 32) ** 0.5 / 5.0  # ten tokens of 32 channels
    assert noise.abs().max() <= 1 + 1e-5
    assert abs(noise.mean()) < 5 * (1 / 3 / noise.numel()) ** 0.5
    assert abs(noise.square().mean() - 1 / 3) < 5 * (4 / 45 / noise.numel()) ** 0.5
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_detach_leaves_no_trace():
    model, regularizer = build("llama"), NEFTune()
    before = set(vars(model.get_input_embeddings()))
    regularizer.attach(model)
    regularizer.detach()
    assert set(vars(model.get_input_embeddings())) == before
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("alpha", [0.0, -5.0, float("nan"), float("inf")])
def test_bad_settings_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha of NEFTune must be positive and finite, got"):
        NEFTune(alpha=alpha)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_model_without_tokens_is_refused(name):
    with pytest.raises(ValueError, match="NEFTune adds noise to token embeddings, and .* has none"):
        NEFTune().attach(build(name))

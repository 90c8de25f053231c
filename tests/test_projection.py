"""A site's own parameters in a model of another dtype: they stay float32, and so does what they add."""

import pytest
import torch
from peft import PeftModel

from dipnet_hf import dip_loss
from tests.helpers import dip_model, gradients, logits, trained_model
from tests.tiny_models import NUM_LAYERS, build


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_leaves_the_noise_in_float32(dtype, tmp_path):
    model = trained_model()
    noise = {key: tensor.clone() for key, tensor in model.state_dict().items() if "dip_" in key}
    assert len(noise) == 3 * NUM_LAYERS and all(tensor.dtype == torch.float32 for tensor in noise.values())
    summary = model.noise_summary()
    model.to(dtype)
    assert model.noise_summary() == summary
    state = model.state_dict()
    assert all(state[key].dtype == torch.float32 and torch.equal(state[key], noise[key]) for key in noise)
    output = logits(model, seed=0)
    assert output.dtype == dtype and output.isfinite().all()
    assert not torch.equal(output, logits(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama").to(dtype), str(tmp_path))
    assert loaded.noise_summary() == summary
    assert all(torch.equal(loaded.state_dict()[key], noise[key]) for key in noise)


def test_bfloat16_follows_float32(batch):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = dip_model("llama", [batch]).train().to(dtype)
        with model.sampling(seed=0):
            results.append(gradients(model, dip_loss(model, batch).loss))
    for (name, expected), actual in zip(results[0].items(), results[1].values()):
        if "dip_logvar" in name:
            assert actual.dtype == torch.float32
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < 0.1, (name, error)


def test_float64_follows_float32(batch):
    losses, grads = [], []
    for dtype in (torch.float32, torch.float64):
        model = dip_model(build("llama").to(dtype), [batch], num_samples=2).train()
        with model.sampling(seed=0):
            losses.append(dip_loss(model, batch).loss)
        grads.append(gradients(model, losses[-1]))
    torch.testing.assert_close(losses[0].double(), losses[1].double(), atol=1e-5, rtol=1e-5)
    for name, expected in grads[1].items():
        assert expected.dtype == (torch.float32 if "dip_logvar" in name else torch.float64)
        torch.testing.assert_close(grads[0][name], expected.float(), atol=1e-5, rtol=1e-4)

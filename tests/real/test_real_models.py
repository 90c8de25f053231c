"""What no model built from a config can tell: that a pretrained LLM survives the default noise."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dipnet_hf import DipConfig, dip_loss, get_dip_model
from dipnet_hf.scale import channel_scale
from tests.helpers import predictions, projections

PROBLEMS = [
    ("A pack costs 76 dollars. How much do 3 packs cost?", "76 * 3 = 228\n#### 228"),
    ("Dan had 4 dollars and spent 3. How much is left?", "4 - 3 = 1\n#### 1"),
    ("Paco had 26 cookies and ate 9 of them. How many did he have left?", "26 - 9 = 17\n#### 17"),
    ("There are 7 rows of 12 chairs each in the hall. How many chairs are there?", "7 * 12 = 84\n#### 84"),
]


def load(folder):
    """The model in float32, and the problems as two batches with labels on the answers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for question, answer in PROBLEMS:
        prompt = f"Question: {question}\nAnswer:"
        num_prompt_tokens = len(tokenizer(prompt)["input_ids"])
        input_ids = tokenizer(f"{prompt} {answer}")["input_ids"]
        rows.append((input_ids, [-100] * num_prompt_tokens + input_ids[num_prompt_tokens:]))
    length = max(len(input_ids) for input_ids, _ in rows)
    padded = {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    }
    return model, [{name: value[i : i + 2] for name, value in padded.items()} for i in (0, 2)]


@torch.no_grad()
def divergence(model, batches):
    """How far noise takes the predictions of supervised tokens, in nats per token: the mean of eight draws."""
    off = [predictions(model, batch) for batch in batches]
    with model.sampling(seed=1):
        noisy = [predictions(model, batch) for batch in batches * 8]
    return torch.nn.functional.kl_div(torch.cat(noisy), torch.cat(off * 8), reduction="batchmean", log_target=True)


def test_the_default_noise_is_survived_where_the_rms_of_a_site_is_not(real_model, tmp_path):
    base, batches = load(real_model)
    config = DipConfig(weights=LoraConfig(r=4, target_modules="all-linear"))
    model = get_dip_model(base, config, calibration=batches)
    off, *_ = model.noise_sweep(batches, [], per_site=False)
    noisy = model.noise_sweep(batches, [model.init_noise_std], per_site=False)[-1]["loss"]
    assert noisy < off["loss"] + 0.15
    assert divergence(model.eval(), batches) == pytest.approx(config.init_loss_increase, rel=0.6)

    # Unlike a stand-in, a real model has its massive token and outlier channels everywhere.
    sites = projections(model)
    middle = model.get_base_model().get_submodule(list(sites)[len(sites) // 2])
    inputs = []
    hook = middle.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        loss = model.eval()(**batches[0]).loss
    hook.remove()
    assert dip_loss(model.train(), batches[0]).nll < loss + 0.3  # other draws, of half the tokens
    x = inputs[0][batches[0]["attention_mask"].bool()]
    assert x.square().mean().sqrt() > 5 * channel_scale(x).median()
    scales = [projection.scale.clone() for projection in sites.values()]
    for projection in sites.values():  # as version 0.1 did by default
        projection.set_noise(scale=x.square().mean().sqrt())
    assert model.noise_sweep(batches, [0.05], per_site=False)[-1]["loss"] > off["loss"] + 2
    for projection, scale in zip(sites.values(), scales, strict=True):
        projection.set_noise(scale=scale)

    # Training, ensemble and storage.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3, weight_decay=0.0)
    for _ in range(3):
        dip_loss(model.train(), batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert model(**batches[0]).loss < loss
        with model.ensemble(2):
            assert model(**batches[0]).loss < loss + 0.15
            expected = model(**batches[0]).logits
    model.save_pretrained(tmp_path)
    del model, base
    loaded = PeftModel.from_pretrained(load(real_model)[0], tmp_path).eval()
    with torch.no_grad(), loaded.ensemble(2):
        assert torch.equal(loaded(**batches[0]).logits, expected)

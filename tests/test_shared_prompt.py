"""Several answers after one prompt against a pass for each of them."""

import pytest
import torch

from dipnet_hf import DipConfig, DipTrainer, dip_loss, get_dip_model
from dipnet_hf.noise import draw_noise
from dipnet_hf.shared_prompt import by_sample, lengthen
from tests.test_trainer import make_rows, make_trainer
from tests.tiny_models import CAUSAL, build, make_batch


def make(name="llama", std=0.3, **config):
    config = {"num_samples": 3, "antithetic": False, "shared_prompt_noise": True} | config
    config = DipConfig(weights="full", noise_scale="absolute", init_noise_std=std, **config)
    return get_dip_model(build(name), config).train()


def padded(side):
    batch = make_batch("llama")
    if side == "left":
        order = batch["attention_mask"].argsort(dim=1, stable=True)
        batch = {name: tensor.gather(1, order) for name, tensor in batch.items()}
    return batch


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("side", ["right", "left"])
def test_without_noise_every_sample_is_the_plain_answer(name, side):
    batch = padded(side)
    base = build(name)
    inputs, sample_BW = lengthen(base, batch, 3)
    with torch.no_grad():
        lengthened = base(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        plain = base(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions
        ).logits
    logits_RV, targets_R = by_sample(lengthened, inputs["labels"], sample_BW, 3)
    mask = batch["labels"][:, 1:] != -100
    for logits, targets in zip(logits_RV.chunk(3), targets_R.chunk(3)):
        assert torch.equal(targets, batch["labels"][:, 1:][mask])
        torch.testing.assert_close(logits, plain[:, :-1][mask], atol=1e-5, rtol=1e-4)


def test_samples_share_the_prompts_noise_and_nothing_else(monkeypatch):
    """Each sample equals a pass over its own row with that row's noise put together from the lengthened one's."""
    model, batch = make(layers_to_transform=[0]), padded("right")
    seen = {}

    def keep(x, key, antithetic=False):
        seen["noise"] = draw_noise(x, key, antithetic)
        return seen["noise"]

    monkeypatch.setattr("dipnet_hf.noise.draw_noise", keep)
    inputs, sample_BW = model.base_model.share_prompts(batch, 3)
    with torch.no_grad():
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    lengthened = seen["noise"]
    length, start, copy_length = 10, 2, 8
    for sample in range(3):
        own = lengthened[:, :length].clone()
        if sample:
            first = length + (sample - 1) * copy_length
            own[:, start:] = lengthened[:, first : first + copy_length]
        monkeypatch.setattr("dipnet_hf.noise.draw_noise", lambda x, key, antithetic=False, own=own: own)
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        mask = batch["labels"][:, 1:] != -100
        ours = by_sample(outputs, inputs["labels"], sample_BW, 3)[0].chunk(3)[sample]
        torch.testing.assert_close(ours, alone[:, :-1][mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hidden", ["left padding", "a hole"])
def test_copies_do_not_see_what_the_mask_hides(hidden):
    """Nothing is a prompt, so that a copy begins where the row does; all samples are equal without noise."""
    ids = torch.arange(3, 13)[None]
    mask = torch.ones_like(ids)
    mask[:, : 3 if hidden == "left padding" else 0] = 0
    mask[:, 5] = hidden != "a hole"
    labels = ids.masked_fill(mask == 0, -100)
    base = build("llama")
    inputs, sample_BW = lengthen(base, {"input_ids": ids, "attention_mask": mask, "labels": labels}, 3)
    with torch.no_grad():
        logits = base(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    first, *others = by_sample(logits, inputs["labels"], sample_BW, 3)[0].chunk(3)
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-5)


def test_a_pass_has_one_prompt():
    batch = {"input_ids": torch.arange(3, 9)[None], "labels": torch.tensor([[-100, -100, -100, 6, 7, 8]])}
    inputs, sample_BW = lengthen(build("llama"), batch, 3)
    assert inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert inputs["labels"].tolist() == [[-100] * 3 + [6, 7, 8] + [-100, 6, 7, 8] * 2]
    assert sample_BW.tolist() == [[-1, -1] + [0] * 4 + [1] * 4 + [2] * 4]


@pytest.mark.parametrize("target", ["log_prob", "logits"])
def test_the_loss_without_noise_is_the_plain_one(target):
    batch = padded("right")
    shared = dip_loss(make(std=0.0, stability_loss_weight=0.5, stability_target=target), batch)
    plain = dip_loss(make(std=0.0, shared_prompt_noise=False), batch)
    torch.testing.assert_close(shared.nll, plain.nll)
    assert shared.stability.abs() < 1e-9


def test_the_trainer_takes_it(tmp_path):
    trainer = make_trainer(make(num_samples=2), make_rows(), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["nll"] > 0


def test_what_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs num_samples >= 2 and antithetic=False.*got num_samples=2"):
        DipConfig(num_samples=2, shared_prompt_noise=True)
    model, batch = make(), padded("right")
    with pytest.raises(ValueError, match="got token_type_ids too"):
        dip_loss(model, {**batch, "token_type_ids": torch.zeros_like(batch["labels"])})
    model.get_base_model().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="LlamaForCausalLM has attention 'flex_attention'"):
        dip_loss(model, batch)
    mistral = make("mistral")
    mistral.get_base_model().config.sliding_window = 9
    with pytest.raises(ValueError, match="rows within the sliding window of 9, got 10"):
        dip_loss(mistral, batch)
    experts = make("mixtral")
    experts.get_base_model().config.output_router_logits = True
    with pytest.raises(ValueError, match="does not know the load-balancing loss"):
        dip_loss(experts, batch)
    config = DipConfig(
        num_samples=2, antithetic=False, shared_prompt_noise=True, noise_scale="absolute", init_noise_std=0.05
    )
    vit = get_dip_model(build("vit"), config)
    with pytest.raises(ValueError, match="for causal language models, not ViTForImageClassification"):
        dip_loss(vit.train(), make_batch("vit"))
    trainer = make_trainer(make(num_samples=2), make_rows(), tmp_path, DipTrainer, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="needs DipTrainer's plain loss"):
        trainer.train()

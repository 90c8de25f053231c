"""Rows and tokens are found wherever they stand: streams first, length first, in one row, and padding among them."""

import pytest
import torch
from torch import nn
from transformers import XLNetConfig, XLNetLMHeadModel

from dipnet_hf import DipConfig, dip_loss, get_dip_model
from dipnet_hf.layout import Layout, TokenDims, find_token_dims
from dipnet_hf.noise import KeySource
from dipnet_hf.passes import FreshPass, _layout
from tests.helpers import dip_model, projections
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, make_batch


def test_rows_and_length_are_neighbours_in_either_order():
    assert find_token_dims((3, 7), 3, 7) == [TokenDims(0, 1)]
    assert find_token_dims((7, 3), 3, 7) == [TokenDims(1, 0)]
    assert find_token_dims((3, 3, 7), 3, 7) == [TokenDims(1, 2)]
    assert find_token_dims((3, 7, 3), 3, 7) == [TokenDims(0, 1), TokenDims(2, 1)]
    assert find_token_dims((5, 5), 5, 5) == [TokenDims(0, 1), TokenDims(1, 0)]
    assert find_token_dims((21,), 3, 7) == []
    assert find_token_dims((3, 1, 7), 3, 7) == [TokenDims(0, 2)]  # one head
    assert find_token_dims((3, 2, 7), 3, 7) == []


def test_what_is_known_of_a_site_decides_between_equal_sizes():
    layout = Layout(num_rows=5, length=5)
    assert layout.rows_dim((5, 5), known=None) == 0
    assert layout.rows_dim((5, 5), known=TokenDims(1, 0)) == 1
    assert layout.rows_dim((5, 9), known=TokenDims(1, 0)) == 0  # of another length than the text


def test_as_many_heads_as_rows_are_not_taken_for_them():
    layout = Layout(num_rows=4, length=7)
    assert layout.token_dims((4, 4, 7), known=None) is None and layout.rows_dim((4, 4, 7), known=None) == 0
    assert layout.token_dims((4, 4, 7), known=TokenDims(1, 2)) == TokenDims(1, 2)  # streams


def test_tokens_are_known_by_any_name():
    tokens = torch.ones(4, 8, dtype=torch.int64)
    assert _layout((), {"tokens": tokens})[:2] == _layout((tokens,), {})[:2] == (4, 8)
    assert _layout((), {"pixel_values": torch.ones(4, 3, 8, 8), "labels": tokens})[:2] == (4, None)


def test_an_ensemble_of_a_model_that_has_the_length_first_needs_no_calibration():
    """Four samples of two rows are as many rows as there are tokens."""
    model = dip_model(xlnet(), weights="frozen", noise_scale="absolute").eval()
    ids = make_batch("llama", 2)["input_ids"][:, :8].clamp(min=3)
    with torch.no_grad(), model.ensemble(4):
        both, alone = model(input_ids=ids, use_mems=False).logits, model(input_ids=ids[:1], use_mems=False).logits
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0)


def test_inputs_of_one_dimension_have_noise():
    model = get_dip_model(
        nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)),
        DipConfig(weights="frozen", target_modules=["1"], noise_scale="absolute", init_noise_std=0.1),
    )
    ids = torch.tensor([1, 2, 3])
    assert model.train()(ids).shape == (3, 4) and not torch.equal(model(ids), model.eval()(ids))


def test_no_mask_is_remembered_where_no_site_asks_for_it():
    model = dip_model("llama", noise_scale="absolute").train()
    draws = FreshPass(KeySource()).begin((), make_batch("llama"), list(projections(model).values()))[1]
    assert all(draw.layout.mask is None for draw in draws)


@pytest.mark.parametrize(
    ("shape", "is_text", "expected"),
    [
        ((12,), True, 0),  # all tokens in one row
        ((8,), True, None),  # some of them
        ((8,), False, 0),  # patches of images, two per row
        ((8, 5), True, 0),  # windows
        ((2, 4), True, 1),
        ((2, 6), True, None),
    ],
)
def test_halves_of_the_rows_are_found_or_not_told(shape, is_text, expected):
    assert Layout(num_rows=4, length=3, is_text=is_text).rows_dim(shape, known=None) == expected


def pair_noise(model, batch):
    """The noise of the first site in one pass on the batch twice, in pairs; calibrated before."""
    seen = []
    projection = next(iter(projections(model).values()))
    hook = projection.register_forward_hook(lambda module, args, output: seen.append((output - args[0]).detach()))
    dip_loss(model.train(), batch)
    hook.remove()
    return seen[-1]


def xlnet():
    config = XLNetConfig(vocab_size=VOCAB_SIZE, d_model=HIDDEN_SIZE, n_layer=2, n_head=4, d_inner=64, dropout=0.0)
    return XLNetLMHeadModel(config)


@pytest.mark.parametrize(("name", "rows_dim", "num_rows"), [("gemma3n_text", 1, 2), ("xlnet", 1, 3), ("xlnet", 1, 5)])
def test_pairs_are_of_rows_wherever_these_stand(name, rows_dim, num_rows):
    """With five rows a pass has as many rows as tokens; calibration, on five rows, has seen which is which."""
    input_ids = make_batch("llama", num_rows)["input_ids"].clamp(min=3)
    batch = {"input_ids": input_ids, "labels": input_ids}
    model = dip_model(
        xlnet() if name == "xlnet" else name, [batch], weights="frozen", num_samples=2, target_sites="decoder_layer"
    )
    noise = pair_noise(model, batch)
    assert noise.shape[rows_dim] == 2 * num_rows
    plus, minus = noise.split(num_rows, dim=rows_dim)
    torch.testing.assert_close(plus, -minus, atol=1e-5, rtol=0)
    others = noise.movedim(rows_dim, 0).flatten(1).corrcoef()[:num_rows, :num_rows] - torch.eye(num_rows)
    assert others.abs().max() < 5 * (noise.numel() / noise.shape[rows_dim]) ** -0.5
    if name == "gemma3n_text":
        assert torch.stack([stream.flatten() for stream in noise]).corrcoef()[0, 1].abs() < 0.2


@pytest.mark.parametrize(
    ("others", "is_text"),
    [
        ({"token_type_ids": torch.zeros(4, 10, dtype=torch.long)}, True),
        ({"pixel_values": torch.zeros(12, 9)}, False),
        ({"labels": torch.zeros(4, 7, dtype=torch.long)}, False),
    ],
    ids=["segments", "images", "a decoder's labels"],
)
def test_what_a_pass_tells_of_its_rows(others, is_text):
    batch = make_batch("llama")
    sites = list(projections(dip_model()).values())
    sites[-1].site = sites[-1].site._replace(spares_padding=True)  # one that asks for the mask
    _, draws = FreshPass(KeySource(0), antithetic=True).begin((), {**batch, **others}, sites)
    for draw in draws:
        assert (draw.layout.num_rows, draw.layout.length, draw.layout.is_text) == (4, 10, is_text)
        assert torch.equal(draw.layout.mask, batch["attention_mask"])


def test_pairs_are_refused_where_the_rows_are_not_told(tiny_llama, batch):
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

        def forward(self, x):
            return x + self.expert(x.flatten(0, 1)[:6]).mean()

    tiny_llama.model.layers[1].mlp = Some()
    fields = {"weights": "frozen", "target_modules": ["expert"], "init_noise_std": 0.1, "num_samples": 2}
    with pytest.raises(ValueError, match=r"shape \(6, 32\) does not tell which.*of 8 rows.*sampling='independent'"):
        dip_loss(get_dip_model(tiny_llama, DipConfig(**fields), calibration=[batch]).train(), batch)


# ---- padding ----


def left_padded(input_ids, num_pads=3, filler=0):
    pads = torch.full((len(input_ids), num_pads), filler)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(input_ids)], dim=1)
    return {"input_ids": torch.cat([pads, input_ids], dim=1), "attention_mask": mask}


@pytest.mark.parametrize("name", ["mamba2", "lfm2"])
@pytest.mark.parametrize("fields", [{"target_sites": "linear"}, {"target_modules": ["in_proj"]}], ids=str)
def test_padding_before_a_convolution_has_no_noise(name, fields):
    calibration = make_batch(name)
    model = dip_model(name, [calibration], weights="frozen", **fields).eval()
    input_ids = calibration["input_ids"][:, :7].clamp(min=3)
    padded = left_padded(input_ids)
    with torch.no_grad(), model.ensemble(2):
        together = model(**padded).logits[:, 3:]
        alone = model(input_ids=input_ids).logits
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # fresh noise: what stands in the padding changes nothing
        answers = []
        for filler in (0, 9):
            with model.sampling(seed=0):
                answers.append(model(**left_padded(input_ids, filler=filler)).logits[:, 3:])
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    projection = next(iter(projections(model).values()))
    noise = []
    projection.register_forward_hook(lambda module, args, output: noise.append(output - args[0]))
    with torch.no_grad(), model.sampling(seed=0):
        model(**padded)
    noise_BLD = noise[0].movedim(projection.site.channel_dim, -1)
    assert not noise_BLD[:, :3].any() and noise_BLD[:, 3:].all(dim=-1).any()


@torch.no_grad()
def test_a_mask_that_is_given_by_position_is_seen():
    model = dip_model("lfm2", [make_batch("lfm2")], weights="frozen", target_sites="linear").eval()
    padded = left_padded(make_batch("lfm2")["input_ids"][:, :7].clamp(min=3))
    network = model.get_base_model()  # a PeftModel hands on by name what it knows
    for context in (lambda: model.sampling(seed=0), lambda: model.ensemble(2)):
        with context():
            by_name = network(**padded).logits
        with context():
            assert torch.equal(network(padded["input_ids"], padded["attention_mask"]).logits, by_name)


# ---- ensembles ----


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
@torch.no_grad()
def test_an_ensemble_of_layers_that_see_more_or_less_than_all_tokens(name):
    model = dip_model(name, [make_batch(name)], weights="frozen").eval()
    input_ids = make_batch(name)["input_ids"][:2, :7].clamp(min=3)
    with model.ensemble(2):
        logits = model(input_ids=input_ids, use_cache=False).logits
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in input_ids])
        last = model(input_ids=input_ids, logits_to_keep=1).logits
        tokens = model.generate(input_ids=input_ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        steps = input_ids
        for _ in range(3):
            steps = torch.cat([steps, model(input_ids=steps, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(last, logits[:, -1:], atol=2e-5, rtol=1e-5)
    assert torch.equal(tokens, steps)
    assert not torch.allclose(logits.log_softmax(-1), model(input_ids=input_ids).logits.log_softmax(-1), atol=1e-3)

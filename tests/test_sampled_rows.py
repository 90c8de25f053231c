"""What holds for samples of any kind, here of equal ones: the rows' shapes, the loss, the logits' order, refusals."""

import pytest
import torch
import torch.nn.functional as F

from dipnet_hf.sampled_rows import SampledRows
from tests.tiny_models import build, build_task, make_batch


def rows_of(model, num_samples=2, combine=lambda logits_SBLV: logits_SBLV.mean(0), seed=0):
    """Samples of a network, whose hooks are put on it."""
    rows = SampledRows(model, num_samples, combine, seed)
    model.register_forward_pre_hook(lambda module, args, kwargs: ((), rows.repeat(kwargs).inputs), with_kwargs=True)
    model.register_forward_hook(lambda module, args, output: rows.end(output))
    return rows


@torch.no_grad()
def test_sample_s_of_row_b_is_row_s_times_B_plus_b():
    model, batch = build("llama"), make_batch("llama", num_rows=3)
    seen, shapes = [], []
    rows_of(model, 2, lambda logits: shapes.append(logits.shape) or logits[1])
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    model(input_ids=batch["input_ids"])
    assert torch.equal(seen[0], torch.cat([batch["input_ids"]] * 2))
    assert shapes == [(2, 3, 10, 64)]


@torch.no_grad()
def test_the_loss_is_that_of_what_the_samples_are_combined_to():
    model, batch = build("llama"), make_batch("llama")
    plain = model(**batch)
    rows_of(model, 3, lambda logits_SBLV: 2 * logits_SBLV[0])
    output = model(**batch)
    torch.testing.assert_close(output.logits, 2 * plain.logits)
    expected = F.cross_entropy(2 * plain.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@torch.no_grad()
def test_positions_do_not_count_padding_and_go_on_after_a_cache():
    model, batch = build("llama"), make_batch("llama")
    rows = SampledRows(model, 2, lambda logits: logits, 0)
    left_padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    repeated = rows.repeat({"input_ids": batch["input_ids"][:2, :4], "attention_mask": left_padded})
    assert repeated.positions_BL.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert repeated.num_rows == 2 and torch.equal(repeated.tokens, batch["input_ids"][:2, :4])
    assert repeated.inputs["attention_mask"].shape == (4, 4)
    cache = model(input_ids=batch["input_ids"][:1].repeat(2, 1)).past_key_values
    cache.dip_samples = (0, 2)
    step = rows.repeat({"input_ids": batch["input_ids"][:1, :1], "past_key_values": cache})
    assert step.positions_BL.tolist() == [[10]]
    image = SampledRows(build("vit"), 2, lambda logits: logits, 0).repeat(
        {"pixel_values": make_batch("vit")["pixel_values"]}
    )
    assert image.tokens is None and image.positions_BL is None


def test_what_has_no_samples_is_refused():
    with pytest.raises(ValueError, match="T5.* is an encoder-decoder"):
        SampledRows(build_task("t5"), 2, lambda logits: logits, 0)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        SampledRows(build("llama"), 0, lambda logits: logits, 0)
    rows = SampledRows(build("llama"), 2, lambda logits: logits, 0)
    input_ids = make_batch("llama")["input_ids"]
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name} is not available in an ensemble: each of the samples has"):
            rows.repeat({"input_ids": input_ids, name: True})

"""Eq. (2) inside models of transformers: the loss is their own, of shifted labels, padding-free rows and others."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from dipnet_hf import dip_loss
from tests.helpers import dip_model
from tests.tiny_models import CAUSAL, build


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_padding_free_row_costs_what_its_sequences_cost(num_samples):
    """Noise off: sequences in one row see nothing of each other, in whichever copy of the row."""
    model = dip_model(init_noise_std=0.0, noise_scale="absolute", num_samples=num_samples).train()
    sequences = [torch.arange(3, 9), torch.arange(20, 24), torch.arange(40, 49)]
    row = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    labels = row.masked_fill(positions == 0, -100)
    packed = dip_loss(model, {"input_ids": row, "labels": labels, "position_ids": positions})
    num_tokens = sum(len(sequence) - 1 for sequence in sequences)
    alone = [dip_loss(model, {"input_ids": ids[None], "labels": ids[None]}, num_tokens) for ids in sequences]
    assert packed.nll.item() == pytest.approx(sum(result.nll.item() for result in alone), rel=1e-5)


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
        model = dip_model(model, init_noise_std=0.0, noise_scale="absolute", num_samples=num_samples).train()
        assert dip_loss(model, batch).nll.item() == pytest.approx(expected, rel=1e-5)

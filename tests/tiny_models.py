"""Tiny models of many architectures, from configs, in milliseconds: hidden size 32, float32, no dropout.

What is peculiar to an architecture stands in its row; the tests ask the same of all.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    MarianMTModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperForConditionalGeneration,
)

NUM_LAYERS = 3
HIDDEN_SIZE = 32
VOCAB_SIZE = 64
NUM_CLASSES = 5


class Architecture(NamedTuple):
    """What the tests expect of an architecture, and what its config needs beyond the common fields."""

    num_linears: int = 7  # in a layer
    mlp: str = "mlp"  # what the mixing of channels is called in a layer
    config: dict = {}


CAUSAL = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(config={"head_dim": 8}),
    "gemma2": Architecture(config={"head_dim": 8}),
    "gemma3_text": Architecture(config={"head_dim": 8}),
    "phi3": Architecture(num_linears=4),
    "olmo2": Architecture(),
    "gpt2": Architecture(num_linears=4, config={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": Architecture(num_linears=4),
    "opt": Architecture(
        num_linears=6, mlp="fc1", config={"ffn_dim": 64, "word_embed_proj_dim": HIDDEN_SIZE, "dropout": 0.0}
    ),
    "falcon": Architecture(num_linears=4),
    # Experts are one parameter of three dimensions, not linear layers.
    "mixtral": Architecture(num_linears=4, config={"num_local_experts": 4}),
    "qwen3_moe": Architecture(
        num_linears=4,
        config={"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
# Models whose layers see more than rows of tokens; a few tests ask them what is peculiar.
PECULIAR = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
    # Streams stand before the rows.
    "gemma3n_text": {
        "head_dim": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "intermediate_size": [64] * 3,
    },
    # Keys and values are written from latents, which are what the cache holds.
    "deepseek_v3": {
        **{"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 3},
    },
    # The last layers see the last token alone when it is all that is asked for.
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}
VISION = {"vit": Architecture(num_linears=6)}
ARCHITECTURES = CAUSAL | VISION


_ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SEQ2SEQ = {
    **{"d_model": HIDDEN_SIZE, "encoder_layers": 2, "decoder_layers": NUM_LAYERS, "dropout": 0.0},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None},
}
# Models that do not predict the next token, and what their config needs.
TASKS: dict[str, tuple[type[PreTrainedModel], dict]] = {
    "classes": (LlamaForSequenceClassification, {"num_labels": NUM_CLASSES, "num_key_value_heads": 2}),
    "regression": (BertForSequenceClassification, {**_ENCODER, "num_labels": 1}),
    "multi_label": (BertForSequenceClassification, {**_ENCODER, "num_labels": NUM_CLASSES}),
    "tokens": (BertForTokenClassification, {**_ENCODER, "num_labels": NUM_CLASSES}),
    "spans": (BertForQuestionAnswering, _ENCODER),
    "masked": (BertForMaskedLM, _ENCODER),
    "t5": (
        T5ForConditionalGeneration,
        {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": NUM_LAYERS, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0},
    ),
    "bart": (BartForConditionalGeneration, _SEQ2SEQ),
    "marian": (MarianMTModel, _SEQ2SEQ),
    "whisper": (
        WhisperForConditionalGeneration,
        _SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    ),
}


def build_task(name: str) -> PreTrainedModel:
    """Build a row of `TASKS`; the same call gives the same weights, in eval mode."""
    model_class, settings = TASKS[name]
    common = {
        **{"hidden_size": HIDDEN_SIZE, "intermediate_size": 2 * HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS},
        **{"num_attention_heads": 4, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(model_class.config_class(**{**common, **settings})).eval()


def make_task_batch(name: str, num_rows: int = 4) -> dict[str, torch.Tensor]:
    """Make a batch with labels for a row of `TASKS`; source and target are padded, to one length."""
    batch = make_batch("llama", num_rows)
    ids, mask, tokens = batch["input_ids"], batch["attention_mask"], batch["labels"]
    labels = {
        "classes": ids[:, 0] % NUM_CLASSES,
        "regression": ids[:, 0] / VOCAB_SIZE,
        "multi_label": (ids[:, :NUM_CLASSES] % 2).float(),
        "tokens": torch.where(tokens == -100, -100, tokens % NUM_CLASSES),
    }
    if name == "spans":
        spans = {"start_positions": ids[:, 0] % 4, "end_positions": ids[:, 1] % 6}
        return {"input_ids": ids, "attention_mask": mask, **spans}
    if name == "whisper":
        features = torch.randn(num_rows, 8, 16, generator=torch.Generator().manual_seed(0))
        return {"input_features": features, "labels": tokens}
    if name in ("t5", "bart", "marian"):
        tokens = torch.where(torch.arange(10) < 4, ids, -100)  # the target ends before the source
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.get(name, tokens)}


def build(name: str, num_layers: int = NUM_LAYERS, hidden_size: int = HIDDEN_SIZE) -> PreTrainedModel:
    """Build a model: a row of `ARCHITECTURES`, another causal model by its type, or `"resnet"`.

    The same call gives the same weights, in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build(name, num_layers, hidden_size).eval()


def _build(name: str, num_layers: int, hidden_size: int) -> PreTrainedModel:
    if name == "resnet":
        return ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=NUM_CLASSES)
        )
    common = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
    }
    if name == "vit":
        return ViTForImageClassification(ViTConfig(**common, image_size=8, patch_size=4, num_labels=NUM_CLASSES))
    fields = common | {
        "vocab_size": VOCAB_SIZE,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(name, **fields | CAUSAL.get(name, Architecture()).config | PECULIAR.get(name, {}))
    return AutoModelForCausalLM.from_config(config)


def build_with_outliers() -> PreTrainedModel:
    """Build a stand-in for a pretrained language model, which predicts the next token and has what no config gives.

    As in real models, the first token (bos, 1) has a massive activation, so that its norm is 100 times that of the
    others, and two channels are 20 times the others and constant over tokens. Both are planted in the embedding. Token
    t is followed by `SUCCESSOR[t]`, which the head reads from the other channels.
    """
    model = build("llama")
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    meaning = embedding.clone()
    meaning[:, [*OUTLIER_CHANNELS, MASSIVE_CHANNEL]] = 0.0
    embedding[:, OUTLIER_CHANNELS] = 20.0
    embedding[1, MASSIVE_CHANNEL] = 100 * embedding[2:].norm(dim=1).mean()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight[SUCCESSOR] = meaning
    return model


OUTLIER_CHANNELS, MASSIVE_CHANNEL = [3, 17], 5
SUCCESSOR = torch.cat([torch.arange(3), torch.arange(3, VOCAB_SIZE).roll(-1)])


def make_outlier_batch(num_rows: int = 8, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make a batch of sequences that `build_with_outliers` predicts, each with bos first and padding on the right."""
    tokens = torch.randint(3, VOCAB_SIZE, (num_rows, 1), generator=torch.Generator().manual_seed(seed))
    while tokens.shape[1] < length - 1:
        tokens = torch.cat([tokens, SUCCESSOR[tokens[:, -1:]]], dim=1)
    input_ids = torch.cat([torch.ones(num_rows, 1, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(length) < length - torch.arange(num_rows)[:, None] % 4).long()
    supervised = mask.bool() & (torch.arange(length) >= 2)
    return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": input_ids.where(supervised, -100)}


def make_batch(name: str, num_rows: int = 4) -> dict[str, torch.Tensor]:
    """Make a batch with labels. Text has padding on the right, and its first three tokens have no label."""
    generator = torch.Generator().manual_seed(0)
    if name not in VISION and name != "resnet":
        input_ids = torch.randint(3, VOCAB_SIZE, (num_rows, 10), generator=generator)
        positions = torch.arange(10)
        mask = (positions < 10 - torch.arange(num_rows)[:, None] % 4).long()
        labels = torch.where((positions >= 3) & mask.bool(), input_ids, -100)
        return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}
    size = 32 if name == "resnet" else 8
    return {
        "pixel_values": torch.randn(num_rows, 3, size, size, generator=generator),
        "labels": torch.randint(NUM_CLASSES, (num_rows,), generator=generator),
    }


class Quadratic(torch.nn.Module):
    """A loss with closed forms, half of w H w in float64, H diagonal: its gradient is H w."""

    def __init__(self, curvature: list[float], weights: list[float]):
        super().__init__()
        self.curvature = torch.tensor(curvature, dtype=torch.float64)
        self.weights = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.curvature * self.weights**2).sum() / 2)

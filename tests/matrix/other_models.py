"""Models that are no causal language models, of images, of sound, of classes and of a second sequence; all tiny."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from tests.matrix.cases import Batch
from tests.matrix.shrinking import VOCAB_SIZE, enliven

NUM_CLASSES = 5
ALL_SITES = ("decoder_layer", "attention", "mlp", "linear", "embedding")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def images() -> Batch:
    """Seven images with classes; twice as many are as many as nothing else in the models."""
    pixels = torch.randn(7, 3, 32, 32, generator=_generator())
    return {"pixel_values": pixels, "labels": torch.arange(7) % NUM_CLASSES}


def texts() -> Batch:
    """Three padded texts with classes."""
    ids = torch.randint(5, 180, (3, 12), generator=_generator())
    mask = (torch.arange(12) < torch.tensor([[12], [10], [7]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.arange(3)}


def tagged_texts() -> Batch:
    """Three padded texts with a class per token."""
    batch = texts()
    return batch | {"labels": (batch["input_ids"] % NUM_CLASSES).where(batch["attention_mask"].bool(), -100)}


def masked_texts() -> Batch:
    """Three padded texts whose tokens are to be found again."""
    batch = texts()
    return batch | {"labels": batch["input_ids"].where(batch["attention_mask"].bool(), -100)}


def text_pairs() -> Batch:
    """Three padded texts with padded texts to write."""
    labels = torch.randint(5, 180, (3, 9), generator=_generator())
    labels[1, 7:] = -100
    return texts() | {"labels": labels}


def spectrograms() -> Batch:
    """Three spectrograms with texts to write."""
    return {"input_features": torch.randn(3, 16, 40, generator=_generator()), "labels": text_pairs()["labels"]}


def waves() -> Batch:
    """Three pieces of sound with classes."""
    return {"input_values": torch.randn(3, 1600, generator=_generator()), "labels": torch.arange(3)}


class OtherModel(NamedTuple):
    """A class of transformers, its config's fields, its inputs, and its sites: words, or regular expressions."""

    model_class: str
    config: dict[str, Any]
    make_batch: Callable[[], Batch]
    sites: tuple[str, ...] = ALL_SITES


_LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TEXT = _LAYERS | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "pad_token_id": 0}
_TEXT_CLASSES = _TEXT | _NO_DROPOUT | {"num_labels": NUM_CLASSES}
_VISION = _LAYERS | {"image_size": 32, "patch_size": 8}
_IMAGE_CLASSES = _VISION | _NO_DROPOUT | {"num_labels": NUM_CLASSES}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_SEQ2SEQ = _HEADS | {
    **{"vocab_size": VOCAB_SIZE, "d_model": 64, "encoder_layers": 3, "decoder_layers": 4, "encoder_ffn_dim": 128},
    **{"decoder_ffn_dim": 128, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}
_CONVOLUTIONS = {"num_channels": 3, "patch_size": 2, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1]}
_SOUND = _LAYERS | {
    **{"vocab_size": 32, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4]},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    **{"classifier_proj_size": 32, "num_labels": NUM_CLASSES, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    **{"activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0},
    **{"apply_spec_augment": False, "mask_time_prob": 0.0},
}
_ENCODER_LAYERS = r".*encoder\.layers\.\d+"

OTHER_MODELS: dict[str, OtherModel] = {
    "vit_classes": OtherModel("ViTForImageClassification", _IMAGE_CLASSES, images),
    "dinov2_classes": OtherModel("Dinov2ForImageClassification", _IMAGE_CLASSES | {"mlp_ratio": 2}, images),
    "resnet_classes": OtherModel(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": NUM_CLASSES},
        images,
        ("decoder_layer", r".*convolution", r".*layers\.\d+"),
    ),
    "convnext_classes": OtherModel(
        "ConvNextForImageClassification",
        _CONVOLUTIONS | {"num_labels": NUM_CLASSES},
        images,
        ("decoder_layer", r".*dwconv", r".*pwconv1", r".*layers\.\d+"),
    ),
    "convnextv2_classes": OtherModel(
        "ConvNextV2ForImageClassification",
        _CONVOLUTIONS | {"num_labels": NUM_CLASSES},
        images,
        (r".*dwconv", r".*pwconv1", r".*layers\.\d+"),
    ),
    "swin_classes": OtherModel(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        | {"num_labels": NUM_CLASSES, "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0},
        images,
        (*ALL_SITES, r".*blocks\.\d+", r".*layernorm_before"),
    ),
    "clip_classes": OtherModel(
        "CLIPForImageClassification",
        {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 32, "num_labels": NUM_CLASSES},
        images,
        (*ALL_SITES, r".*vision_model.*layers\.\d+"),
    ),
    "bert_classes": OtherModel("BertForSequenceClassification", _TEXT_CLASSES, texts),
    "roberta_classes": OtherModel("RobertaForSequenceClassification", _TEXT_CLASSES, texts),
    "electra_classes": OtherModel("ElectraForSequenceClassification", _TEXT_CLASSES | {"embedding_size": 32}, texts),
    "deberta_classes": OtherModel("DebertaForSequenceClassification", _TEXT_CLASSES | _DISENTANGLED, texts),
    "deberta_v2_classes": OtherModel("DebertaV2ForSequenceClassification", _TEXT_CLASSES | _DISENTANGLED, texts),
    "modernbert_classes": OtherModel(
        "ModernBertForSequenceClassification",
        _TEXT_CLASSES
        | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        | {"local_attention": 8, "global_attn_every_n_layers": 2},
        texts,
    ),
    "albert_classes": OtherModel(
        "AlbertForSequenceClassification",
        _TEXT_CLASSES | {"embedding_size": 32, "classifier_dropout_prob": 0.0},
        texts,
        (*ALL_SITES, r".*albert_layers\.0"),
    ),
    "distilbert_classes": OtherModel(
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCAB_SIZE, "dim": 64, "hidden_dim": 128, "n_layers": 4, "n_heads": 4, "dropout": 0.0}
        | {"attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": NUM_CLASSES},
        texts,
    ),
    "llama_classes": OtherModel("LlamaForSequenceClassification", _TEXT | {"num_labels": NUM_CLASSES}, texts),
    "qwen2_classes": OtherModel(
        "Qwen2ForSequenceClassification", _TEXT | {"num_labels": NUM_CLASSES, "num_key_value_heads": 2}, texts
    ),
    "bert_tags": OtherModel(
        "BertForTokenClassification", _TEXT_CLASSES, tagged_texts, ("decoder_layer", "linear", "embedding")
    ),
    "bert_masked": OtherModel(
        "BertForMaskedLM", _TEXT | _NO_DROPOUT, masked_texts, ("decoder_layer", "linear", "embedding")
    ),
    "t5_translation": OtherModel(
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB_SIZE, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 4}
        | {"num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0},
        text_pairs,
    ),
    "bart_translation": OtherModel(
        "BartForConditionalGeneration", _SEQ2SEQ, text_pairs, (*ALL_SITES, _ENCODER_LAYERS)
    ),
    "marian_translation": OtherModel(
        "MarianMTModel", _SEQ2SEQ | {"encoder_layers": 4}, text_pairs, ("decoder_layer", "attention", "embedding")
    ),
    "whisper_transcription": OtherModel(
        "WhisperForConditionalGeneration",
        _SEQ2SEQ
        | {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        spectrograms,
        (*ALL_SITES, _ENCODER_LAYERS),
    ),
    "wav2vec2_classes": OtherModel(
        "Wav2Vec2ForSequenceClassification", _SOUND, waves, (*ALL_SITES, r".*q_proj", r".*\.conv")
    ),
    "hubert_classes": OtherModel("HubertForSequenceClassification", _SOUND, waves, ("decoder_layer", "linear")),
}


def build_other(name: str) -> PreTrainedModel:
    """Build a row of `OTHER_MODELS` in eval mode, the same weights at each call."""
    row = OTHER_MODELS[name]
    model_class = getattr(transformers, row.model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**row.config))
    enliven(model)
    return model.eval()

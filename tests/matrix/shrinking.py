"""Every causal language model of the installed transformers, shrunk from its default config to run in milliseconds.

Sizes are known by the names that configs give them; a list with an entry per layer is cut so that every kind of layer
stays. What a family wants beside that stands in `_FAMILIES`.
"""

import math
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 200
NUM_LAYERS = 4
MAX_PARAMETERS = 30e6

# By size, the names of the fields that get it.
_SIZES = {
    64: """hidden_size d_model n_embd dim model_dim embed_dim emb_dim embedding_size embedding_dim word_embed_proj_dim
        hidden_dim dec_hidden_size attention_hidden_size out_hidden_size hidden_size_global lru_width feature_size
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size prefix_intermediate_size
        block_ff_dim feed_forward_size index_topk global_window_size backbone_hidden_size""",
    128: """intermediate_size ffn_dim d_ff dff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim mlp_dim d_inner
        dim_ff intermediate_size_mlp dense_intermediate_size emb_inner_dim mamba_d_ssm max_position_embeddings
        n_positions n_ctx max_seq_len max_sequence_length model_max_length max_target_positions max_source_positions
        original_max_position_embeddings""",
    NUM_LAYERS: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers depth num_blocks num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads num_experts num_local_experts n_routed_experts
        moe_num_experts ffn_num_experts mamba_dt_rank time_step_rank dim_per_layer_input""",
    2: """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads
        num_attention_groups num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts
        index_n_heads linear_num_key_heads n_groups mamba_n_groups mamba_ngroups n_mamba_heads zero_expert_num
        altup_num_inputs hc_mult hc_count o_groups type_vocab_size temporal_patch_size""",
    16: """head_dim attention_head_dim attention_head_size d_kv d_head dim_head kv_channels swa_head_dim
        global_head_dim v_head_dim qk_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim
        q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim mamba_headdim num_mel_bins ple_embed_dim""",
    8: """qk_rope_head_dim qk_nope_head_dim rotary_dim hidden_size_per_layer_input laurel_rank adapter_rank hc_lowrank
        mamba_d_state state_size ssm_state_size mamba_n_heads mamba_num_heads chunk_size mamba_chunk_size patch_size
        window_size""",
    32: "sliding_window sliding_window_size attention_chunk_size attention_window_size local_attention image_size",
    1: """n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts
        num_kv_shared_layers first_k_dense_replace moe_layer_start_index num_dense_layers num_mem_blocks""",
    0: "pad_token_id num_logits_to_keep",
    3: "conv_L_cache",
    VOCAB_SIZE: """vocab_size vocab_size_per_layer_input engram_vocab_size ngram_vocab_size_base decoder_vocab_size
        encoder_hash_byte_group_vocab""",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}
_MODALITY_TOKENS = {"image": 199, "video": 198, "audio": 197}
# Fields that a default config leaves open and the model needs.
_NEEDED = {
    *("head_dim", "num_key_value_heads", "n_group", "topk_group", "num_experts_per_tok"),
    *("n_routed_experts", "n_shared_experts"),
}
_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types")
_OWN_CACHE = ["sliding_attention", "full_attention"] * 2
_ALL_HEADS = {"num_key_value_heads": 4}

_FAMILIES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _ALL_HEADS,
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _OWN_CACHE[:2]},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note_text": _ALL_HEADS | {"head_dim": 16, "per_layer_config": {}},
    "gemma3n_text": {
        **{"layer_types": _OWN_CACHE, "num_kv_shared_layers": 2, "intermediate_size": [128] * 4},
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"layer_types": _OWN_CACHE, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"layer_types": _OWN_CACHE, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "L_bp_cycles": [2]},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"]},
    "prophetnet": {"num_buckets": 32, "is_encoder_decoder": False},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32},
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        **{"attn_layers": ["local"] * 4, "attention_head_size": 16, "local_attn_chunk_length": 8},
        **{"axial_pos_embds": False, "num_buckets": None},
    },
    "rwkv": {"context_length": 64},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        **{"layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 128, "attention_head_dim": 32},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False} | _ALL_HEADS,
    },
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "attention_hidden_size": 128},
        **{"attention_head_dim": 32, "n_mamba_heads": 8, "kv_channels": 16, "num_query_groups": 4} | _ALL_HEADS,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# They have no grouped queries.
_FAMILIES |= dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"], _ALL_HEADS)
_FAMILIES |= dict.fromkeys(
    ["glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu"], _ALL_HEADS
)


def causal_families() -> list[str]:
    """The model types that `AutoModelForCausalLM` knows, in order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family: str) -> PreTrainedModel:
    """Build the shrunken model of a family: float32, in eval mode, the same weights at each call.

    Raises:
        ValueError: it is still too large.
        Exception: whatever the config or the model raises, where the family cannot be shrunk in this way.
    """
    config = shrunken_config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
        if num_parameters > MAX_PARAMETERS:
            raise ValueError(f"{num_parameters / 1e6:.0f} million parameters")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    enliven(model)
    return model.eval()


def shrunken_config(family: str) -> PreTrainedConfig:
    """The default config of a family with small sizes, and as a decoder."""
    config_class = CONFIG_MAPPING[family]
    fields = _shrink(config_class().to_dict())
    if "is_decoder" in fields and not fields.get("is_encoder_decoder"):
        fields["is_decoder"] = True
    return config_class.from_dict(fields)


def _shrink(fields: dict[str, Any]) -> dict[str, Any]:
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    num_layers = next((fields[name] for name in names if isinstance(fields.get(name), int)), NUM_LAYERS)
    small = {name: _shrunken(name, value, num_layers) for name, value in fields.items() if name not in _UNWANTED}
    if small.get("qk_rope_head_dim") and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small | _FAMILIES.get(fields.get("model_type", ""), {})


_UNWANTED = ("transformers_version", "dtype", "torch_dtype", "_name_or_path")


def _shrunken(name: str, value: Any, num_layers: int) -> Any:
    """One field of a config at its small size."""
    if isinstance(value, dict):
        return _shrunken_dict(name, value)
    if isinstance(value, list):
        if name in _PER_LAYER or (len(value) == num_layers > NUM_LAYERS):
            return _keep_every_kind(value)
        return [_SIZE_OF.get(name, x) for x in value] if name in _SIZE_OF else value
    if value is None:
        return _SIZE_OF[name] if name in _NEEDED else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if name in _TOKENS:
        return _TOKENS[name]
    if name in _SIZE_OF:
        return _SIZE_OF[name]
    if re.search(r"drop|jitter", name):
        return type(value)(0)
    if re.search(r"token_(id|index)$", name):
        return _MODALITY_TOKENS.get(name.partition("_")[0], min(int(value), VOCAB_SIZE - 10))
    return value


def _shrunken_dict(name: str, value: dict[str, Any]) -> dict[str, Any]:
    if name == "per_layer_config":
        return {layer: fields for layer, fields in value.items() if int(layer) < NUM_LAYERS}
    if "model_type" in value or name.endswith("_config"):
        return _shrink(value)
    if "rope" not in name:
        return value
    # Rotary positions: by kind of layer, or the fields themselves.
    small = {key: _shrunken_dict(name, x) if isinstance(x, dict) else x for key, x in value.items()}
    sizes = {"mrope_section": [4, 2, 2], "original_max_position_embeddings": 128}
    sizes |= {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    return small | {key: size for key, size in sizes.items() if key in small}


def _keep_every_kind(values: list) -> list:
    """The first entries, the last of which make room for kinds that come later only."""
    kept = list(values[:NUM_LAYERS])
    kept += kept[-1:] * (NUM_LAYERS - len(kept))
    for kind in values:
        if kind not in kept:
            place = next((i for i in range(NUM_LAYERS - 1, -1, -1) if kept.count(kept[i]) > 1), None)
            if place is not None:
                kept[place] = kind
    return kept


def enliven(model: torch.nn.Module) -> None:
    """Make the weights large enough for every part of the model to matter, which at their start they are not.

    What a recurrence is made of stays as it is; other numbers there need not be stable.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            recurrent = re.search(r"A_log|dt_bias|time_decay|time_first|a_param|recurrent_param|sinks", name)
            if recurrent or not parameter.is_floating_point():
                continue
            if not torch.isfinite(parameter).all():
                parameter.zero_()
            if parameter.dim() >= 2 and parameter.std() < 0.06:
                parameter.normal_(0, min(0.3, 1 / math.sqrt(parameter.shape[-1])), generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))

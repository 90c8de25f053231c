"""The architectures of the paper's six models, for what needs their shapes and not their weights."""

from transformers import Gemma3Config, LlamaConfig, PretrainedConfig, Qwen2Config

GEMMA3_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}
GEMMA3_TEXT = {"vocab_size": 262_208, "head_dim": 256, "sliding_window": 1024, "query_pre_attn_scalar": 256}


def _llama(**sizes) -> LlamaConfig:
    return LlamaConfig(vocab_size=128_256, num_key_value_heads=8, max_position_embeddings=131_072, **sizes)


def _qwen2(**sizes) -> Qwen2Config:
    return Qwen2Config(max_position_embeddings=32_768, **sizes)


def _gemma3(**sizes) -> Gemma3Config:
    return Gemma3Config(text_config=GEMMA3_TEXT | sizes, vision_config=GEMMA3_VISION, mm_tokens_per_image=256)


# As the `config.json` of each has it; what is left out is the class's own default. Keys: names on the Hub.
PAPER_MODELS: dict[str, PretrainedConfig] = {
    "Qwen/Qwen2.5-3B": _qwen2(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B": _qwen2(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.2-3B": _llama(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B": _llama(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    ),
    "google/gemma-3-4b-pt": _gemma3(
        hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4,
    ),
    "google/gemma-3-12b-pt": _gemma3(
        hidden_size=3840, intermediate_size=15_360, num_hidden_layers=48, num_attention_heads=16,
        num_key_value_heads=8,
    ),
}  # fmt: skip

"""What is refused of `generate` while noise is on, and that a merged model has its own methods back."""

import pytest
import torch
from transformers import StaticCache

from tests.helpers import dip_model
from tests.tiny_models import build, make_batch


@pytest.fixture
def batch():
    return make_batch("llama")


@pytest.fixture
def model(batch):
    return dip_model("llama", [batch], weights="frozen", init_noise_std=0.5).eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "one token at a time, greedily or by sampling; got beam_search.*num_beams=1"),
        ({"prompt_lookup_num_tokens": 2}, "got assisted_generation.*leave out assistant_model"),
        ({"assistant_model": build("llama")}, "got assisted_generation"),
        ({"cache_implementation": "static"}, r"supports the caches .*'dynamic'.*got cache_implementation='static'"),
        ({"past_key_values": StaticCache(build("llama").config, max_cache_len=32)}, "static cache is not supported"),
        (
            {"return_dict_in_generate": True, "output_hidden_states": True},
            r"output_hidden_states is not available in an ensemble.*model.sampling",
        ),
    ],
)
def test_unsupported_generation_is_refused(model, batch, settings, message):
    with model.ensemble(2), pytest.raises(ValueError, match=message):
        model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=2, **settings)


def test_continuous_batching_within_a_context_is_refused(model, batch):
    """It would run in a thread of its own, without the context."""
    prompts = batch["input_ids"]
    for context in (model.sampling, model.deterministic, lambda: model.ensemble(2)):
        with context(), pytest.raises(ValueError, match="thread of its own, which this context does not reach"):
            model.generate_batch(inputs=prompts.tolist())
    with model.ensemble(2), pytest.raises(ValueError, match="Continuous batching runs in a thread of its own"):
        model.generate(input_ids=prompts, cache_implementation="paged")


def test_a_merged_model_has_its_own_methods(model, batch):
    guarded = {"_validate_generation_mode", "generate_batch"}
    assert guarded <= set(vars(model.get_base_model()))
    merged = model.merge_and_unload()
    assert not guarded & set(vars(merged))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        merged.generate(input_ids=batch["input_ids"], **settings),
        build("llama").eval().generate(input_ids=batch["input_ids"], **settings),
    )

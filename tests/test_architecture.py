"""What is asked of a network: its stack of layers, its head, its loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, GitConfig, GitForCausalLM

from dipnet_hf.architecture import (
    adds_router_loss,
    decoder_layers,
    layers_from,
    linears_of,
    plain_head,
    router_loss_weight,
)
from tests.tiny_models import NUM_LAYERS, build


class Nested(nn.Module):
    """A model whose blocks hold lists of as many modules as it has layers."""

    def __init__(self, num_blocks, has_layers):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=NUM_LAYERS)
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS)) for _ in range(num_blocks)
        )
        if has_layers:
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS))


def test_a_list_within_another_is_no_stack_of_layers():
    model = Nested(num_blocks=2, has_layers=True)
    assert decoder_layers(model) == [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    outer = Nested(num_blocks=NUM_LAYERS, has_layers=False)
    assert decoder_layers(outer) == [(f"experts.{i}", block) for i, block in enumerate(outer.experts)]
    with pytest.raises(ValueError, match=f"No stack of {NUM_LAYERS} layers was found in Nested.*target_modules"):
        decoder_layers(Nested(num_blocks=2, has_layers=False))


def git():
    """Text layers behind a vision encoder of as many."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
    return GitForCausalLM(GitConfig(**size, vocab_size=20, vision_config=size | {"image_size": 8, "patch_size": 4}))


def bart():
    size = {"vocab_size": 20, "d_model": 16, "encoder_layers": 2, "decoder_layers": NUM_LAYERS}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**size, **heads))


class AroundAnEncoderDecoder(nn.Module):
    """Its decoder is a whole encoder-decoder."""

    def __init__(self):
        super().__init__()
        self.language_model = bart().model
        self.config = self.language_model.config

    def get_decoder(self):
        return self.language_model


@pytest.mark.parametrize(
    ("make", "stack"),
    [
        (git, "git.encoder.layer"),
        (bart, "model.decoder.layers"),
        (AroundAnEncoderDecoder, "language_model.decoder.layers"),
    ],
)
def test_the_layers_of_a_composite_model_are_those_of_its_text(make, stack):
    assert [name for name, _ in decoder_layers(make())] == [f"{stack}.{i}" for i in range(NUM_LAYERS)]


def test_several_stacks_that_may_be_the_texts_are_refused():
    model = Nested(num_blocks=0, has_layers=True)
    model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS))
    model.config = SimpleNamespace(get_text_config=lambda decoder: TextConfig())
    with pytest.raises(ValueError, match=r"several stacks of 3 layers, \['layers', 'others'\].*target_modules"):
        decoder_layers(model)


class TextConfig(SimpleNamespace):
    num_hidden_layers = NUM_LAYERS


def test_a_list_for_each_part_of_a_layer_is_no_stack(tiny_llama):
    tiny_llama.model.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(NUM_LAYERS))
    assert decoder_layers(tiny_llama)[0][0] == "model.layers.0"
    tiny_llama.model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(NUM_LAYERS))
    with pytest.raises(ValueError, match=r"several stacks of 3 layers, \['layers', 'norms'\]"):
        decoder_layers(tiny_llama)


def test_a_model_without_a_known_stack_runs_all_samples_from_its_inputs_on():
    model = build("llama")
    assert layers_from(model, ["model.layers.2"]) == [model.model.layers[2]]
    model.config.num_hidden_layers = 2 * NUM_LAYERS
    assert layers_from(model, ["model.layers.2"]) == []


def test_experts_are_balanced_as_the_text_config_says():
    text = SimpleNamespace(output_router_logits=True, router_aux_loss_coef=0.02)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: text))
    assert adds_router_loss(model) and router_loss_weight(model) == 0.02
    model.router_aux_loss_coef = 0.0  # what it computes with; DBRX's config has it elsewhere
    assert router_loss_weight(model) == 0.0


def test_linears_that_learn_nothing_are_no_sites():
    class KeyIndexer(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq = nn.Linear(2, 2)

    mixer = nn.Module()
    mixer.A_log = nn.Parameter(torch.zeros(2))
    layer = nn.ModuleDict({"mixer": mixer, "indexer": KeyIndexer(), "attention": nn.ModuleDict()})
    for name in ("in_proj", "dt_proj"):
        mixer.add_module(name, nn.Linear(2, 2))
        layer["attention"][name] = nn.Linear(2, 2)
    assert linears_of(layer) == ["mixer.in_proj", "attention.in_proj", "attention.dt_proj"]


@pytest.mark.parametrize("change", ["meta", "hook", "class", "shape"])
def test_a_head_that_is_not_a_plain_linear_layer_is_left_alone(change):
    base = build("llama")
    head = base.lm_head
    if change == "meta":
        head.to("meta")
    elif change == "hook":
        head.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "class":
        own_forward = {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)}
        base.lm_head = type("OtherLinear", (nn.Linear,), own_forward)(32, 64, bias=False)
    else:
        head.weight = nn.Parameter(torch.zeros(0))  # as sharded by DeepSpeed
    assert plain_head(base) is None and plain_head(build("llama")) is not None

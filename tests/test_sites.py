"""Where noise enters: every architecture x every `target_sites`, named modules, convolutions, adapters, the errors."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import MllamaForCausalLM, MllamaTextConfig, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from dipnet_hf import DipConfig, get_dip_model
from dipnet_hf.config import TARGET_SITES
from dipnet_hf.sites import find_sites
from tests.helpers import assert_same, projections, record, unshifted_bart
from tests.tiny_models import ARCHITECTURES, CAUSAL, HIDDEN_SIZE, NUM_LAYERS, build, build_task, make_batch

STD = 0.1
STAGES = "resnet.encoder.stages"


def dip_config(**fields):
    return DipConfig(**{"weights": "frozen", "noise_scale": "absolute", "init_noise_std": STD} | fields)


def split_layers(pattern):
    """Split "a.[01].b" into what stands before the layers, the layers, and what stands after them."""
    before, _, rest = pattern.partition("[")
    layers, found, after = rest.partition("]")
    return (before, layers, after) if found else (pattern, [""], "")


def expected_names(model, architecture, target_sites):
    """The sites that `target_sites` should find, told by the modules' names and classes alone."""
    layers = next(name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == NUM_LAYERS)
    stack = [f"{layers}.{i}" for i in range(NUM_LAYERS)]
    if target_sites == "decoder_layer":
        return stack
    if target_sites == "mlp":
        return [f"{layer}.{architecture.mlp}" for layer in stack]
    if target_sites == "embedding":
        return [next(name for name, m in model.named_modules() if isinstance(m, nn.Embedding))]
    if target_sites == "linear":
        return [
            name
            for name, m in model.named_modules()
            if name.startswith(f"{layers}.") and isinstance(m, (nn.Linear, Conv1D))
        ]
    parts = dict(model.get_submodule(stack[0]).named_children())
    attention = next(name for name in ("self_attn", "self_attention", "attention", "attn") if name in parts)
    return [f"{layer}.{attention}" for layer in stack]


@pytest.mark.parametrize(
    ("name", "target_sites"),
    # Images have patches, no table of embeddings.
    [(name, sites) for name in ARCHITECTURES for sites in TARGET_SITES if name in CAUSAL or sites != "embedding"],
)
def test_noise_enters_at_every_site(name, target_sites):
    base, batch = build(name), make_batch(name)
    names = expected_names(base, ARCHITECTURES[name], target_sites)
    num_sites = {"linear": ARCHITECTURES[name].num_linears * NUM_LAYERS, "embedding": 1}.get(target_sites, NUM_LAYERS)
    assert len(names) == num_sites

    model = get_dip_model(base, dip_config(target_sites=target_sites)).train()
    sites = projections(model)
    assert list(sites) == names
    seen = record(model.get_base_model(), names, at_output=target_sites == "embedding")
    model(**batch).loss.backward()
    with model.deterministic():
        model(**batch)

    for site, (noisy, plain) in seen.items():
        logvar = sites[site].dip_logvar["default"]
        assert logvar.shape == (plain.shape[-1],)
        assert logvar.grad.isfinite().all() and logvar.grad.count_nonzero() > 0
        assert not torch.equal(noisy, plain)
    first = names[0]  # nothing noisy comes before it
    noise = (seen[first][0] - seen[first][1]) / STD
    assert noise.std().item() == pytest.approx(1, abs=5 * (2 * noise.numel()) ** -0.5)


@pytest.mark.parametrize("layers", [1, [0, 2]])
@pytest.mark.parametrize("target_sites", ["decoder_layer", "attention", "mlp", "linear"])
def test_layers_to_transform(tiny_llama, target_sites, layers):
    every = expected_names(tiny_llama, CAUSAL["llama"], target_sites)
    model = get_dip_model(tiny_llama, dip_config(target_sites=target_sites, layers_to_transform=layers))
    wanted = [layers] if isinstance(layers, int) else layers
    assert list(projections(model)) == [name for name in every if int(name.split(".")[2]) in wanted]


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("llama", {"target_modules": ["up_proj", "norm"]}, "model.layers.[012].mlp.up_proj model.norm"),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}, "model.layers.1.self_attn.q_proj"),
        (
            "llama",
            {"target_modules": ["mlp"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
            "model.layers.[02].mlp",
        ),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, "model.embed_tokens lm_head"),
        ("vit", {"target_modules": ["q_proj", "classifier"]}, "vit.layers.[012].attention.q_proj classifier"),
        ("vit", {"target_modules": r".*layers\.[01]\.mlp\.fc2"}, "vit.layers.[01].mlp.fc2"),
        ("vit", {"target_modules": ["patch_embeddings"]}, "vit.embeddings.patch_embeddings"),
        ("resnet", {"target_modules": ["shortcut.convolution"]}, f"{STAGES}.1.layers.0.shortcut.convolution"),
        ("resnet", {"target_modules": r".*stages\.1\.layers\.\d"}, f"{STAGES}.1.layers.[01]"),
        ("resnet", {"target_modules": r".*1\.layer\.2\.normalization"}, f"{STAGES}.1.layers.1.layer.2.normalization"),
    ],
)
def test_named_modules(name, fields, expected):
    """`expected` has one pattern a kind of site; [012] stands for layers."""
    batch = make_batch(name)
    model = get_dip_model(build(name), dip_config(**fields)).train()
    sites = projections(model)
    assert list(sites) == [f"{a}{i}{b}" for a, layers, b in map(split_layers, expected.split()) for i in layers]
    model(**batch).loss.backward()
    for projection in sites.values():
        assert projection.dip_logvar["default"].grad.count_nonzero() > 0


def test_sites_of_an_asymmetric_encoder_decoder_are_in_the_decoder():
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2)
    model = get_dip_model(T5ForConditionalGeneration(config), DipConfig(weights="frozen"))
    assert [row["name"] for row in model.noise_summary()] == [f"decoder.block.{i}" for i in range(3)]


@pytest.mark.parametrize(
    "name, tables",
    [
        ("bart", ["model.encoder.embed_tokens", "model.decoder.embed_tokens"]),  # not model.shared, which never runs
        ("marian", ["model.encoder.embed_tokens", "model.decoder.embed_tokens"]),
        ("whisper", ["model.decoder.embed_tokens"]),  # its encoder hears
    ],
)
def test_an_encoder_decoder_has_noise_in_both_its_embeddings(name, tables):
    config = dip_config(target_sites="embedding", weights=LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    model = get_dip_model(build_task(name), config)
    model.add_adapter("second", config)
    assert [projection.site.name for projection in projections(model).values()] == tables


def test_attention_to_an_image_is_a_site():
    config = MllamaTextConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1]},
    )
    names = [site.name for site in find_sites(MllamaForCausalLM(config), dip_config(target_sites="linear"))]
    assert "model.layers.1.cross_attn.q_proj" in names


def test_a_reversible_layer_is_refused(tiny_llama):
    tiny_llama.model.layers[1].backward_pass = lambda: None
    with pytest.raises(ValueError, match=r"'model.layers.1' .* is a reversible layer.*target_sites='attention'"):
        find_sites(tiny_llama, dip_config())


def test_attention_to_an_encoder_is_a_site_where_there_is_one():
    config = dip_config(target_sites="linear")
    with_encoder, alone = (find_sites(model, config) for model in (build_task("bart"), unshifted_bart()))
    assert any("encoder_attn" in site.name for site in with_encoder)
    assert alone and not any("encoder_attn" in site.name for site in alone)


def test_the_stack_is_found_by_whichever_count_of_layers_fits(tiny_llama):
    tiny_llama.config.num_layers = NUM_LAYERS
    tiny_llama.config.num_hidden_layers = 2 * NUM_LAYERS  # LongCat-Flash counts two in each layer
    assert len(find_sites(tiny_llama, dip_config())) == NUM_LAYERS


def test_channels_of_a_convolution_are_dimension_one():
    batch = make_batch("resnet", num_rows=64)
    site = "resnet.encoder.stages.1.layers.0.layer.0.convolution"
    model = get_dip_model(build("resnet"), dip_config(target_modules=[site]))
    std_C = torch.linspace(0.1, 0.8, 8)
    projections(model)[site].dip_logvar["default"].data = 2 * std_C.log()
    seen = record(model.get_base_model(), [site])[site]
    with torch.no_grad(), model.sampling(seed=0):
        model(**batch)
    with torch.no_grad():
        model(**batch)
    eps_BCHW = (seen[0] - seen[1]) / std_C[:, None, None]

    # The variance of n standard normal values has a standard error of sqrt(2 / n), a covariance one of sqrt(1 / n).
    for dims in ((0, 2, 3), (0, 1)):  # the same std at every position, the channel's own in every channel
        variance = eps_BCHW.square().mean(dims)
        num_values = eps_BCHW.numel() / variance.numel()
        assert (variance - 1).abs().max() < 5 * (2 / num_values) ** 0.5
    for dim in range(4):  # rows, channels and positions each have noise of their own
        neighbours = eps_BCHW.narrow(dim, 1, eps_BCHW.shape[dim] - 1)
        neighbours = neighbours * eps_BCHW.narrow(dim, 0, eps_BCHW.shape[dim] - 1)
        assert neighbours.mean().abs() < 5 * neighbours.numel() ** -0.5


@pytest.mark.parametrize("by_keyword", [False, True])
def test_queries_keys_and_values_of_one_tensor_get_one_noise(tiny_llama, batch, by_keyword):
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(HIDDEN_SIZE, 4, batch_first=True)

        def forward(self, x):
            mixed, _ = self.mix(query=x, key=x, value=x) if by_keyword else self.mix(x, x, x)
            return mixed

    tiny_llama.model.layers[1].mlp = SelfAttention()
    model = get_dip_model(tiny_llama, dip_config(target_modules=["mix"])).eval()
    layer = model.get_base_model().model.layers[1].mlp
    seen = []
    layer.mix.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append([*args, *kwargs.values()]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
        with model.sampling(seed=0):
            model(**batch)
    plain, noisy = seen
    assert len(noisy) == 3 and all(x is noisy[0] for x in noisy) and not torch.equal(plain[0], noisy[0])


def test_granularity_layer_has_one_variance_a_site(tiny_llama, batch):
    model = get_dip_model(tiny_llama, dip_config(granularity="layer")).train()
    model(**batch).loss.backward()
    for logvar in model.logvars():
        assert logvar.shape == (1,)
        assert logvar.grad.item() != 0


@pytest.mark.parametrize("use_dora", [False, True])
def test_noise_enters_base_weight_and_adapter_alike(tiny_llama, batch, use_dora):
    weights = LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=use_dora)
    model = get_dip_model(tiny_llama, dip_config(target_sites="linear", weights=weights))
    sites = list(projections(model))
    assert len(sites) == CAUSAL["llama"].num_linears * NUM_LAYERS
    base = model.get_base_model()
    inputs = record(base, [f"{site}.base_layer" for site in sites] + [f"{site}.lora_A.default" for site in sites])
    outputs = record(base, sites, at_output=True)
    with torch.no_grad(), model.sampling(seed=0):
        model(**batch)
    for site in sites:
        layer = base.get_submodule(site)
        assert isinstance(layer, LoraLayer)
        u = inputs[f"{site}.base_layer"][0]
        if not use_dora:
            assert torch.equal(inputs[f"{site}.lora_A.default"][0], u)
        noisy = outputs[site].pop(0)
        with torch.no_grad(), model.deterministic():
            assert torch.equal(layer(u), noisy)


def test_sites_are_found_beneath_another_adapter(tiny_llama):
    linears = expected_names(tiny_llama, CAUSAL["llama"], "linear")
    model = get_dip_model(tiny_llama, dip_config(weights=LoraConfig(target_modules="all-linear")))
    assert [
        site.name for site in find_sites(model.get_base_model(), DipConfig(weights="frozen", target_sites="linear"))
    ] == linears
    fields = {"linear": {"target_sites": "linear"}, "named": {"target_modules": ["up_proj", "embed_tokens"]}}
    expected = {"linear": linears, "named": ["model.embed_tokens", *[name for name in linears if "up_proj" in name]]}
    for adapter in fields:
        model.add_adapter(adapter, dip_config(task_type="CAUSAL_LM", **fields[adapter]))
        model.set_adapter(adapter)
        assert [row["name"] for row in model.noise_summary()] == expected[adapter]


def test_an_adapter_on_a_projected_layer_gets_its_noise(tiny_llama, batch):
    """The second adapter's LoRA wraps layers that already have a projection."""
    model = get_dip_model(tiny_llama, dip_config(target_sites="linear"))
    sites = list(projections(model))
    weights = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", dip_config(target_sites="linear", weights=weights, task_type="CAUSAL_LM"))
    assert list(projections(model)) == sites
    model.set_adapter("second")
    seen = record(model.get_base_model(), [f"{sites[0]}.base_layer", f"{sites[0]}.lora_A.second"])
    with torch.no_grad(), model.sampling(seed=0):
        model(**batch)
        model(**batch)
    (first, second), (first_lora, second_lora) = seen.values()
    assert torch.equal(first, first_lora) and torch.equal(second, second_lora)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "fields", "expected", "width"),
    [
        ("ctrl", {"target_sites": "mlp"}, [f"transformer.h.{i}.ffn" for i in range(NUM_LAYERS)], HIDDEN_SIZE),
        ("resnet", {"target_modules": r".*stages\.1\.layers\.1\.layer"}, [f"{STAGES}.1.layers.1.layer"], 16),
    ],
)
def test_noise_enters_a_sequence_of_modules_once(name, fields, expected, width):
    model = get_dip_model(build(name), dip_config(**fields)).eval()
    assert list(projections(model)) == [f"{sequence}.0" for sequence in expected]
    assert all(projection.site.num_channels == width for projection in projections(model).values())
    base = model.get_base_model()
    last = [f"{sequence}.{len(build(name).get_submodule(sequence)) - 1}" for sequence in expected]
    seen = record(base, [*expected, *last], at_output=True)
    for noise in (model.deterministic(), model.sampling(seed=0)):
        with torch.no_grad(), noise:
            model(**make_batch(name))
    for sequence, end in zip(expected, last):
        assert torch.equal(seen[sequence][1], seen[end][1])  # nothing comes behind the last module
        assert not torch.equal(*seen[sequence])


@pytest.mark.parametrize("kind", ["children", "sequential"])
def test_noise_never_enters_where_a_module_runs_whatever_it_holds(tiny_llama, batch, kind):
    class RunsItsChildren(nn.Sequential if kind == "sequential" else nn.Module):
        def forward(self, x):
            for child in self.children():
                x = child(x)
            return x

    block = RunsItsChildren()
    block.add_module("first", nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE))
    tiny_llama.model.layers[1].mlp = block
    fields = {"target_modules": ["mlp"], "layers_to_transform": [1]}
    if kind == "sequential":
        with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp' \(RunsItsChildren\) is a container.*Name the"):
            get_dip_model(tiny_llama, dip_config(**fields))
        return
    model = get_dip_model(tiny_llama, dip_config(**fields))
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp' runs all modules that it holds.*Name the first"):
        model(**batch)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llama", {"target_modules": ["layers"]}, r"'model\.layers' \(ModuleList\) is a container.*Name the modules"),
        ("llama", {"target_modules": ["q_prj"]}, r"match no module of LlamaForCausalLM.*nearest names.*'q_proj'"),
        ("llama", {"target_modules": r".*\.zzz"}, r"match no module of LlamaForCausalLM"),
        ("llama", {"layers_to_transform": 3}, r"layers_to_transform=\[3\] must be layers from 0 to 2"),
        ("llama", {"layers_to_transform": [0, -1]}, r"must be layers from 0 to 2"),
        ("llama", {"layers_to_transform": []}, r"must be layers from 0 to 2"),
        ("llama", {"target_modules": ["mlp"], "layers_to_transform": [1, 7]}, r"match nothing in layers \[7\]"),
        ("llama", {"target_modules": ["norm"], "layers_to_transform": 0}, r"match nothing in layers \[0\]"),
        ("resnet", {}, r"config of ResNet.* does not say how many layers it has.*target_modules=\["),
        ("resnet", {"target_sites": "embedding"}, r"ResNet.* has no input embedding.*target_modules"),
        ("vit", {"target_sites": "embedding"}, r"ViT.* has no input embedding.*target_modules"),
        ("resnet", {"target_modules": ["pooler"]}, r"width of the input of '.*pooler'.*not known: name the first"),
    ],
)
def test_sites_that_are_not_there(name, fields, message):
    model = build(name)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_dip_model(model, dip_config(**fields))
    assert list(model.state_dict()) == before  # nothing has been changed


def test_a_layer_without_the_part_is_named():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    model = build("llama")
    model.model.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
    with pytest.raises(ValueError, match=r"Layer has no part.*'attention'.*\['mix'\].*target_modules"):
        get_dip_model(model, dip_config(target_sites="attention"))


@pytest.mark.parametrize("target_sites", ["decoder_layer", "linear"])
def test_a_replicated_layer_has_noise_of_its_own(target_sites, tmp_path):
    weights = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    config = DipConfig(weights=weights, target_sites=target_sites, init_noise_std=0.3)
    model = get_dip_model(build("llama"), config, calibration=[make_batch("llama")]).eval()
    layers = {int(re.search(r"layers\.(\d+)", row["name"]).group(1)) for row in model.noise_summary()}
    assert layers == {0, 1, 2, 3}
    assert len({id(logvar) for logvar in model.logvars()}) == len(model.noise_summary())
    model.save_pretrained(tmp_path)
    assert_same(model, PeftModel.from_pretrained(build("llama"), tmp_path).eval())

"""A layer that is recomputed in the backward pass, or compiled, gets the noise that its forward pass had."""

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from dipnet_hf import DipConfig, dip_loss, get_dip_model
from tests.helpers import checkpointed, dip_model, gradients, projections
from tests.tiny_models import build

CHECKPOINTS = [
    dict(use_reentrant=reentrant, preserve_rng_state=preserve)
    for reentrant in (True, False)
    for preserve in (True, False)
]


def dip_llama(batch, target_sites="decoder_layer", base="llama", **config):
    return dip_model(base, [batch], target_sites=target_sites, **config).train()


@pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=str)
@pytest.mark.parametrize("target_sites", ["decoder_layer", "attention", "linear"])
def test_checkpointing_changes_no_gradient(batch, target_sites, kwargs):
    """Two forward passes, one backward pass: the recomputed layers of both find their own noise."""
    results = []
    for prepare in (lambda model: model, lambda model: checkpointed(model, kwargs)):
        model = prepare(dip_llama(batch, target_sites, num_samples=2))
        torch.manual_seed(0)
        results.append(gradients(model, dip_loss(model, batch).loss + 2 * dip_loss(model, batch).loss))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_mode_of_the_forward_pass_counts_not_that_of_the_backward_pass(batch, use_reentrant):
    results = []
    for prepare in (lambda model: model, lambda model: checkpointed(model, dict(use_reentrant=use_reentrant))):
        model = prepare(dip_llama(batch, "attention"))
        torch.manual_seed(0)
        noisy = dip_loss(model, batch).loss
        with model.deterministic():
            quiet = dip_loss(model, batch).loss
        model.eval()
        results.append(gradients(model, noisy + quiet))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "sites",
    [{}, {"layers_to_transform": [1, 2]}, {"target_sites": "mlp"}, {"target_sites": "linear"}],
    ids=["all layers", "upper layers", "mlp", "linear"],
)
def test_checkpointing_changes_no_gradient_of_an_ensemble(batch, sites, use_reentrant):
    results = []
    for prepare in (lambda model: model, lambda model: checkpointed(model, dict(use_reentrant=use_reentrant))):
        model = prepare(dip_llama(batch, **sites))
        with model.ensemble(2):
            loss = model(**batch, use_cache=False).loss
        results.append(gradients(model, loss))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


class CheckpointedLayer(torch.nn.Module):
    """The whole layer with its hooks inside, as activation-checkpointing wrappers do it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return checkpoint(self.layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def test_a_wrapper_that_recomputes_the_hook_too(batch):
    results = []
    for wrap in (lambda layer: layer, CheckpointedLayer):
        model = dip_llama(batch)
        layers = model.get_base_model().model.layers
        for i, layer in enumerate(layers):
            layers[i] = wrap(layer)
        torch.manual_seed(0)
        uncached = {**batch, "use_cache": False}  # a cache would be filled twice
        loss = dip_loss(model, uncached).loss - dip_loss(model, uncached).loss.exp()
        results.append(list(gradients(model, loss).values()))
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_a_site_that_runs_twice_draws_twice_and_refuses_recomputation(batch):
    def shared_layers():
        model = build("llama")
        model.model.layers[1] = model.model.layers[0]  # one layer, run twice
        model.config.use_cache = False
        return dip_llama(batch, "attention", base=model)

    model = shared_layers()
    inputs = []
    projections(model)["model.layers.0.self_attn"].register_forward_hook(
        lambda module, args, output: inputs.append(output - args[0])
    )
    model(batch["input_ids"])
    assert len(inputs) == 2 and not torch.equal(*inputs)

    loss = dip_loss(checkpointed(shared_layers(), dict(use_reentrant=False)), batch).loss
    with pytest.raises(RuntimeError, match="did not run exactly once"):
        loss.backward()


def test_compiled_in_one_graph_with_the_same_noise(batch):
    model = dip_llama(batch, weights=LoraConfig(r=4, target_modules="all-linear"))
    assert torch._dynamo.explain(model)(**batch).graph_break_count == 0

    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with model.sampling(seed=0):
            outputs = [call(**batch).loss for _ in range(3)]
        sum(outputs).backward()
        results.append((outputs, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    for eager, compiled in zip(results[0][0], results[1][0]):
        assert torch.equal(eager, compiled)
    assert not torch.equal(results[1][0][0], results[1][0][1])
    for eager, compiled in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(eager, compiled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_the_whole_model(batch, use_reentrant):
    """Right without reentrancy; refused with it, because no layer can tell there which forward pass it repeats."""
    inputs = {**batch, "use_cache": False}
    results = []
    for call in (lambda f, *args: f(*args), checkpoint):
        model = dip_llama(batch)
        embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()

        def loss(inputs_embeds, model=model):
            kept = {name: value for name, value in inputs.items() if name != "input_ids"}
            return model(inputs_embeds=inputs_embeds, **kept).loss

        torch.manual_seed(0)
        options = {"use_reentrant": use_reentrant, "preserve_rng_state": False} if call is checkpoint else {}
        total = call(loss, embeddings, **options) + call(loss, embeddings, **options).exp()
        if use_reentrant and options:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                total.backward()
            return
        results.append(gradients(model, total))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("target_sites", ["decoder_layer", "attention"])
def test_layers_compiled_one_by_one_share_their_code(batch, target_sites):
    """If a site looked its draw up by its name, every layer would be compiled anew."""
    torch._dynamo.reset()
    config = DipConfig(weights="full", target_sites=target_sites, noise_scale="absolute", init_noise_std=0.1)
    model = get_dip_model(build("llama", num_layers=10), config).train()
    counter = CompileCounter()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=counter)
    for _ in range(2):
        model(**batch, use_cache=False).loss.backward()
    assert counter.frame_count <= 2

"""`dipnet_hf.diagnostics`: known answers, exact derivatives of a tiny Llama, and a model left as it was."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_outputs import CausalLMOutput

from dipnet_hf.diagnostics import (
    Curvature,
    attack_robustness,
    disagreement,
    layer_places,
    learned_noise,
    lipschitz_constants,
    loss_line,
    loss_plane,
    noise_robustness,
    places,
    scores,
    top_eigenvalues,
    trace,
    weight_robustness,
)
from dipnet_hf.diagnostics.perturbation import Displacement, changed_at, typical_rms
from dipnet_hf.diagnostics.predictions import losses
from tests.helpers import calibrated_model, trained_model
from tests.tiny_models import build, build_task, make_batch, make_task_batch


@pytest.fixture
def llama():
    """Three layers in float64; its weights are large enough for curvature to be seen."""
    model = build("llama").double()
    for parameter in model.parameters():
        parameter.data *= 3
    return model


@pytest.fixture
def batch():
    return make_batch("llama", num_rows=2)


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_as_before(model, before):
    state, modes, wants = snapshot(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())
    assert (modes, wants) == before[1:]


# ---- Lipschitz constants ----


class Linear(nn.Module):
    """Logits are linear in the token's own embedding: W e."""

    loss_type = "ForCausalLM"
    config = None

    def __init__(self, weight, table):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)
        self.layers = nn.ModuleList([nn.Identity()])
        self.weight = nn.Parameter(weight)
        self.config = LinearConfig()

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.layers[0](self.table(input_ids)) @ self.weight.T)


class LinearConfig:
    num_hidden_layers = 1
    is_encoder_decoder = False
    model_type = None

    def get_text_config(self, decoder=True):
        return self


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return Linear(torch.randn(7, 5).double(), torch.randn(9, 5).double())


@pytest.fixture
def short_batch():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 2]])
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("place", ["embeddings", "layer 0"])
def test_a_linear_models_constant_is_its_weights_spectral_norm(linear, short_batch, place):
    measured = lipschitz_constants(linear, short_batch, place, num_iterations=300)
    assert measured.logits.shape == (6,)
    torch.testing.assert_close(measured.logits, torch.linalg.matrix_norm(linear.weight.detach(), 2).expand(6))
    # d loss / d e = W^T (p - y), whatever its order
    targets, embedded = short_batch["labels"][:, 1:].flatten(), linear.table(short_batch["input_ids"][:, :-1])
    probs = (embedded @ linear.weight.T).softmax(-1).flatten(0, 1)
    exact = ((probs - nn.functional.one_hot(targets, 7)) @ linear.weight).norm(dim=1)
    torch.testing.assert_close(measured.loss.sort().values, exact.sort().values)
    rms = linear.table(short_batch["input_ids"]).square().mean(-1).sqrt().flatten().median()
    assert measured.token_norm == pytest.approx(rms.item() * math.sqrt(5))


@pytest.mark.parametrize("place", ["embeddings", "layer 2"])
def test_constants_converge_to_those_of_exact_jacobians(llama, batch, place):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = batch["labels"][:, 1:] != -100

    def logits_of(value):
        displacement = Displacement(len(value))
        displacement.value = value
        with changed_at(llama, {place: displacement}):
            return llama(**inputs).logits[:, :-1][wanted]

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(logits_of)(torch.zeros(2, 10, 32, dtype=torch.float64))
    exact = torch.linalg.matrix_norm(jacobian.flatten(2), 2)
    few, many = (
        lipschitz_constants(llama, batch, place, num_tokens=99, num_iterations=n, rows_per_pass=5) for n in (3, 200)
    )
    torch.testing.assert_close(many.logits.sort().values, exact.sort().values, rtol=1e-5, atol=0)
    assert (few.logits <= many.logits * (1 + 1e-12)).all()
    assert (few.last_change > 1e-6).any() and (many.last_change < 1e-6).all()


def test_the_loss_constant_is_the_norm_of_each_tokens_gradient(llama, batch):
    measured = lipschitz_constants(llama, batch, "layer 1", num_tokens=99, num_iterations=2)
    displacement = Displacement(2)
    with changed_at(llama, {"layer 1": displacement}):
        values = losses(llama, batch)
        exact = [torch.autograd.grad(v, displacement.value, retain_graph=True)[0].norm() for v in values]
    torch.testing.assert_close(measured.loss.sort().values, torch.stack(exact).sort().values)


def test_an_ensembles_constant_is_that_of_its_mean(batch):
    """Samples that share what is added: without noise every sample is the network itself."""
    model = calibrated_model(weights="full", init_noise_std=0.5)
    plain = lipschitz_constants(model, batch, "layer 1")
    with model.ensemble(3):
        mean = lipschitz_constants(model, batch, "layer 1")
    assert not torch.allclose(mean.logits, plain.logits, rtol=1e-3)
    for logvar in model.logvars():
        logvar.data.fill_(-60.0)
    with model.ensemble(3):
        silent = lipschitz_constants(model, batch, "layer 1")
    torch.testing.assert_close(silent.logits, plain.logits, rtol=1e-4, atol=0)
    torch.testing.assert_close(silent.loss, plain.loss, rtol=1e-4, atol=0)


# ---- curvature ----


def exact_hessian(model, names, batch):
    chosen = {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}
    labels = batch["labels"]

    def loss(flat):
        pieces = flat.split([tensor.numel() for tensor in chosen.values()])
        weights = {name: piece.view_as(chosen[name]) for name, piece in zip(chosen, pieces, strict=True)}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = functional_call(model, weights, kwargs=inputs).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    with sdpa_kernel(SDPBackend.MATH):
        return jacrev(jacrev(loss))(torch.cat([tensor.flatten() for tensor in chosen.values()]))


NORMS = (
    "model.layers.0.input_layernorm.weight",
    "model.layers.2.post_attention_layernorm.weight",
    "model.norm.weight",
)


def test_hessian_products_eigenvalues_and_trace_are_those_of_the_matrix(llama, batch):
    exact = exact_hessian(llama, NORMS, batch)
    parts = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]
    curvature = Curvature(llama, [llama.get_parameter(name) for name in NORMS], parts)
    vector = torch.randn(curvature.size, dtype=torch.float64)
    torch.testing.assert_close(curvature @ vector, exact @ vector)
    eigenvalues = torch.linalg.eigvalsh(exact).flip(0)
    assert top_eigenvalues(curvature, 2, tolerance=1e-8) == pytest.approx(eigenvalues[:2].tolist())
    estimate = trace(curvature, num_vectors=100)
    assert abs(estimate.mean - exact.trace().item()) < 5 * estimate.standard_error
    assert estimate.standard_error == pytest.approx(
        (2 * (exact - exact.diag().diag()).square().sum() / 100).sqrt().item(), rel=0.4
    )


def test_a_linear_models_hessian_is_its_ggn(linear, short_batch):
    """The loss is convex in W: the second derivative of the logits by it is zero, and J^T H J is all there is."""
    hess, ggn = (Curvature(linear, [linear.weight], [short_batch], matrix) for matrix in ("hessian", "ggn"))
    vector = torch.randn(35, dtype=torch.float64)
    torch.testing.assert_close(ggn @ vector, exact_hessian(linear, ["weight"], short_batch) @ vector)
    torch.testing.assert_close(ggn @ vector, hess @ vector)


def test_the_ggn_is_the_hessian_without_the_second_derivatives_of_the_logits(llama, batch):
    parameters = [llama.get_parameter(name) for name in NORMS]
    inputs, labels = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]
    wanted = labels[:, 1:] != -100

    def logits_of(flat):
        weights = dict(zip(NORMS, flat.split(32), strict=True))
        return functional_call(llama, weights, kwargs=inputs).logits[:, :-1][wanted]

    flat = torch.cat([parameter.detach() for parameter in parameters])
    with sdpa_kernel(SDPBackend.MATH):
        jacobian, probs = jacrev(logits_of)(flat), logits_of(flat).detach().softmax(-1)
    middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    exact = torch.einsum("nvp,nvw,nwq->pq", jacobian, middle, jacobian) / len(probs)
    vector = torch.randn(96, dtype=torch.float64)
    torch.testing.assert_close(Curvature(llama, parameters, [batch], "ggn") @ vector, exact @ vector)


def test_parameters_of_lora_alone(batch):
    model = trained_model(weights="lora")
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    curvature = Curvature(model, lora, [batch])
    (value,) = top_eigenvalues(curvature, tolerance=1e-3)
    assert value > 0 and 8 <= curvature.num_products <= 200
    with model.ensemble(2):
        assert top_eigenvalues(curvature, tolerance=1e-3) != [value]
    assert top_eigenvalues(curvature, tolerance=1e-3) == [value]


# ---- robustness ----


def test_attacks_on_a_linear_model_raise_the_loss_as_far_as_can_be(linear):
    """Two classes: the loss of one token falls with z = (w_1 - w_0) e, and the L-infinity ball lowers z by r |w|_1."""
    torch.manual_seed(0)
    two = Linear(torch.randn(2, 5).double(), torch.randn(2, 5).double())
    ids = torch.tensor([[0, 1]])
    batch = {"input_ids": ids, "labels": ids}
    size = typical_rms(two, [batch], ["embeddings"])["embeddings"]
    slope = (two.weight[1] - two.weight[0]).detach()
    margin = slope @ two.table.weight[0] - 0.3 * size * slope.abs().sum()
    for num_steps in (1, 5):
        (row,) = attack_robustness(two, [batch], [0.3], num_steps)
        assert row.nll == pytest.approx(nn.functional.softplus(-margin).item(), rel=1e-6)


def test_attacks_are_worse_than_noise_and_more_steps_than_one(llama, batch):
    radii = [0.0, 0.2]
    noise = noise_robustness(llama, [batch], radii, num_draws=4)
    one, many = (attack_robustness(llama, [batch], radii, num_steps=n) for n in (1, 8))
    assert noise[0] == one[0] == many[0] == (0.0, *scores(llama, [batch]))
    assert noise[1].nll < one[1].nll < many[1].nll


def test_noise_has_the_stated_size_and_the_seeds_draw(linear, short_batch):
    seen = []
    linear.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    big = {name: value.repeat(500, 1) for name, value in short_batch.items()}
    first = noise_robustness(linear, [big], [0.5])
    noise = seen[-1] - linear.table(big["input_ids"])
    size = typical_rms(linear, [short_batch], ["embeddings"])["embeddings"]
    assert noise.std().item() == pytest.approx(0.5 * size, rel=5 / math.sqrt(2 * noise.numel()))
    assert noise_robustness(linear, [big], [0.5]) == first
    assert noise_robustness(linear, [big], [0.5], seed=1) != first


def test_noise_at_every_layer_is_that_of_each_layer(llama, batch):
    """Nothing but the last layer's own noise is left when the others have none."""
    together = noise_robustness(llama, [batch], [0.3], layer_places(llama))
    alone = noise_robustness(llama, [batch], [0.3], ["layer 2"])
    assert together[0].nll != alone[0].nll
    assert len(layer_places(llama)) == 3 and places(llama)[0] == "embeddings"


def test_all_samples_of_an_ensemble_get_the_same_disturbance(batch):
    model = calibrated_model(weights="full")
    for logvar in model.logvars():
        logvar.data.fill_(-60.0)
    measures = [
        lambda: noise_robustness(model, [batch], [0.3], layer_places(model)),
        lambda: attack_robustness(model, [batch], [0.1], num_steps=2),
    ]
    for measure in measures:
        plain = measure()[0]
        with model.ensemble(3):
            assert measure()[0] == pytest.approx(plain, rel=1e-4)


def test_weight_noise_is_relative_to_each_tensor(linear, short_batch):
    """NLL of a linear model whose weight moved by a known draw."""
    before = linear.weight.detach().clone()
    rows = weight_robustness(linear, [linear.weight], [short_batch], [0.0, 0.2], seed=3)
    noise = torch.randn(7, 5, generator=torch.Generator().manual_seed(3)).double()
    moved = Linear(before + 0.2 * before.square().mean().sqrt() * noise, linear.table.weight)
    assert rows[1] == (0.2, *scores(moved, [short_batch]))
    assert rows[0] == (0.0, *scores(linear, [short_batch]))
    assert torch.equal(linear.weight, before)


# ---- landscape ----


def test_directions_are_as_long_as_each_filter_and_leave_vectors_alone(llama, batch):
    name = "model.layers.0.mlp.up_proj.weight"
    weight, seen = llama.get_parameter(name), []
    hook = llama.register_forward_pre_hook(lambda module, args: seen.append(weight.detach().clone()))
    loss_plane(llama, [weight, llama.get_parameter("model.norm.weight")], [batch], [0.0, 0.5])
    hook.remove()
    center, second, first, both = seen
    for moved in (first, second):
        torch.testing.assert_close((moved - center).norm(dim=1), 0.5 * center.norm(dim=1))
    torch.testing.assert_close(both - center, (first - center) + (second - center))
    assert not torch.allclose(first, second)


def test_a_plane_has_the_models_loss_at_its_center(llama, batch):
    plane = loss_plane(llama, list(llama.parameters()), [batch], [-0.3, 0.0, 0.3])
    assert plane[1][1] == scores(llama, [batch]).nll
    assert len({loss for row in plane for loss in row}) == 9
    assert plane == loss_plane(llama, list(llama.parameters()), [batch], [-0.3, 0.0, 0.3])


def test_a_line_ends_at_both_networks_and_a_convex_loss_stays_below_its_chord(linear, short_batch):
    other = Linear(linear.weight.detach() + 1.0 * torch.randn(7, 5).double(), linear.table.weight)
    line = loss_line(linear, dict(other.named_parameters()), [short_batch], [0.0, 0.5, 1.0])
    ends = [scores(model, [short_batch]).nll for model in (linear, other)]
    assert line[0] == ends[0] and line[2] == pytest.approx(ends[1], rel=1e-12)
    assert line[1] < sum(ends) / 2


# ---- disagreement and learned noise ----


def test_disagreement_is_zero_without_noise_and_tells_wrong_tokens(batch):
    model = trained_model(weights="full", init_noise_std=0.5)
    measured = disagreement(model, [batch, batch], num_samples=4)
    assert measured.mutual_information.shape == (26,) and (measured.mutual_information > 1e-6).all()
    assert (measured.mutual_information <= math.log(4)).all()
    for logvar in model.logvars():
        logvar.data.fill_(-60.0)
    silent = disagreement(model, [batch], num_samples=4)
    assert (silent.mutual_information < 1e-5).all() and (silent.variance < 1e-9).all()
    ranked = measured._replace(
        mutual_information=torch.tensor([0.1, 0.4, 0.2, 0.3]), correct=torch.tensor([1.0, 0.0, 1.0, 1.0])
    )
    assert ranked.auroc() == 1.0
    assert ranked._replace(correct=torch.ones(4)).auroc() is None


def test_learned_noise_is_split_into_depth_and_channel():
    depth, channel = torch.tensor([0.0, 1.0, 2.0]).exp(), torch.tensor([0.0, 3.0]).exp()
    scale = {"scale": [1.0, 5.0]}

    def of(table):
        return learned_noise({f"layers.{i}": {"std": row.tolist(), **scale} for i, row in enumerate(table)}, 0.5)

    by_depth = of(depth[:, None].expand(3, 2))
    assert by_depth.ratio_by_depth == pytest.approx((depth / 0.5).tolist())
    assert by_depth[1:3] == pytest.approx((1.0, 0.0)) and by_depth.scale_correlation is None
    by_channel = of(channel.expand(3, 2))
    assert by_channel[1:3] == pytest.approx((0.0, 1.0)) and by_channel.scale_correlation == pytest.approx(1.0)
    both = of(depth[:, None] * channel)  # ln std has the variances 2/3 and 9/4
    assert both[1:3] == pytest.approx((8 / 35, 27 / 35))


# ---- what all instruments promise ----


def instruments(model, batch):
    weights = [p for name, p in model.named_parameters() if "_proj" in name and "dip_" not in name][:2]
    return {
        "lipschitz": lambda: lipschitz_constants(model, batch, num_tokens=3, num_iterations=2),
        "hessian": lambda: trace(Curvature(model, weights, [batch]), num_vectors=2),
        "ggn": lambda: trace(Curvature(model, weights, [batch], "ggn"), num_vectors=2),
        "noise": lambda: noise_robustness(model, [batch], [0.1], layer_places(model)),
        "attack": lambda: attack_robustness(model, [batch], [0.1], num_steps=2),
        "weights": lambda: weight_robustness(model, weights, [batch], [0.1]),
        "plane": lambda: loss_plane(model, weights, [batch], [0.0, 0.1]),
        "disagreement": lambda: disagreement(model, [batch], num_samples=2),
    }


@pytest.mark.parametrize("name", [*instruments(build("llama"), None)])
def test_the_model_stays_as_it_was_and_the_seed_decides(name, batch):
    model = calibrated_model(weights="lora")
    model.train()
    model.get_base_model().model.layers[1].eval()
    before = snapshot(model)
    measure = instruments(model, batch)[name]
    state = torch.get_rng_state()
    first, second = measure(), measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert_as_before(model, before)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_model_stays_as_it_was_when_an_instrument_fails(batch):
    model = build("llama").train()
    before = snapshot(model)
    model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    for name in ("lipschitz", "hessian", "attack", "weights", "plane"):
        with pytest.raises(ZeroDivisionError):
            instruments(model, batch)[name]()
        assert_as_before(model, before)
    assert not model.model.embed_tokens._forward_hooks and not model.model.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "mixtral"])
def test_other_architectures(name, batch):
    model = build(name)
    batch = make_batch(name, num_rows=2)
    assert lipschitz_constants(model, batch, "layer 1", num_tokens=2).logits.isfinite().all()
    assert attack_robustness(model, [batch], [0.1])[0].nll > scores(model, [batch]).nll


def test_a_classifier_has_one_prediction_a_row():
    model = build_task("classes")
    batch = make_task_batch("classes")
    assert lipschitz_constants(model, batch).logits.shape == (4,)
    assert attack_robustness(model, [batch], [0.1])[0].nll > scores(model, [batch]).nll


def test_bad_input_is_named(llama, batch):
    weights = [llama.model.norm.weight]
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="needs labels that are not all -100, got the entries"):
        scores(llama, [unlabelled])
    with pytest.raises(ValueError, match=r"no place 'layer 3'; there are 'embeddings' and 'layer 0' to 'layer 2'"):
        lipschitz_constants(llama, batch, "layer 3")
    with pytest.raises(ValueError, match="num_iterations must be at least 2, got 1"):
        lipschitz_constants(llama, batch, num_iterations=1)
    with pytest.raises(ValueError, match="radius must be a finite number of at least 0, got -0.1"):
        noise_robustness(llama, [batch], [-0.1])
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        weight_robustness(llama, weights, [batch], [0.1], num_draws=0)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        attack_robustness(llama, [batch], [0.1], num_steps=0)
    with pytest.raises(ValueError, match="matrix must be one of hessian, ggn, got 'fisher'"):
        Curvature(llama, weights, [batch], "fisher")
    with pytest.raises(ValueError, match="no parameter to differentiate by"):
        Curvature(llama, [], [batch])
    with pytest.raises(ValueError, match="not the model's"):
        Curvature(llama, build("llama").parameters(), [batch])
    with pytest.raises(ValueError, match=r"shape \(32,\), got \(3,\)"):
        Curvature(llama, weights, [batch]) @ torch.ones(3)
    with pytest.raises(ValueError, match="num_eigenvalues must be from 1 to 31, got 32"):
        top_eigenvalues(Curvature(llama, weights, [batch]), 32)
    with pytest.raises(ValueError, match="num_vectors must be at least 2"):
        trace(Curvature(llama, weights, [batch]), num_vectors=1)
    with pytest.raises(RuntimeError, match=r"did not converge to 1e-12 within \d+ products"):
        top_eigenvalues(Curvature(llama, weights, [batch]), 3, tolerance=1e-12, max_products=8)
    with pytest.raises(ValueError, match="no parameter to change"):
        weight_robustness(llama, [], [batch], [0.1])
    with pytest.raises(ValueError, match="parameter of two dimensions"):
        loss_plane(llama, weights, [batch], [0.0])
    with pytest.raises(ValueError, match="differ in 1 parameters, such as model.norm.weight"):
        loss_line(llama, {n: p for n, p in llama.named_parameters() if n != "model.norm.weight"}, [batch], [0.0])
    with pytest.raises(ValueError, match="init_std must be positive"):
        learned_noise({}, 0.0)
    with pytest.raises(ValueError, match="got no site"):
        learned_noise({}, 0.1)
    with pytest.raises(ValueError, match="DIP adapter"):
        disagreement(llama, [batch])


def test_what_has_no_second_derivatives_is_refused(llama, batch):
    llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2' has no second derivatives"):
        lipschitz_constants(llama, batch)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        scores(build_task("t5"), [make_task_batch("t5")])
    with pytest.raises(ValueError, match="torch.int64 have no derivatives"):
        whole = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        model = build("llama")
        model.register_parameter("whole", whole)
        Curvature(model, [whole], [batch])


def test_a_constant_that_overflows_is_an_error(llama, batch):
    llama.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="Lipschitz constant at embeddings is not finite"):
        lipschitz_constants(llama, batch)

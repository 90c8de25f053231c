"""What must hold for any network and any kind of site. Each function asks one property of a case.

A property raises `AssertionError` where it does not hold, and `NotAsked` where the network without this package cannot
do it either. Anything else that it raises is a fault too, but for a refusal: see `ask`.

Shape legend: R rows, L sequence, K samples.
"""

import contextlib
import copy
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from dipnet_hf import dip_loss
from dipnet_hf.architecture import adds_router_loss, decoder_layers, is_encoder_decoder, shifts_labels, text_config
from dipnet_hf.batches import expand_batch
from dipnet_hf.passes import FreshPass
from dipnet_hf.projection import DipProjection
from tests.matrix.cases import (
    Case,
    NotAsked,
    assert_close,
    assert_finite,
    assert_same_gradients,
    backward,
    cast,
    difference_of,
    moved,
    projections_of,
    shortened,
)

TOLERANCE = 1e-3
NUM_PADS = 4


# ---- noise ----


def is_silent_in_eval(case: Case) -> None:
    """Without noise the logits are those of the network, bit for bit."""
    assert torch.equal(case.logits(case.fresh), case.logits(case.network.model))


def is_drawn_anew(case: Case) -> None:
    """Two passes with noise differ from each other and from the one without, and are finite."""
    silent = case.logits(case.fresh)
    with case.fresh.sampling():
        first, second = case.logits(case.fresh), case.logits(case.fresh)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, silent) and not torch.equal(first, second)


def is_decided_by_the_seed(case: Case) -> None:
    """A seed gives the same draws again, and another one others."""
    logits = []
    for seed in (5, 5, 6):
        with case.fresh.sampling(seed=seed):
            logits.append(case.logits(case.fresh))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def has_the_scale_of_its_channels(case: Case) -> None:
    """The scale is 1.4826 times the median absolute deviation over the real tokens, where these are few."""
    if "attention_mask" not in case.batch:
        raise NotAsked("no padding")
    mask = case.batch["attention_mask"].bool()
    inputs: dict[str, list[torch.Tensor]] = {}
    projections = {p.site.name: p for p in projections_of(case.fresh)}
    hooks = [
        p.register_forward_pre_hook(
            lambda module, args: inputs.setdefault(module.site.name, []).append(args[0].clone())
        )  # some networks go on in place
        for p in projections.values()
    ]
    case.logits(case.fresh)
    for hook in hooks:
        hook.remove()
    compared = 0
    for name, values in inputs.items():
        if len(values) != 1 or values[0].dim() != 3 or values[0].shape[:2] != mask.shape:
            continue  # rows stand elsewhere, or the site runs more than once
        x_ND = values[0][mask].float()
        deviation_D = 1.4826 * (x_ND - x_ND.median(dim=0).values).abs().median(dim=0).values
        scale_D = projections[name].scale
        # A channel that mostly has one value is measured in another way, and one that hardly changes gets a floor.
        above = deviation_D > 0.1 * deviation_D.max()
        if not above.any():
            continue
        compared += 1
        assert_close(scale_D[above], deviation_D[above], 1e-4, f"scale of {name}")
    if not compared:
        raise NotAsked("no site whose rows come first")


def finds_its_level(case: Case) -> None:
    """Calibration finds a level, where the network predicts anything that noise can spoil."""
    if is_encoder_decoder(case.network.model):
        raise NotAsked("an untrained network is as wrong without noise")  # its true labels decide
    base = copy.deepcopy(case.network.model)
    _make_it_half_sure(case, base)
    # Many tokens, as one whose experts are chosen otherwise makes the loss jump.
    batches = [case.batch]
    if "input_ids" in case.batch:
        real = case.batch["input_ids"] > 0
        batches = [case.batch | {"input_ids": (case.batch["input_ids"] + 7 * i) % 180 * real} for i in range(8)]
    model = case.make(base, batches, init_noise_std="auto", init_loss_increase=0.2)
    assert 0 < model.init_noise_std < 1e3


def _make_it_half_sure(case: Case, base: nn.Module) -> None:
    """Scale the head until the network predicts something and is not certain of all: noise has to change its loss."""
    labels, head = case.batch["labels"], base.get_output_embeddings()
    for _ in range(20):
        logits = case.logits(base)
        if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
            return
        log_probs = logits[labels != -100].log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean() / math.log(logits.shape[-1])
        if 0.3 < entropy < 0.8:
            return
        if head is None:
            break
        with torch.no_grad():
            head.weight *= 1.5 if entropy > 0.5 else 0.7
    raise NotAsked("it predicts nothing yet")


def leaves_padding_alone(case: Case) -> None:
    """What is drawn at padding reaches no token."""
    if is_encoder_decoder(case.network.model):
        raise NotAsked("it reads two sequences")
    if not case.network.takes_mask:
        raise NotAsked("no padding")
    left = shifts_labels(case.network.model)  # a class may be that of the first token
    ids, inputs = _padded(case, left)
    real = slice(NUM_PADS, None) if left else slice(0, -NUM_PADS)

    def answer(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        logits = case.tokens_logits(model, ids, **inputs)
        return logits[:, real] if logits.shape[:2] == ids.shape else logits

    other = torch.where(inputs["attention_mask"].bool(), ids, 77)
    base = case.network.model
    case.network.once(
        "padding is left out",
        lambda: assert_close(answer(base, other), answer(base, ids), 1e-5, "with other tokens at the padding"),
    )
    logits: list[torch.Tensor] = []
    changed: set[str] = set()

    def change(module: DipProjection, args: tuple, output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        lengths = [dim for dim, size in enumerate(x.shape[:-1]) if size == ids.shape[1]]
        if not lengths:
            return output
        changed.add(module.site.name)
        place = [slice(None)] * x.dim()
        place[lengths[0]] = slice(0, NUM_PADS) if left else slice(-NUM_PADS, None)
        output = output.clone()
        output[tuple(place)] = x[tuple(place)] + (-3.0 if logits else 1.0) * (output - x)[tuple(place)]
        return output

    hooks = [p.register_forward_hook(change) for p in projections_of(case.fresh)]
    try:
        for _ in range(2):
            with case.fresh.sampling(seed=2):
                logits.append(answer(case.fresh, ids))
    finally:
        for hook in hooks:
            hook.remove()
    if not changed:
        raise NotAsked("no site sees the padding")
    assert_close(logits[1], logits[0], 1e-4, "noise at padding")


def _padded(case: Case, left: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The first row behind padding, or before it, and what else the model is told of it."""
    ids, pads = case.first_row, torch.zeros(1, NUM_PADS, dtype=torch.int64)
    ones = torch.ones_like(ids)
    ids, mask = (torch.cat([pads, x] if left else [x, pads], dim=1) for x in (ids, ones))
    inputs = {"attention_mask": mask}
    if left and "position_ids" in case.network.parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return ids, inputs


# ---- training ----


def learns_at_every_site(case: Case) -> None:
    """Every log-variance has a gradient, where the site's input has one in the network without noise."""
    case.check_training()
    model = moved(copy.deepcopy(case.fresh))
    loss, gradients = backward(model, case.batch)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    names = {id(p): name for name, p in model.named_parameters()}
    learning = {
        p.site.name: gradients.get(names[id(p.logvar)], torch.zeros(())).abs().sum() > 0 for p in projections_of(model)
    }
    dead = [name for name, learns in learning.items() if not learns and name not in case.network.blind_modules]
    assert not dead, f"no gradient at {len(dead)} of {len(learning)} sites, such as {dead[:3]}"


def has_the_gradient_of_differences(case: Case) -> None:
    """The gradient of the log-variances is that of central differences in float64, with the same noise."""
    case.check_training()
    base = copy.deepcopy(case.network.model).double()
    if hasattr(base, "set_experts_implementation"):  # the grouped one knows no float64
        with contextlib.suppress(ValueError):
            base.set_experts_implementation("eager")
    batch = cast(case.batch, torch.float64)
    case.network.once("float64", lambda: assert_finite(base(**batch).logits))
    model = case.make(base)
    logvars = model.logvars()
    for logvar in logvars:
        logvar.data = logvar.data.double()  # float32 does not hold such small steps
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(logvar.shape, generator=generator, dtype=torch.float64) for logvar in logvars]
    starts = [logvar.detach().clone() for logvar in logvars]
    model.train()

    def loss_at(step: float, seed: int) -> torch.Tensor:
        with torch.no_grad():
            for logvar, start, direction in zip(logvars, starts, directions, strict=True):
                logvar.copy_(start + step * direction)
        torch.manual_seed(seed)
        return dip_loss(model, batch).loss

    tried = []
    for seed in (11, 12, 13):  # a network may choose (experts, tokens), and its loss jump within one of the steps
        model.zero_grad()
        loss_at(0.0, seed).backward()
        slope = sum(float((v.grad * d).sum()) for v, d in zip(logvars, directions, strict=True) if v.grad is not None)
        with torch.no_grad():
            differences = [float(loss_at(h, seed) - loss_at(-h, seed)) / (2 * h) for h in (1e-3, 1e-4)]
        # Parts of most networks compute in float32.
        if min(abs(d - slope) for d in differences) <= 3e-4 + 0.02 * abs(slope):
            return
        tried.append((slope, *differences))
    raise AssertionError(f"by the gradient and by two differences: {tried}")


def recomputes_its_noise(case: Case) -> None:
    """Gradient checkpointing changes neither loss nor gradients."""
    _compare_with_checkpointing(case, use_reentrant=False)


def recomputes_its_noise_reentrantly(case: Case) -> None:
    """As above with reentrant checkpoints."""
    _compare_with_checkpointing(case, use_reentrant=True)


def _compare_with_checkpointing(case: Case, use_reentrant: bool) -> None:
    if not getattr(case.network.model, "supports_gradient_checkpointing", False):
        raise NotAsked("no gradient checkpointing")

    def step(model: Any, objective: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        torch.manual_seed(11)
        loss = objective(model)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return gradients | {"loss": loss.detach()}

    def compare(model: Any, objective: Callable[[Any], torch.Tensor]) -> None:
        want = step(model, objective)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        assert_same_gradients(step(model, objective), want, 1e-4)

    name = f"checkpointing, use_reentrant={use_reentrant}"
    plain = case.network.plain
    case.network.once(name, lambda: compare(plain(), lambda model: model(**case.batch).loss))
    compare(moved(case.make()), lambda model: dip_loss(model, case.batch).loss)


def averages_over_samples(case: Case) -> None:
    """Two samples in the upper half of the layers cost what twice the rows do, in loss and gradients."""
    case.check_training()
    layers: dict[str, Any] = {}
    if case.sites.get("target_sites") in ("decoder_layer", "attention", "mlp", "linear"):
        stack = [f"{name}." for name, _ in decoder_layers(case.network.model)]
        sites = tuple(f"{p.site.name}." for p in projections_of(case.fresh))
        projected = [i for i, layer in enumerate(stack) if any(site.startswith(layer) for site in sites)]
        layers = {"layers_to_transform": projected[len(projected) // 2 :]}
    model = moved(case.make(num_samples=2, **layers))
    loss, gradients = backward(model, case.batch)
    model.train()
    torch.manual_seed(11)
    tuner = model.base_model
    rows = expand_batch(case.batch, 2)
    # The lower layers run on both copies here.
    with tuner._pass.set_to(FreshPass(tuner._pass.get().keys, antithetic=True)):
        outputs = model(**rows)
    naive = outputs.loss
    if naive is None:
        raise NotAsked("no loss of its own")
    half = len(outputs.logits) // 2
    assert difference_of(outputs.logits[:half], outputs.logits[half:]) > 1e-7, "both samples are the same"
    if getattr(outputs, "aux_loss", None) is not None:
        raise NotAsked("a balancing loss is of the rows together")
    naive.backward()
    assert_close(loss, naive, 1e-4, "loss of two samples")
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(gradients, want, 2e-3)


def pairs_its_samples(case: Case) -> None:
    """At every site each row has opposite noise in the two samples."""
    case.check_training()
    model = case.make(num_samples=2).train()
    num_rows = 2 * len(next(iter(case.batch.values())))
    wrong: list[str] = []
    checked: set[str] = set()

    def check(module: DipProjection, args: tuple, output: torch.Tensor) -> None:
        x = args[0]
        if not module.sampling:
            return
        leading = [dim for dim in range(x.dim()) if dim != module.site.channel_dim % x.dim()]
        # No other dimension is as long as twice the rows; windows and the tokens of experts stand row by row.
        dims = [dim for dim in leading if x.shape[dim] == num_rows] + [0] * (x.shape[0] % num_rows == 0)
        if not dims:
            if len(leading) > 1:  # an expert may see any tokens
                wrong.append(f"{module.site.name}: no rows in {tuple(x.shape)}")
            return
        dim = dims[0]
        checked.add(module.site.name)
        first, second = (output - x).detach().chunk(2, dim)
        if difference_of(first, -second) > TOLERANCE:
            wrong.append(f"{module.site.name}: not opposite in {tuple(x.shape)}")

    for projection in projections_of(model):
        projection.register_forward_hook(check)
    dip_loss(model, case.batch)
    assert not wrong, f"{len(wrong)} sites, such as {wrong[0]}"
    assert checked, "no site was checked"


def has_the_models_own_loss(case: Case) -> None:
    """Without noise the objective is the loss of the network, with its balancing loss."""
    base = copy.deepcopy(case.network.model)
    if hasattr(text_config(base), "output_router_logits"):
        text_config(base).output_router_logits = base.config.output_router_logits = True
    try:
        own = base(**case.batch).loss
    except Exception as error:
        raise NotAsked(f"{type(error).__name__}: {shortened(error)}") from error
    if own is None:
        raise NotAsked("no loss of its own")
    model = case.make(base, num_samples=1 if adds_router_loss(base) else 2).eval()  # as `own` was computed
    with model.deterministic():
        out = dip_loss(model, case.batch)
    assert_close((out.loss - out.prior).detach(), own.detach(), 1e-4, "loss without noise")


def trains_in_bfloat16(case: Case) -> None:
    """A step in bfloat16 is finite, and the log-variances and scales stay float32."""
    batch = cast(case.batch, torch.bfloat16)

    def plain_step() -> None:
        case.network.plain().to(torch.bfloat16).train()(**batch).loss.backward()

    case.network.once("bfloat16", plain_step)
    model = case.make(copy.deepcopy(case.network.model).to(torch.bfloat16))
    loss, gradients = backward(model, batch)
    assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(p.logvar.dtype == p.scale.dtype == torch.float32 for p in projections_of(model))


# ---- files ----


def loads_what_it_saved(case: Case) -> None:
    """A saved adapter answers the same with and without noise."""
    with tempfile.TemporaryDirectory() as folder:
        case.trained.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(case.network.model), folder).eval()
    # Not bit for bit: some of the networks round by where their weights lie in memory.
    assert_close(case.logits(loaded), case.logits(case.trained), 1e-5, "without noise")
    logits = []
    for model in (loaded, case.trained):
        with model.sampling(seed=3):
            logits.append(case.logits(model))
    assert_close(*logits, 1e-5, "with noise")


def merges_without_a_trace(case: Case) -> None:
    """A merged model is the plain network with other weights."""

    def merge(model: Any) -> nn.Module:
        want = case.logits(model.eval())
        merged = model.merge_and_unload()
        assert_close(case.logits(merged), want, TOLERANCE, "merged logits")
        return merged

    if case.network.weights != "full":
        case.network.once("merging", lambda: merge(moved(case.network.plain())))
    merged = merge(copy.deepcopy(case.trained))
    assert type(merged) is type(case.network.model)
    for name, module in merged.named_modules():
        assert not isinstance(module, DipProjection) and not any("dip_" in key for key in vars(module)), name
        for hook in (
            *module._forward_pre_hooks.values(),
            *module._forward_hooks.values(),
        ):  # some have hooks of their own
            assert not getattr(hook, "__module__", "").startswith("dipnet_hf"), name


# ---- ensembles ----


def has_the_mean_of_its_samples(case: Case) -> None:
    """The ensemble's logits are the mean of its samples', of which the first does not depend on the others."""
    rows = 1 if "input_ids" in case.batch else None
    with case.trained.base_model.ensemble_samples(3, seed=1):
        samples_K = case.logits(case.trained, rows)
    with case.trained.base_model.ensemble_samples(1, seed=1):
        first = case.logits(case.trained, rows)
    with case.trained.ensemble(num_samples=3, average="logit", seed=1):
        mean = case.logits(case.trained, rows)
    assert difference_of(samples_K[0], samples_K[1]) > 1e-6, "two samples are the same"
    assert_close(samples_K[:1], first, TOLERANCE, "the first sample of three and of one")
    assert_close(mean, samples_K.mean(0), TOLERANCE, "the mean")


def is_the_network_without_variance(case: Case) -> None:
    """An ensemble of no noise is one pass without noise, at the real tokens."""
    model = copy.deepcopy(case.trained)
    with torch.no_grad():
        for logvar in model.logvars():
            logvar.fill_(-40.0)
    with model.ensemble(num_samples=3, average="logit"):
        mean = case.logits(model)
    want = case.logits(case.trained)
    if "attention_mask" in case.batch and mean.shape[:2] == case.batch["attention_mask"].shape:
        real = case.batch["attention_mask"].bool()
        mean, want = mean[real], want[real]
    assert_close(mean, want, TOLERANCE, "without variance")


def answers_alike_with_a_cache(case: Case) -> None:
    """A row in two pieces has the logits of the whole row."""
    _compare_in_ensemble(case, _in_pieces)


def answers_alike_behind_padding(case: Case) -> None:
    """A row behind padding has the logits of the row alone."""
    if not case.network.takes_mask:
        raise NotAsked("no padding")

    def padded(case: Case, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        longer, inputs = _padded(case)
        return case.tokens_logits(model, longer, **inputs)[:, NUM_PADS:]

    _compare_in_ensemble(case, padded)


def answers_alike_in_another_batch(case: Case) -> None:
    """A row has the same logits whatever stands beside it."""
    if "input_ids" in case.batch and "labels" in case.batch and shifts_labels(case.network.model):

        def beside_others(case: Case, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
            others = torch.randint(5, 180, (2, ids.shape[1]), generator=torch.Generator().manual_seed(9))
            return case.tokens_logits(model, torch.cat([ids, others]))[:1]

        return _compare_in_ensemble(case, beside_others)

    def compare(model: nn.Module) -> None:
        assert_close(case.logits(model, 2)[:1], case.logits(model, 1), TOLERANCE, "in another batch")

    case.network.once("another batch", lambda: compare(case.network.model))
    with case.trained.ensemble(num_samples=3, seed=1):
        compare(case.trained)


def _in_pieces(case: Case, model: nn.Module, ids: torch.Tensor, cut: int = 7) -> torch.Tensor:
    with torch.no_grad():
        first = model(input_ids=ids[:, :cut], use_cache=True)
        cache = getattr(first, "past_key_values", None)
        if cache is None:
            raise NotAsked("no cache")
        second = model(input_ids=ids[:, cut:], past_key_values=cache, use_cache=True)
    return torch.cat([first.logits, second.logits], dim=1)


def _compare_in_ensemble(case: Case, answer: Callable[[Case, nn.Module, torch.Tensor], torch.Tensor]) -> None:
    """Whether an ensemble answers the first row in this way as it answers the row alone, if the network does."""
    ids = case.first_row
    if not shifts_labels(case.network.model):
        raise NotAsked("it predicts no next token")

    def compare(model: nn.Module) -> None:
        assert_close(answer(case, model, ids), case.tokens_logits(model, ids), TOLERANCE, "in this way")

    case.network.once(f"answers, {answer.__name__}", lambda: compare(case.network.model))
    with case.trained.deterministic():
        compare(case.trained)
    with case.trained.ensemble(num_samples=3, seed=1):
        compare(case.trained)


def generates_step_by_step(case: Case) -> None:
    """Greedy tokens of an ensemble, and their logits, are those of whole passes one by one."""
    _compare_generation(case, padded=False)


def generates_alike_behind_padding(case: Case) -> None:
    """As above, for a row behind padding."""
    if not case.network.takes_mask:
        raise NotAsked("no padding")
    _compare_generation(case, padded=True)


def _compare_generation(case: Case, padded: bool) -> None:
    ids = case.first_row
    if not shifts_labels(case.network.model):
        raise NotAsked("it predicts no next token")
    num_tokens = 5
    settings: dict[str, Any] = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": None, "forced_eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}

    def step_by_step(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logits = ids, []
        for _ in range(num_tokens):
            logits.append(case.tokens_logits(model, tokens)[0, -1])
            tokens = torch.cat([tokens, logits[-1].argmax().view(1, 1)], dim=1)
        return tokens[0, ids.shape[1] :], torch.stack(logits)

    def generate(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = ids, torch.ones_like(ids)
        if padded:
            tokens, inputs = _padded(case)
            mask = inputs["attention_mask"]
        out = model.generate(input_ids=tokens, attention_mask=mask, **settings)
        return out.sequences[0, tokens.shape[1] :], torch.cat(out.logits)

    def compare(model: nn.Module) -> None:
        (tokens, logits), (own_tokens, own_logits) = step_by_step(model), generate(model)
        assert torch.equal(own_tokens, tokens), f"tokens {own_tokens.tolist()} for {tokens.tolist()}"
        assert_close(own_logits, logits, TOLERANCE, "logits of the steps")

    case.network.once(f"generation, padded={padded}", lambda: compare(case.network.model))
    with case.trained.deterministic():
        compare(case.trained)
    with case.trained.ensemble(num_samples=3, seed=1):
        try:
            compare(case.trained)
        except ValueError as refusal:
            if "use_cache=False" not in str(refusal):
                raise
            settings["use_cache"] = False  # its advice is taken
            compare(case.trained)


PROPERTIES: tuple[Callable[[Case], None], ...] = (
    is_silent_in_eval,
    is_drawn_anew,
    is_decided_by_the_seed,
    has_the_scale_of_its_channels,
    finds_its_level,
    leaves_padding_alone,
    learns_at_every_site,
    has_the_gradient_of_differences,
    recomputes_its_noise,
    recomputes_its_noise_reentrantly,
    averages_over_samples,
    pairs_its_samples,
    has_the_models_own_loss,
    trains_in_bfloat16,
    loads_what_it_saved,
    merges_without_a_trace,
    has_the_mean_of_its_samples,
    is_the_network_without_variance,
    answers_alike_with_a_cache,
    answers_alike_behind_padding,
    answers_alike_in_another_batch,
    generates_step_by_step,
    generates_alike_behind_padding,
)

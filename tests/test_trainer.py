"""The objective inside transformers' Trainer: accumulation, optimizer groups, logs, calibration, resuming."""

import copy
import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, default_data_collator

from dipnet_hf import DipTrainer, DipTrainerMixin, dip_loss
from dipnet_hf.trainer import ShardedCalibration
from tests.helpers import (
    HasALossOfItsOwn,
    assert_same,
    calibrated_model,
    collate,
    dip_model,
    losses,
    make_rows,
    make_trainer,
    projections,
    unshifted_bart,
)
from tests.tiny_models import build, build_task, make_task_batch


@pytest.fixture
def rows():
    return make_rows()


class FixedNoise(DipTrainerMixin, Trainer):
    """Every row gets noise that depends on its tokens alone, so that batches can be split without changing it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        for projection in projections(self.model).values():
            projection.forward = lambda x, from_host, p=projection: self.noisy(p, x, inputs["input_ids"])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def noisy(self, projection, x, input_ids):
        samples = len(x) // len(input_ids)
        sign = torch.linspace(-1, 1, samples).repeat_interleave(len(input_ids))[:, None, None]
        eps = torch.sin(input_ids.repeat(samples, 1)[..., None] * torch.arange(1, x.shape[-1] + 1)) * sign
        return x + projection.dip_scale["default"] * torch.exp(projection.dip_logvar["default"] / 2) * eps


@pytest.mark.parametrize("trainer_class", [DipTrainer, FixedNoise])
@pytest.mark.parametrize("target", ["log_prob", "logits"])
def test_eight_steps_of_one_row_weigh_as_one_step_of_eight_rows(rows, tmp_path, trainer_class, target):
    """Each of the three terms, and the weights after the step; with the noise off and with fixed draws."""
    noise_off = trainer_class is DipTrainer
    results = []
    for batch_size, steps in [(8, 1), (1, 8)]:
        config = dict(num_samples=2, stability_loss_weight=0.5, stability_target=target)
        config |= dict(init_noise_std=0.0, prior_weight=0.0) if noise_off else {}
        model = dip_model(calibration=[collate(list(rows))], **config)
        trainer = make_trainer(
            model,
            rows,
            tmp_path,
            trainer_class,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
        )
        trainer.train()
        log = trainer.state.log_history[0]
        results.append(([log[name] for name in ("nll", "prior", "stability", "loss")], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-9)
    nll, prior, stability, loss = results[0][0]
    assert loss == pytest.approx(nll + prior + stability, rel=1e-5)
    assert (stability > 0 and prior != 0) or noise_off
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("config", [{}, dict(num_samples=2, stability_loss_weight=0.3)], ids=str)
def test_the_trainer_computes_dip_loss(rows, tmp_path, config):
    model = dip_model(calibration=[collate(list(rows))], **config)
    trainer = make_trainer(copy.deepcopy(model), rows, tmp_path, per_device_train_batch_size=16, max_steps=1)
    seen = {}

    class Spy(DipTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen["inputs"], seen["rng"] = inputs, torch.get_rng_state()
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer.__class__ = Spy
    trainer.train()
    log = trainer.state.log_history[0]
    torch.set_rng_state(seen["rng"])
    expected = dip_loss(model.train(), seen["inputs"])
    for name in expected._fields:
        assert log[name] == pytest.approx(getattr(expected, name).item(), rel=1e-4, abs=1e-9)


def test_terms_and_noise_are_logged_beside_the_loss(rows, tmp_path):
    trainer = make_trainer(dip_model(), rows, tmp_path, logging_steps=2, max_steps=4)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["nll"] + log["prior"] + log["stability"], rel=1e-4)
        assert 0 < log["noise_std_min"] <= log["noise_std_mean"] <= log["noise_std_max"]


def test_logvar_has_its_own_group_without_decay(rows, tmp_path):
    model = dip_model(logvar_learning_rate=0.05, prior_weight=0.0)
    trainer = make_trainer(model, rows, tmp_path, weight_decay=0.5, lr_scheduler_type="constant")
    trainer.train()
    *others, own = trainer.optimizer.param_groups
    assert {id(p) for p in own["params"]} == {id(p) for p in model.logvars()} and own["params"]
    assert (own["lr"], own["weight_decay"]) == (0.05, 0.0)
    assert not {id(p) for group in others for p in group["params"]} & {id(p) for p in own["params"]}
    assert [group["weight_decay"] for group in others] == [0.5, 0.0]
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_step_takes_what_channels_share(rows, tmp_path):
    model = dip_model(logvar_learning_rate=1.0)
    before = [logvar.detach().clone() for logvar in model.logvars()]
    gradients = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            gradients.extend(logvar.grad.clone() for logvar in model.logvars())

    trainer = make_trainer(model, rows, tmp_path, optim="sgd", max_steps=1, lr_scheduler_type="constant")
    trainer.add_callback(Spy())
    trainer.train()
    for logvar, start, gradient in zip(model.logvars(), before, gradients, strict=True):
        step = gradient + gradient.mean() * len(gradient) ** 0.5
        torch.testing.assert_close(logvar.detach(), start - step)


def test_an_optimizer_of_ones_own_is_left_as_it_is(rows, tmp_path):
    model = dip_model(calibration=[collate(list(rows))])
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in learned]
    gradients = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            gradients.extend(parameter.grad.clone() for parameter in learned)

    optimizer = torch.optim.SGD(learned, lr=0.5)  # it decays nothing, so nothing is warned of
    trainer_class = partial(DipTrainer, optimizers=(optimizer, None))
    trainer = make_trainer(model, rows, tmp_path, trainer_class, max_steps=1, lr_scheduler_type="constant")
    trainer.add_callback(Spy())
    trainer.train()
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5 and len(group["params"]) == len(before)
    for parameter, start, gradient in zip(learned, before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.5 * gradient)  # no level is shared


@pytest.mark.parametrize(
    ("is_given", "message"),
    [
        (lambda name: True, "decays the log-variances. Give them a group of their own: {'params': model.logvars()"),
        (lambda name: "dip_logvar" not in name, "does not train the log-variances. Give them a group"),
    ],
    ids=["decayed", "left out"],
)
def test_an_optimizer_of_ones_own_that_mistreats_the_noise_is_warned_of(is_given, message, rows, tmp_path):
    model = dip_model(noise_scale="absolute")
    optimizer = torch.optim.AdamW(p for name, p in model.named_parameters() if is_given(name))
    trainer = make_trainer(model, rows, tmp_path, partial(DipTrainer, optimizers=(optimizer, None)), max_steps=1)
    with pytest.warns(UserWarning, match=re.escape(message)):
        trainer.train()


class LoraFa(Trainer):
    def create_optimizer(self, *args, **kwargs):
        self.optimizer = create_lorafa_optimizer(model=self.model, r=4, lora_alpha=8, lr=1e-2)
        return self.optimizer


class NamedParameters(Trainer):
    """Its override returns nothing, which the trainer does not ask for either."""

    def create_optimizer(self, *args, **kwargs):
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(named, lr=1e-2, weight_decay=0.1)


class NamedWeights(NamedParameters):
    def create_optimizer(self, *args, **kwargs):
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if "lora" in name]
        self.optimizer = torch.optim.AdamW(named, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("base_class", [LoraFa, NamedParameters, NamedWeights, Trainer])
def test_the_weights_learn_as_without_noise_in_any_optimizer(base_class, rows, tmp_path):
    """Noise that is off leaves the weights to the optimizer, and every list of a group in step."""

    def trained(model, trainer_class):
        trainer = make_trainer(model, rows, tmp_path, trainer_class)
        trainer.train()
        weights = {n: p.detach() for n, p in model.named_parameters() if "lora" in n}
        return weights, trainer.optimizer.param_groups

    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    torch.manual_seed(0)
    stock, _ = trained(get_peft_model(build("llama"), LoraConfig(**lora)), base_class)
    off = {"noise_scale": "absolute", "init_noise_std": 0.0, "prior_weight": 0.0}
    model = dip_model(weights=LoraConfig(**lora), **off)
    weights, groups = trained(model, type("Mixed", (DipTrainerMixin, base_class), {}))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, stock[name], atol=1e-6, rtol=1e-5)
    assert all(group["params"] for group in groups)
    own = groups[-1]
    assert {id(p) for p in own["params"]} == {id(p) for p in model.logvars()} and own["weight_decay"] == 0.0
    for group in groups:
        for beside in {"param_names", "names", "scaling_factors"} & set(group):
            assert len(group[beside]) == len(group["params"])


def test_an_optimizer_of_matrices_alone_is_refused(rows, tmp_path):
    muon = partial(DipTrainer, optimizer_cls_and_kwargs=(torch.optim.Muon, {"lr": 1e-3}))
    model = dip_model(noise_scale="absolute", weights=LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="could not be made.*log-variances of the noise are vectors.*such as AdamW"):
        make_trainer(model, rows, tmp_path, muon).train()


def test_calibrates_from_its_own_data_and_leaves_the_random_state(rows, tmp_path):
    runs = []
    for calibrated in (False, True):
        model = dip_model(calibration=[collate(list(rows))] if calibrated else None)
        trainer = make_trainer(model, rows, tmp_path, max_steps=1)
        trainer.train()
        runs.append((model.noise_summary(), trainer))
    # Two batches of eight cover the sixteen rows, so the trainer has measured what the caller measured.
    for ours, theirs in zip(runs[0][0], runs[1][0]):
        assert ours["scale"] == pytest.approx(theirs["scale"], rel=1e-5)
    # So its first step draws the same noise on the same rows.
    assert losses(runs[0][1]) == pytest.approx(losses(runs[1][1]), rel=1e-5)


def test_calibrates_in_the_precision_of_training(rows, tmp_path):
    model = dip_model()
    dtypes = {True: set(), False: set()}  # before it is calibrated, and after
    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, output: dtypes[model.needs_calibration].add(output.dtype)
    )
    make_trainer(model, rows, tmp_path, bf16=True, max_steps=1).train()
    assert dtypes == {True: {torch.bfloat16}, False: {torch.bfloat16}}


def test_the_loader_that_calibration_leaves_early_does_not_count_as_being_read(rows, tmp_path):
    loaders, being_read = [], []

    class Spy(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            being_read.extend(trainer.accelerator.gradient_state.dataloader_references)

    class Recorded(DipTrainer):
        def get_train_dataloader(self):
            loaders.append(super().get_train_dataloader())
            return loaders[-1]

    trainer = make_trainer(dip_model(), rows, tmp_path, Recorded, per_device_train_batch_size=1, max_steps=1)
    trainer.add_callback(Spy())
    trainer.train()
    calibration_loader, training_loader = loaders
    assert len(calibration_loader) == 16  # calibration takes eight
    assert being_read and not any(loader is calibration_loader for loader in being_read)


def test_every_model_that_a_run_makes_is_calibrated(rows, tmp_path):
    """`hyperparameter_search` has no model before a trial, nor has it that of the trial before."""

    def trainer_of(**config):
        def model_init():
            return dip_model(init_noise_std=0.0, prior_weight=0.0, **config)

        return make_trainer(None, rows, tmp_path, partial(DipTrainer, model_init=model_init))

    trainer = trainer_of(noise_scale="absolute")  # nothing to calibrate
    trainer.train()
    fresh = trainer_of(noise_scale="relative")
    for _ in range(2):
        made = fresh.model
        fresh.model = None
        fresh.train()
        assert fresh.model is not made
        assert losses(fresh) == pytest.approx(losses(trainer), rel=1e-5)


class Stream(torch.utils.data.IterableDataset):
    """Rows that are read once, or from the start in every epoch."""

    def __init__(self, rows, once):
        self.rows = iter(rows) if once else list(rows)

    def __iter__(self):
        yield from self.rows


@pytest.mark.parametrize("once", [True, False])
def test_calibration_takes_nothing_away_from_a_stream(once, rows, tmp_path):
    """Whatever the calibrated model is trained on, in order, the trainer that calibrates first is too."""
    runs = []
    for calibrated in (True, False):
        seen = []

        class Recorded(DipTrainer):
            def training_step(self, model, inputs, *args, seen=seen, **kwargs):
                seen.append(inputs["input_ids"].tolist())
                return super().training_step(model, inputs, *args, **kwargs)

        model = dip_model(weights="frozen", noise_scale="absolute" if calibrated else "relative")
        stream = Stream(rows, once)
        arguments = {"per_device_train_batch_size": 1, "max_steps": 16 if once else 18}
        make_trainer(model, stream, tmp_path, Recorded, **arguments).train()
        runs.append(seen)
    assert runs[0] == runs[1] and len(runs[0]) == (16 if once else 18)


def test_a_second_run_logs_its_own_terms(rows, tmp_path):
    """Steps that were not logged when the first run ended, or was broken off, do not count."""

    class Broken(Exception):
        pass

    class Breaks(DipTrainer):
        breaks_at = 3

        def training_step(self, *args, **kwargs):
            if self.state.global_step == self.breaks_at:
                raise Broken
            return super().training_step(*args, **kwargs)

    trainer = make_trainer(dip_model(), rows, tmp_path, Breaks, logging_steps=2, max_steps=5)
    with pytest.raises(Broken):
        trainer.train()
    trainer.breaks_at = None
    for _ in range(2):
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logs) == 2
        for log in logs:
            assert log["loss"] == pytest.approx(log["nll"] + log["prior"] + log["stability"], rel=1e-3)


def test_evaluation_is_noise_off_and_plain(rows, tmp_path):
    model = dip_model()
    trainer = make_trainer(model, rows, tmp_path)
    plain = make_trainer(build("llama"), rows, tmp_path, Trainer)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_the_mixin_serves_a_subclass(rows, tmp_path):
    class HalfLoss(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
            return (loss / 2, outputs) if kwargs.get("return_outputs") else loss / 2

    class DipHalfLoss(DipTrainerMixin, HalfLoss):
        pass

    nlls = []
    for trainer_class in (DipTrainer, DipHalfLoss):
        trainer = make_trainer(dip_model(), rows, tmp_path, trainer_class, max_steps=1)
        trainer.train()
        nlls.append(trainer.state.log_history[0]["nll"])
    assert nlls[0] == pytest.approx(2 * nlls[1], rel=1e-5)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_killed_and_resumed_equals_uninterrupted(rows, tmp_path, weights):
    """Losses are equal, not close: adapter, optimizer and random state all come back."""
    weights = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if weights == "lora" else "full"
    config = dict(weights=weights, num_samples=2, stability_loss_weight=0.1)
    arguments = dict(max_steps=6, per_device_train_batch_size=4, save_strategy="steps", save_steps=3)

    whole = make_trainer(dip_model(**config), rows, tmp_path / "a", **arguments)
    whole.train()

    class Killed(Exception):
        pass

    class Dying(DipTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 4:
                raise Killed
            return super().training_step(*args, **kwargs)

    with pytest.raises(Killed):
        make_trainer(dip_model(**config), rows, tmp_path / "b", Dying, **arguments).train()
    torch.manual_seed(999)
    resumed = make_trainer(dip_model(**config), rows, tmp_path / "b", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_the_section_of_the_model_card_survives_the_trainers_own_card(rows, tmp_path):
    trainer = make_trainer(dip_model(), rows, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "import dipnet_hf" in (tmp_path / "README.md").read_text()


def test_the_trainer_keeps_a_loss_function_that_was_set(rows, tmp_path):
    model = dip_model(noise_scale="absolute", init_noise_std=0.0, prior_weight=0.0)
    base = model.get_base_model()
    plain = base.loss_function
    base.loss_function = lambda **kwargs: 3 * plain(**kwargs)
    trainer = make_trainer(model, rows, tmp_path, max_steps=1)
    trainer.train()
    tripled = trainer.state.log_history[0]["nll"]
    assert 3 * 3.5 < tripled < 3 * 5  # ln 64 = 4.16


class AddsToItsLoss(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 10
        return outputs


@pytest.mark.parametrize(
    "make_base",
    [
        lambda: AddsToItsLoss(build("llama").config),
        lambda: HasALossOfItsOwn(build("llama").config),
        unshifted_bart,
    ],
)
def test_the_trainer_keeps_a_loss_that_is_not_the_plain_one(make_base, rows, tmp_path):
    torch.manual_seed(0)
    base = make_base()
    model = dip_model(base, noise_scale="absolute", init_noise_std=0.0, target_modules=r".*layers\.\d+")
    trainer = make_trainer(model, rows, tmp_path, max_steps=1, learning_rate=0.0)
    assert not trainer.model.hidden_state_capture.probe().loss_is_plain
    seen = []
    trainer.model.get_base_model().register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True
    )
    trainer.train()
    inputs = {name: seen[-1][name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).loss.item()
    assert trainer.state.log_history[0]["nll"] == pytest.approx(expected, rel=1e-5)


class PopsLabels(Trainer):
    """As in transformers' documentation of `compute_loss`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(loss, labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def sum_of_squares(outputs, labels, num_items_in_batch):
    return (outputs.logits.square().mean(-1) * (labels != -100)).sum() / num_items_in_batch


@pytest.mark.parametrize(
    ("base_class", "arguments", "loss_function", "target"),
    [
        (Trainer, {"label_smoothing_factor": 0.3}, None, "log_prob"),
        (Trainer, {}, sum_of_squares, "logits"),
        (PopsLabels, {}, None, "log_prob"),
    ],
    ids=["smoothing", "function", "subclass"],
)
def test_a_loss_that_takes_the_labels_away_leaves_the_stability_term(
    base_class, arguments, loss_function, target, rows, tmp_path
):
    """The data term is stock's, the stability term what it is beside the plain loss: equal noise at every step."""

    def first_log(trainer_class, **config):
        config |= {"noise_scale": "absolute", "init_noise_std": 0.2, "prior_weight": 0.0, "num_samples": 2}
        model = dip_model(sampling="independent", **config)
        trainer = make_trainer(model, rows, tmp_path, partial(trainer_class, compute_loss_func=function), **options)
        trainer.train()
        return trainer.state.log_history[0]

    stability = {"stability_loss_weight": 0.5, "stability_target": target}
    mixed = type("Mixed", (DipTrainerMixin, base_class), {})
    function, options = loss_function, {"max_steps": 1, **arguments}
    ours, unstable = first_log(mixed, **stability), first_log(mixed)
    function, options = None, {"max_steps": 1}
    plain = first_log(DipTrainer, **stability)
    assert ours["stability"] == pytest.approx(plain["stability"], rel=1e-4) and ours["stability"] > 0
    assert ours["nll"] == pytest.approx(unstable["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "stability_loss_weight"), [("regression", 0.0), ("multi_label", 0.1), ("tokens", 0.1), ("t5", 0.0)]
)
def test_the_trainer_serves_other_tasks(name, stability_loss_weight, tmp_path):
    """With the noise off the loss is stock's; a stability term of what is no class is refused."""
    batch = make_task_batch(name)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]

    def trained(model, trainer_class):
        trainer = make_trainer(model, rows, tmp_path, trainer_class, max_steps=1, remove_unused_columns=False)
        trainer.data_collator = default_data_collator
        trainer.train()
        return losses(trainer)

    config = {"noise_scale": "absolute", "init_noise_std": 0.0, "prior_weight": 0.0, "num_samples": 2}
    model = dip_model(build_task(name), stability_loss_weight=stability_loss_weight, **config)
    if name == "multi_label":
        with pytest.raises(ValueError, match="is not known to predict classes.*set stability_loss_weight=0"):
            trained(model, DipTrainer)
    else:
        assert trained(model, DipTrainer) == pytest.approx(trained(build_task(name), Trainer), rel=1e-5)


def test_a_model_without_the_adapter_is_refused(rows, tmp_path):
    with pytest.raises(TypeError, match="DipTrainer needs a model from get_dip_model, got LlamaForCausalLM"):
        make_trainer(build("llama"), rows, tmp_path)


def test_a_run_says_at_its_start_where_noise_enters(rows, tmp_path, caplog):
    caplog.set_level("INFO", "dipnet_hf")
    model = dip_model(calibration=[collate(list(rows))], init_noise_std=0.25, num_samples=2)
    make_trainer(model, rows, tmp_path, DipTrainer, max_steps=1).train()
    where = "Noise at 3 sites, model.layers.0 to model.layers.2: "
    assert where + "std 0.25 (relative), 2 per row; prior of weight 0.1 around where it began" in caplog.text


def test_a_model_whose_adapter_was_deleted_is_refused(rows, tmp_path):
    model = dip_model()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="last DIP adapter was deleted"):
        make_trainer(model, rows, tmp_path)


def test_a_model_that_will_be_sharded_is_calibrated_when_training_begins(rows):
    batch = collate(list(rows))
    model, expected = dip_model(), dip_model(calibration=[batch])
    calibration = ShardedCalibration()
    calibration.on_train_begin(None, None, None, model)  # the model needs none, or there is nothing to do it on
    assert model.needs_calibration
    calibration.batches = [batch]
    calibration.on_train_begin(None, None, None, model)
    assert model.noise_summary() == expected.noise_summary() and calibration.batches == []


def test_the_scale_is_resumed_where_fsdp_leaves_it_out(rows, tmp_path, monkeypatch):
    saved = dip_model(calibration=[collate(list(rows))])
    saved.save_pretrained(tmp_path)
    trainer = make_trainer(dip_model(), rows, tmp_path)
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *args: None)
    trainer._load_from_checkpoint(str(tmp_path))
    assert trainer.model.needs_calibration
    trainer.is_fsdp_enabled = True
    trainer._load_from_checkpoint(str(tmp_path))
    assert trainer.model.noise_summary() == saved.noise_summary()


@pytest.fixture
def in_zero3(monkeypatch):
    """Trainers go the way of ZeRO-3; that of parameters in parts is in `test_zero.py`."""
    monkeypatch.setattr(DipTrainer, "_is_in_zero3", True)


def test_the_scale_is_resumed_where_zero_3_leaves_it_out(rows, tmp_path, in_zero3):
    saved = dip_model(calibration=[collate(list(rows))])
    saved.save_pretrained(tmp_path)
    trainer = make_trainer(dip_model(), rows, tmp_path)
    trainer._load_optimizer_and_scheduler(None)
    assert trainer.model.needs_calibration
    trainer._load_optimizer_and_scheduler(str(tmp_path))
    assert trainer.model.noise_summary() == saved.noise_summary()


@pytest.mark.parametrize("weights", ["lora", "full", "frozen"])
def test_an_adapter_is_saved_whole_from_what_zero_3_has_gathered(rows, tmp_path, in_zero3, weights):
    model = calibrated_model(weights=weights)
    trainer = make_trainer(model, rows, tmp_path)
    trainer._save(str(tmp_path), {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert_same(model, PeftModel.from_pretrained(build("llama"), tmp_path).eval())
    trainer._save(str(tmp_path), None)  # on another process, which only helps to gather


def test_a_model_for_zero_3_is_calibrated_when_training_begins(rows, tmp_path, in_zero3):
    needed = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            needed.append(model.needs_calibration)

    trainer = make_trainer(dip_model(), rows, tmp_path)
    trainer.callback_handler.callbacks.insert(0, Spy())
    trainer.callback_handler.callbacks.append(Spy())
    trainer.train()
    assert needed == [True, False]


def test_the_level_is_shared_by_the_gradients_where_zero_takes_them_away(rows, tmp_path):
    trainer = make_trainer(dip_model(calibration=[collate(list(rows))]), rows, tmp_path, optim="sgd")
    trainer.is_deepspeed_enabled = True
    optimizer = trainer.create_optimizer()
    logvar = trainer.model.logvars()[0]
    weights = torch.arange(float(len(logvar)))
    for _ in range(2):  # gradients of two batches add up
        (logvar * weights).sum().backward()
    optimizer.step()
    torch.testing.assert_close(logvar.grad, 2 * (weights + weights.mean() * len(logvar) ** 0.5))


def test_variances_with_a_learning_rate_of_zero_take_no_part(rows, tmp_path):
    """They stay, and the norm that is logged and clipped is that of the weights alone."""
    model = dip_model(logvar_learning_rate=0.0, prior_weight=0.0)
    trainer = make_trainer(model, rows, tmp_path, max_grad_norm=1e9, max_steps=1)
    norms = []
    trainer.add_callback(WeightNorm(norms))
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-6)
    for projection in projections(model).values():
        std = torch.exp(projection.dip_logvar["default"] / 2)
        torch.testing.assert_close(std, projection.dip_init_std["default"].expand_as(std), atol=0, rtol=1e-6)


class WeightNorm(TrainerCallback):
    """Notes the norm of the gradients of all but the log-variances."""

    def __init__(self, norms):
        self.norms = norms

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = [p.grad for name, p in model.named_parameters() if "dip_logvar" not in name and p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

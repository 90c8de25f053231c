"""Calibration: the level that is found by itself, bad input, and what scale and level do on a stand-in for a
pretrained model, whose massive activations and outlier channels no model built from a config has."""

import logging
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForQuestionAnswering

from dipnet_hf import DipConfig, DipModel, DipTrainer, dip_loss, get_dip_model
from dipnet_hf.calibration import find_std
from dipnet_hf.scale import channel_scale
from tests.helpers import dip_model, make_trainer, predictions, projections, site_inputs
from tests.tiny_models import (
    MASSIVE_CHANNEL,
    OUTLIER_CHANNELS,
    build,
    build_task,
    build_with_outliers,
    make_batch,
    make_outlier_batch,
    make_task_batch,
)


def outlier_model(**fields):
    """The stand-in, calibrated on two batches by its defaults, as a user would."""
    batches = [make_outlier_batch(seed=seed) for seed in (1, 2)]
    return get_dip_model(build_with_outliers(), DipConfig(**{"weights": "full", **fields}), calibration=batches)


@torch.no_grad()
def nll(model, batch=None):
    return float(model(**(batch or make_outlier_batch())).loss)


# ---- the level ----


@pytest.mark.parametrize("increase", [0.002, 0.02, 0.5])
@pytest.mark.parametrize("cost", [0.03, 1.0, 30.0, 1e3])
def test_the_level_is_found_where_the_loss_rises_and_saturates(cost, increase):
    stds = []

    def loss_at(std):
        stds.append(std)
        return 2.0 + 8.0 * (1.0 - math.exp(-cost * std**2 / 8.0))

    std, loss = find_std(loss_at, 2.0, increase)
    assert std in stds and len(stds) <= 4
    assert loss - 2.0 == pytest.approx(increase, rel=0.25)


def test_the_level_is_found_past_a_loss_that_falls_at_first_and_before_one_that_is_not_finite():
    std, loss = find_std(lambda std: math.nan if std > 1 else 2.0 - 0.1 * std + std**2, 2.0, 0.05)
    assert loss == 2.0 - 0.1 * std + std**2 == pytest.approx(2.05, abs=0.02)
    std, loss = find_std(lambda std: math.nan if std > 0.03 else 2.0 + 10 * std**2, 2.0, 0.005)
    assert std < 0.03 and loss == pytest.approx(2.005, abs=0.003)


@pytest.mark.parametrize(
    "loss_at", [lambda std: 2.0, lambda std: 3.0, lambda std: math.nan, lambda std: 9.0 if std > 0.06 else 2.0]
)
def test_a_loss_that_noise_does_not_raise_by_so_much_is_an_error(loss_at):
    with pytest.raises(
        ValueError, match=r"No noise was found .*, 2, by init_loss_increase=0.05; tried .*at 0\.05[,.]"
    ):
        find_std(loss_at, 2.0, 0.05)


def test_auto_finds_the_level_of_the_calibration_batches(caplog):
    caplog.set_level(logging.INFO, "dipnet_hf")
    model = get_dip_model(build_with_outliers(), DipConfig(weights="full", init_loss_increase=0.1))
    passes = []
    model.get_base_model().register_forward_hook(lambda module, args, output: passes.append(output.logits.shape))
    batches = [make_outlier_batch(seed=seed) for seed in (1, 2)]
    model.calibrate(batches)
    assert len(passes) <= 2 * (1 + 10) + 1  # the measuring pass and ten more of two batches, and the probe of the loss
    std = model.init_noise_std
    assert all(row["mean"] == pytest.approx(std) for row in model.noise_summary())
    assert f"Noise level {std:.3g} found: loss of the model's own answers" in caplog.text
    off = [predictions(model.eval(), batch) for batch in batches]
    with model.sampling(seed=1):  # other draws, and no pairs
        divergences = [
            torch.nn.functional.kl_div(predictions(model, batch), log_probs, reduction="batchmean", log_target=True)
            for _ in range(100)
            for batch, log_probs in zip(batches, off, strict=True)
        ]
    assert torch.stack(divergences).mean().item() == pytest.approx(0.1, rel=0.2)


def test_the_level_is_that_of_the_predictions_whatever_the_labels_say():
    """A model that is sure and wrong gains by noise, so that its labels tell no level."""
    levels = []
    for shift in (0, 1):
        batch = make_outlier_batch()
        wrong = (batch["labels"] + shift) % build_with_outliers().config.vocab_size
        batch["labels"] = torch.where(batch["labels"] == -100, -100, wrong)
        levels.append(
            get_dip_model(build_with_outliers(), DipConfig(weights="frozen"), calibration=[batch]).init_noise_std
        )
    assert levels[0] == levels[1]


def test_the_level_hardly_depends_on_the_draws(monkeypatch):
    """In pairs, what is linear in the noise cancels; a single draw of it would decide the level."""
    batches, stds = [make_outlier_batch(num_rows=4)], []
    for seed in range(6):
        sampling = DipModel.sampling

        def of_this_seed(self, seed=0, number=seed, sampling=sampling):
            return sampling(self, seed=number)

        monkeypatch.setattr(DipModel, "sampling", of_this_seed)
        model = get_dip_model(build_with_outliers(), DipConfig(weights="frozen"), calibration=batches)
        monkeypatch.undo()
        stds.append(model.init_noise_std)
    assert len(set(stds)) > 1 and max(stds) < 1.3 * min(stds)


def test_more_is_wanted_more_is_found():
    stds = [outlier_model(init_loss_increase=wanted).noise_summary()[0]["mean"] for wanted in (0.02, 0.1, 0.5)]
    assert stds == sorted(stds) and stds[0] < 0.5 * stds[2]


def test_the_level_is_that_of_absolute_noise_too():
    model = outlier_model(noise_scale="absolute")
    assert not model.needs_calibration and {row["scale"] for row in model.noise_summary()} == {1.0}
    with model.eval().sampling(seed=0):
        noisy = nll(model)
    assert 0 < noisy - nll(model) < 0.15


def test_the_level_does_not_depend_on_the_samples_of_training():
    assert outlier_model().init_noise_std == outlier_model(num_samples=4, stability_loss_weight=1.0).init_noise_std


def test_a_classifier_has_a_level():
    torch.manual_seed(0)
    model = build("vit")
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    images = make_batch("vit", num_rows=64)
    images["labels"] = model(**{"pixel_values": images["pixel_values"]}).logits.argmax(-1)
    model = get_dip_model(model, DipConfig(weights="frozen", init_loss_increase=0.02), calibration=[images])
    off = nll(model.eval(), images)
    with model.sampling(seed=0):
        noisy = sum(nll(model, images) for _ in range(200)) / 200
    assert noisy - off == pytest.approx(0.02, rel=0.3)


def test_a_loss_of_other_labels_has_a_level():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertForQuestionAnswering(config)
    with torch.no_grad():
        model.qa_outputs.weight.mul_(100)
    input_ids = make_batch("llama", num_rows=64)["input_ids"]
    logits = model.eval()(input_ids=input_ids)
    batch = {"input_ids": input_ids, "start_positions": logits.start_logits.argmax(-1)}
    batch["end_positions"] = logits.end_logits.argmax(-1)
    model = get_dip_model(model, DipConfig(weights="frozen"), calibration=[batch])
    assert model.init_noise_std > 0 and not model.needs_calibration


def test_a_row_without_padding_and_shared_positions_are_taken():
    """What cannot be repeated row by row is calibrated nevertheless."""
    batch = make_outlier_batch()
    rows = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    packed = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }
    packed["labels"] = packed["input_ids"].masked_fill(packed["position_ids"] < 2, -100)
    shared = {**batch, "position_ids": torch.arange(16)[None]}
    stds = [
        get_dip_model(build_with_outliers(), DipConfig(weights="frozen"), calibration=[each]).init_noise_std
        for each in (batch, packed, shared)
    ]
    assert max(stds) < 1.3 * min(stds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_level_of_float32(dtype):
    batches = [make_outlier_batch(seed=seed) for seed in (1, 2)]
    stds = []
    for each in (torch.float32, dtype):
        model = get_dip_model(build_with_outliers().to(each), DipConfig(weights="frozen"), calibration=batches)
        stds.append(model.init_noise_std)
    assert stds[1] == pytest.approx(stds[0], rel=0.1)


def test_one_config_for_two_adapters_finds_two_levels():
    """PEFT copies no config: what the first adapter found must not be taken for a number that was given."""
    config = DipConfig(weights="frozen", task_type="CAUSAL_LM")
    model = outlier_model(weights="frozen")
    for name, increase in (("a", 0.02), ("b", 0.2)):
        config.init_loss_increase = increase
        model.add_adapter(name, config)
        model.set_adapter(name)
        assert model.needs_calibration and model.init_noise_std is None
        model.calibrate([make_outlier_batch(seed=1)])
        assert not model.needs_calibration and model.prior_loss().isfinite()
    assert config.init_noise_std == "auto"
    level = model.init_noise_std
    model.set_adapter("a")
    assert model.init_noise_std < 0.7 * level


def test_calibrating_again_keeps_the_variances():
    model = outlier_model()
    with torch.no_grad():
        for logvar in model.logvars():
            logvar.add_(torch.arange(32.0) / 100)
    before = [row["mean"] for row in model.noise_summary()]
    model.calibrate([make_outlier_batch(seed=5)])
    assert [row["mean"] for row in model.noise_summary()] == before


def test_a_number_is_taken_and_warned_of_if_it_costs_more_than_a_nat():
    with pytest.warns(UserWarning, match=r"raises the loss .* from 0\.\d+ to \d\.\d+, by more than 1 nat"):
        model = outlier_model(init_noise_std=3.0)
    assert all(row["mean"] == pytest.approx(3.0) for row in model.noise_summary())
    outlier_model(init_noise_std=0.1)  # a warning would be an error


def test_the_sweep_shows_the_loss_by_site_and_changes_nothing():
    model = outlier_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = model.train().noise_sweep([make_outlier_batch()], [0.1, 1.0])
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    sites = ["all", *(row["name"] for row in model.noise_summary())]
    cells = [(site, std) for site in sites for std in (0.1, 1.0)]
    assert [(row["site"], row["std"]) for row in rows] == [("all", 0.0), *cells]
    losses = {(row["site"], row["std"]): row["loss"] for row in rows}
    assert losses["all", 0.0] == pytest.approx(nll(model.eval()), rel=1e-5)
    for site in sites[1:]:
        assert losses["all", 0.0] < losses[site, 1.0] < losses["all", 1.0]
    assert model.noise_sweep([make_outlier_batch()], [1.0], per_site=False) == [rows[0], rows[2]]
    with pytest.raises(ValueError, match=r"must be positive and finite, got \[0.1, -1\]"):
        model.noise_sweep([make_outlier_batch()], [0.1, -1])
    with pytest.raises(ValueError, match="no supervised token"):
        model.noise_sweep([make_outlier_batch()["input_ids"]], [0.1])
    with pytest.raises(ValueError, match=r"call model\.calibrate\(batches\) first"):
        get_dip_model(build("llama"), DipConfig(weights="frozen")).noise_sweep([make_batch("llama")], [0.1])


def test_calibration_leaves_every_module_in_its_mode(tiny_llama, batch):
    model = get_dip_model(tiny_llama, DipConfig(weights="frozen", init_noise_std=0.1)).train()
    frozen = model.get_base_model().model.layers[1].eval()
    model.calibrate([batch])
    assert model.training and not frozen.training


# ---- bad input ----


def test_what_cannot_be_calibrated_is_named_and_leaves_nothing_behind():
    batch = make_outlier_batch()
    unlabelled = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for batches in ([unlabelled], [{**batch, "labels": torch.full_like(batch["labels"], -100)}], [batch["input_ids"]]):
        model = get_dip_model(build_with_outliers(), DipConfig(weights="frozen"))
        with pytest.raises(ValueError, match="hold no supervised token. Give batches with labels, or a number"):
            model.calibrate(batches)
        assert model.needs_calibration
    with pytest.raises(ValueError, match=r"3 of 3 sites never ran.*'model\.layers\.0'.*Give batches that reach them"):
        get_dip_model(build("llama"), DipConfig(weights="frozen"), calibration=[])
    with pytest.raises(ValueError, match='noise_scale="absolute" has nothing to calibrate'):
        get_dip_model(
            build("llama"),
            DipConfig(weights="frozen", noise_scale="absolute", init_noise_std=0.1),
            calibration=[batch],
        )
    silent = build("llama")
    silent.lm_head.weight.data.zero_()
    with pytest.raises(ValueError, match=r"No noise was found .*predicts nothing yet.*Give a number"):
        get_dip_model(silent, DipConfig(weights="frozen"), calibration=[make_batch("llama")])


def test_calibration_needs_its_noise():
    model, batch = outlier_model(weights="frozen"), make_outlier_batch()
    with model.disable_adapter(), pytest.raises(ValueError, match="Noise is disabled.*leave disable_adapter"):
        model.calibrate([batch])
    with model.ensemble(2):
        for call in (model.calibrate, lambda batches: model.noise_sweep(batches, [0.1])):
            with pytest.raises(ValueError, match="in an ensemble, whose seed decides its noise"):
                call([batch])


@pytest.mark.parametrize("init_noise_std", ["auto", 0.1])
def test_a_loss_that_is_not_finite_is_named(init_noise_std):
    model = get_dip_model(build_with_outliers(), DipConfig(weights="frozen", init_noise_std=init_noise_std))
    model.get_base_model().lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss of the calibration batches is nan without any noise"):
        model.calibrate([make_outlier_batch()])


def test_a_failed_calibration_keeps_the_noise_that_was():
    model = outlier_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def breaks():
        yield make_outlier_batch(seed=7)
        raise RuntimeError("the data ended")

    for batches, error in ((breaks(), "the data ended"), ([{"input_ids": torch.zeros(1, 0).long()}], ".")):
        with pytest.raises((RuntimeError, ValueError), match=error):
            model.calibrate(batches)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert dip_loss(model.train(), make_outlier_batch()).loss.isfinite()


def test_calibration_takes_single_tensors_and_images():
    model = get_dip_model(build("llama"), DipConfig(weights="frozen", init_noise_std=0.1))
    model.calibrate([make_batch("llama")["input_ids"].repeat(2, 1)])
    assert not model.needs_calibration
    vit = get_dip_model(
        build("vit"), DipConfig(weights="frozen", init_noise_std=0.1), calibration=[make_batch("vit", num_rows=16)]
    )
    assert not vit.needs_calibration


def test_noise_before_calibration_names_it():
    batch = make_batch("llama")
    for fields in ({}, {"init_noise_std": 0.1}, {"noise_scale": "absolute"}):
        model = get_dip_model(build("llama"), DipConfig(weights="frozen", **fields)).train()
        message = r"site 'model\.layers\.0' was never calibrated.*call model\.calibrate\(batches\).*labelled"
        with pytest.raises(ValueError, match=message):
            model(**batch)
        with pytest.raises(ValueError, match=message), model.eval().sampling():
            model(**batch)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, build("llama")(**batch).logits)
    with pytest.raises(ValueError, match=r"initial level, which was never found: call model\.calibrate"):
        get_dip_model(build("llama"), DipConfig(weights="frozen")).prior_loss()


# ---- what a pretrained model survives ----


def test_the_stand_in_has_a_massive_token_and_outlier_channels():
    """What is planted is there at every site, and the RMS of a site, the unit of 0.1's noise, is made of it."""
    model, batch = build_with_outliers(), make_outlier_batch()
    inputs = site_inputs(model, [f"model.layers.{i}" for i in range(3)], [batch])
    first = batch["input_ids"][batch["attention_mask"].bool()] == 1
    for x in inputs.values():
        norms = x.norm(dim=1)
        assert norms[first].min() > 50 * norms[~first].median()
        others = x[~first].abs().median(0).values
        assert (others[OUTLIER_CHANNELS] > 15 * others.median()).all()
        assert x[~first][:, OUTLIER_CHANNELS].std(0).max() < 0.1  # constant
        assert x.square().mean().sqrt() > 50 * channel_scale(x).median()
        assert channel_scale(x)[MASSIVE_CHANNEL] < 3 * channel_scale(x).median()
    assert nll(model) < 1.0 < math.log(64)


def test_noise_of_the_sites_rms_destroys_the_stand_in_and_the_default_does_not():
    model = outlier_model().eval()
    off = nll(model)
    with model.sampling(seed=3):
        assert 0 < abs(nll(model) - off) < 0.15
    inputs = site_inputs(build_with_outliers(), [f"model.layers.{i}" for i in range(3)], [make_outlier_batch()])
    for name, projection in projections(model).items():  # as version 0.1 did by default
        projection.set_noise(inputs[name].square().mean().sqrt(), std=0.05)
    with model.sampling(seed=3):
        assert nll(model) - off > 2.0


@pytest.mark.parametrize("weights", ["full", LoraConfig(r=4, target_modules="all-linear")], ids=["full", "lora"])
def test_training_with_defaults_learns_and_keeps_its_noise(weights, tmp_path):
    torch.manual_seed(0)
    batches = [make_outlier_batch(seed=seed) for seed in range(8)]
    rows = [{name: value[i].tolist() for name, value in batch.items()} for batch in batches for i in range(8)]
    model = get_dip_model(build_with_outliers(), DipConfig(weights=weights))
    before = nll(model.eval())
    trainer = make_trainer(
        model, rows, tmp_path, DipTrainer, per_device_train_batch_size=8, max_steps=60, learning_rate=3e-3
    )
    trainer.train()
    stds = torch.cat([torch.exp(logvar.detach() / 2) for logvar in model.logvars()]) / model.init_noise_std
    assert nll(model.eval(), make_outlier_batch(seed=99)) < 0.8 * before
    assert 0.2 < stds.min() < stds.max() < 3  # neither collapsed nor run away
    assert (stds - 1).abs().mean() > 0.05  # and not where they began


def test_an_ensemble_of_the_stand_in_is_the_mean_of_noisy_passes():
    model, batch = outlier_model().eval(), make_outlier_batch()
    off = nll(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        with model.base_model.ensemble_samples(4, seed=1):
            each = model(**inputs).logits.log_softmax(-1)
        with model.ensemble(4, seed=1):
            mean = model(**inputs).logits.log_softmax(-1)
            loss = nll(model)
    assert each.shape == (4, *mean.shape) and each.std(0).max() > 1e-3
    torch.testing.assert_close(mean, each.logsumexp(0) - math.log(4), atol=1e-4, rtol=1e-4)
    assert abs(loss - off) < 0.15


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_scale_and_level_are_stored(tmp_path, granularity):
    model, batch = outlier_model(weights="frozen", granularity=granularity), make_outlier_batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_with_outliers(), tmp_path)
    assert not loaded.needs_calibration and loaded.noise_summary() == model.noise_summary()
    assert loaded.init_noise_std == model.init_noise_std
    again = get_dip_model(build_with_outliers(), DipConfig(weights="frozen", granularity=granularity))
    again.load_adapter(tmp_path, "default", is_trainable=True)  # as a Trainer resumes
    assert not again.needs_calibration
    for each in (loaded, again):
        assert torch.equal(each.prior_loss(), model.prior_loss())
    with torch.no_grad(), model.eval().sampling(seed=4), loaded.eval().sampling(seed=4):
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_an_adapter_of_one_scale_per_site_loads_and_means_what_it_meant(tmp_path):
    """Version 0.1 saved the RMS of the site, a scalar."""
    model, batch = outlier_model(weights="frozen", init_noise_std=0.05), make_outlier_batch()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    scales = iter([0.5, 1.0, 2.0])
    tensors = {
        name: torch.tensor(next(scales)) if "dip_scale" in name else tensor
        for name, tensor in load_file(file).items()
        if "dip_init_std" not in name
    }
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(build_with_outliers(), tmp_path)
    for projection, scale in zip(projections(model).values(), [0.5, 1.0, 2.0], strict=True):
        projection.set_noise(scale=torch.tensor(scale))
    assert loaded.noise_summary() == model.noise_summary() and loaded.init_noise_std == model.init_noise_std
    with torch.no_grad(), model.eval().sampling(seed=4), loaded.eval().sampling(seed=4):
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (
        PeftModel.from_pretrained(build_with_outliers(), tmp_path / "again").noise_summary() == model.noise_summary()
    )


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "whisper"])
def test_an_encoder_decoder_is_calibrated_on_its_own_loss(name):
    """It makes its decoder's input of the labels, so they are never taken away."""
    batch = make_task_batch(name)
    model = dip_model(build_task(name), [batch], weights="frozen")
    assert not model.needs_calibration
    (row,) = model.noise_sweep([batch], stds=[], per_site=False)
    assert row["loss"] == pytest.approx(build_task(name)(**batch).loss.item(), rel=1e-5)

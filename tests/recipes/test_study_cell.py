"""A cell of a study: what its result file says of the training, and a distillation that had ended."""

import math
from pathlib import Path

import pytest
import yaml

from dipnet_hf.diagnostics import lipschitz_constants, noise_robustness, weight_robustness
from recipes import distill, study_cell, study_smoothness
from recipes.data import make_collator, prepare_data
from recipes.finished_run import load_network, read_run
from recipes.running import load_tokenizer
from recipes.study_cell import run_cell
from recipes.study_config import Cell, load_study
from report.results import read_results


@pytest.fixture
def make_cell(model_folder, problems_folder, tmp_path):
    """Return a function that makes a cell of a study of one method on the tiny model, in a folder."""
    training = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
    training |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "metric_for_best_model": "nll"}
    base = {
        "model": str(model_folder),
        "dataset": str(problems_folder),
        "max_length": 64,
        "num_validation_samples": 3,
        "weights": "full",
        "training": {"output_dir": "unused", **training},
        "evaluation": {"limit": 1, "max_new_tokens": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "base": str(tmp_path / "base.yaml"),
        "output_dir": str(tmp_path / "study"),
        "references": ["dip"],
        "margin": 0.01,
        "tuning_seeds": [0],
        "seeds": [0],
        "methods": {"dip": {"setting": "dip.init_noise_std", "values": [0.1], "num_samples": 2}},
        "num_smoothness_problems": 3,
        "distill": {"num_samples": 2, "training": {"max_steps": 1, "use_cpu": True}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))

    def make(phase):
        cell = Cell(load_study(tmp_path / "study.yaml"), phase, "dip", 0.1, 0)
        cell.folder.mkdir(parents=True)
        return cell

    return make


def test_the_validation_curve_is_of_validation_problems_whatever_is_scored_afterwards(make_cell):
    """The same training, scored on validation problems and on test problems, and by an ensemble."""
    curves = []
    for phase in ("tuning", "final"):
        cell = make_cell(phase)
        run_cell(cell)
        curves.append(read_results(cell.result_file)["validation"])
    assert [entry["step"] for entry in curves[0]] == [2, 4, 5]  # the last by the Trainer, as those afterwards
    assert curves[0] == curves[1]


def test_the_final_networks_are_measured_as_they_answer(make_cell, monkeypatch):
    """Without noise and with what they learned, on the first problems, by the instruments themselves."""
    monkeypatch.setattr(study_smoothness, "BATCH_SIZE", 2)
    expected = {}

    def measured(folder, num_problems):
        expected[Path(folder).name] = reference_smoothness(folder, num_problems)
        return study_smoothness.measure_smoothness(folder, num_problems)

    monkeypatch.setattr(study_cell, "measure_smoothness", measured)
    cell = make_cell("final")
    run_cell(cell)
    result = read_results(cell.result_file)
    answers = result["answers"]
    assert result["smoothness"]["num_problems"] == 3
    for name, folder in (("one pass", cell.run_folder), ("distilled", cell.student_folder)):
        nll, smoothness = expected[folder.name]
        problems = answers[name]["problems"]
        assert nll == pytest.approx(sum(problems["nll"][:3]) / sum(problems["num_tokens"][:3]), rel=1e-4)
        assert answers[name]["smoothness"] == pytest.approx(smoothness, rel=1e-4)
    assert answers["one pass"]["smoothness"] != answers["distilled"]["smoothness"]
    assert "smoothness" not in answers["mean of 2"]


def reference_smoothness(folder, num_problems):
    """The NLL of the first problems, and what the instruments say of the network, by hand."""
    run = read_run(folder)
    tokenizer = load_tokenizer(run.config)
    rows = [dict(row) for row in prepare_data(run.config, tokenizer).heldout.select(range(num_problems))]
    collator, model = make_collator(tokenizer), load_network(run)
    batches = [collator(rows[start : start + 2]) for start in range(0, num_problems, 2)]
    weights = [weight for name, weight in model.named_parameters() if ".dip_" not in name]
    layers = noise_robustness(model, batches, [0.0, 0.2], ["layer 0", "layer 1"], num_draws=4)
    disturbed = weight_robustness(model, weights, batches, [0.0, 0.1], num_draws=4)
    constants = lipschitz_constants(model, collator(rows), num_tokens=16)
    return layers[0].nll, {
        "lipschitz": constants.logits.log().mean().exp().item() * constants.token_norm,
        "layer_noise_rise": layers[1].nll - layers[0].nll,
        "weight_noise_rise": disturbed[1].nll - disturbed[0].nll,
    }


def test_a_network_that_diverged_has_no_smoothness(make_cell, monkeypatch):
    cell = make_cell("final")
    monkeypatch.setattr(study_cell, "_answer", lambda *_: {"nll": math.nan, "problems": {}, "scores": {}})
    run_cell(cell)
    result = read_results(cell.result_file)
    assert set(result["answers"]) == {"one pass", "mean of 2", "distilled"}
    assert not any("smoothness" in answer for answer in result["answers"].values())


def test_a_cell_that_was_killed_after_its_distillation_goes_on_from_there(make_cell, monkeypatch):
    cell = make_cell("final")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study_cell, "_score_student", killed)
        run_cell(cell)
    assert not cell.result_file.exists()
    monkeypatch.setattr(distill, "main", lambda arguments: pytest.fail("distilled again"))
    run_cell(cell)
    assert "distilled" in read_results(cell.result_file)["answers"]
    assert not cell.run_folder.exists() and not cell.student_folder.exists()

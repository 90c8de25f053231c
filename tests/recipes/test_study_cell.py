"""A cell of a study: what its result file says of the training, and a distillation that had ended."""

import pytest
import yaml

from dipnet_hf.diagnostics import noise_robustness
from recipes import distill, study_cell, study_smoothness
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
        "num_smoothness_problems": 2,
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
    """What is measured is the network without noise, whose weights learned for five steps, and not its base."""
    measured = {}

    def at_no_radius(model, batches, *_, **__):
        (undisturbed,) = noise_robustness(model, batches, [0.0])
        measured[len(measured)] = undisturbed.nll
        return [undisturbed, undisturbed._replace(nll=undisturbed.nll + 1.0)]

    monkeypatch.setattr(study_smoothness, "noise_robustness", at_no_radius)
    cell = make_cell("final")
    run_cell(cell)
    answers = read_results(cell.result_file)["answers"]
    for number, name in enumerate(("one pass", "distilled")):
        problems = answers[name]["problems"]
        assert measured[number] == pytest.approx(sum(problems["nll"][:2]) / sum(problems["num_tokens"][:2]), rel=1e-4)
        assert answers[name]["smoothness"]["layer_noise_rise"] == pytest.approx(1.0)
        assert answers[name]["smoothness"]["lipschitz"] > 0
    assert "smoothness" not in answers["mean of 2"]


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

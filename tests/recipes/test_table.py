"""`recipes/table.py`: mean and spread of result files, for every way in which a run was scored."""

import json

import pytest

from recipes import table


def write(folder, name, seed, nll, best=None, ensemble=None, learning_rate=1e-3):
    """A result file, small."""
    training = {"output_dir": name, "seed": seed, "learning_rate": learning_rate}
    results = {
        "metrics": {"num_steps": 8},
        "scores": {"task": {"eval_nll": nll}},
        "best_checkpoint": best and {"step": 4, "metrics": {}, "scores": {"task": {"eval_nll": best}}},
        "ensemble_scores": ensemble and {"task": {"eval_nll": ensemble}},
        "provenance": {"config": {"training": training, "evaluation": {"num_samples": 8}}, "seed": seed},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results))
    return str(path)


def test_every_way_of_scoring_is_a_line(tmp_path, capsys):
    plain = [write(tmp_path, f"plain{seed}", seed, 2.0 + seed, best=1.0) for seed in (0, 1)]
    dip = [write(tmp_path, f"dip{seed}", seed, 3.0, ensemble=1.5 + seed) for seed in (0, 1)]
    table.main([f"plain={','.join(plain)}", f"DIPNet={','.join(dip)}", "--metrics", "NLL per token=task.eval_nll"])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[-1].strip() for line in lines[2:]}
    assert rows == {
        "plain": "2.5000 +- 0.7071",
        "plain, best checkpoint": "1.0000 +- 0.0000",
        "DIPNet": "3.0000 +- 0.0000",
        "DIPNet, mean of 8": "2.0000 +- 0.7071",
    }


def test_what_cannot_be_averaged_is_named(tmp_path):
    a = write(tmp_path, "a", 0, 2.0, best=1.0)
    metrics = ["--metrics", "NLL=task.eval_nll"]
    with pytest.raises(ValueError, match="differ in training.learning_rate"):
        table.main([f"a={a},{write(tmp_path, 'b', 1, 2.0, best=1.0, learning_rate=1.0)}", *metrics])
    with pytest.raises(ValueError, match=r"No metric task\.eval_nll; there are"):
        table.main([f"a={a},{write(tmp_path, 'c', 1, 2.0)}", *metrics])
    with pytest.raises(ValueError, match=r"No metric accuracy; there are num_steps, task\.eval_nll"):
        table.main([f"a={a}", "--metrics", "accuracy"])

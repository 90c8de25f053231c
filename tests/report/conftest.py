"""Result files as `recipes/finetune.py` writes them, small."""

import json

import pytest


@pytest.fixture
def write_results(tmp_path):
    """Return a function that writes a `results.json` with given figures and returns its path."""

    def write(name, eval_nll, seed=0, noise=None, log_history=None, learning_rate=1e-3):
        training = {"output_dir": f"runs/{name}", "seed": seed, "learning_rate": learning_rate}
        config = {"model": "m", "dataset": "d", "weights": "full", "dip": noise and {}, "training": training}
        results = {
            "metrics": {"num_steps": 20, "eval_nll": eval_nll},
            "scores": {"gsm8k_local": {"exact_match": 0.5}},
            "log_history": log_history or [],
            "provenance": {"config": config, "seed": seed},
            "noise": noise,
        }
        path = tmp_path / name / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps(results))
        return str(path)

    return write

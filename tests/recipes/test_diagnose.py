"""`recipes/diagnose.py`: which networks it measures, on what, and which runs it refuses."""

import json
import shutil

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from recipes import diagnose
from recipes.config import DistillConfig, dump_config
from recipes.finished_run import load_network, read_run
from tests.helpers import write_jsonl

QUICK = ["--limit", "2", "--num-tokens", "2", "--num-samples", "2", "--radii", "0", "0.2"]


@pytest.fixture(scope="module")
def runs(dip_runs, model_folder, tmp_path_factory):
    """Finished runs: plain and DIP of both kinds of weights, and one distilled from a DIP run."""
    root = tmp_path_factory.mktemp("runs")
    folders = {f"dip-{name}": folder for name, folder in dip_runs.items()}
    full = load_network(read_run(str(dip_runs["full"]))).merge_and_unload()
    lora = load_network(read_run(str(dip_runs["lora"])))
    for name, source in (("plain-full", "full"), ("plain-lora", "lora"), ("distilled", "full")):
        folders[name] = root / name
        folders[name].mkdir()
        shutil.copy(dip_runs[source] / "results.json", folders[name])
        shutil.copytree(dip_runs[source] / "data", folders[name] / "data")
        config = yaml.safe_load((dip_runs[source] / "config.yaml").read_text())
        (folders[name] / "config.yaml").write_text(yaml.safe_dump(config | {"dip": None}))
        if source == "full":
            full.save_pretrained(folders[name])
        else:
            lora.export_weights_adapter(str(folders[name]))
    distilled = DistillConfig(teacher=str(dip_runs["full"]), training={"output_dir": str(root / "distilled")})
    (folders["distilled"] / "config.yaml").write_text(dump_config(distilled))
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    for name, value in {"PLANE": (-0.3, 0.0, 0.3), "LINE": (0.0, 0.5, 1.0), "NUM_DRAWS": 1, "PGD_STEPS": 2}.items():
        monkeypatch.setattr(diagnose, name, value)


def measured(folder):
    return json.loads((folder / "diagnosis.json").read_text())


def test_all_networks_are_measured_beside_one_another(runs, tmp_path, capsys):
    shifted = tmp_path / "shifted.jsonl"
    write_jsonl(shifted, [{"question": f"{a} - 1?", "answer": f"#### {a - 1}"} for a in range(3)])
    folders = [runs[name] for name in ("distilled", "dip-full")]
    diagnose.main([*folders, *QUICK, "--shift", str(shifted), "--out", str(tmp_path / "new" / "out")])
    out = tmp_path / "new" / "out"
    results, printed = measured(out), capsys.readouterr().out
    names = ["distilled", "full, noise off", "full, mean of 2"]
    assert list(results["networks"]) == names
    plain, noise_off, mean = results["networks"].values()
    assert plain == noise_off, "the same weights, whichever way they were saved"
    assert mean["scores"] != plain["scores"] and mean["lipschitz"] != plain["lipschitz"]
    assert plain.keys() == {"scores", "shifted_scores", *diagnose.INSTRUMENTS}
    assert list(plain["lipschitz"]) == ["embeddings", "layer 1"]
    assert plain["shifted_scores"]["nll"] > plain["scores"]["nll"]
    of_run = results["runs"]["full"]
    assert len(of_run["learned_noise"]["ratio_by_depth"]) == 2
    assert max(of_run["disagreement"]["mutual_information"]) > 0
    line = results["lines"]["distilled to full"]
    assert max(line) == pytest.approx(min(line)), "there is no way to go between equal networks"
    assert results["provenance"]["script"] == "recipes/diagnose.py" and results["provenance"]["seed"] == 0
    pictures = ["lipschitz.png", "robustness.png", "plane.png", "line.png", "noise.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    table = (out / "table.txt").read_text()
    assert table.strip() in printed and all(name in table.splitlines()[0] for name in names)


def test_of_lora_the_adapter_alone_moves(runs, tmp_path):
    for name in ("plain-lora", "dip-lora"):
        model = load_network(read_run(runs[name]))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        chosen = [names[id(parameter)] for parameter in diagnose.trained_weights(model)]
        assert len(chosen) == 2 * 2 * 7 and all(".lora_" in name for name in chosen)
    diagnose.main([runs["plain-lora"], runs["dip-lora"], *QUICK, "--instruments", "line", "--out", str(tmp_path)])
    results = measured(tmp_path)
    line = results["lines"]["plain-lora to lora"]
    assert line[0] == pytest.approx(results["networks"]["plain-lora"]["scores"]["nll"], rel=1e-4)
    assert line[2] == pytest.approx(results["networks"]["lora, noise off"]["scores"]["nll"], rel=1e-4)


def test_all_weights_of_a_full_run_move_but_the_variances(runs):
    for name in ("plain-full", "dip-full"):
        model = load_network(read_run(runs[name]))
        plain = AutoModelForCausalLM.from_pretrained(runs["plain-full"])
        shapes = [tuple(parameter.shape) for parameter in diagnose.trained_weights(model)]
        assert shapes == [tuple(parameter.shape) for parameter in plain.parameters()]


def test_the_split_and_the_instruments_are_chosen(runs, tmp_path):
    diagnose.main([runs["plain-full"], *QUICK, "--instruments", "curvature", "--out", str(tmp_path / "test")])
    of_test = measured(tmp_path / "test")["networks"]["plain-full"]
    assert of_test.keys() == {"scores", "curvature"} and not list((tmp_path / "test").glob("*.png"))
    arguments = [runs["plain-full"], *QUICK, "--instruments", "curvature", "--split", "train"]
    diagnose.main([*arguments, "--out", str(tmp_path / "train")])
    assert measured(tmp_path / "train")["networks"]["plain-full"]["curvature"] != of_test["curvature"]


def test_a_networks_kind_is_told_by_its_folder(runs):
    kinds = {name: read_run(folder) for name, folder in runs.items()}
    assert {name for name, run in kinds.items() if run.has_noise} == {"dip-full", "dip-lora"}
    assert {name for name, run in kinds.items() if run.is_distilled} == {"distilled"}
    networks = {name: load_network(run) for name, run in kinds.items()}
    assert {name for name, net in networks.items() if isinstance(net, PeftModel)} == {
        "dip-full",
        "dip-lora",
        "plain-lora",
    }


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="nowhere holds no finished run: give the output folder"):
        diagnose.main(["nowhere", *out])
    with pytest.raises(ValueError, match="Two runs have one name"):
        diagnose.main([runs["plain-full"], runs["plain-full"], *out])
    other = tmp_path / "other"
    shutil.copytree(runs["plain-full"], other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"max_length": 33}))
    with pytest.raises(ValueError, match="The test rows of plain-full and other differ: compare runs on one data set"):
        diagnose.main([runs["plain-full"], str(other), *out])
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(other / "data")
    with pytest.raises(ValueError, match=r"other held nothing out \(.*test.jsonl\): choose --split train"):
        diagnose.main([str(other), *out])
    quantized = {"quantization": {"load_in_4bit": True}, "weights": {"peft_type": "LORA"}}
    (other / "config.yaml").write_text(yaml.safe_dump(config | quantized))
    with pytest.raises(ValueError, match="other was trained on a quantized base"):
        diagnose.main([str(other), *out])
    assert not (tmp_path / "out").exists()

"""The table and the pictures of a diagnosis: which numbers they show."""

import copy

import pytest

from report import draw_diagnosis, format_diagnosis
from report.diagnosis import _draw_lipschitz, _draw_noise, _draw_planes, _draw_robustness

NETWORK = {
    "scores": {"nll": 2.0, "accuracy": 0.5, "ece": 0.1},
    "lipschitz": {
        "embeddings": {
            "logits": [1.0, 3.0, 2.0],
            "loss": [0.1, 0.3, 0.2],
            "last_change": [0, 0.03, 0],
            "token_norm": 10.0,
        },
        "layer 1": {"logits": [4.0, 4.0, 4.0], "loss": [1.0, 1.0, 1.0], "last_change": [0, 0, 0], "token_norm": 0.5},
    },
    "curvature": {"hessian_top": 5.0, "ggn_top": 6.0, "hessian_trace": {"mean": 7.0, "standard_error": 1.0}},
    "noise": {"embedding_noise": [{"radius": 0.0, "nll": 2.0}, {"radius": 0.2, "nll": 2.5}]},
    "plane": {"steps": [-1.0, 0.0, 1.0], "loss": [[5.0, 3.0, 5.0], [3.0, 2.0, 3.0], [5.0, 3.0, 5.0]]},
}


@pytest.fixture
def results():
    other = copy.deepcopy(NETWORK)
    del other["curvature"]
    other["scores"]["nll"] = 1.5
    noise = {"learned_noise": {"ratio_by_depth": [0.9, 1.1]}}
    disagreement = {"mutual_information": [0.1, 0.2], "correct": [1.0, 0.0]}
    return {
        "networks": {"plain": copy.deepcopy(NETWORK), "dip": other},
        "runs": {"plain": {}, "dip": noise | {"disagreement": disagreement}},
        "lines": {"fractions": [0.0, 1.0], "plain to dip": [2.0, 1.5]},
    }


def test_the_table_has_a_column_per_network(results):
    lines = [line.rsplit(maxsplit=2) for line in format_diagnosis(results).splitlines()]
    assert [line[-2:] for line in lines[:1]] == [["plain", "dip"]]
    cells = {line[0].strip(): line[1:] for line in lines[2:]}
    assert cells == {
        "NLL": ["2", "1.5"],
        "ECE": ["0.1", "0.1"],
        "Lipschitz of logits, embeddings, median": ["20", "20"],
        "Lipschitz of loss, embeddings, median": ["2", "2"],
        "Lipschitz of logits, layer 1, median": ["2", "2"],
        "Lipschitz of loss, layer 1, median": ["0.5", "0.5"],
        "Lipschitz of logits, last change, worst": ["0.03", "0.03"],
        "Hessian, top eigenvalue": ["5", "-"],
        "Hessian, trace": ["7", "-"],
        "GGN, top eigenvalue": ["6", "-"],
        "NLL, noise in the embeddings, 0.2": ["2.5", "2.5"],
        "plane, mean NLL - NLL": ["1.778", "2.278"],
    }


def test_what_was_measured_is_drawn_and_nothing_else(results, tmp_path):
    names = ["lipschitz.png", "robustness.png", "plane.png", "line.png", "noise.png"]
    assert [path.name for path in draw_diagnosis(results, tmp_path)] == names
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    bare = {"networks": {"plain": {"scores": NETWORK["scores"]}}, "runs": {"plain": {}}}
    assert draw_diagnosis(bare, tmp_path) == []


def test_the_pictures_show_the_numbers(results):
    networks = results["networks"]
    by_place = _draw_lipschitz({name: network["lipschitz"] for name, network in networks.items()}).axes[0]
    assert by_place.lines[0].get_ydata().tolist() == [20.0, 2.0]
    (noise,) = _draw_robustness(networks).axes
    assert noise.lines[1].get_xydata().tolist() == [[0.0, 2.0], [0.2, 2.5]] and "embeddings" in noise.get_title()
    planes = _draw_planes({name: network["plane"] for name, network in networks.items()})
    assert [axes.get_title() for axes in planes.axes[:2]] == ["plain", "dip"]
    assert planes.axes[0].collections[0].get_clim() == (0.0, 3.0), "above the center, on one scale"


def test_noise_without_disagreement_is_one_panel(results):
    runs = {"dip": results["runs"]["dip"]}
    assert len(_draw_noise(runs).axes) == 2
    del runs["dip"]["disagreement"]
    (axes,) = _draw_noise(runs).axes
    assert axes.lines[0].get_ydata().tolist() == [0.9, 1.1]

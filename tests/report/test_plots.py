"""Plots of result files: what they draw and what they refuse."""

import pytest
from matplotlib.figure import Figure

from report import plot_losses, plot_noise

LOG_HISTORY = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_nll": 2.5}]
NOISE = [
    {"name": "layers.0", "scale": 2.0, "relative_std": [0.3, 0.1, 0.2]},
    {"name": "layers.1", "scale": 4.0, "relative_std": [0.5]},
]


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved, and save them."""
    saved, savefig = [], Figure.savefig

    def record(figure, *arguments, **options):
        saved.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def test_losses_of_each_run_by_step(write_results, figures, tmp_path):
    with_terms = [{"step": 1, "loss": 9.0, "nll": 4.0, "prior": 5.0}]
    files = [write_results("plain", 2.5, log_history=LOG_HISTORY), write_results("dip", 2.5, log_history=with_terms)]
    plot_losses(files, str(tmp_path / "losses.png"))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert lines == {
        "plain, training NLL": [[1, 3], [2, 2]],
        "plain, held-out NLL": [[2, 2.5]],
        "dip, training NLL": [[1, 4]],
    }
    assert (tmp_path / "losses.png").stat().st_size > 0


def test_what_is_scored_after_the_training_is_another_curve(write_results, figures, tmp_path):
    after = [{"step": 2, "train_runtime": 1.0}, {"step": 2, "eval_nll": 2.5}, {"step": 2, "eval_nll": 2.6}]
    trained = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    on_the_way = [trained[0], {"step": 1, "eval_nll": 2.9}, trained[1]]
    histories = {"after": trained + after, "way": on_the_way + after}
    files = [write_results(name, 2.5, log_history=history) for name, history in histories.items()]
    plot_losses(files, str(tmp_path / "losses.png"))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert lines["after, held-out NLL"] == [[2, 2.5]] and lines["way, held-out NLL"] == [[1, 2.9]]


@pytest.mark.parametrize("sort_channels, first_row", [(False, [0.3, 0.1, 0.2]), (True, [0.1, 0.2, 0.3])])
def test_noise_by_site_and_channel(write_results, figures, tmp_path, sort_channels, first_row):
    plot_noise(write_results("dip", 2.0, noise=NOISE), str(tmp_path / "noise.png"), sort_channels)
    axes = figures[0].axes[0]
    drawn = axes.images[0].get_array()
    assert drawn[0].tolist() == first_row
    assert drawn[1].tolist() == [0.5, None, None], "a narrower site leaves its other channels blank"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layers.0", "layers.1"]


def test_a_plain_run_has_no_noise_to_draw(write_results, tmp_path):
    with pytest.raises(ValueError, match="without projections"):
        plot_noise(write_results("plain", 2.0), str(tmp_path / "noise.png"))


def test_the_scoring_at_the_end_is_no_point_of_the_curve(write_results, figures, tmp_path):
    end = [{"step": 3, "train_runtime": 1.0}, {"step": 3, "eval_nll": 9.0}]
    for number, (before, expected) in enumerate([(LOG_HISTORY, [[2, 2.5]]), (LOG_HISTORY[:2], [[3, 9]])]):
        results = write_results(f"run{number}", 2.5, log_history=[*before, *end])
        plot_losses([results], str(tmp_path / "losses.png"))
        assert figures[number].axes[0].lines[1].get_xydata().tolist() == expected


def test_exact_match_has_an_axis_of_its_own(write_results, figures, tmp_path):
    log_history = [*LOG_HISTORY, {"step": 2, "eval_exact_match": 0.25}]
    plot_losses([write_results("plain", 2.5, log_history=log_history)], str(tmp_path / "losses.png"))
    losses, shares = figures[0].axes
    assert len(losses.lines) == 2 and shares.lines[0].get_xydata().tolist() == [[2, 0.25]]
    assert losses.get_yscale() == "log" and shares.get_yscale() == "linear"


def test_a_run_without_losses_says_so(write_results, tmp_path):
    with pytest.raises(ValueError, match="logging_steps"):
        plot_losses([write_results("plain", 2.0)], str(tmp_path / "losses.png"))

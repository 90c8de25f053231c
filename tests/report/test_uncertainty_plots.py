"""Plots of uncertainty: what they draw, what they refuse, and how tokens are laid out."""

import html
import re
import warnings
from itertools import groupby

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dipnet_hf.uncertainty import area_under_risk_coverage, expected_calibration_error, risk_coverage
from report import (
    plot_against_samples,
    plot_reliability,
    plot_risk_coverage,
    plot_tokens,
    write_tokens_html,
)

ROWS = [
    {"method": "dip", "num_samples": 4, "seed": 0, "nll": 1.0},
    {"method": "dip", "num_samples": 4, "seed": 1, "nll": 2.0},
    {"method": "dip", "num_samples": 1, "seed": 0, "nll": 3.0},
    {"method": "noise off", "num_samples": None, "seed": 0, "nll": 2.5},
    {"method": "noise off", "num_samples": None, "seed": 1, "nll": 3.5},
    {"method": "dropout", "num_samples": 16, "seed": 0, "nll": 4.0},
]
GROUPS = {
    "plain": ([0.9, 0.9, 0.6, 0.2], [1, 0, 1, 0]),
    "dip": (np.linspace(0.01, 1, 100), np.arange(100) % 3 > 0),
}
TOKENS = ["She", " paid", " $", "5", ".\n", "\n", "\ta", " & b", " <c>", ' "d"', ""]
VALUES = np.linspace(0, 1, len(TOKENS))


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved, and save them."""
    saved, savefig = [], Figure.savefig

    def record(figure, *arguments, **options):
        saved.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


# ---- against the number of samples ----


def test_mean_over_seeds_by_number_of_samples(figures, tmp_path):
    plot_against_samples(ROWS, str(tmp_path / "nll.png"), label="nats per token")
    axes = figures[0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["dip"].get_xydata().tolist() == [[1, 3], [4, 1.5]]
    assert lines["dropout"].get_xydata().tolist() == [[16, 4]]
    assert lines["noise off (one pass)"].get_ydata() == [3, 3]
    assert lines["noise off (one pass)"].get_linestyle() == "--"
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "nats per token"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    assert (tmp_path / "nll.png").stat().st_size > 0


def test_bands_are_one_sample_deviation_wide(figures, tmp_path):
    plot_against_samples(ROWS, str(tmp_path / "nll.png"))
    axes = figures[0].axes[0]
    band = axes.collections[0].get_paths()[0].vertices
    deviation = 2**-0.5
    assert sorted(set(band[band[:, 0] == 4, 1])) == pytest.approx([1.5 - deviation, 1.5 + deviation])
    assert set(band[band[:, 0] == 1, 1]) == {3}, "one seed has no deviation"
    span = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (span.y0, span.y1) == pytest.approx((3 - deviation, 3 + deviation))


def test_another_metric(figures, tmp_path):
    rows = [{"method": "dip", "num_samples": 2, "seed": 0, "accuracy": 0.5}]
    plot_against_samples(rows, str(tmp_path / "accuracy.png"), "accuracy")
    assert figures[0].axes[0].get_ylabel() == "accuracy"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "None of the 0 rows has a num_samples"),
        (ROWS[3:5], "None of the 2 rows has a num_samples to draw nll against"),
        (ROWS + ROWS[:1], "Two rows of dip have num_samples=4 and seed=0; give one row per seed"),
        ([{"method": "dip", "num_samples": 2, "seed": 0}], "no nll; it has method, num_samples, seed"),
        ([{**ROWS[0], "num_samples": 0}], "at least 1, or None for one pass without noise, got 0"),
    ],
)
def test_rows_that_make_no_curve(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot_against_samples(rows, str(tmp_path / "nll.png"))


# ---- reliability, risk against coverage ----


def test_reliability_by_bin(figures, tmp_path):
    plot_reliability(GROUPS, str(tmp_path / "reliability.png"), num_bins=5)
    axes = figures[0].axes[0]
    diagonal, plain, _ = axes.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert plain.get_xydata().tolist() == [[0.2, 0], [0.6, 1], [0.9, 0.5]]
    areas = axes.collections[0].get_sizes()
    assert (areas / areas[0]).tolist() == [1, 1, 2], "areas follow the counts"
    errors = [f"{label}, ECE {expected_calibration_error(*group, 5):.3f}" for label, group in GROUPS.items()]
    assert legend(axes) == ["calibrated", *errors]
    assert (tmp_path / "reliability.png").stat().st_size > 0


def test_reliability_with_bins_of_equal_count(figures, tmp_path):
    plot_reliability({"dip": GROUPS["dip"]}, str(tmp_path / "reliability.png"), 4, "mass")
    axes = figures[0].axes[0]
    assert len(set(axes.collections[0].get_sizes())) == 1 and len(axes.lines[1].get_xdata()) == 4
    assert legend(axes)[1] == f"dip, ECE {expected_calibration_error(*GROUPS['dip'], 4, 'mass'):.3f}"


def test_risk_by_coverage(figures, tmp_path):
    plot_risk_coverage(GROUPS, str(tmp_path / "risk.png"))
    axes = figures[0].axes[0]
    for line, (label, group) in zip(axes.lines, GROUPS.items()):
        coverage, risk = risk_coverage(*group)
        assert line.get_xydata().tolist() == np.stack([coverage, risk], 1).tolist()
        assert line.get_label() == f"{label}, AURC {area_under_risk_coverage(*group):.3f}"
    assert axes.collections[0].get_segments()[0].tolist() == [[0, 0.5], [0.5, 0.5]], "within the first tie"
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]


@pytest.mark.parametrize("plot", [plot_reliability, plot_risk_coverage])
def test_groups_that_are_no_confidences(plot, tmp_path):
    with pytest.raises(ValueError, match="groups is empty"):
        plot({}, str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="got 1.5 at index 0"):
        plot({"dip": ([1.5], [1])}, str(tmp_path / "a.png"))


# ---- tokens ----


def drawn(figure):
    """The letters and rectangles of the text, in columns and lines."""
    axes = figure.axes[0]
    letters = [(*text.get_position(), text.get_text()) for text in axes.texts if text.get_text()]
    boxes = [(box.get_x(), box.get_y(), box.get_width(), to_hex(box.get_facecolor())) for box in axes.patches]
    return letters, boxes


def test_tokens_are_laid_out_in_lines(figures, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font does not have
        plot_tokens(TOKENS, VALUES, str(tmp_path / "tokens.png"), title="price $x$")
    letters, boxes = drawn(figures[0])
    lines = {line: [letter[2] for letter in group] for line, group in groupby(letters, lambda letter: int(letter[1]))}
    assert lines == {0: ["She", "paid", "$", "5", ".↵"], 1: ["↵"], 2: ["a", "& b", "<c>", '"d"', "∅"]}
    starts = [x for x, y, _ in letters if int(y) == 0]
    assert starts == [0, 4, 9, 10, 11], "a leading space belongs to its token's box"
    assert [box[0] for box in boxes[:5]] == pytest.approx([0.05, 3.05, 8.05, 10.05, 11.05])
    assert len(boxes) == len(TOKENS) and len({color for *_, color in boxes}) == len(TOKENS)
    assert [text.get_text() for text in figures[0].texts] == ["price $x$"]
    assert figures[0].axes[1].get_xlabel() == "nats"


def test_letters_fill_their_boxes(figures, tmp_path):
    plot_tokens(["m" * 80], [1.0], str(tmp_path / "tokens.png"))
    figures[0].set_dpi(150)  # as it was saved
    axes = figures[0].axes[0]
    width = axes.texts[0].get_window_extent().transformed(axes.transData.inverted()).width
    assert width == pytest.approx(80, abs=1)


def test_long_texts_wrap_between_tokens_and_long_tokens_within(figures, tmp_path):
    plot_tokens([" word"] * 40 + ["x" * 200, "end"], np.ones(42), str(tmp_path / "tokens.png"))
    letters, boxes = drawn(figures[0])
    assert all(x + width <= 88 for x, _, width, _ in boxes)
    assert [text for *_, text in letters[:40]] == ["word"] * 40, "no word is cut"
    assert "".join(text for *_, text in letters[40:]) == "x" * 200 + "end"
    assert figures[0].axes[0].get_ylim()[0] == int(letters[-1][1]) + 1


def test_the_largest_value_is_the_darkest(figures, tmp_path):
    for vmax in (None, 4.0):
        plot_tokens(["a", "b", "c"], [0.0, 1.0, 2.0], str(tmp_path / "tokens.png"), vmax=vmax)
    own, shared = ([color for *_, color in drawn(figure)[1]] for figure in figures)
    assert own[0] == shared[0] and own[1] == shared[2] and own[2] != shared[2]
    inks = [text.get_color() for text in figures[0].axes[0].texts]
    assert inks == ["black", "black", "white"]


def test_values_that_are_all_zero_are_drawn(figures, tmp_path):
    plot_tokens(["a", "b"], [0.0, 0.0], str(tmp_path / "tokens.png"))
    assert len({color for *_, color in drawn(figures[0])[1]}) == 1


def spans(page):
    pattern = r'<span style="background:(#\w+);color:\w+" title="([^"]*)">(.*?)</span>'
    return [(color, title, html.unescape(text)) for color, title, text in re.findall(pattern, page, re.DOTALL)]


def test_html_has_the_same_tokens_and_colors(figures, tmp_path):
    plot_tokens(TOKENS, VALUES, str(tmp_path / "tokens.png"))
    write_tokens_html(TOKENS, VALUES, str(tmp_path / "tokens.html"), title="<a> & b")
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    found = spans(page)
    assert [color for color, *_ in found] == [color for *_, color in drawn(figures[0])[1]]
    assert [title for _, title, _ in found] == [f"{value:.3g} nats" for value in VALUES]
    shown = [token.replace("\n", "↵\n").replace("\t", "    ") or "∅" for token in TOKENS]
    assert [text for *_, text in found] == shown
    assert page.count("&lt;a&gt; &amp; b") == 2 and "<c>" not in page
    assert not re.search(r"https?:|src=|<script|<link", page), "needs no other file"


def test_control_characters_are_replaced(tmp_path):
    write_tokens_html(["a\x00b", "\r\n", "é↵"], [1, 2, 3], str(tmp_path / "tokens.html"))
    found = spans((tmp_path / "tokens.html").read_bytes().decode())
    assert [text for *_, text in found] == ["a\ufffdb", "↵\n", "é↵"]


@pytest.mark.parametrize("write", [plot_tokens, write_tokens_html])
@pytest.mark.parametrize("values", [torch.tensor([0.5, 1.0], dtype=torch.bfloat16), (0.5, 1), np.array([0.5, 1])])
def test_values_of_any_kind(write, values, tmp_path):
    write(["a", "b"], values, str(tmp_path / ("a.png" if write is plot_tokens else "a.html")))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("write", [plot_tokens, write_tokens_html])
@pytest.mark.parametrize(
    "tokens, values, vmax, message",
    [
        ([], [], None, "got 0 tokens and 0 values"),
        (["a"], [1.0, 2.0], None, "got 1 tokens and 2 values"),
        (["a", "b"], [1.0, -0.5], None, "got -0.5 for token 1; .*-log p"),
        (["a"], [float("nan")], None, "got nan for token 0"),
        (["a"], [1.0], 0.0, "vmax must be positive, got 0.0"),
    ],
)
def test_values_that_are_no_nats(write, tokens, values, vmax, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tokens, values, str(tmp_path / "a.png"), vmax=vmax)

"""Generated input: whatever is given, only documented errors come out, and what is accepted is kept as it was.

Every run of a test draws the same examples. How many stands in `docs/limits.md`.
"""

import json
import math
from contextlib import suppress
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dipnet_hf import DipConfig, get_dip_model, uncertainty
from dipnet_hf.config import TARGET_SITES
from eval.json_rows import read_rows
from recipes.config import dump_config, load_config
from recipes.formats import BESIDE_TURNS, KNOWN_COLUMNS, ROLES
from recipes.rows import load_rows, read_json_lines
from tests.tiny_models import build

DOCUMENTED = (ValueError, TypeError)


def fuzz(num_examples):
    """Try so many examples, the same in every run, and keep none on the disk."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=num_examples, deadline=None, derandomize=True, database=None, suppress_health_check=health
    )


# ---- configurations ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WORDS = st.sampled_from(
    [
        *TARGET_SITES,
        *(
            "full",
            "frozen",
            "channel",
            "relative",
            "absolute",
            "auto",
            "pairs",
            "independent",
            "mean",
            "sum",
            "logits",
        ),
    ]
)
FIELDS = sorted({field.name for field in fields(DipConfig) if field.init} | {"alpha", "beta", "antithetic"})
DIP = st.dictionaries(st.sampled_from(FIELDS), WORDS | st.integers(0, 4) | st.floats(0, 2) | JSON, max_size=4)


@fuzz(400)
@given(DIP)
@example({"init_noise_std": 0.1, "num_samples": 4, "sampling": "pairs"})
def test_an_accepted_config_is_read_back_as_it_was(values):
    try:
        config = DipConfig(**values)
    except DOCUMENTED:
        return
    saved = json.loads(json.dumps(config.to_dict()))
    assert DipConfig(**saved).to_dict() == config.to_dict()


RUN = {
    "model": "folder/of-a-model",
    "dataset": "folder/of-problems",
    "weights": {"peft_type": "LORA", "r": 2},
    "dip": {"init_noise_std": 0.1},
    "training": {"output_dir": "runs/x", "learning_rate": 1e-3},
    "evaluation": {"tasks": ["gsm8k_local"]},
}
KEYS = [
    *RUN,
    *(f"{section}.{key}" for section, values in RUN.items() if isinstance(values, dict) for key in values),
    *("max_length", "dtype", "weights.target_modules", "training.seed", "evaluation.limit", "dip.num_samples"),
]


@fuzz(200)
@given(st.lists(st.tuples(st.sampled_from(KEYS), JSON), max_size=3))
@example([("training.learning_rate", 1e-7)])
@example([("max_length", 10)])
def test_an_accepted_run_is_written_as_the_yaml_that_it_is_read_from(tmp_path, changes):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    try:
        config = load_config(str(path), [f"{key}={json.dumps(value)}" for key, value in changes])
    except DOCUMENTED:
        return
    written = tmp_path / "written.yaml"
    written.write_text(dump_config(config), encoding="utf-8")
    assert_same(asdict(load_config(str(written))), asdict(config))


def assert_same(one, other):
    """Equality in which NaN equals itself."""
    assert repr(one) == repr(other)


@fuzz(200)
@given(st.text(max_size=60) | JSON.map(yaml.safe_dump))
@example("!!python/object/apply:os.getcwd []")
@example("a: &a [*a]")
@example("? [1, 2]\n: 3")
def test_yaml_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(DOCUMENTED):
        load_config(str(path))


@fuzz(200)
@given(st.text(max_size=30))
@example("training.learning_rate")
@example("=1")
@example("a.b.c={")
def test_an_override_is_taken_or_refused(tmp_path, override):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    with suppress(*DOCUMENTED):
        load_config(str(path), [override])


# ---- data ----


@fuzz(300)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 10_000)
@example(b"1" * 5_000)
def test_a_broken_data_file_is_refused(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    try:
        read_json_lines(str(path), ("question", "answer"))
    except DOCUMENTED as error:
        assert str(path) in str(error)


ROWS = st.lists(st.fixed_dictionaries({"question": st.text(min_size=1), "answer": st.text(min_size=1)}), min_size=1)


@fuzz(200)
@given(ROWS, st.booleans(), st.booleans())
@example([{"question": "a\u2028b\x85c", "answer": "\x1c"}], False, False)
def test_an_accepted_data_file_gives_the_rows_that_it_holds(tmp_path, rows, as_array, ascii_only):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = f"[{','.join(lines)}]" if as_array else "\n".join(lines)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read = read_json_lines(str(path), ("question", "answer"))
    except DOCUMENTED:
        return
    assert read == rows
    assert [row for _, row in read_rows(str(path), "")] == rows


TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*ROLES, "human"]) | JSON, "content": st.text(max_size=5) | JSON},
        optional={"tool_calls": JSON},
    ),
    max_size=3,
)
ANY_ROWS = st.lists(
    st.dictionaries(st.sampled_from(KNOWN_COLUMNS), st.text(max_size=5) | TURNS | JSON, max_size=3)
    | st.fixed_dictionaries({"messages": TURNS}, optional={"tools": JSON}),
    max_size=3,
)


@fuzz(150)
@given(ANY_ROWS)
@example([{"messages": [{"role": ["user"], "content": "a"}]}])
@example([{"messages": [{"role": "user", "content": "a", "number": 10**30}]}])
@example([{"text": "a"}, {"text": "a", "tools": "[1]"}])
def test_accepted_rows_are_kept_as_they_are(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    try:
        read = load_rows(str(path))["train"]
    except DOCUMENTED as error:
        assert str(path) in str(error)
        return
    names = [name for name in read.column_names if name not in BESIDE_TURNS]
    read = read.select_columns(names)
    if "Equation" not in rows[0]:
        assert read.to_list() == [{name: row.get(name) for name in names} for row in rows]


# ---- figures ----

NUMBERS = arrays(np.float64, st.integers(0, 8), elements=st.floats(-0.5, 1.5) | st.floats())
FIGURES = {
    "expected_calibration_error": (0, 1),
    "brier_score": (0, 1),
    "negative_log_likelihood": (0, math.inf),
    "auroc": (0, 1),
    "area_under_risk_coverage": (0, 1),
}


@fuzz(300)
@given(NUMBERS, st.lists(st.booleans(), max_size=8), st.sampled_from(sorted(FIGURES)))
@example(np.array([0.0, 1.0]), [False, True], "auroc")
@example(np.array([1.0]), [False], "negative_log_likelihood")
def test_a_figure_of_calibration_lies_in_its_range(confidence, correct, name):
    low, high = FIGURES[name]
    try:
        figure = getattr(uncertainty, name)(confidence, np.array(correct, dtype=bool))
    except ValueError:
        return
    assert low <= figure <= high and abs(confidence - 0.5).max() <= 0.5


# ---- calibration ----

TENSORS = st.builds(
    lambda shape, value, dtype: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from([-100, -1, 0, 1, 200]),
    st.sampled_from([torch.int64, torch.float32]),
)
INPUTS = st.dictionaries(st.sampled_from(["input_ids", "attention_mask", "labels"]), TENSORS, max_size=3)


@fuzz(100)
@given(st.lists(INPUTS | TENSORS | JSON, max_size=2) | JSON)
@example({"input_ids": torch.ones(1, 70, dtype=torch.int64)})
@pytest.mark.filterwarnings("ignore")  # too few tokens, noise that costs too much
def test_calibration_says_what_is_wrong_or_the_model_does(batches):
    config = DipConfig(weights="full", init_noise_std=0.1)
    try:
        get_dip_model(build("llama"), config, calibration=batches)
    except (ValueError, TypeError):
        pass
    except (IndexError, RuntimeError) as error:
        plain = build("llama").eval()
        with pytest.raises(type(error)):
            for batch in batches:
                plain(batch) if isinstance(batch, torch.Tensor) else plain(**batch)

"""The pictures' recipe: what reaches the plots from the files of runs, and which files are refused."""

import json

import pytest

from dipnet_hf import predict
from recipes import distill, plots
from recipes.running import load_dip_run, load_tokenizer


@pytest.fixture
def drawn(monkeypatch):
    """Collect what the plots are called with, by name, and call them."""
    calls = {}

    def record(name):
        draw = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *args: (calls.setdefault(name, []).append(args), draw(*args))[1])

    for name in ("against_samples", "reliability", "risk_coverage", "tokens"):
        record(f"plot_{name}")
    record("write_tokens_html")
    return calls


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


# ---- metrics by ensemble size ----


@pytest.fixture
def distilled(tmp_path):
    """Return a function that writes the results of a distillation; its numbers tell run, method and held-out size."""

    def write(seed, teacher_seed=0, temperature=1.0, number=0.0, names=("first_2", "all"), name="results"):
        config = {
            "teacher": f"runs/teacher-{teacher_seed}",
            "temperature": temperature,
            "training": {"seed": seed, "output_dir": f"runs/distilled-{seed}"},
            "teacher_config": {"training": {"seed": teacher_seed, "output_dir": f"runs/teacher-{teacher_seed}"}},
        }
        scores = {
            method: {
                size: {"nll": number + 10 * column + row, "accuracy": row / 10, "ece": 0.1, "n": 2}
                for column, size in enumerate(names)
            }
            for row, method in enumerate(("noise_off", "ensemble_1", "ensemble_8", "distilled"))
        }
        results = {"metrics": {}, "scores": scores, "provenance": {"config": config, "seed": seed}}
        path = tmp_path / f"{name}-{seed}-{teacher_seed}.json"
        path.write_text(json.dumps(results))
        return str(path)

    return write


def test_scores_of_every_group_and_seed_reach_the_curves(drawn, distilled, tmp_path, capsys):
    groups = [
        f"DIPNet={distilled(0)},{distilled(1, number=100.0)}",
        f"other={distilled(0, teacher_seed=1, temperature=2.0, name='other')}",
    ]
    plots.main(["samples", *groups, "--heldout", "all", "--output", str(tmp_path / "new" / "pictures")])
    (nll, accuracy) = drawn["plot_against_samples"]
    assert nll[0] == accuracy[0] and (nll[2], accuracy[2]) == ("nll", "accuracy")
    rows = {(row["method"], row["num_samples"], row["seed"]): (row["nll"], row["accuracy"]) for row in nll[0]}
    expected = {}
    for label, seeds, number in (("DIPNet", (0, 0), 10), ("DIPNet", (0, 1), 110), ("other", (1, 0), 10)):
        methods = (("noise off", None), ("ensemble", 1), ("ensemble", 8), ("distilled", None))
        for row, (method, num_samples) in enumerate(methods):
            expected[f"{label}, {method}", num_samples, seeds] = (number + row, row / 10)
    assert rows == expected
    paths = [tmp_path / "new" / "pictures" / f"{metric}-by-samples.png" for metric in ("nll", "accuracy")]
    assert all(map(is_png, paths)) and capsys.readouterr().out.split() == [str(path) for path in paths]


def test_the_only_heldout_size_needs_no_name(drawn, distilled, tmp_path):
    plots.main(["samples", f"a={distilled(0, names=('all',))}", "--output", str(tmp_path)])
    assert len(drawn["plot_against_samples"][0][0]) == 4


def test_results_of_the_recipe_itself_are_drawn(drawn, dip_runs, tmp_path):
    config = f"{{teacher: {dip_runs['lora']}, training: {{max_steps: 1, use_cpu: true, save_strategy: 'no'}}}}"
    (tmp_path / "distill.yaml").write_text(config)
    settings = [f"training.output_dir={tmp_path / 'run'}", "compare_samples=[1, 2]"]
    distill.main([str(tmp_path / "distill.yaml"), "--set", *settings])
    plots.main(["samples", f"a={tmp_path / 'run' / 'results.json'}", "--output", str(tmp_path)])
    rows = drawn["plot_against_samples"][0][0]
    assert [row["num_samples"] for row in rows] == [None, 1, 2, None]
    assert [row["method"] for row in rows] == ["a, noise off", "a, ensemble", "a, ensemble", "a, distilled"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a={first}"], "results-0-0.json has first_2, all: choose by --heldout"),
        (["a={first}", "--heldout=some"], "has no held-out size some; it has first_2, all: choose by --heldout"),
        (["a=nowhere.json"], "No result file at nowhere.json"),
        (["a={first},nowhere.json"], "No result file at nowhere.json"),
        (["{first}"], "A group is LABEL=FILE.*, got '/"),
        (["a="], "A group is LABEL=FILE.*, got 'a='"),
        (["a={first}", "a={second}"], "Two groups are called a"),
        (["a={first},{warm}"], "The runs of a differ in temperature; make them groups of their own"),
        (["a={first},{copy}", "--heldout=all"], r"Two rows of a, noise off have num_samples=None and seed=\(0, 0\)"),
        (["a={finetuned}"], "finetuned.json was not written by recipes/distill.py; it scores gsm8k_local"),
    ],
)
def test_files_that_cannot_be_drawn_are_named(distilled, tmp_path, arguments, message):
    finetuned = tmp_path / "finetuned.json"
    config = {"provenance": {"config": {}, "seed": 0}, "scores": {"gsm8k_local": {"exact_match": 0}}}
    finetuned.write_text(json.dumps(config))
    files = {
        "first": distilled(0),
        "second": distilled(1),
        "warm": distilled(2, temperature=2.0),
        "copy": distilled(0, name="copy"),
        "finetuned": str(finetuned),
    }
    with pytest.raises(ValueError, match=message):
        plots.main(
            ["samples", *(argument.format(**files) for argument in arguments), f"--output={tmp_path / 'pictures'}"]
        )
    assert not (tmp_path / "pictures" / "nll-by-samples.png").exists()


# ---- a text by mutual information ----


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_tokens_have_the_information_of_the_position_before(drawn, dip_runs, tmp_path, weights):
    folder = str(dip_runs[weights])
    plots.main(["tokens", folder, "--num-samples=3", "--output", str(tmp_path / "pictures")])
    ((tokens, nats, *_, title),) = drawn["plot_tokens"]
    assert drawn["write_tokens_html"][0][:2] == (tokens, nats) and "3 samples" in title
    text = "Question: 12 + 12?\nAnswer: #### 24"
    assert "".join(tokens) == text[1:] and len(tokens) == len(text) - 1, "one token a letter, and none for the first"
    run = plots.load_run(folder)
    inputs = load_tokenizer(run)(text, return_tensors="pt")
    prediction = predict(load_dip_run(folder, run), inputs, num_samples=3)
    assert nats == prediction.mutual_information[0, :-1].tolist() and max(nats) > 0
    assert is_png(tmp_path / "pictures" / "tokens.png")
    assert "3 samples" in (tmp_path / "pictures" / "tokens.html").read_text()


def test_a_text_of_ones_own_is_cut_at_the_runs_length(drawn, dip_runs, tmp_path):
    plots.main(["tokens", str(dip_runs["full"]), "--text", "ab" * 40, "--output", str(tmp_path)])
    tokens, nats = drawn["plot_tokens"][0][:2]
    assert "".join(tokens) == "b" + "ab" * 31 and len(nats) == 63


class Spans:
    """What `token_texts` asks of a tokenizer: which tokens are special, and their names."""

    all_special_ids = [0]

    @staticmethod
    def decode(ids):
        return "</s>"


@pytest.mark.parametrize(
    "text, ids, spans, expected",
    [
        ("She is", [1, 2], [[0, 3], [3, 6]], ["She", " is"]),
        ("She is", [1, 2], [[0, 3], [4, 6]], ["She", " is"]),  # spaces left out of the spans
        ("Q: a", [1, 2, 3, 4], [[0, 1], [0, 1], [1, 2], [2, 4]], ["", "Q", ":", " a"]),  # a space put before the text
        ("aé!", [1, 2, 3, 4], [[0, 1], [1, 2], [1, 2], [2, 3]], ["a", "", "é", "!"]),  # two bytes of one letter
        ("a b", [0, 1, 2, 0], [[0, 0], [0, 1], [1, 3], [0, 0]], ["</s>", "a", " b", "</s>"]),  # added by the tokenizer
        ("a b cut", [1, 2], [[0, 1], [1, 3]], ["a", " b"]),
        ("", [0], [[0, 0]], ["</s>"]),
    ],
)
def test_text_is_cut_into_tokens_with_their_spaces(text, ids, spans, expected):
    assert plots.token_texts(text, ids, spans, Spans) == expected


def test_runs_without_an_ensemble_or_a_text_are_named(dip_runs, tmp_path):
    output = ["--output", str(tmp_path / "pictures")]
    with pytest.raises(ValueError, match="nowhere holds no adapter; give the output folder of a DIP run"):
        plots.main(["tokens", str(tmp_path / "nowhere"), *output])
    with pytest.raises(ValueError, match="The text 'a' has 1 tokens"):
        plots.main(["tokens", str(dip_runs["full"]), "--text=a", *output])
    run = tmp_path / "run"
    run.mkdir()
    for name in ("adapter_config.json", "config.yaml"):
        (run / name).write_text((dip_runs["lora"] / name).read_text())
    with pytest.raises(ValueError, match=r"run has no held-out problems \(data/test.jsonl\); give a text with --text"):
        plots.main(["tokens", str(run), *output])
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config[: config.index("dip:")] + "dip: null\n")
    with pytest.raises(ValueError, match="run holds a plain run, which has no ensemble"):
        plots.main(["tokens", str(run), *output])
    assert not (tmp_path / "pictures").exists()


# ---- calibration ----


@pytest.fixture
def samples(tmp_path):
    """Return a function that writes the samples of an evaluation, two answers by two filters."""

    def write(name, filters=("strict", "flexible"), metrics=("exact_match",), **more):
        rows = [
            {"doc_id": doc, "filter": filter_name, "confidence": 0.2 + 0.5 * doc + 0.1 * number, **more}
            | {metric: float(doc == number) for metric in metrics}
            for number, filter_name in enumerate(filters)
            for doc in range(2)
        ]
        path = tmp_path / f"samples_{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_answers_of_a_filter_reach_both_plots(drawn, samples, tmp_path):
    files = {"plain": [samples("a")], "mean of 8": [samples("b"), samples("c", metrics=("acc",))]}
    groups = [f"{label}={','.join(paths)}" for label, paths in files.items()]
    options = ["--filter=flexible", "--binning=mass", "--num-bins=2"]
    plots.main(["calibration", *groups, *options, "--output", str(tmp_path / "pictures")])
    groups = {"plain": ([0.3, 0.8], [0, 1]), "mean of 8": ([0.3, 0.8] * 2, [0, 1] * 2)}
    for name in ("plot_reliability", "plot_risk_coverage"):
        found = drawn[name][0][0]
        assert list(found) == list(groups)
        for label, (confidence, correct) in groups.items():
            assert found[label][0] == pytest.approx(confidence) and found[label][1] == correct
    assert drawn["plot_reliability"][0][2:] == (2, "mass")
    assert all(is_png(tmp_path / "pictures" / name) for name in ("reliability.png", "risk-coverage.png"))


def test_a_single_filter_and_metric_need_no_name(drawn, samples, tmp_path):
    plots.main(["calibration", f"a={samples('a', filters=('none',), metrics=('acc',))}", f"--output={tmp_path}"])
    assert drawn["plot_risk_coverage"][0][0]["a"][1] == [1, 0]


@pytest.mark.parametrize(
    "options, arguments, message",
    [
        ([], {}, "samples_a.jsonl has the filters flexible, strict: choose by --filter"),
        (["--filter=none"], {}, "samples_a.jsonl has no filter none; it has flexible, strict: choose by --filter"),
        ([], {"filters": ["x"], "metrics": ["acc", "exact_match"]}, "has the metrics exact_match, acc: choose by --m"),
        (["--metric=acc"], {"filters": ["x"]}, "has no metric acc; it has exact_match: choose by --metric"),
        ([], {"filters": ["x"], "metrics": []}, "has the metrics none: choose by --metric"),
        ([], {"filters": ["x"], "exact_match": 0.5, "metrics": []}, "correct must be 0 or 1, got 0.5"),
    ],
)
def test_answers_that_are_not_clear_are_refused(samples, tmp_path, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.main(["calibration", f"a={samples('a', **arguments)}", *options, f"--output={tmp_path / 'pictures'}"])


def test_a_file_without_confidences_is_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"filter": "none", "acc": 1.0}\n')
    with pytest.raises(ValueError, match="samples.jsonl has no confidences; give the samples of eval/run.py"):
        plots.main(["calibration", f"a={tmp_path / 'samples.jsonl'}", f"--output={tmp_path}"])
    with pytest.raises(ValueError, match="No data file at nowhere.jsonl"):
        plots.main(["calibration", "a=nowhere.jsonl", f"--output={tmp_path}"])

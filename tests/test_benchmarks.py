"""The benchmarks from their arguments to their result files, on tiny models: what they write, not how long it took."""

import json
import math

import pytest
import torch

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 needs Python 3.11")
from benchmarks import (
    ensemble,
    gradient_variance,
    loss,
    measure,
    padding,
    projection,
    regularizers,
    scaling,
    step,
    step_profile,
)
from tests.tiny_models import build, make_batch

# trl 1.16 sets the old name of a setting that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of result files, of benchmarks that are tiny and measure memory by counting calls."""
    for module in (ensemble, regularizers, step, scaling):
        monkeypatch.setattr(module, "VOCAB_SIZE", 64)
        monkeypatch.setattr(module, "NUM_LAYERS", 2, raising=False)
    for module in (ensemble, regularizers, step, scaling, loss, projection):
        monkeypatch.setattr(module, "memory_in_own_process", lambda script, *case: 2**20 * memory_of_case(case))
    monkeypatch.setattr(loss, "HIDDEN_SIZE", 8)
    monkeypatch.setattr(loss, "NUM_TOKENS", 5)
    monkeypatch.setattr(projection, "SHAPES", [(2, 3, 5)])
    monkeypatch.setattr(projection, "NUM_CALLS", 1)
    monkeypatch.setitem(projection.IMPLEMENTATIONS, "compiled", projection.eager)
    monkeypatch.setattr(scaling, "START", scaling.Point(length=8, hidden_size=64, num_layers=1))
    monkeypatch.setattr(scaling, "CURVES", {"S": ("num_samples", [1, 2]), "k": ("num_trajectories", [1, 2])})
    for name, value in dict(PROMPT_LENGTH=4, ANSWER_LENGTH=3, NUM_REQUESTS=5, REQUEST_LENGTH=6, BATCH_SIZE=2).items():
        monkeypatch.setattr(ensemble, name, value)
    monkeypatch.setattr(step, "LENGTH", 8)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def memory_of_case(case):
    """A number that tells the cases apart: their samples, or the length of a side's name."""
    return 1 + int(case[-1]) if str(case[-1]).isdigit() else len(str(case[-1]))


def test_ensemble_compares_every_case_with_both_peers(results, capsys):
    ensemble.main(["--hidden", "64", "--samples", "1", "8", "--rounds", "2"])
    (path,) = results.glob("ensemble-*.json")
    written = json.loads(path.read_text())
    assert written["provenance"]["script"] == "benchmarks/ensemble.py"
    rows = {(row["layers"], row["num_samples"]): row for row in written["rows"]}
    assert set(rows) == {("all", 1), ("all", 8), ("upper", 8)}
    for row in rows.values():
        check_ratio(row, "throughput_over_separate")
        check_ratio(row, "time_over_plain")
        assert list(row["tokens_per_second"]) == ["plain", "separate", "ensemble"]
    assert rows["all", 8]["memory_over_plain"] == 9 and rows["all", 8]["memory_over_separate"] == 4.5
    (scoring,) = written["scoring"]
    check_ratio(scoring, "time_over_noise_off")
    assert scoring["num_rounds"] == 3  # batches of 2, 2 and 1
    assert [target["target"].split(":")[0] for target in written["targets"]] == [
        "hidden 64, k = 8",
        "hidden 64, k = 1",
    ]
    printed = capsys.readouterr().out
    assert printed.count("hidden 64, k = ") == 2 and printed.splitlines()[-1] == f"Written to {path}"


@pytest.mark.usefixtures("results")
def test_all_sides_write_answers_of_one_length():
    plain, dip = ensemble.build(64, "none"), ensemble.build(64, "upper")
    prompt = ensemble.random_tokens(1, 4)
    answers = [
        ensemble.answer(plain, prompt),
        ensemble.answer_by_ensemble(dip, prompt, 2),
        *ensemble.answer_separately(dip, prompt, 2),
    ]
    assert [tuple(answer.shape) for answer in answers] == [(1, 7)] * 4


def read_rows(results, name):
    (path,) = results.glob(f"{name}-*.json")
    return json.loads(path.read_text())["rows"]


def test_step_compares_every_case(results, capsys):
    step.main(["--hidden", "64", "--weights", "lora", "--rounds", "2"])
    rows = read_rows(results, "step")
    assert [(row["side"], row["peer"]) for row in rows] == step.RATIOS
    for row in rows:
        check_ratio(row, "time_ratio")
        assert row["memory_ratio"] == len(row["side"]) / len(row["peer"])
    assert "S=4 upper half" in capsys.readouterr().out


def test_every_regularizer_is_compared_with_plain_fine_tuning(results, capsys):
    regularizers.main(["--hidden", "64", "--rounds", "2"])
    rows = read_rows(results, "regularizers")
    of_full = [name for name, method in regularizers.METHODS.items() if not method.needs_lora]
    expected = {"lora": ["dip", *regularizers.METHODS], "full": ["dip", *of_full]}
    assert [(row["weights"], row["method"]) for row in rows] == [(w, name) for w in expected for name in expected[w]]
    for row in rows:
        check_ratio(row, "time_ratio")
        assert row["memory_ratio"] == len(row["method"]) / len("plain")
    assert "weight_compander" in capsys.readouterr().out


def test_a_profile_lists_what_a_step_adds(results, capsys):
    step_profile.main(["--hidden", "64", "--steps", "1"])
    for row in read_rows(results, "step_profile"):
        added = {operator["name"]: operator["more_calls"] for operator in row["operators"]}
        assert len(added) == step_profile.NUM_LISTED and all(calls > 0 for calls in added.values())
        assert row["flops_over_peer"] > 0
    assert "S=1 SFT over SFT: FLOPs" in capsys.readouterr().out


def test_all_losses_are_one_objective(results):
    loss.main(["--vocab", "11", "--rounds", "2"])
    rows = read_rows(results, "loss")
    assert len(rows) == 2 * (3 + 5)
    for row in rows:
        check_ratio(row, "time_over_naive")
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8), torch.randn(11, 8), torch.randint(11, (5,)).repeat(4)
    values = {name: function(hidden, weight, targets, 4).item() for name, function in loss.LOSSES.items()}
    assert values["ours"] == pytest.approx(values["naive"]) == pytest.approx(values["TRL"])
    stable = "stability on logits"
    assert values[f"ours, {stable}"] == pytest.approx(values[f"naive, {stable}"]) != pytest.approx(values["naive"])


def test_projection_compares_implementations_with_a_copy(results):
    projection.main(["--rounds", "2"])
    rows = read_rows(results, "projection")
    assert [row["direction"] for row in rows] == ["forward"] * 3 + ["backward"] * 3 + ["forward", "backward"]
    for row in rows:
        check_ratio(row, "copy_bandwidth")


def test_scaling_fits_exponents(results):
    scaling.main(["--rounds", "2"])
    assert [row["quantity"] for row in read_rows(results, "scaling")] == ["S", "k"]
    assert len(list(results.glob("scaling-*.png"))) == 1
    fitted = scaling.exponents("time", [1, 2, 4, 8], [3.0, 12.0, 48.0, 384.0])
    assert fitted["time_last_exponent"] == pytest.approx(3.0) and 2 < fitted["time_exponent"] < 3


def test_the_variance_of_independent_samples_falls_as_one_over_s(results, monkeypatch):
    rows = [{name: tensor[:1] for name, tensor in make_batch("llama", 2).items()}] * 2
    model = gradient_variance.get_dip_model(
        build("llama", num_layers=1),
        gradient_variance.DipConfig(weights="full", init_noise_std=0.3, prior_weight=0.0),
        calibration=rows,
    ).train()
    torch.manual_seed(0)
    measured = gradient_variance.measure(model, rows, 2, 48, {"noise_std": 0.3, "num_steps": 0})
    ratios = {(row["num_samples"], row["sampling"]): row["noise_variance_ratio"] for row in measured}
    flops = {(row["num_samples"], row["sampling"]): row["flops_ratio"] for row in measured}
    for num_samples in (2, 4, 8):
        assert ratios[num_samples, "independent"] == pytest.approx(1 / num_samples, rel=0.3)
        assert ratios[num_samples, "pairs"] < 1.2 * ratios[num_samples, "independent"]
        assert flops[num_samples, "independent"] == flops[num_samples, "pairs"] == pytest.approx(num_samples, rel=0.05)


def test_padding_compares_batches_of_the_same_problems(results, shared, few_problems, monkeypatch):
    monkeypatch.setattr(padding, "NUM_BATCHES", 2)
    monkeypatch.setattr(padding, "BATCH_SIZE", 2)
    settings = [f"model={shared / 'models' / 'stories260K'}", f"dataset={few_problems}", "num_validation_samples=2"]
    padding.main(["--rounds", "2", "--set", *settings])
    rows = {row["batches"]: row for row in read_rows(results, "padding")}
    assert rows["padded"]["time_over_padded"] == 1
    assert rows["padding-free"]["num_tokens"] <= rows["sorted"]["num_tokens"] <= rows["padded"]["num_tokens"]


def test_gradients_are_summed_up_as_vectors():
    vectors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    assert gradient_variance.total_variance(iter(vectors)) == pytest.approx(2 + 8)


def test_instructions_are_counted_in_machine_code_and_in_its_loops():
    pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
    from benchmarks import instructions

    code = """
        /*0000*/  MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/  FADD R2, R2, R3 ;
        /*0020*/  NOP ;
        /*0030*/  @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/  EXIT ;
    """.splitlines()
    assert sum(map(instructions.is_instruction, code)) == 4
    (loop,) = instructions.loops(code)
    assert [line.split()[-3] for line in loop] == ["R2,", "BRA"]


@pytest.mark.parametrize(
    "module, case",
    [
        (step, ["64", "lora", "S=4 SFT"]),
        (loss, ["11", "4", "trained", "ours"]),
        (projection, ["0", "operator"]),
        (scaling, ["1", "2", "8", "64", "1"]),
        (ensemble, ["generate", "64", "none", "0"]),
        (ensemble, ["generate", "64", "upper", "2"]),
        (ensemble, ["score", "64", "all", "2"]),
    ],
)
@pytest.mark.usefixtures("results")
def test_a_process_asked_for_memory_prints_bytes(module, case, capsys):
    module.main(["--memory-of", *case])
    assert int(capsys.readouterr().out.split()[-1]) > -(2**20)  # the system may take a page back meanwhile


def test_the_first_side_rotates():
    order = []
    sides = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rounds = [measure.time_round(sides, number) for number in range(4)]
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert all(set(seconds) == set(sides) for seconds in rounds)


def check_ratio(row, name):
    low, high = row[f"{name}_quartiles"]
    assert 0 < row[name] < math.inf and low <= row[name] <= high

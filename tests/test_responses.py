"""Finished responses: what is written is handed out again, once, and what does not belong together is refused."""

import pytest

pytest.importorskip("lm_eval", reason="needs dipnet_hf[eval]")
from dipnet_hf.responses import Responses

REQUEST = ("What is 2 plus 3?", {"until": ["."]})


def test_each_response_is_handed_out_once_and_by_its_sample(tmp_path):
    first = Responses(tmp_path, {"seed": 0})
    for sample, text in ((0, "5"), (0, "five"), (1, "6")):
        first.sample = sample
        first.add_partial("generate_until", REQUEST, text)
    again = Responses(tmp_path, {"seed": 0})
    again.sample = 0
    assert [again.take("generate_until", REQUEST) for _ in range(3)] == ["5", "five", None]
    assert again.take("loglikelihood", REQUEST) is None
    again.sample = 1
    assert again.take("generate_until", REQUEST) == "6"


def test_a_pair_comes_back_as_a_pair(tmp_path):
    Responses(tmp_path, {}).add_partial("loglikelihood", REQUEST, (-1.5, True))
    assert Responses(tmp_path, {}).take("loglikelihood", REQUEST) == (-1.5, True)


def test_the_responses_of_another_run_are_refused(tmp_path):
    Responses(tmp_path, {"seed": 1})  # a run that fails before its first response leaves nothing
    Responses(tmp_path, {"seed": 0, "limit": 3.0}).add_partial("generate_until", REQUEST, "5")
    with pytest.raises(
        ValueError, match="another run: limit was 3.0 and is None; seed was 0 and is 1. Choose another"
    ):
        Responses(tmp_path, {"seed": 1})


@pytest.mark.parametrize("line", ["{", '{"request": "a", "trajectory": 0, "response": "5"}'], ids=["torn", "of 0.2"])
def test_a_broken_line_is_named(tmp_path, line):
    responses = Responses(tmp_path, {})
    for text in ("5", "6"):
        responses.add_partial("generate_until", REQUEST, text)
    path = tmp_path / "responses.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], f"{line}\n", *lines[2:]]))
    with pytest.raises(ValueError, match="responses.jsonl, line 3 is broken"):
        Responses(tmp_path, {})


def test_a_last_line_that_was_torn_is_dropped(tmp_path):
    Responses(tmp_path, {}).add_partial("generate_until", REQUEST, "5")
    path = tmp_path / "responses.jsonl"
    path.write_text(path.read_text() + '{"request": "a')
    resumed = Responses(tmp_path, {})
    assert resumed.take("generate_until", REQUEST) == "5"
    resumed.add_partial("generate_until", REQUEST, "6")
    assert Responses(tmp_path, {}).take("generate_until", REQUEST) == "5"

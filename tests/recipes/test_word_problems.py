"""The generated word problems: right by their own annotations, apart from each other, the same for the same seed."""

import random
import re

import pytest

from recipes.word_problems import CHANGES, CLOSINGS, NAMES, OPENINGS, THINGS, UNSEEN_CHANGES, generate_splits

SIZES = {
    "pretrain": 300,
    "train": 600,
    "test": 200,
    "test_more_steps": 200,
    "test_larger_numbers": 200,
    "test_unseen_templates": 200,
}
STEP = re.compile(r"(\d+)([-+*/])(\d+)=<<(\d+[-+*/]\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def splits():
    return generate_splits(0, SIZES)


def problems(splits):
    return [problem for split in splits.values() for problem in split]


def steps(problem):
    return STEP.findall(problem["answer"])


def test_every_annotation_is_right_and_the_last_is_the_answer(splits):
    for problem in problems(splits):
        *lines, last = problem["answer"].split("\n")
        found = steps(problem)
        assert len(found) == len(lines) > 0
        for a, operation, b, calculation, result, shown in found:
            assert calculation == f"{a}{operation}{b}" and result == shown
            a, b = int(a), int(b)
            exact = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation]
            assert exact == int(result) >= 0
        assert last == f"#### {found[-1][-1]}"


def test_every_number_of_a_question_is_used_and_stands_there(splits):
    for problem in problems(splits):
        asked = [int(number) for number in re.findall(r"\d+", problem["question"])]
        results = [int(step[-1]) for step in steps(problem)]
        operands = [int(number) for step in steps(problem) for number in (step[0], step[2])]
        assert set(asked) <= set(operands) <= {*asked, *results}


@pytest.mark.parametrize(
    "split, allowed",
    [
        ("pretrain", {1}),
        ("train", {2, 3}),
        ("test", {2, 3}),
        ("test_more_steps", {4, 5}),
        ("test_larger_numbers", {2, 3}),
        ("test_unseen_templates", {2, 3}),
    ],
)
def test_number_of_steps(splits, split, allowed):
    assert {len(steps(problem)) for problem in splits[split]} == allowed


def test_splits_share_no_problem_even_with_other_names(splits):
    """A problem is its sentences and numbers, whoever it is about."""

    def identity(problem):
        text = re.sub(rf"\b({'|'.join(THINGS)})\b", "thing", problem["question"])
        return re.sub(rf"\b({'|'.join(NAMES)})\b", "name", text)

    seen = {}
    for split, members in splits.items():
        for problem in members:
            assert seen.setdefault(identity(problem), split) == split


def test_no_question_comes_twice(splits):
    questions = [problem["question"] for problem in problems(splits)]
    assert len(questions) == len(set(questions)) == sum(SIZES.values())


def test_what_makes_each_split_harder(splits):
    opening = {name: [int(re.search(r"\d+", p["question"])[0]) for p in members] for name, members in splits.items()}
    assert max(opening["train"] + opening["test"]) < min(opening["test_larger_numbers"])
    seen, unseen = (
        {template.text for templates in changes.values() for template in templates}
        for changes in (CHANGES, UNSEEN_CHANGES)
    )
    assert not unseen & (seen | {template.text for template in OPENINGS + CLOSINGS})


def test_all_operations_templates_and_names_occur(splits):
    text = "\n".join(problem["question"] + problem["answer"] for problem in problems(splits))
    assert {step[1] for problem in splits["train"] for step in steps(problem)} == set("+-*/")
    for words in ("Tom", "Kim", "hats", "in a box", "equal parts", "dollars", "fewer", "together"):
        assert words in text


def test_same_seed_same_problems_whatever_else_is_drawn():
    first = generate_splits(7, {"train": 20, "test": 5})
    random.seed(1)
    state = random.getstate()
    again = generate_splits(7, {"test": 5, "train": 40})
    assert random.getstate() == state
    assert again["train"][:20] == first["train"] and again["test"] == first["test"]
    assert generate_splits(8, {"test": 5}) != {"test": first["test"]}


def test_problems_do_not_change_between_versions():
    """A frozen problem: when this fails, results of the demo no longer compare with older ones."""
    question = (
        "Ann has 40 books and finds 5 more. Ann shares them into 3 equal parts and keeps one. "
        "Ann shares them into 3 equal parts and keeps one. How many books does Ann have now?"
    )
    answer = (
        "After Ann finds 5: 40+5=<<40+5=45>>45 books.\nIn 3 equal parts: 45/3=<<45/3=15>>15 books.\n"
        "In 3 equal parts: 15/3=<<15/3=5>>5 books.\n#### 5"
    )
    assert generate_splits(0, {"test": 1})["test"] == [{"question": question, "answer": answer}]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"exam": 3}, "Unknown split 'exam' in `sizes`; use pretrain, train"),
        ({"test": -1}, "must be 0 or more, got -1"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        generate_splits(0, sizes)

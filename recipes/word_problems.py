"""Grade-school word problems in GSM8K's own format, written by a seeded generator: the demo's reasoning task.

A problem is an opening, some changes to a running quantity `x`, and a closing question. Standard library only; files
and tokens live elsewhere.
"""

import operator
import random
import zlib
from functools import cache
from itertools import product
from typing import NamedTuple


class Template(NamedTuple):
    """Some sentences of a problem, and the calculations they ask for.

    `steps` holds pairs (calculation, line of the answer). A calculation joins two letters by one operation: `x` the
    running quantity, `n` and `m` this template's own numbers, `y` the result of its first step. The last result
    becomes the next `x`.
    """

    text: str
    steps: tuple[tuple[str, str], ...] = ()


class Filling(NamedTuple):
    """A template with its numbers: its calculations as an answer writes them, and the running quantity they leave."""

    template: Template
    n: int
    m: int
    equations: tuple[str, ...]
    x: int


OPENINGS = (
    Template("{name} has {n} {things}."),
    Template("There are {n} {things} in the room of {name}."),
    Template("On Monday {name} has {n} {things}."),
    Template("{name} has {n} {things} and finds {m} more.", (("n+m", "After {name} finds {m}: {eq} {things}."),)),
    Template("{name} has {n} {things} and loses {m} of them.", (("n-m", "After {name} loses {m}: {eq} {things}."),)),
    Template("{name} has {n} boxes with {m} {things} each.", (("n*m", "With {m} each: {eq} {things}."),)),
    Template(
        "{name} shares {n} {things} into {m} equal parts and keeps one.",
        (("n/m", "In {m} equal parts: {eq} {things}."),),
    ),
)


def _changes(operation, event, *texts):
    """Make templates that tell one event in several ways; the answer's line repeats the event, then calculates."""
    return tuple(Template(text, ((f"x{operation}n", f"{event}: {{eq}} {{things}}."),)) for text in texts)


CHANGES = {
    "+": (
        *_changes("+", "After {name} buys {n}", "{name} buys {n} more {things}.", "Then {name} buys {n} {things}."),
        *_changes("+", "After {name} finds {n}", "{name} finds {n} {things} in a box.", "Then {name} finds {n} more."),
    ),
    "-": (
        *_changes(
            "-",
            "After {name} gives {n}",
            "{name} gives {n} {things} to {friend}.",
            "Then {name} gives {n} of them to {friend}.",
        ),
        *_changes("-", "After {name} loses {n}", "{name} loses {n} of them.", "Then {name} loses {n} {things}."),
    ),
    "*": (
        *_changes(
            "*",
            "After {name} trades each for {n}",
            "{name} trades each for {n} {things}.",
            "Then {name} trades each for {n} new {things}.",
        ),
        *_changes(
            "*",
            "With {n} times as many",
            "A week later {name} has {n} times as many.",
            "Then there are {n} times as many.",
        ),
    ),
    "/": (
        *_changes(
            "/",
            "In {n} equal parts",
            "{name} shares them into {n} equal parts and keeps one.",
            "Then {name} keeps one of {n} equal parts.",
        ),
        *_changes(
            "/",
            "With one of every {n}",
            "{name} keeps one of every {n} {things}.",
            "Then {name} keeps one of every {n}.",
        ),
    ),
}

UNSEEN_CHANGES = {
    "+": (
        *_changes("+", "After {name} buys {n}", "On Monday {name} buys new {things}, {n} of them."),
        *_changes("+", "After {name} finds {n}", "There are more {things} in the room, and {name} finds {n}."),
    ),
    "-": (
        *_changes("-", "After {name} gives {n}", "{friend} has no {things}, and {name} gives {n} to {friend}."),
        *_changes("-", "After {name} loses {n}", "A week later {name} loses {n} more {things}."),
    ),
    "*": (
        *_changes("*", "After {name} trades each for {n}", "On Monday {name} trades each of them for {n}."),
        *_changes("*", "With {n} times as many", "On Monday the {things} are {n} times as many."),
    ),
    "/": (
        *_changes(
            "/", "In {n} equal parts", "{name} and {friend} share them into {n} equal parts, and {name} keeps one."
        ),
        *_changes("/", "With one of every {n}", "A week later {name} has one of every {n} {things}."),
    ),
}

CLOSINGS = (
    Template("How many {things} does {name} have now?"),
    Template("How many {things} are there now?"),
    Template(
        "{name} sells each for {n} dollars. How many dollars does {name} get?",
        (("x*n", "As {name} sells each for {n}: {eq} dollars."),),
    ),
    Template(
        "{name} puts {n} in each box. How many boxes are there?", (("x/n", "As {name} puts {n} in each: {eq} boxes."),)
    ),
    Template(
        "{friend} has {n} more {things}. How many does {friend} have?",
        (("x+n", "As {friend} has {n} more: {eq} {things}."),),
    ),
    Template(
        "{friend} has {n} fewer {things}. How many does {friend} have?",
        (("x-n", "As {friend} has {n} fewer: {eq} {things}."),),
    ),
    Template(
        "{friend} has {n} more {things}. How many do they have together?",
        (("x+n", "As {friend} has {n} more: {eq} {things}."), ("x+y", "Together: {eq} {things}.")),
    ),
)

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Mia", "Sam", "Zoe", "Leo", "Ida", "Jim", "Kim")
THINGS = ("apples", "pens", "books", "cards", "coins", "stamps", "cups", "shells", "balls", "eggs", "toys", "hats")

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
# The second number of a calculation: an opening's `m`, any other template's `n`.
OPERANDS = {"+": range(2, 6), "-": range(2, 6), "*": range(2, 4), "/": range(2, 4)}
LARGEST_RESULT = 99
NUM_BUCKETS = 8


class Regime(NamedTuple):
    """Which problems a split may contain; `buckets` are the values of `_bucket` that it keeps."""

    num_steps: tuple[int, ...]
    opening_numbers: range = range(10, 41)
    changes: dict[str, tuple[Template, ...]] = CHANGES
    min_changes: int = 0
    buckets: range = range(NUM_BUCKETS)


REGIMES = {
    "pretrain": Regime(num_steps=(1,), opening_numbers=range(2, 81)),
    "train": Regime(num_steps=(2, 3), buckets=range(1, NUM_BUCKETS)),
    "test": Regime(num_steps=(2, 3), buckets=range(1)),
    "test_more_steps": Regime(num_steps=(4, 5)),
    "test_larger_numbers": Regime(num_steps=(2, 3), opening_numbers=range(41, 81)),
    "test_unseen_templates": Regime(num_steps=(2, 3), changes=UNSEEN_CHANGES, min_changes=1),
}


def generate_splits(seed, sizes):
    """Write the splits named in `sizes`; the same seed gives the same problems, and a larger size only adds to them.

    No two splits can share a problem, whatever the seed. `pretrain` (1 step), `test_more_steps` (4 or 5) and the
    others (2 or 3) differ in their number of steps. Of these others, `test_larger_numbers` opens with a larger number
    than the rest, and each problem of `test_unseen_templates` has a sentence that no other split uses. `train` and
    `test` are told apart by a hash of a problem's sentences and numbers, whatever its names and things: no test
    problem is a training problem told about somebody else.

    Args:
        seed (`int`): decides all problems.
        sizes (`dict[str, int]`): the number of problems per split, for example `{"train": 2000, "test": 200}`.

    Returns:
        `dict[str, list[dict]]`: the problems of each split, `{"question": ..., "answer": ...}`, no question twice.

    Raises:
        ValueError: an unknown split, or a negative size.
    """
    for split, size in sizes.items():
        if split not in REGIMES:
            raise ValueError(f"Unknown split {split!r} in `sizes`; use {', '.join(REGIMES)}.")
        if size < 0:
            raise ValueError(
                f"The size of split {split!r} must be 0 or more, got {size}; leave the split out to do without it."
            )
    return {split: _generate(random.Random(f"{seed}/{split}"), REGIMES[split], size) for split, size in sizes.items()}


def _generate(rng, regime, size):
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < size:
        fillings = _draw(rng, regime)
        if fillings is not None and _bucket(fillings) in regime.buckets:
            problem = _write(rng, fillings)
            problems.setdefault(problem["question"], problem)
    return list(problems.values())


def _draw(rng, regime):
    """Draw a problem's filled templates in order; None if the draw leads nowhere (nothing to divide, for example)."""
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    num_changes = rng.choice(regime.num_steps) - len(opening.steps) - len(closing.steps)
    if num_changes < regime.min_changes:
        return None
    changes = [rng.choice(regime.changes[rng.choice("+-*/")]) for _ in range(num_changes)]
    fillings, x = [], None
    for template in (opening, *changes, closing):
        choices = _fillings(template, x, regime.opening_numbers)
        if not choices:
            return None
        fillings.append(rng.choice(choices))
        x = fillings[-1].x
    return fillings


@cache
def _fillings(template, x, opening_numbers):
    """List a template's fillings whose results are all whole and in 1..`LARGEST_RESULT`; an opening has no `x` yet."""
    # The range depends on the first calculation's operation, the second letter of `n+m`. Only an opening uses `m`.
    operands = OPERANDS[template.steps[0][0][1]] if template.steps else range(1)
    pairs = product(opening_numbers, operands) if x is None else product(operands, range(1))
    fillings = (_fill(template, x, n, m) for n, m in pairs)
    return tuple(filling for filling in fillings if filling is not None)


def _fill(template, x, n, m):
    numbers = {"x": x, "n": n, "m": m}
    result = n if x is None else x
    equations = []
    for (left, operation, right), _ in template.steps:
        a, b = numbers[left], numbers[right]
        result = OPERATIONS[operation](a, b)
        if not 1 <= result <= LARGEST_RESULT or (operation == "/" and a % b):
            return None
        equations.append(f"{a}{operation}{b}=<<{a}{operation}{b}={result}>>{result}")
        numbers["y"] = result
    return Filling(template, n, m, tuple(equations), result)


def _bucket(fillings):
    """Hash a problem's sentences and numbers; Python's own `hash` of a string differs from process to process."""
    sentences = [(filling.template.text, filling.n, filling.m) for filling in fillings]
    return zlib.crc32(repr(sentences).encode()) % NUM_BUCKETS


def _write(rng, fillings):
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "things": rng.choice(THINGS)}
    question = " ".join(filling.template.text.format(n=filling.n, m=filling.m, **words) for filling in fillings)
    lines = []
    for filling in fillings:
        for (_, line), equation in zip(filling.template.steps, filling.equations, strict=True):
            lines.append(line.format(n=filling.n, m=filling.m, eq=equation, **words))
    return {"question": question, "answer": "\n".join([*lines, f"#### {fillings[-1].x}"])}

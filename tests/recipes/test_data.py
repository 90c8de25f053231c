"""The recipe's data: files with their errors, and tokens with labels on the answer alone."""

import copy
import json
import re

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from recipes.data import (
    heldout_set,
    hold_out,
    load_problems,
    make_collator,
    read_problems,
    svamp_problem,
    tokenize,
    training_set,
)
from tests.helpers import write_jsonl

PROBLEM = {"question": "1 + 1?", "answer": "#### 2"}
LINE = json.dumps(PROBLEM)


def test_a_folder_gives_its_splits(problems_folder):
    problems = load_problems(str(problems_folder))
    assert {name: len(split) for name, split in problems.items()} == {"train": 12, "test": 5}
    assert problems["train"][0] == {"question": "0 + 0?", "answer": "#### 0"}


def test_lines_and_arrays_read_alike(tmp_path):
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(f"{LINE}\n\n{LINE}")
    array.write_text(json.dumps([PROBLEM, PROBLEM], indent=1))
    assert read_problems(str(lines)) == read_problems(str(array)) == [PROBLEM, PROBLEM]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "train.jsonl is empty"),
        (f"{LINE}\n{LINE[:-3]}\n", "train.jsonl, line 2 is not valid JSON: .* at column"),
        (f"{LINE}\n\n3\n", "train.jsonl, line 3 is not a JSON object, got 3"),
        ('{"question": "a", "solution": "b"}', "line 1 has the columns question, solution and lacks answer"),
        ('{"question": "a", "answer": 2}', "line 1: answer must be text, got 2"),
        ('[{"question": "a",\n "answer": }]', "train.jsonl, line 2 is not valid JSON"),
    ],
)
def test_broken_files_are_named_with_their_line(problems_folder, text, message):
    (problems_folder / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_problems(str(problems_folder))


def test_text_stays_text(problems_folder):
    """`datasets` would read such a column as dates."""
    write_jsonl(problems_folder / "train.jsonl", [{"question": "When?", "answer": "2020-01-01", "id": "a"}] * 2)
    (problems_folder / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.encode())  # a byte order mark
    problems = load_problems(str(problems_folder))
    assert problems["train"].to_list() == [{"question": "When?", "answer": "2020-01-01"}] * 2
    assert problems["test"].to_list() == [PROBLEM]


def test_columns_of_other_files_must_be_text(problems_folder):
    for name in ("train", "test"):
        (problems_folder / f"{name}.jsonl").unlink()
        (problems_folder / f"{name}.csv").write_text("question,answer\nWhen?,1\n")
    with pytest.raises(ValueError, match=r"split train: answer must be text, got Value\('int64'\)"):
        load_problems(str(problems_folder))


def test_a_folder_that_is_a_pattern_is_refused(tmp_path):
    for name in ("run[12]", "run1"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [PROBLEM])
    with pytest.raises(ValueError, match=r"takes .*run\[12\] for a pattern: rename folders"):
        load_problems(str(tmp_path / "run[12]"))


SVAMP = {"ID": "chal-1", "Body": "A pack costs 76.", "Question": "And now?", "Type": "Sum"}
SVAMP |= {"Equation": "( ( 76.0 - 25.5 ) * 10.0 )", "Answer": 505.0}


def test_svamp_reasons_by_its_equation(tmp_path):
    assert svamp_problem(SVAMP) == {
        "question": "A pack costs 76. And now?",
        "answer": "( 76 - 25.5 ) * 10 = 505\n#### 505",
    }
    folder = tmp_path / "svamp"
    folder.mkdir()
    (folder / "SVAMP.json").write_text(json.dumps([SVAMP] * 705))
    problems = load_problems(str(folder))
    assert {name: len(split) for name, split in problems.items()} == {"train": 700, "test": 5}
    assert problems["test"][4] == svamp_problem(SVAMP) == read_problems(str(folder / "SVAMP.json"))[704]
    (folder / "SVAMP.json").write_text(json.dumps([SVAMP, {**SVAMP, "Answer": "many"}]))
    with pytest.raises(ValueError, match="SVAMP.json, item 2: Answer must be a number, got 'many'"):
        load_problems(str(folder))


def test_svamp_itself_is_read(shared):
    problems = load_problems(str(shared / "data" / "svamp"))
    assert {name: len(split) for name, split in problems.items()} == {"train": 700, "test": 300}
    wrong = []
    for problem in [*problems["train"], *problems["test"]]:
        equation, result = problem["answer"].split("\n#### ")
        left, _, right = equation.partition(" = ")
        assert right == result and re.fullmatch(r"[\d. +*/()-]+", left)
        if eval(left) != pytest.approx(float(result)):
            wrong.append(equation)
    assert wrong == ["( 4 - 2 ) + 3 = 1"]  # in the file itself


def test_validation_problems_are_the_last_of_the_training_split(problems_folder):
    problems = load_problems(str(problems_folder))
    held_out = hold_out(problems, 5)
    assert held_out["train"].to_list() == problems["train"].to_list()[:7]
    assert held_out["validation"].to_list() == problems["train"].to_list()[7:]
    assert held_out["test"].to_list() == problems["test"].to_list()
    with pytest.raises(ValueError, match="num_validation_samples=12 leaves nothing to train on: there are 12"):
        hold_out(problems, 12)


def test_missing_data_is_named(problems_folder, tmp_path):
    with pytest.raises(ValueError, match="No data file at .*nothing.jsonl"):
        read_problems(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="No dataset folder at .*nowhere"):
        load_problems(str(tmp_path / "nowhere"))
    (problems_folder / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="has the splits test, but training needs one called train"):
        load_problems(str(problems_folder))
    (problems_folder / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no data files"):
        load_problems(str(problems_folder))


def write_card(folder, *config_names):
    """Declare configurations as the Hub's dataset cards do."""
    lines = [f"- config_name: {name}\n  data_files: [{{split: train, path: train.jsonl}}]\n" for name in config_names]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")


def test_the_configuration_is_chosen_or_asked_for(problems_folder):
    write_card(problems_folder, "socratic", "main")
    assert list(load_problems(str(problems_folder))) == ["train"]
    write_card(problems_folder, "socratic", "algebraic")
    with pytest.raises(ValueError, match="configurations socratic, algebraic; set dataset_config"):
        load_problems(str(problems_folder))
    assert len(load_problems(str(problems_folder), "socratic")["train"]) == 12
    with pytest.raises(ValueError, match="no configuration platonic; it has socratic, algebraic"):
        load_problems(str(problems_folder), "platonic")


def test_labels_cover_the_answer_and_eos_alone(tokenizer):
    tokens = tokenize(Dataset.from_list([PROBLEM]), tokenizer)[0]
    supervised = [label for label in tokens["labels"] if label != -100]
    assert tokenizer.decode(tokens["input_ids"]) == "Question: 1 + 1?\nAnswer: #### 2</s>"
    assert tokenizer.decode(supervised) == " #### 2</s>"
    assert tokens["labels"][-len(supervised) :] == tokens["input_ids"][-len(supervised) :]


def test_training_drops_what_is_too_long_and_heldout_cuts_it(tokenizer):
    long = {**PROBLEM, "answer": PROBLEM["answer"] + " and so on"}
    tokens = tokenize(Dataset.from_list([long, PROBLEM, PROBLEM, PROBLEM]), tokenizer)
    max_length = len(tokens[1]["input_ids"])
    kept, num_dropped = training_set(tokens, max_length, max_samples=2)
    assert (kept[:], num_dropped) == (tokens.select([1, 2])[:], 1)
    cut, num_cut = heldout_set(tokens, max_length)
    assert num_cut == 1 and [len(row["labels"]) for row in cut] == [max_length] * 4
    assert cut[0]["input_ids"] == tokens[0]["input_ids"][:max_length]
    with pytest.raises(ValueError, match="None of the 4 training sequences fits in max_length=3; the shortest has"):
        training_set(tokens, 3)


def test_collator_pads_labels_with_the_ignored_index(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    long = {**PROBLEM, "answer": PROBLEM["answer"] + "!!"}
    tokens = tokenize(Dataset.from_list([PROBLEM, long]), tokenizer)
    batch = make_collator(tokenizer)(list(tokens))
    assert batch["labels"][0, -2:].tolist() == [-100, -100] and batch["attention_mask"][0, -2:].tolist() == [0, 0]
    assert batch["labels"][0, -3] == tokenizer.eos_token_id, "eos is learned though it also pads"


def test_gsm8k_prompt_is_the_prefix_of_its_training_sequence(shared):
    """The tokenizer puts a space before every text, which must not double that before the answer."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    problems = load_problems(str(shared / "data" / "gsm8k"))["test"].select(range(50))
    for problem, tokens in zip(problems, tokenize(problems, tokenizer), strict=True):
        prompt_ids = tokenizer(f"Question: {problem['question']}\nAnswer:")["input_ids"]
        num_ignored = tokens["labels"].count(-100)
        assert tokens["input_ids"][:num_ignored] == prompt_ids
        answer = tokenizer.decode(tokens["input_ids"])[len(tokenizer.decode(prompt_ids)) :]
        assert answer == f" {problem['answer']}</s>"

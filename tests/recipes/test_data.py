"""The recipe's data: files with their errors, and tokens with labels on the answer alone."""

import copy
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from recipes.config import FinetuneConfig
from recipes.data import (
    drop_long,
    heldout_lines,
    heldout_set,
    hold_out,
    hold_out_fraction,
    make_collator,
    mix,
    prepare_data,
)
from recipes.rows import load_rows, read_problems, svamp_problem
from recipes.tokens import tokenize
from tests.helpers import write_jsonl

PROBLEM = {"question": "1 + 1?", "answer": "#### 2"}
LINE = json.dumps(PROBLEM)


def test_a_folder_gives_its_splits(problems_folder):
    problems = load_rows(str(problems_folder))
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
        load_rows(str(problems_folder))


def test_text_stays_text(problems_folder):
    """`datasets` would read such a column as dates."""
    write_jsonl(problems_folder / "train.jsonl", [{"question": "When?", "answer": "2020-01-01", "id": "a"}] * 2)
    (problems_folder / "test.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.encode())  # a byte order mark
    problems = load_rows(str(problems_folder))
    assert problems["train"].to_list() == [{"question": "When?", "answer": "2020-01-01"}] * 2
    assert problems["test"].to_list() == [PROBLEM]


def test_columns_of_other_files_must_be_text(problems_folder):
    for name in ("train", "test"):
        (problems_folder / f"{name}.jsonl").unlink()
        Dataset.from_list([{"question": "When?", "answer": 1}]).to_parquet(problems_folder / f"{name}.parquet")
    with pytest.raises(ValueError, match="split train, row 1: answer must be text, got 1"):
        load_rows(str(problems_folder))


def test_a_folder_that_is_a_pattern_is_refused(tmp_path):
    for name in ("run[12]", "run1"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [PROBLEM])
    with pytest.raises(ValueError, match=r"takes .*run\[12\] for a pattern: rename folders"):
        load_rows(str(tmp_path / "run[12]"))


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
    problems = load_rows(str(folder))
    assert {name: len(split) for name, split in problems.items()} == {"train": 700, "test": 5}
    assert problems["test"][4] == svamp_problem(SVAMP) == read_problems(str(folder / "SVAMP.json"))[704]
    (folder / "SVAMP.json").write_text(json.dumps([SVAMP, {**SVAMP, "Answer": "many"}]))
    with pytest.raises(ValueError, match="SVAMP.json, item 2: Answer must be a number, got 'many'"):
        load_rows(str(folder))


def test_svamp_itself_is_read(shared):
    problems = load_rows(str(shared / "data" / "svamp"))
    assert {name: len(split) for name, split in problems.items()} == {"train": 700, "test": 300}
    wrong = []
    for problem in [*problems["train"], *problems["test"]]:
        equation, result = problem["answer"].split("\n#### ")
        left, _, right = equation.partition(" = ")
        assert right == result and re.fullmatch(r"[\d. +*/()-]+", left)
        if eval(left) != pytest.approx(float(result)):
            wrong.append(equation)
    assert wrong == ["( 4 - 2 ) + 3 = 1"]  # in the file itself


def test_options_are_asked_with_their_question_and_the_right_one_is_learned(tokenizer):
    row = {"question": "1 + 1?", "options": ["A)1", "B)2", "C)2"], "correct": "B"}
    asked = {"question": "1 + 1?\nOptions:\nA)1\nB)2\nC)2", "answer": "B)2"}
    assert (
        tokenize(Dataset.from_list([row]), tokenizer).to_list()
        == tokenize(Dataset.from_list([asked]), tokenizer).to_list()
    )


def test_aqua_itself_is_read(shared, tokenizer):
    problems = load_rows(str(shared / "data" / "aqua-rat"), split="validation")  # `dev.json` to datasets
    assert {name: len(split) for name, split in problems.items()} == {"train": 254, "test": 254}
    learned = [[token for token in row["labels"] if token != -100] for row in tokenize(problems["test"], tokenizer)]
    assert Counter(tokenizer.decode(tokens)[:3] for tokens in learned)[" A)"] == 63  # README.md of the task


def test_validation_problems_are_the_last_of_the_training_split(problems_folder):
    problems = load_rows(str(problems_folder))
    held_out = hold_out(problems, 5)
    assert held_out["train"].to_list() == problems["train"].to_list()[:7]
    assert held_out["validation"].to_list() == problems["train"].to_list()[7:]
    assert held_out["test"].to_list() == problems["test"].to_list()
    with pytest.raises(ValueError, match="num_validation_samples=12 leaves nothing to train on: there are 12"):
        hold_out(problems, 12)


def test_figures_of_validation_problems_leave_the_test_split_alone(problems_folder, tokenizer):
    config = FinetuneConfig(
        model="m",
        dataset=str(problems_folder),
        training={"output_dir": "runs/x"},
        weights="full",
        num_validation_samples=4,
        max_eval_samples=2,
    )
    tested = prepare_data(config, tokenizer)
    validated = prepare_data(replace(config, heldout_split="validation"), tokenizer)
    assert validated.train.to_list() == tested.train.to_list()
    assert validated.heldout.to_list() == validated.validation.to_list() == tested.validation.to_list()
    assert heldout_lines(validated.rows).count("\n") == 4 and heldout_lines(tested.rows).count("\n") == 2


def split_of(questions, fraction=0.3):
    rows = Dataset.from_list([{"question": question, "answer": ""} for question in questions])
    held_out = hold_out_fraction(DatasetDict({"train": rows, "test": rows}), fraction)
    assert held_out["test"].to_list() == rows.to_list()
    return set(held_out["train"]["question"]), set(held_out["validation"]["question"])


def test_a_row_stays_on_its_side_whatever_is_added():
    questions = [f"{number} + 1?" for number in range(400)]
    train, validation = split_of(questions)
    assert train | validation == set(questions) and not train & validation
    assert abs(len(validation) - 0.3 * 400) < 5 * (400 * 0.3 * 0.7) ** 0.5  # five standard deviations
    more_train, more_validation = split_of([*(f"new {n}" for n in range(100)), *reversed(questions), *questions])
    assert train <= more_train and validation <= more_validation and not more_train & more_validation
    assert validation < split_of(questions, 0.5)[1]


def test_a_row_stays_on_its_side_when_others_have_tools(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{number}"}]} for number in range(50)]
    sides = []
    for name, more in (("few", []), ("more", [{**rows[0], "tools": [{"name": "add"}]}])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows + more)
        held_out = hold_out_fraction(load_rows(str(tmp_path / f"{name}.jsonl")), 0.3)["validation"]
        sides.append({row["messages"][0]["content"] for row in held_out if row.get("tools") is None})
    assert sides[0] == sides[1]


@pytest.mark.parametrize("fraction, side", [(1e-9, "validate on"), (1 - 1e-9, "train on")])
def test_an_empty_side_is_refused(fraction, side):
    with pytest.raises(ValueError, match=f"leaves nothing to {side} of 3 training problems"):
        split_of("abc", fraction)


def test_missing_data_is_named(problems_folder, tmp_path):
    with pytest.raises(ValueError, match="No data file at .*nothing.jsonl"):
        read_problems(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="No dataset folder or file at .*nowhere"):
        load_rows(str(tmp_path / "nowhere"))
    (problems_folder / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="has the splits test, but training needs one called train"):
        load_rows(str(problems_folder))
    (problems_folder / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no data files"):
        load_rows(str(problems_folder))


def write_card(folder, *config_names):
    """Declare configurations as the Hub's dataset cards do."""
    lines = [f"- config_name: {name}\n  data_files: [{{split: train, path: train.jsonl}}]\n" for name in config_names]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")


def test_the_configuration_is_chosen_or_asked_for(problems_folder):
    write_card(problems_folder, "socratic", "main")
    assert list(load_rows(str(problems_folder))) == ["train"]
    write_card(problems_folder, "socratic", "algebraic")
    with pytest.raises(ValueError, match="configurations socratic, algebraic; set dataset_config"):
        load_rows(str(problems_folder))
    assert len(load_rows(str(problems_folder), "socratic")["train"]) == 12
    with pytest.raises(ValueError, match="no configuration platonic; it has socratic, algebraic"):
        load_rows(str(problems_folder), "platonic")


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
    kept, num_dropped = drop_long(tokens, max_length)
    assert (kept[:], num_dropped) == (tokens.select([1, 2, 3])[:], 1)
    cut, num_cut = heldout_set(tokens, max_length)
    assert num_cut == 1 and [len(row["labels"]) for row in cut] == [max_length] * 4
    assert cut[0]["input_ids"] == tokens[0]["input_ids"][:max_length]
    with pytest.raises(ValueError, match="None of the 4 training sequences fits in max_length=3; the shortest has"):
        drop_long(tokens, 3)


def test_a_heldout_sequence_that_is_cut_before_its_answer_is_left_out(tokenizer):
    long = {**PROBLEM, "question": PROBLEM["question"] + " and so on"}
    tokens = tokenize(Dataset.from_list([long, PROBLEM]), tokenizer)
    max_length = len(tokens[1]["input_ids"]) - 1
    cut, num_cut = heldout_set(tokens, max_length)
    assert num_cut == 2 and cut["input_ids"][:] == [tokens[1]["input_ids"][:max_length]]
    with pytest.raises(ValueError, match="No held-out sequence has a label within max_length=3: raise max_length"):
        heldout_set(tokens, 3)


def mixture(*lengths):
    """Data sets of one-token sequences, each of a token of its own."""
    return [Dataset.from_dict({"input_ids": [[number]] * length}) for number, length in enumerate(lengths)]


def test_a_mixture_has_its_weights_and_no_row_twice():
    mixed = mix(mixture(4000, 3000), [1, 3])
    numbers = [ids[0] for ids in mixed["input_ids"]]
    shares = [numbers.count(number) for number in (0, 1)]
    assert shares[1] == 3000 and shares[0] < 4000  # the second was used up first
    assert abs(shares[1] / len(numbers) - 0.75) < 5 * (0.75 * 0.25 / len(numbers)) ** 0.5
    assert [ids[0] for ids in mix(mixture(4000, 3000), [2, 6])["input_ids"]] == numbers
    whole = mix(mixture(4, 3), [None, None])
    assert [ids[0] for ids in whole["input_ids"]] == [0] * 4 + [1] * 3


@pytest.mark.parametrize("max_train_samples", [None, 60])
def test_a_mixture_has_its_weights_among_the_rows_that_fit(tokenizer, tmp_path, max_train_samples):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * (100 if number % 2 else 5)} for number in range(400)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b" * 5} for _ in range(200)])
    data_sets = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in "ab"]
    config = FinetuneConfig("m", data_sets, {"output_dir": "x"}, "full", max_length=20)
    config.max_train_samples = max_train_samples
    data = prepare_data(config, tokenizer)
    firsts = [tokenizer.decode(ids[:1]) for ids in data.train["input_ids"]]
    assert len(firsts) == max_train_samples or (max_train_samples is None and 200 in map(firsts.count, "ab"))
    assert abs(firsts.count("a") / len(firsts) - 0.5) < 4 * (0.25 / len(firsts)) ** 0.5
    assert data.counts["num_dropped_train_sequences"] == 200


def test_the_first_heldout_rows_are_those_of_every_set():
    sets = [DatasetDict({"test": Dataset.from_dict({"text": [f"{name}{n}" for n in range(3)]})}) for name in "ab"]
    texts = [json.loads(line)["text"] for line in heldout_lines(sets, 2).splitlines()]
    assert texts == ["a0", "a1", "b0", "b1"]


def test_a_mixture_of_formats_is_one_data_set(problems_folder, chat_tokenizer, tmp_path):
    turns = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "Hello!"}] for n in range(9)]
    write_jsonl(tmp_path / "turns.jsonl", [{"messages": messages} for messages in turns])
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"Once {number}"} for number in range(9)])
    names = [str(problems_folder), str(tmp_path / "turns.jsonl"), str(tmp_path / "texts.jsonl")]
    config = FinetuneConfig(
        model="m",
        dataset=[{"path": name} for name in names],
        training={"output_dir": "runs/x"},
        weights="full",
        apply_chat_template=True,
        validation_fraction=0.3,
        max_eval_samples=2,
    )
    data = prepare_data(config, chat_tokenizer)
    assert data.validation is not None and data.heldout is not None
    assert len(data.train) + len(data.validation) == 12 + 9 + 9
    assert len(data.heldout) == data.counts["num_eval_problems"] == 2
    texts = {chat_tokenizer.decode(row["input_ids"]) for row in [*data.train, *data.validation]}
    assert {f"Once {number}</s>" for number in range(9)} < texts
    assert any("Answer:<|im_end|>\n<|im_start|>assistant\n#### 2<|im_end|>" in text for text in texts)
    assert len(heldout_lines(data.rows).splitlines()) == 2 and heldout_lines(data.rows, 1).count("\n") == 1


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
    problems = load_rows(str(shared / "data" / "gsm8k"))["test"].select(range(50))
    for problem, tokens in zip(problems, tokenize(problems, tokenizer), strict=True):
        prompt_ids = tokenizer(f"Question: {problem['question']}\nAnswer:")["input_ids"]
        num_ignored = tokens["labels"].count(-100)
        assert tokens["input_ids"][:num_ignored] == prompt_ids
        answer = tokenizer.decode(tokens["input_ids"])[len(tokenizer.decode(prompt_ids)) :]
        assert answer == f" {problem['answer']}</s>"

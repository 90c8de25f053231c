"""What a task reads: configurations over files, and errors that name the file, the line and the column."""

import json

import pytest
from lm_eval.tasks import TaskManager

from eval.task_files import TASKS, check_data_files, check_json_file, resolve_tasks

GSM8K = '{"question": "a", "answer": "#### 1"}'
SVAMP = '{"Body": "a", "Question": "b", "Answer": 1.0}'
AQUA = '{"question": "a", "options": ["A)1", "B)2"], "correct": "B"}'
COLUMNS = {"question": "text", "answer": "text"}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes text or bytes to a file and returns the path."""

    def write(content, name="problems.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_a_task_becomes_a_whole_configuration(write):
    train, test = write("", "train.jsonl"), write("", "test.jsonl")
    files = {"gsm8k_local_fewshot": {"train": train, "test": test}, "svamp": {"test": test}}
    fewshot, svamp = resolve_tasks(["gsm8k_local_fewshot", "svamp"], files)
    assert fewshot["task"] == "gsm8k_local_fewshot" and fewshot["num_fewshot"] == 5
    assert fewshot["doc_to_text"] == "Question: {{question}}\nAnswer:"  # of the file that it includes
    assert fewshot["dataset_kwargs"] == {"data_files": {"train": train, "test": test}}
    assert callable(svamp["process_results"])


def test_exemplars_are_part_of_the_configuration(write):
    (config,) = resolve_tasks(["gsm8k_cot_local"], {"gsm8k_cot_local": {"test": write("")}})
    assert [set(sample) for sample in config["fewshot_config"]["samples"]] == [{"question", "target"}] * 8
    json.dumps({**config, "custom_dataset": None})


@pytest.mark.parametrize(
    "names, data_files, message",
    [
        (["gsm9k"], {}, r"No task called gsm9k; eval/tasks/ has aqua_rat_local, .*comes with lm-eval"),
        (["svamp"], {"svmap": {"test": "x"}}, "Files for svmap, but the tasks are svamp"),
        (["svamp"], {}, "svamp reads a file for test; test is missing, got none"),
        (["svamp"], {"svamp": {"dev": "x"}}, "svamp reads a file for test; test is missing, got dev"),
        (
            ["gsm8k_local_fewshot"],
            {"gsm8k_local_fewshot": {"test": "x"}},
            "reads a file for test and one for train; train is missing, got test",
        ),
    ],
)
def test_files_that_do_not_fit_the_tasks_are_refused(names, data_files, message):
    with pytest.raises(ValueError, match=message):
        resolve_tasks(names, data_files)


@pytest.mark.parametrize(
    "name, row",
    [("gsm8k_local", GSM8K), ("gsm8k_cot_local", GSM8K), ("word_problems", GSM8K), ("svamp", SVAMP)]
    + [("aqua_rat_local", AQUA), ("svamp", SVAMP.replace("1.0", '"1"'))],
)
@pytest.mark.parametrize("form", ["{0}\n\n{0}\n", "[{0}, {0}]", "\n [\n{0},\n{0}\n]\n"])
def test_a_good_file_passes(write, name, row, form):
    check_data_files(resolve_tasks([name], {name: {"test": write(form.format(row))}}))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gsm8k_local", None, "No data file at .*nowhere.json; give JSON objects with question, answer"),
        ("gsm8k_local", "", "problems.json is empty; give"),
        ("gsm8k_local", " \n", "problems.json is empty; give"),
        ("gsm8k_local", "[]", "problems.json is empty; give"),
        ("gsm8k_local", f'{GSM8K}\n\n{{"question": "b"\n', "problems.json, line 3 is not valid JSON: .* at column"),
        ("svamp", f"[\n{SVAMP},\n{SVAMP[:-1]}\n]", "problems.json, line 4 is not valid JSON"),
        ("gsm8k_local", f"{GSM8K}\n".encode() + b'{"question": "\xff"}', "problems.json, line 2 is not UTF-8 text"),
        ("gsm8k_local", f"{GSM8K}\n17", "problems.json, line 2 is not a JSON object, got 17"),
        (
            "gsm8k_local",
            f"{GSM8K}\n{SVAMP}",
            "line 2 has the columns Body, Question, Answer and lacks question, answer",
        ),
        ("gsm8k_local", GSM8K.replace('"a"', "null"), "line 1: question must be text, got None"),
        ("svamp", f"[{SVAMP}, {GSM8K}]", "item 2 has the columns question, answer and lacks Body, Question, Answer"),
        ("svamp", SVAMP.replace("1.0", "true"), "line 1: Answer must be a number, got True"),
        ("svamp", SVAMP.replace("1.0", "NaN"), "line 1: Answer must be a number, got nan"),
        ("svamp", SVAMP.replace("1.0", '"one"'), "line 1: Answer must be a number, got 'one'"),
        ("aqua_rat_local", AQUA.replace('"B"', '"F"'), "line 1: correct must be one of A, B, C, D, E, got 'F'"),
        ("aqua_rat_local", AQUA.replace('"A)1"', "1"), r"line 1: options must be a list of text, got \[1, 'B\)2'\]"),
        ("aqua_rat_local", AQUA.replace('["A)1", "B)2"]', "[]"), r"line 1: options must be a list of text, got \[\]"),
    ],
)
def test_a_broken_file_is_named_with_its_line(write, tmp_path, name, content, message):
    path = str(tmp_path / "nowhere.json") if content is None else write(content)
    with pytest.raises(ValueError, match=message):
        check_data_files(resolve_tasks([name], {name: {"test": path}}))


def load(name, path):
    """The problems of a task as the harness gets them."""
    specs = resolve_tasks([name], {name: {"test": path}})
    check_data_files(specs)
    return list(TaskManager(include_defaults=False).load(specs)["tasks"][name].test_docs())


@pytest.mark.parametrize("folder, neighbour", [("r[12]", "r1"), ("r?", "r1"), ("r*", "r1"), ("r{1,2}", "r1")])
def test_a_path_is_no_pattern(tmp_path, folder, neighbour):
    for name, question in ((folder, "right"), (neighbour, "wrong")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(GSM8K.replace('"a"', f'"{question}"'))
    assert [doc["question"] for doc in load("gsm8k_local", tmp_path / folder / "test.jsonl")] == ["right"]


@pytest.mark.parametrize("text", ["2020-01-01", "2020-01-01T10:00:00Z", "2020-01-01 10:00:00", "10:00:00", "1", ""])
def test_text_stays_text(write, text):
    path = write(f"{json.dumps({'question': text, 'answer': text})}\n" * 2, "dates.jsonl")
    assert load("gsm8k_local", path) == [{"question": text, "answer": text}] * 2


def test_numbers_and_texts_that_spell_them_may_mix(write):
    path = write(f"{SVAMP}\n{SVAMP.replace('1.0', json.dumps('2'))}\n")
    assert [doc["Answer"] for doc in load("svamp", path)] == ["1.0", "2"]
    assert [doc["Answer"] for doc in load("svamp", write(SVAMP))] == [1.0]


@pytest.mark.parametrize("form", ["{0}\n{0}\n", "[{0}, {0}]"])
def test_a_byte_order_mark_is_left_out(write, form):
    assert load("gsm8k_local", write(b"\xef\xbb\xbf" + form.format(GSM8K).encode())) == [json.loads(GSM8K)] * 2


def test_every_file_of_every_task_is_checked(write):
    good, broken = write(GSM8K, "good.jsonl"), write("{", "broken.jsonl")
    files = {"gsm8k_local": {"test": good}, "gsm8k_local_fewshot": {"test": good, "train": broken}}
    with pytest.raises(ValueError, match="broken.jsonl, line 1"):
        check_data_files(resolve_tasks(files, files))
    with pytest.raises(ValueError, match="No data file at .*; give JSON objects"):
        check_json_file(str(TASKS), COLUMNS)


def test_tasks_of_the_harness_are_passed_over():
    check_data_files(["gsm8k", {"task": "theirs", "dataset_path": "somewhere/else"}])


def test_the_real_files_pass(shared):
    data = shared / "data"
    gsm8k = {split: str(data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    files = dict.fromkeys(("gsm8k_local", "gsm8k_local_fewshot", "gsm8k_cot_local"), gsm8k)
    files |= {"svamp": {"test": str(data / "svamp" / "SVAMP.json")}}
    files |= {"aqua_rat_local": {split: str(data / "aqua-rat" / f"{split}.json") for split in ("dev", "test")}}
    check_data_files(resolve_tasks(files, files))

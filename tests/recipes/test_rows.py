"""Rows of every format, from every kind of file, and what is said of broken ones before anything is tokenized."""

import json

import pytest
from datasets import Dataset

from recipes.rows import load_rows, read_problems
from tests.helpers import write_jsonl

TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
ROWS = {
    "question / answer": {"question": "1 + 1?", "answer": "2"},
    "AQuA-RAT": {"question": "1 + 1?", "options": ["A)1", "B)2"], "correct": "B"},
    "messages": {"messages": TURNS},
    "prompt / completion": {"prompt": "1 + 1?", "completion": " 2"},
    "turns of a prompt": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "text": {"text": "1 + 1 = 2"},
}


@pytest.fixture
def load(tmp_path):
    """Return a function that writes rows to a file and loads it."""

    def write_and_load(rows, *, name="rows.jsonl", **options):
        path = tmp_path / name
        if path.suffix in (".json", ".jsonl"):
            write_jsonl(path, rows)
        else:
            data = Dataset.from_list(rows)
            data.to_parquet(path) if path.suffix == ".parquet" else data.to_csv(path)
        return load_rows(str(path), **options)

    return write_and_load


WITHOUT_LISTS = ["question / answer", "prompt / completion", "text"]
FILES = [(name, suffix) for suffix in ("jsonl", "parquet") for name in ROWS]


@pytest.mark.parametrize("name, suffix", [*FILES, *((name, "csv") for name in WITHOUT_LISTS)])
def test_every_format_is_read_from_every_kind_of_file(load, name, suffix):
    row = ROWS[name]
    splits = load([{**row, "id": "a"}] * 3, name=f"rows.{suffix}")
    assert list(splits) == ["train"] and splits["train"].to_list() == [row] * 3


def test_a_folder_of_conversations_gives_its_splits(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        write_jsonl(tmp_path / f"{split}.jsonl", [ROWS["messages"]] * number)
    assert {name: len(rows) for name, rows in load_rows(str(tmp_path)).items()} == {"train": 3, "test": 2}
    assert load_rows(str(tmp_path), split="test")["train"].to_list() == [ROWS["messages"]] * 2
    with pytest.raises(ValueError, match="has the splits .*, but training needs one called valid"):
        load_rows(str(tmp_path), split="valid")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_are_renamed_and_the_others_left_out(load, suffix):
    rows = [{"problem": "1 + 1?", "solution": "2", "text": "about sums"}]
    columns = {"problem": "question", "solution": "answer"}
    splits = load(rows, name=f"rows.{suffix}", columns=columns)
    assert splits["train"].to_list() == [ROWS["question / answer"]]
    with pytest.raises(ValueError, match="has no column problm, which columns renames; did you mean problem?"):
        load(rows, name=f"rows.{suffix}", columns={"problm": "question"})


def test_tools_stay_beside_their_conversation(load):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"b": None}}}]}
    rows = [ROWS["messages"], {"messages": [TURNS[0], call], "tools": tools}]
    assert load(rows)["train"].to_list() == [{**rows[0], "tools": None}, rows[1]]  # nothing is added to a turn


USER, ANSWER = TURNS


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"messages": [USER, {**ANSWER, "role": "gpt"}]}],
            "line 1: messages: turn 2 has the role 'gpt'; write assis",
        ),
        ([{"messages": [{**USER, "role": "usr"}]}], "turn 1 has the role 'usr'; did you mean user"),
        ([{"messages": [{"from": "human", "value": "Hi"}]}], "turn 1 must have a role and a content, got {'from'"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "content of turn 1 must be text, got"),
        ([{"messages": [ANSWER, USER]}], "line 1: nothing asks for the first turn, the assistant's"),
        ([{"messages": []}], "messages must be a list of turns, got \\[\\]"),
        ([{"messages": "Hi"}], "messages must be a list of turns, got 'Hi'"),
        ([ROWS["messages"], ROWS["text"]], "line 2 is of the format text, and .*line 1 of messages: a file must have"),
        (
            [ROWS["prompt / completion"], ROWS["turns of a prompt"]],
            "line 2 is of the format prompt / completion of tu",
        ),
        ([{"prompt": TURNS, "completion": [ANSWER]}], "line 1: a completion begins with .* assistant after assistant"),
        ([{"prompt": "1 + 1?", "completion": [ANSWER]}], "line 1: completion must be text"),
        ([{**ROWS["messages"], **ROWS["text"]}], "columns of several formats: messages, text. Name those to use"),
        ([{"question": "a", "answers": "b"}], "lacks answer; rename .* For answer, did you mean answers?"),
        ([{"message": TURNS}], "lacks those of any format.* For message, did you mean messages?"),
        ([{"messages": TURNS, "tools": "[{"}], "line 1: tools is not valid JSON"),
        ([{"messages": TURNS, "tools": ["add"]}], "line 1: tools must be a list of descriptions, got"),
        ([{"messages": TURNS, "chat_template_kwargs": 1}], "chat_template_kwargs must be a mapping, got 1"),
        ([{"messages": [{**USER, "number": 10**30}]}], "line 1: messages holds NaN or a number of more"),
        ([{"messages": [{**USER, "role": ["user"]}]}], "turn 1 has the role .*; did you mean user?"),
        ([{**ROWS["AQuA-RAT"], "correct": "C"}], r"correct must be the letter .*, got 'C' and \['A\)1', 'B\)2'\]"),
        ([{**ROWS["AQuA-RAT"], "correct": 2}], "line 1: correct must be text, got 2"),
        ([{**ROWS["AQuA-RAT"], "options": ["B)1", "B)2"]}], "line 1: correct must be the letter of one option"),
        ([{**ROWS["AQuA-RAT"], "options": ["", "B)2"]}], "line 1: correct must be the letter of one option"),
        ([{**ROWS["AQuA-RAT"], "options": "A)1"}], r"line 1: options must be a list of text, got 'A\)1'"),
        (
            [{"question": "a", "choices": ["A)1"], "correct": "A"}],
            "lacks options; rename its columns to question and opt",
        ),
        (
            [{"question": "a", "options": ["A)1"], "label": "A"}],
            "lacks correct; rename its columns to question and opt",
        ),
        ([{**ROWS["AQuA-RAT"], "text": "a"}], "columns: {question: question, options: options, correct: correct}"),
        ([{"text": 3}], "line 1: text must be text, got 3"),
        ([{}], "line 1 has the columns  and lacks those of any format"),
    ],
)
def test_broken_rows_are_named_with_their_line(load, rows, message):
    with pytest.raises(ValueError, match=message):
        load(rows)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROWS["messages"], {"messages": [{**USER, "role": "usr"}]}], "row 2: messages: turn 1 has the role 'usr'"),
        ([{"question": "a", "answers": "b"}], "split train has the columns .* did you mean answers?"),
        ([{"text": "a"}, {"text": None}], "row 2: text must be text, got None"),
    ],
)
def test_broken_rows_of_a_table_are_named_with_their_number(load, rows, message):
    with pytest.raises(ValueError, match=message):
        load(rows, name="rows.parquet")


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"a": "questions"}, "columns gives questions, no column of a format; did you mean question"),
        ({"a": "text", "b": "text"}, "columns gives text twice"),
    ],
)
def test_columns_of_no_format_are_named(load, columns, message):
    with pytest.raises(ValueError, match=message):
        load([{"a": "1", "b": "2"}], columns=columns)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("a")
    with pytest.raises(ValueError, match="rows.xlsx must end in .json, .jsonl, .csv or .parquet"):
        load_rows(str(tmp_path / "rows.xlsx"))
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet has no rows"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_a_task_reads_questions_alone(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [ROWS["messages"]])
    with pytest.raises(ValueError, match="test.jsonl has messages, and a task reads question and answer"):
        read_problems(str(tmp_path / "test.jsonl"))


def test_a_format_does_not_depend_on_the_order_of_columns(load):
    row = {"completion": " 2", "prompt": "1 + 1?"}
    assert load([row])["train"][0] == row
    assert json.dumps(load([row])["train"][0]) == json.dumps(ROWS["prompt / completion"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "rows.csv is empty; give a line of column names"),
        ("question,answer\n1,2\n3\n", "rows.csv, line 3 has another number of columns than the 2 named"),
        ("question,answer\n1,2,3\n", "rows.csv, line 2 has another number of columns than the 2 named"),
        ('question,answer\n1,"2\n', "rows.csv, after line 1, is not CSV in UTF-8"),
    ],
)
def test_broken_csv_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / "rows.csv"))

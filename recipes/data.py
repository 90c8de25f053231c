"""Question / answer data: reading it with clear errors, and turning it into tokens with labels on the answer.

The text is that of lm-evaluation-harness' `gsm8k` task, so a model is trained on the very prompt it is scored with.
SVAMP comes with equations in place of answers, and gets answers of the same form.
"""

import re
from pathlib import Path

from datasets import Dataset, DatasetDict, Value, get_dataset_config_names, load_dataset, load_dataset_builder
from datasets.data_files import EmptyDatasetError
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from eval.json_rows import read_rows
from eval.task_files import check_json_file
from recipes.config import FinetuneConfig

COLUMNS = ("question", "answer")
SVAMP_COLUMNS = ("Body", "Question", "Equation", "Answer")
NUM_SVAMP_TRAIN = 700  # of 1,000, the rest is for testing, as on the Hub
IGNORED_LABEL = -100


def load_problems(dataset: str, config_name: str | None = None) -> DatasetDict:
    """Load the splits of a dataset of problems, from the Hub or from a folder, by `datasets.load_dataset`.

    JSON files on this machine are read as they are: the errors of `datasets` name neither their line nor their column,
    and it takes text that looks like a date for a date. A data set with the columns of SVAMP is turned into questions
    and answers; without a `test` split, what follows its first 700 problems is that.

    Raises:
        ValueError: the folder, its files, a line, a column or the `train` split is missing or broken; or a column is
            no text.
    """
    config_name = _choose_config(dataset, config_name)
    data_files = load_dataset_builder(dataset, config_name).config.data_files
    paths = [Path(path) for files in data_files.values() for path in files]
    if all(path.suffix in (".json", ".jsonl") and path.is_file() for path in paths):
        splits = DatasetDict({str(split): _read_split(files) for split, files in data_files.items()})
    else:
        splits = load_dataset(dataset, config_name)
    if "train" not in splits:
        raise ValueError(f"{dataset} has the splits {', '.join(splits)}, but training needs one called train.")
    if set(SVAMP_COLUMNS) <= set(splits["train"].column_names):
        return _from_svamp(dataset, splits)
    for name, split in splits.items():
        _check_columns(f"{dataset}, split {name}", split.column_names, COLUMNS)
        for column in COLUMNS:
            if split.features[column] not in (Value("string"), Value("large_string")):
                raise ValueError(f"{dataset}, split {name}: {column} must be text, got {split.features[column]}.")
    return splits


def _read_split(paths: list[str]) -> Dataset:
    """Read JSON files of problems, or of SVAMP's, which are left as they are."""
    rows = [row for path in paths for row in _read_rows_of_problems(path)]
    columns = SVAMP_COLUMNS if set(SVAMP_COLUMNS) <= set(rows[0]) else COLUMNS
    if missing := next((set(columns) - set(row) for row in rows if not set(columns) <= set(row)), None):
        raise ValueError(f"{', '.join(paths)} mix problems of SVAMP with others: some lack {', '.join(missing)}.")
    return Dataset.from_list([{name: str(row[name]) for name in columns} for row in rows])


def _from_svamp(dataset: str, splits: DatasetDict) -> DatasetDict:
    for name, split in splits.items():
        _check_columns(f"{dataset}, split {name}", split.column_names, SVAMP_COLUMNS)
    splits = splits.map(svamp_problem, remove_columns=splits["train"].column_names, desc="SVAMP")
    if "test" not in splits and len(splits["train"]) > NUM_SVAMP_TRAIN:
        whole = splits["train"]
        splits["train"] = whole.select(range(NUM_SVAMP_TRAIN))
        splits["test"] = whole.select(range(NUM_SVAMP_TRAIN, len(whole)))
    return splits


def svamp_problem(row: dict) -> dict[str, str]:
    """Turn a problem of SVAMP into a question and an answer that reasons by its equation: `8 - 3 = 5\\n#### 5`."""
    equation = re.sub(r"(\d)\.0\b", r"\1", str(row["Equation"])).strip()
    equation = re.sub(r"^\( (.*) \)$", r"\1", equation)  # the outermost pair, which every equation has
    answer = f"{float(row['Answer']):.15g}"
    return {"question": f"{row['Body']} {row['Question']}", "answer": f"{equation} = {answer}\n#### {answer}"}


def hold_out(problems: DatasetDict, num_samples: int) -> DatasetDict:
    """Move the last `num_samples` training problems into a split of their own, `validation`.

    Raises:
        ValueError: none is left to train on.
    """
    num_train = len(problems["train"]) - num_samples
    if num_train < 1:
        raise ValueError(
            f"num_validation_samples={num_samples} leaves nothing to train on: there are {len(problems['train'])} "
            "training problems."
        )
    train, validation = (
        problems["train"].select(range(num_train)),
        problems["train"].select(range(num_train, num_train + num_samples)),
    )
    return DatasetDict({**problems, "train": train, "validation": validation})


def read_problems(path: str) -> list[dict]:
    """Read one JSON Lines file of problems, or one JSON array of them; those of SVAMP are turned into such.

    Raises:
        ValueError: the file is missing, empty or broken; the message names its path and line.
    """
    return [svamp_problem(row) if _is_svamp(row) else row for row in _read_rows_of_problems(path)]


def _read_rows_of_problems(path: str) -> list[dict]:
    """Read one file as `read_problems` does, with the columns that it has."""
    rows = read_rows(path, f"give one JSON object a line with {' and '.join(COLUMNS)}")
    if _is_svamp(rows[0][1]):
        check_json_file(path, {"Body": "text", "Question": "text", "Equation": "text", "Answer": "a number"})
        return [row for _, row in rows]
    return read_json_lines(path, COLUMNS)


def _is_svamp(row) -> bool:
    return isinstance(row, dict) and set(SVAMP_COLUMNS) <= set(row)


def read_json_lines(path: str, columns: tuple[str, ...]) -> list[dict]:
    """Read the rows of a JSON Lines file, or of a JSON array, each with text in every one of `columns`.

    Raises:
        ValueError: the file is missing, empty or broken; the message names its path and line.
    """
    rows = read_rows(path, f"give one JSON object a line with {' and '.join(columns)}")
    for place, row in rows:
        _check_row(place, row, columns)
    return [row for _, row in rows]


def prepare_data(config: FinetuneConfig, tokenizer):
    """Load and tokenize the problems.

    Returns:
        `tuple`: the problems as loaded, the tokenized training set, the tokenized held-out set (None without a `test`
        split), and the numbers of sequences in and left out.
    """
    problems = load_problems(config.dataset, config.dataset_config)
    if config.num_validation_samples is not None:
        problems = hold_out(problems, config.num_validation_samples)
    train_set, num_dropped = training_set(
        tokenize(problems["train"], tokenizer), config.max_length, config.max_train_samples
    )
    counts = {"num_train_sequences": len(train_set), "num_dropped_train_sequences": num_dropped}
    if "test" not in problems:
        return problems, train_set, None, counts
    if config.max_eval_samples is not None:
        num_heldout = min(config.max_eval_samples, len(problems["test"]))
        problems["test"] = problems["test"].select(range(num_heldout))
    eval_set, num_cut = heldout_set(tokenize(problems["test"], tokenizer), config.max_length)
    counts |= {"num_eval_problems": len(eval_set), "num_cut_eval_problems": num_cut}
    return problems, train_set, eval_set, counts


def format_prompt(question: str) -> str:
    """Write a question as lm-evaluation-harness' `gsm8k` task does."""
    return f"Question: {question}\nAnswer:"


def tokenize(problems: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Turn problems into `input_ids`, `attention_mask` and `labels`, with labels on the answer and the final eos only.

    Prompt and answer are tokenized as one text: a tokenizer that puts a space before every text would put one more
    before an answer tokenized alone.
    """

    def encode(problem: dict) -> dict:
        prompt = format_prompt(problem["question"])
        num_prompt_tokens = len(tokenizer(prompt)["input_ids"])
        input_ids = tokenizer(f"{prompt} {problem['answer']}")["input_ids"]
        if input_ids[-1] != tokenizer.eos_token_id:
            input_ids = [*input_ids, tokenizer.eos_token_id]
        labels = [IGNORED_LABEL] * num_prompt_tokens + input_ids[num_prompt_tokens:]
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}

    return problems.map(encode, remove_columns=problems.column_names, desc="Tokenizing")


def training_set(tokens: Dataset, max_length: int, max_samples: int | None = None) -> tuple[Dataset, int]:
    """Drop the sequences over `max_length` and keep the first `max_samples` of the others.

    Returns:
        `tuple[Dataset, int]`: the sequences to train on, and how many were too long.

    Raises:
        ValueError: none is left.
    """
    lengths = [len(input_ids) for input_ids in tokens["input_ids"]]
    fitting = [index for index, length in enumerate(lengths) if length <= max_length]
    if not fitting:
        shortest = min(lengths, default=0)
        raise ValueError(
            f"None of the {len(lengths)} training sequences fits in max_length={max_length}; the shortest has "
            f"{shortest} tokens. Raise max_length if the model's context allows it."
        )
    return tokens.select(fitting[:max_samples]), len(lengths) - len(fitting)


def heldout_set(tokens: Dataset, max_length: int) -> tuple[Dataset, int]:
    """Cut every sequence at `max_length`, so that each held-out problem counts with the tokens that fit.

    Returns:
        `tuple[Dataset, int]`: the sequences, and how many were cut.
    """
    num_cut = sum(len(input_ids) > max_length for input_ids in tokens["input_ids"])
    return tokens.map(lambda row: {name: values[:max_length] for name, values in row.items()}, desc="Cutting"), num_cut


def make_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pad a batch to its longest sequence, labels with -100."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED_LABEL)


def make_padding_free_collator() -> DataCollatorWithFlattening:
    """Put a batch's sequences one after the other into one row, and tell flash attention where each of them ends."""
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)


def _choose_config(dataset: str, wanted: str | None) -> str:
    """Find the wanted configuration of a dataset; when none is given its `main`, its `default` or its only one."""
    looks_local = dataset.startswith((".", "/", "~")) or Path(dataset).exists()
    if looks_local and not Path(dataset).is_dir():
        raise ValueError(f"No dataset folder at {dataset}; give one with train.jsonl and test.jsonl, or a Hub id.")
    if looks_local and set(str(Path(dataset).resolve())) & set("[]?*"):
        raise ValueError(f"The library datasets takes {dataset} for a pattern: rename folders that have [ ] ? or *.")
    try:
        names = get_dataset_config_names(dataset)
    except EmptyDatasetError as error:
        raise ValueError(f"{dataset} holds no data files; put train.jsonl and test.jsonl there.") from error
    if wanted is not None and wanted not in names:
        raise ValueError(f"{dataset} has no configuration {wanted}; it has {', '.join(names)}.")
    for name in (wanted, "main", "default"):
        if name is not None and name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise ValueError(f"{dataset} has the configurations {', '.join(names)}; set dataset_config to one of them.")


def _check_row(place: str, row, columns: tuple[str, ...]) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object, got {row!r:.60}.")
    _check_columns(place, row, columns)
    for name in columns:
        if not isinstance(row[name], str):
            raise ValueError(f"{place}: {name} must be text, got {row[name]!r:.60}.")


def _check_columns(place: str, names, columns: tuple[str, ...]) -> None:
    if missing := [name for name in columns if name not in names]:
        raise ValueError(
            f"{place} has the columns {', '.join(names)} and lacks {', '.join(missing)}; "
            f"rename its columns to {' and '.join(columns)}."
        )

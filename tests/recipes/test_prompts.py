"""The prompts of training and of scoring: what is the same passes, and every way in which they differ is named."""

import copy

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from recipes.config import EvaluationConfig, FinetuneConfig
from recipes.data import PreparedData, choose_chat
from recipes.prompts import check_prompts
from recipes.tokens import Chat
from tests.helpers import write_jsonl

PROBLEMS = [{"question": f"{number} + 1?", "answer": "#### 2"} for number in range(5)]
SVAMP = {"Body": "A pack costs 76.", "Question": "And now?", "Equation": "( 76.0 + 1.0 )", "Answer": 77.0}
AQUA = {"question": "1 + 1?", "options": ["A)1", "B)2"], "correct": "B"}


def conversations(*openings):
    answer = {"role": "assistant", "content": "2"}
    return [{"messages": [*opening, answer]} for opening in openings]


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def check(model_folder, chat_tokenizer):
    """Return a function that compares the prompts of rows with those of tasks."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()

    def compare(train, tasks, tokenizer=chat_tokenizer, **changes):
        config = FinetuneConfig(
            model="m",
            dataset="d",
            training={"output_dir": "runs/x"},
            weights="full",
            evaluation=EvaluationConfig(tasks=tasks),
            **changes,
        )
        rows = [DatasetDict({"train": Dataset.from_list(train), "test": Dataset.from_list(PROBLEMS)})]
        data = PreparedData(rows, rows[0]["train"], None, rows[0]["test"], {}, choose_chat(config, rows))
        check_prompts(model, tokenizer, config, data)
        assert model.training

    return compare


@pytest.mark.parametrize("settings", [{}, {"apply_chat_template": True}])
@pytest.mark.parametrize(
    ("task", "problems"),
    [("gsm8k_local", None), ("word_problems", None), ("svamp", [SVAMP]), ("aqua_rat_local", [AQUA] * 5)],
)
def test_questions_are_asked_as_they_are_trained(check, tmp_path, task, problems, settings):
    if problems is not None:
        write_jsonl(tmp_path / "problems.json", problems)
    check(PROBLEMS, {task: problems and str(tmp_path / "problems.json")}, **settings)


def test_a_system_prompt_is_that_of_the_tasks(check):
    check(PROBLEMS, {"gsm8k_local": None}, apply_chat_template=True, system_prompt="Be brief.")


def test_a_task_that_asks_otherwise_is_refused(check):
    with pytest.raises(ValueError, match="The task gsm8k_cot_local would not be asked .* score with eval/run.py"):
        check(PROBLEMS, {"gsm8k_cot_local": None})


def test_conversations_are_asked_as_they_are_trained(check):
    check(conversations([user("1 + 1?")]), {"gsm8k_local": None})
    system = {"role": "system", "content": "Be brief."}
    check(conversations([system, user("1 + 1?")]), {"gsm8k_local": None}, system_prompt="Be brief.")
    with pytest.raises(ValueError, match="A task in the chat template would not be asked .*Set system_prompt"):
        check(conversations([system, user("1 + 1?")]), {"gsm8k_local": None})
    with pytest.raises(ValueError, match="Be brief.*Set system_prompt to that of the conversations"):
        check(conversations([user("1 + 1?")]), {"gsm8k_local": None}, system_prompt="Be brief.")


def test_a_template_with_the_bos_token_is_given_no_other(check, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    check(PROBLEMS, {"gsm8k_local": None}, tokenizer=tokenizer, apply_chat_template=True)


def test_thoughts_that_a_row_switches_off_are_found(check, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{{ '/no_think' if off else '' }}" + tokenizer.chat_template
    row = {**conversations([user("1 + 1?")])[0], "chat_template_kwargs": {"off": True}}
    with pytest.raises(ValueError, match="no_think"):
        check([row], {"gsm8k_local": None}, tokenizer=tokenizer)


def test_what_rows_are_asked_in_the_template():
    def chosen(*kinds, **changes):
        rows = {"turns": conversations([user("Hi")]), "question": PROBLEMS, "text": [{"text": "Hi"}]}
        sets = [DatasetDict({"train": Dataset.from_list(rows[kind])}) for kind in kinds]
        training = {"output_dir": "runs/x"}
        return choose_chat(FinetuneConfig("m", "d", training, "full", **changes), sets)

    assert chosen("question") is chosen("text") is chosen("question", "text") is None
    assert chosen("turns") == chosen("turns", "text") == chosen("question", apply_chat_template=True) == Chat()
    assert chosen("turns", "question", apply_chat_template=True, system_prompt="a") == Chat("a")
    with pytest.raises(ValueError, match="Some of the data sets are conversations and some are not"):
        chosen("turns", "question")
    with pytest.raises(ValueError, match="apply_chat_template: false, but rows are conversations"):
        chosen("turns", apply_chat_template=False)
    with pytest.raises(ValueError, match="system_prompt is for a chat template"):
        chosen("question", system_prompt="a")


def test_a_file_of_the_task_is_read(check, tmp_path):
    write_jsonl(tmp_path / "own.jsonl", PROBLEMS)
    check(conversations([user("1 + 1?")]), {"gsm8k_local": str(tmp_path / "own.jsonl")})

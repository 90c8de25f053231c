"""Labels of conversations, against a slow reference: what is learned, after which tokens, by the texts themselves."""

import copy

import pytest

from recipes.chat import IGNORED_LABEL, check_template, encode_turns
from tests.recipes.conftest import CHATML

LLAMA3 = """{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>

{{ m['content'] | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>

{% endif %}"""
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
)
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
)
WITHOUT_EARLIER_THOUGHTS = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}""" + CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' and loop.index0 < ns.last else m['content'] }}",
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "default_system": DEFAULT_SYSTEM,
    "marked": MARKED,
    "without_earlier_thoughts": WITHOUT_EARLIER_THOUGHTS,
}
ENDS = ("<|im_end|>", "<|eot|>")


def turns(*texts, system=None):
    """A conversation of the user and the assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    said = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return [{"role": "system", "content": system}, *said] if system else said


CONVERSATIONS = {
    "one": turns("1 + 1?", "2"),
    "several": turns("Hi", "Hello!", "1 + 1?", "2", "And\n\nnow?", "Done: 2."),
    "system": turns("2", "2", "2", "2", system="2"),
    "thoughts": turns("Hi", "<think>a greeting</think>Hello!", "1 + 1?", "<think>two</think>2"),
    "no_ascii": turns("Grüße 😀", "Ähm… 😀!", "ß", "ẞ"),
    "ends_with_the_user": turns("Hi", "Hello!", "Bye"),
}


@pytest.fixture
def tokenizer_with(chat_tokenizer):
    """Return a function that gives the tokenizer another template."""

    def with_template(template):
        tokenizer = copy.deepcopy(chat_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return with_template


def reference(tokenizer, conversation, num_given=0):
    """What is to be learned, as (tokens before, token): each answer's text and its end mark, where they stand."""
    learned = []
    for place, turn in enumerate(conversation):
        if turn["role"] != "assistant" or place < num_given:
            continue
        text = tokenizer.apply_chat_template(conversation[: place + 1], tokenize=False)
        start = text.rindex(turn["content"])
        end = min(text.index(mark, start) + len(mark) for mark in ENDS if mark in text[start:])
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        for number, (first, last) in enumerate(encoded["offset_mapping"]):
            if start <= first and last <= end:
                learned.append((tuple(ids[:number]), ids[number]))
    return sorted(learned)


def learned(sequences):
    """The same of labelled sequences, whose labels must be their tokens."""
    pairs = []
    for ids, labels in sequences:
        assert len(ids) == len(labels)
        for number, label in enumerate(labels):
            if label != IGNORED_LABEL:
                assert label == ids[number]
                pairs.append((tuple(ids[:number]), label))
    return sorted(pairs)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_learned_is_what_the_assistant_says_after_the_prompt_that_asks_it(tokenizer_with, template, name):
    tokenizer, conversation = tokenizer_with(TEMPLATES[template]), CONVERSATIONS[name]
    sequences = encode_turns(tokenizer, conversation)
    expected = reference(tokenizer, conversation)
    assert expected and learned(sequences) == expected
    rewritten = template == "without_earlier_thoughts" and name == "thoughts"
    assert len(sequences) == 1 + rewritten
    for place, turn in enumerate(conversation):
        if turn["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(conversation[:place], add_generation_prompt=True)["input_ids"]
            assert any(ids[: len(prompt)] == prompt and labels[len(prompt)] >= 0 for ids, labels in sequences)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_generation_markers_say_the_same(tokenizer_with, name):
    """The labels are those of transformers' own mask, up to what the user says last, which is not learned."""
    tokenizer = tokenizer_with(MARKED)
    ((ids, labels),) = encode_turns(tokenizer, CONVERSATIONS[name])
    whole = tokenizer.apply_chat_template(CONVERSATIONS[name], return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"][: len(ids)] == ids
    assert whole["assistant_masks"][: len(ids)] == [int(label != IGNORED_LABEL) for label in labels]
    assert not any(whole["assistant_masks"][len(ids) :])


def test_turns_of_a_prompt_are_not_learned(tokenizer_with):
    tokenizer, conversation = tokenizer_with(CHATML), CONVERSATIONS["several"]
    sequences = encode_turns(tokenizer, conversation, num_given=3)
    assert learned(sequences) == reference(tokenizer, conversation, num_given=3) != reference(tokenizer, conversation)


def test_a_conversation_in_which_the_assistant_is_silent_has_no_labels(tokenizer_with):
    ((ids, labels),) = encode_turns(tokenizer_with(CHATML), turns("Hi"))
    assert set(labels) == {IGNORED_LABEL} and len(labels) == len(ids)


# What a template must not be: how it is changed, and what is said of it.
WRONG = {
    "asks otherwise": (CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>"), "asks for a turn"),
    "never ends": (CHATML.replace("<|im_end|>", "."), "no special token, so the model would not learn to stop"),
    "refuses": ("{{ raise_exception('only one turn') }}", "refuses a conversation of user.*: only one turn"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_template_that_cannot_train_is_named(tokenizer_with, name):
    template, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        encode_turns(tokenizer_with(template), turns("Hi", "Hello!"))


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "has no chat template, and conversations need one"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "leaves out what an assist"),
    ],
)
def test_a_template_without_an_assistant_is_refused_before_the_rows(tokenizer_with, template, message):
    with pytest.raises(ValueError, match=message):
        check_template(tokenizer_with(template))


REAL = ["qwen2_5", "llama3", "gemma3", "phi3", "qwen3"]


@pytest.mark.parametrize("name", REAL)
def test_templates_of_real_models(tokenizer, name):
    """TRL has them; the marks of each are tokens here as they are there."""
    templates = pytest.importorskip("trl.chat_template_utils")
    tokenizer = copy.deepcopy(tokenizer)
    marks = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "bos_token": "<s>"})
    tokenizer.chat_template = getattr(templates, f"{name}_chat_template")
    conversation = CONVERSATIONS["several"]
    sequences = encode_turns(tokenizer, conversation)
    texts = ["".join(tokenizer.decode([label]) for label in labels if label >= 0) for _, labels in sequences]
    # When a conversation goes on, Qwen3 takes away the empty thought of the last turn, and Phi-3 the eos after it.
    assert len(sequences) == (3 if name in ("qwen3", "phi3") else 1)
    for turn in conversation[1::2]:
        assert any(turn["content"] + mark in text for mark in marks for text in texts)
    assert not any("And" in text for text in texts)

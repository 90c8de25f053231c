"""Written answers know the very tokens in which they were written, whatever the tokenizer does to a text's edges."""

import copy
import pickle

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, set_seed

pytest.importorskip("lm_eval", reason="needs dipnet_hf[eval]")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dipnet_hf.answers import Answer, WritingLM, token_span
from eval.calibration import confidences_of_text
from recipes.tiny_model import BOS, EOS, PAD, tiny_llama, train_tokenizer
from recipes.word_problems import generate_splits

TEXTS = [f"Question: {problem['question']}\nAnswer:" for problem in generate_splits(0, {"test": 6})["test"]]
# An untrained model repeats its last token if it may.
NO_REPEATS = {"do_sample": False, "repetition_penalty": 20.0, "suppress_tokens": [0, 1, 2]}
GREEDY = {"until": [], "max_gen_toks": 8, **NO_REPEATS}


def spaced_tokenizer():
    """One that puts a space before every text and drops it when it decodes, as those of Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[BOS, EOS, PAD], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    assert tokenizer.decode(tokenizer.encode(" a")) == tokenizer.decode(tokenizer.encode("a")) == "a"
    return tokenizer


TOKENIZERS = {"bytes": lambda: train_tokenizer(TEXTS, vocab_size=300), "spaced": spaced_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def lm(request):
    """A model that writes by chance, with a context of 48 tokens."""
    tokenizer = TOKENIZERS[request.param]()
    set_seed(0)
    return WritingLM(tiny_llama(tokenizer).eval(), tokenizer=tokenizer, batch_size=4, max_length=48)


def request(prompt, number=0, **changes):
    return Instance("generate_until", {}, (prompt, {**GREEDY, **changes}), 0, ("task", number, 1))


def log_probs_as_written(lm, prompt, num_tokens):
    """The tokens that the model writes after a prompt, and their log-probabilities as it did."""
    output = lm.model.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **NO_REPEATS,
    )
    tokens = output.sequences[0, len(prompt) :]
    log_probs = torch.stack(output.logits, dim=1)[0].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), log_probs


@pytest.mark.parametrize("end", ["", " ", "\n", "\n\n "], ids=repr)
def test_the_confidence_is_that_of_the_tokens_as_written(lm, end):
    """After prompts that end in white space, as chat templates do, and ones that were cut to leave room."""
    requests = [request(TEXTS[number][-length:] + end, number) for number, length in enumerate([30, 40, 999])]
    answers = lm.generate_until(requests)
    assert answers == HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=4, max_length=48).generate_until(requests)
    values = confidences_of_text(lm, answers)
    for one, answer, value in zip(requests, answers, values, strict=True):
        assert answer.prompt == lm.tok_encode(one.args[0])[-40:]
        tokens, log_probs = log_probs_as_written(lm, answer.prompt, 8)
        assert answer.tokens == tokens[: len(answer.tokens)] and len(answer.tokens) >= 6
        assert value == pytest.approx(log_probs[: len(answer.tokens)].mean().exp().item(), rel=1e-4)


def test_an_answer_ends_with_the_token_that_ends_its_text(lm):
    prompt = TEXTS[0][:40]
    (whole,) = lm.generate_until([request(prompt)])
    place = next(place for place in range(2, len(whole)) if whole.find(whole[place]) == place)
    (answer,) = lm.generate_until([request(prompt, until=[whole[place]])])
    assert answer == whole[:place] and answer.tokens == whole.tokens[: len(answer.tokens)]
    assert lm.tok_decode(answer.tokens).startswith(answer)
    assert not lm.tok_decode(answer.tokens[:-1]).startswith(answer)


def test_an_empty_answer_has_no_tokens_and_no_confidence(lm):
    (whole,) = lm.generate_until([request(TEXTS[0][:40])])
    empty, other = lm.generate_until([request(TEXTS[0][:40], until=[whole[0]]), request(TEXTS[1][:40], 1)])
    assert empty == "" and empty.tokens == []
    values = confidences_of_text(lm, [empty, other])
    assert values[0] == 0 and values[1] == pytest.approx(confidences_of_text(lm, [other])[0], rel=1e-4)


@pytest.mark.parametrize("kind", [int, str])
def test_thoughts_belong_to_what_an_answer_was_written_after(lm, kind):
    (whole,) = lm.generate_until([request(TEXTS[0][:40])])
    marker = whole.tokens[2] if kind is int else next(c for c in whole[2:-3] if c.isalpha() and whole.count(c) == 1)
    thinking = WritingLM(
        lm.model,
        tokenizer=lm.tokenizer,
        batch_size=4,
        max_length=48,
        think_end_token=str(marker),
        enable_thinking=True,
    )
    (answer,) = thinking.generate_until([request(TEXTS[0][:40])])
    assert answer and answer != whole
    assert answer.prompt + answer.tokens == whole.prompt + whole.tokens
    assert len(whole.prompt) < len(answer.prompt)
    (value,) = confidences_of_text(thinking, [answer])
    assert value == pytest.approx(
        log_probs_as_written(lm, answer.prompt, len(answer.tokens))[1].mean().exp().item(), rel=1e-4
    )


def test_equal_requests_keep_their_own_tokens(lm):
    set_seed(0)
    sampled = request(TEXTS[0][:40], do_sample=True, temperature=1.0)
    answers = lm.generate_until([sampled, request(TEXTS[1][:40]), sampled, sampled])
    assert len(set(answers)) == 4
    for answer in answers:
        assert lm.tok_decode(answer.tokens).startswith(answer)


def test_the_tokens_of_a_part_of_a_text():
    """Two tokens make one letter; a third has no text, as one that is special."""
    decode = {0: "", 1: "�", 2: "a", 3: "aé", 4: "aé b", 5: "aé b\n\nc", 6: "aé b\n\nc d"}
    tokens = [0, 1, 2, 3, 4, 5]

    def text_of(tokens):
        return decode[len(tokens)]

    whole = text_of(tokens)
    assert token_span(text_of, tokens, whole, 0, "aé") == (0, 3)
    assert token_span(text_of, tokens, whole, 0, "aé b") == (0, 4)
    # A token of which only the end is its own.
    assert token_span(text_of, tokens, whole, whole.index("c"), "c") == (4, 5)
    assert token_span(text_of, tokens, whole, whole.index("d"), "d") == (5, 6)
    assert token_span(text_of, tokens, whole, 0, "") == (0, 0)


def test_a_copy_of_an_answer_keeps_its_tokens():
    answer = Answer("5", [1, 2], [3], sample=4)
    for other in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert other == "5" and (other.prompt, other.tokens, other.sample) == ([1, 2], [3], 4)

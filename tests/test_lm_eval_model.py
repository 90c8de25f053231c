"""The harness' `dip` model: equal to `hf` with the noise off, an ensemble or a vote with it on, and resumable."""

import json
import shutil

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

from dipnet_hf import DipConfig, get_dip_model
from dipnet_hf.lm_eval_model import DipLM
from dipnet_hf.noise import fold_in
from dipnet_hf.responses import Responses
from recipes.tiny_model import tiny_llama, train_tokenizer
from recipes.word_problems import generate_splits

QUESTIONS = [f"Question: {problem['question']}\nAnswer:" for problem in generate_splits(0, {"test": 6})["test"]]
GREEDY = {"until": ["Question:"], "do_sample": False, "max_gen_toks": 12}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 1.0}
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(QUESTIONS)


@pytest.fixture(scope="module")
def save(tokenizer, tmp_path_factory):
    """Return a function that saves a base model and an adapter for it, and returns the arguments that load both."""

    def save(make_adapter, num_extra_tokens=0):
        folder = tmp_path_factory.mktemp("models")
        set_seed(0)
        model = tiny_llama(tokenizer)
        model.resize_token_embeddings(len(tokenizer) + num_extra_tokens, mean_resizing=False)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        make_adapter(model).save_pretrained(folder / "adapter")
        return {"pretrained": str(folder / "base"), "peft": str(folder / "adapter"), "device": "cpu", "batch_size": 4}

    return save


@pytest.fixture(scope="module")
def with_noise(tokenizer):
    """Return a function that makes a DIP model of a base model."""

    def with_noise(model, weights=LORA):
        batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
        return get_dip_model(model, DipConfig(weights=weights, init_noise_std=0.3), calibration=[batch])

    return with_noise


@pytest.fixture(scope="module")
def saved(save, with_noise):
    return save(with_noise)


@pytest.fixture(scope="module")
def dip(saved):
    """A model in memory, with its noise off."""
    return DipLM(**saved)


def make_requests(kind, repeats=1, gen_kwargs=GREEDY):
    """Requests of one kind, of very different lengths, in the harness' order: repeats follow each other."""
    if kind == "generate_until":
        arguments = [(question, gen_kwargs) for question in QUESTIONS]
    elif kind == "loglikelihood":
        options = [" 1", " 2", " 3 apples"]
        arguments = [(context, option) for context in ("", *QUESTIONS) for option in options]
    else:
        arguments = [(question,) for question in (*QUESTIONS, "".join(QUESTIONS))]
    metadata = [("task", number, repeats) for number in range(len(arguments))]
    requests = [Instance(kind, {}, args, 0, entry) for args, entry in zip(arguments, metadata)]
    return [request for request in requests for _ in range(repeats)]


def answer(lm, kind, **kwargs):
    return getattr(lm, kind)(make_requests(kind, **kwargs))


def in_memory(dip, **kwargs):
    return DipLM(pretrained=dip.model, tokenizer=dip.tokenizer, batch_size=4, **kwargs)


# ---- noise off ----


def test_the_harness_knows_it_by_name():
    assert get_model("dip") is DipLM


@pytest.mark.parametrize("max_length", [None, 40], ids=["whole", "truncated"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_off_equals_hf(saved, kind, max_length):
    arguments = {**saved, "max_length": max_length}
    assert answer(DipLM(**arguments), kind) == answer(HFLM(**arguments), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_equals_the_saved_one_and_noise_stays_off(dip, kind):
    with dip.model.sampling(seed=0):
        assert answer(in_memory(dip), kind) == answer(dip, kind)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_models_without_noise_are_evaluated_too(save, adapter):
    arguments = save(lambda model: get_peft_model(model, LORA))
    if adapter == "none":
        del arguments["peft"]
    assert answer(DipLM(**arguments), "loglikelihood") == answer(HFLM(**arguments), "loglikelihood")


def test_an_adapter_of_all_weights_keeps_the_padded_vocabulary(save, with_noise):
    """HFLM cuts the vocabulary down to the tokenizer's before it loads an adapter."""
    made = []
    arguments = save(lambda model: made.append(with_noise(model, "full")) or made[0], num_extra_tokens=7)
    loaded = DipLM(**arguments)
    expected = DipLM(pretrained=made[0], tokenizer=loaded.tokenizer, batch_size=4)
    for kind in KINDS:
        assert answer(loaded, kind) == answer(expected, kind)


# ---- noise on ----


@pytest.mark.parametrize("average", ["prob", "logit"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_by_the_ensemble(dip, kind, average):
    ours = answer(in_memory(dip, num_samples=3, average=average, seed=5), kind)
    stock = HFLM(pretrained=dip.model, tokenizer=dip.tokenizer, batch_size=4)
    with dip.model.ensemble(3, average=average, seed=5):
        assert ours == answer(stock, kind)
    assert ours != answer(stock, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_and_batching_do_not_change_an_ensemble(saved, dip, kind):
    ours = answer(DipLM(**{**saved, "batch_size": 1}, num_samples=2), kind)
    theirs = answer(in_memory(dip, num_samples=2), kind)
    if kind == "generate_until":
        assert ours == theirs
    else:
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-5)


def test_in_a_vote_the_jth_repeat_is_of_sample_j(dip):
    voted = answer(in_memory(dip, num_samples=3, average="vote", seed=5), "generate_until", repeats=3)
    stock = HFLM(pretrained=dip.model, tokenizer=dip.tokenizer, batch_size=1)
    for sample in range(3):
        with dip.model.ensemble(1, seed=int(fold_in(torch.tensor(5), sample))):
            assert voted[sample::3] == answer(stock, "generate_until")
    assert len(set(voted)) > len(QUESTIONS)


@pytest.mark.parametrize("resumed", [False, True])
def test_in_a_vote_an_answer_is_scored_by_the_sample_that_wrote_it(dip, tmp_path, resumed):
    for _ in range(1 + resumed):
        lm = in_memory(dip, num_samples=2, average="vote", seed=5, responses=Responses(tmp_path, {}))
        answers = [text for text in answer(lm, "generate_until", repeats=2) if text]
    scores = lm.answer_log_likelihoods(answers)
    assert {text.sample for text in answers} == {0, 1}
    for text, score in zip(answers, scores, strict=True):
        tokens = torch.tensor([text.prompt + text.tokens])
        with torch.no_grad(), dip.model.ensemble(1, seed=int(fold_in(torch.tensor(5), text.sample))):
            log_probs = dip.model(input_ids=tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
        assert score == pytest.approx(log_probs[-len(text.tokens) :].sum().item(), rel=1e-4)


@pytest.mark.parametrize(("batch_size", "scored"), [(16, 2), (4, 1)])
def test_what_was_written_is_scored_in_smaller_batches(dip, monkeypatch, batch_size, scored):
    """All logits of a batch as large as one that is generated may not fit, and then the answers would be lost."""
    lm = DipLM(pretrained=dip.model, tokenizer=dip.tokenizer, batch_size=batch_size)
    answers = [text for text in answer(lm, "generate_until") if text]
    assert len(answers) > 2
    num_rows = []
    monkeypatch.setattr(lm, "_model_call", lambda rows: num_rows.append(len(rows)) or lm.model(rows).logits)
    small = lm.answer_log_likelihoods(answers)
    assert max(num_rows) == scored and lm.batch_size == batch_size
    lm.batch_size_per_gpu = 8 * len(answers)
    assert small == pytest.approx(lm.answer_log_likelihoods(answers), rel=1e-4) and max(num_rows) == len(answers)


def test_further_repeats_wrap_around(dip):
    """The harness pads the shares of several processes by repeating a request once more, all k times."""
    lm = in_memory(dip, num_samples=2, average="vote")
    requests = make_requests("generate_until", repeats=2)
    texts = lm.generate_until([*requests, *requests[-2:], *requests[-2:]])
    assert texts[-2:] == texts[-4:-2] == texts[-6:-4]


def test_log_likelihoods_of_a_vote_are_of_the_mean_probability(dip):
    for kind in KINDS[:2]:
        voted = answer(in_memory(dip, num_samples=2, average="vote"), kind)
        assert voted == answer(in_memory(dip, num_samples=2), kind)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, .* Got 0"),
        ({"num_samples": 2.5}, "num_samples must be an integer .* Got 2.5"),
        ({"num_samples": True}, "num_samples must be an integer .* Got True"),
        ({"num_samples": 2, "average": "mean"}, "average must be one of prob, logit, vote, got 'mean'"),
        ({"average": "vote"}, "average=vote is over samples: say how many with num_samples=k"),
        ({"num_samples": 2, "seed": "a"}, "seed must be an integer, got 'a'"),
        ({"num_samples": 2}, "num_samples=2 draws the noise of a DIP adapter, and this model has none"),
        ({"peft": "./nowhere"}, "peft=./nowhere holds no adapter"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        DipLM(pretrained="./no-such-model", **arguments)


def test_wrong_folders_are_refused(saved, save, tmp_path):
    with pytest.raises(
        ValueError, match="holds an adapter. Give it as peft=.*adapter, and the model it was trained on"
    ):
        DipLM(pretrained=saved["peft"])
    with pytest.raises(ValueError, match="peft=.*base holds no adapter: it has no adapter_config.json"):
        DipLM(pretrained=saved["pretrained"], peft=saved["pretrained"])
    lora = save(lambda model: get_peft_model(model, LORA))
    with pytest.raises(ValueError, match="num_samples=2 draws the noise of a DIP adapter, and .*adapter has none"):
        DipLM(**lora, num_samples=2)


def test_a_model_in_memory_without_noise_is_refused(tokenizer):
    model = get_peft_model(tiny_llama(tokenizer), LORA)
    with pytest.raises(ValueError, match="num_samples=2 draws the noise of a DIP adapter, and this model has none"):
        DipLM(pretrained=model, tokenizer=tokenizer, num_samples=2)


def test_an_adapter_of_another_base_is_refused(saved, tmp_path):
    config = json.loads((shutil.copytree(saved["pretrained"], tmp_path / "base") / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="trained on a model of another shape: .*layers.3.*no such site"):
        DipLM(**{**saved, "pretrained": str(tmp_path / "base")}, num_samples=2)


def test_code_of_a_model_is_not_trusted(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}')
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DipLM(pretrained=str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("num_samples", [None, 2])
def test_what_cannot_be_generated_is_refused(dip, num_samples):
    lm = in_memory(dip, num_samples=num_samples)
    with pytest.raises(ValueError, match="A prompt is empty"):
        lm.generate_until([Instance("generate_until", {}, (text, GREEDY), 0) for text in ("text", "")])
    too_many = {**GREEDY, "max_gen_toks": 512}
    with pytest.raises(ValueError, match="max_gen_toks=512 leaves no room for a prompt in .* context of 512 tokens"):
        answer(lm, "generate_until", gen_kwargs=too_many)


def test_a_vote_needs_as_many_repeats_as_samples(dip):
    lm = in_memory(dip, num_samples=3, average="vote")
    with pytest.raises(ValueError, match="num_samples=3 samples .* repeats each 1 times. Use eval/run.py, or set"):
        answer(lm, "generate_until")


# ---- finished responses ----


@pytest.mark.parametrize("num_samples", [None, 2])
def test_a_quantized_base_is_loaded_by_the_names_of_its_fields(saved, num_samples):
    pytest.importorskip("bitsandbytes", reason="quantized models need bitsandbytes")
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    quantized = DipLM(**saved, **fields, num_samples=num_samples)
    base = AutoModelForCausalLM.from_pretrained(saved["pretrained"], quantization_config=BitsAndBytesConfig(**fields))
    expected = PeftModel.from_pretrained(base.dequantize(), saved["peft"])
    requests = make_requests("loglikelihood")
    scores = [score for score, _ in quantized.loglikelihood(requests)]
    in_memory = DipLM(expected, tokenizer=quantized.tokenizer, num_samples=num_samples)
    assert scores == pytest.approx([score for score, _ in in_memory.loglikelihood(requests)], rel=1e-3)
    plain = DipLM(**saved, num_samples=num_samples).loglikelihood(requests)
    assert scores != pytest.approx([score for score, _ in plain], rel=1e-3)


@pytest.fixture
def count_requests(monkeypatch):
    """Return the list of how many requests each call of the harness' methods got."""
    counts = []
    for name in KINDS:
        stock = getattr(HFLM, name)
        monkeypatch.setattr(
            HFLM,
            name,
            lambda self, requests, stock=stock, **kw: counts.append(len(requests)) or stock(self, requests, **kw),
        )
    return counts


@pytest.mark.parametrize(
    ("kind", "mode", "per_call"),
    [
        ("loglikelihood", {}, [15]),
        ("loglikelihood_rolling", {"num_samples": 2}, [3]),
        ("generate_until", {"num_samples": 2}, [2]),
        ("generate_until", {"num_samples": 3, "average": "vote"}, [4, 6]),
    ],
)
def test_finished_responses_are_not_asked_for_again(dip, tmp_path, count_requests, kind, mode, per_call):
    repeats = 3 if mode.get("average") == "vote" else 1
    expected = answer(in_memory(dip, **mode), kind, repeats=repeats)
    assert answer(in_memory(dip, responses=Responses(tmp_path, {"a": 1}), **mode), kind, repeats=repeats) == expected
    path = tmp_path / "responses.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(expected)
    num_left = sum(per_call)
    path.write_text("".join(lines[: len(lines) - num_left]) + lines[-1][:20])  # killed while writing
    count_requests.clear()
    assert answer(in_memory(dip, responses=Responses(tmp_path, {"a": 1}), **mode), kind, repeats=repeats) == expected
    assert count_requests == per_call
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_any_number_of_processes_takes_up_the_responses_of_others(dip, tmp_path, monkeypatch, count_requests):
    requests = make_requests("generate_until")
    monkeypatch.setenv("RANK", "1")
    texts = in_memory(dip, responses=Responses(tmp_path, {})).generate_until(requests[:3])
    assert (tmp_path / "responses-1.jsonl").exists() and not (tmp_path / "responses.jsonl").exists()
    monkeypatch.delenv("RANK")
    count_requests.clear()
    assert in_memory(dip, responses=Responses(tmp_path, {})).generate_until(requests)[:3] == texts
    assert count_requests == [3]


def test_a_resumed_run_does_not_sample_the_same_again(dip, tmp_path):
    def sample(num_repeats):
        set_seed(0)
        lm = in_memory(dip, responses=Responses(tmp_path, {}))
        return lm.generate_until([Instance("generate_until", {}, (QUESTIONS[0], SAMPLED), 0)] * num_repeats)

    first = sample(4)
    assert len(set(first)) == 4
    resumed = sample(8)
    assert resumed[:4] == first
    assert len(set(resumed)) == 8

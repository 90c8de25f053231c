"""The distillation recipe: its loss, its targets, and the way from a finished DIP run to a plain network."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM

from dipnet_hf.uncertainty import expected_calibration_error
from recipes import distill, finetune
from recipes.config import DistillConfig
from recipes.data import make_collator, prepare_data
from recipes.running import load_base, load_tokenizer
from recipes.teacher import load_teacher, load_teacher_config
from recipes.tokens import Chat, format_prompt
from tests.helpers import losses, read_results, write_jsonl

BOTH = pytest.mark.parametrize("weights", ["full", "lora"])


@pytest.fixture
def distil(tmp_path):
    """Return a function that distils a finished run and returns the output folder."""

    def run_recipe(teacher, *arguments, name="distilled", training=None, **changes):
        config = {
            "teacher": str(teacher),
            "compare_samples": [1, 2],
            "heldout_sizes": {"first_2": 2, "all": None},
            "num_samples": 2,
            "training": {
                "output_dir": str(tmp_path / name),
                "max_steps": 2,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "learning_rate": 1e-2,
                "seed": 0,
                "use_cpu": True,
                "logging_steps": 1,
                "save_steps": 1,
                **(training or {}),
            },
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        distill.main([str(path), *arguments])
        return tmp_path / name

    return run_recipe


class Parts:
    """What the recipe is made of: a finished run's teacher, configuration, tokenizer and rows, and what follows."""

    def __init__(self, folder, output_dir):
        self.folder, self.output_dir = folder, output_dir
        self.run = load_teacher_config(str(folder))
        self.teacher = load_teacher(str(folder), self.run)
        self.tokenizer = load_tokenizer(self.run)
        self.collator = make_collator(self.tokenizer)
        data = prepare_data(self.run, self.tokenizer)
        train_set, self.heldout = data.train, data.heldout
        self.rows = train_set.add_column("has_answer", [True] * len(train_set))

    def config(self, **changes):
        training = {"output_dir": str(self.output_dir), "use_cpu": True, "per_device_eval_batch_size": 2}
        return DistillConfig(teacher=str(self.folder), training=training, **changes)

    def student(self):
        return distill.make_student(self.teacher, self.config(), self.run)

    def batch(self, numbers):
        indexed = self.rows.add_column("index", range(len(self.rows)))
        return self.collator([indexed[number] for number in numbers])

    def targets(self, **changes):
        return distill.make_targets(self.teacher, self.rows, self.collator, self.config(**changes))

    def loss(self, student, numbers, **changes):
        """The trainer's loss of a batch of some rows."""
        config = self.config(**changes)
        trainer = distill.DistillTrainer(student, config.training_arguments(), self.collator, self.rows)
        trainer.set_targets(self.targets(**changes), config)
        with torch.no_grad():
            return trainer.compute_loss(student, self.batch(numbers)).item()


@pytest.fixture
def parts(dip_runs, tmp_path):
    """Return a function that loads the `Parts` of a finished run."""
    return lambda weights="full": Parts(dip_runs[weights], tmp_path / "output")


# ---- the loss ----


def reference_loss(logits, targets, temperature):
    """T^2 KL(targets || softmax(logits / T)) in float64, summed; `targets` are probabilities."""
    log_probs = torch.log_softmax(logits.double() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_probs, targets.double(), reduction="sum")


def random_logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_and_gradient_are_those_of_torch_in_float64(temperature):
    logits, target = random_logits(5, 7).requires_grad_(), random_logits(5, 7, seed=1).log_softmax(-1)
    loss = distill.distillation_loss(logits, target, None, temperature)
    reference = reference_loss(logits, target.exp(), temperature)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, reference)))


def test_gradient_is_the_difference_of_the_distributions():
    logits, target = random_logits(5, 7).requires_grad_(), random_logits(5, 7, seed=1).log_softmax(-1)
    distill.distillation_loss(logits, target, None, 1.0).backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target.exp())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_of_the_target_itself_is_zero(temperature):
    logits = random_logits(5, 7).requires_grad_()
    target = (logits.detach() / temperature).log_softmax(-1)
    loss = distill.distillation_loss(logits, target, None, temperature)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-5 and gradient.abs().max() < 1e-5


def test_loss_grows_with_the_square_of_the_temperature():
    logits, target = random_logits(5, 7), random_logits(5, 7, seed=1).log_softmax(-1)
    losses = [distill.distillation_loss(T * logits, target, None, T).item() for T in (1.0, 3.0)]
    assert losses[1] == pytest.approx(9 * losses[0], rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_tokens_of_probability_zero_count_for_nothing(temperature):
    logits = random_logits(4, 7).requires_grad_()
    target, ids = distill.keep_top_p(random_logits(4, 7, seed=1).log_softmax(-1), 0.7)
    assert (target == -torch.inf).any()
    loss = distill.distillation_loss(logits, target, ids, temperature)
    reference = reference_loss(logits, dense(target, ids, 7).exp(), temperature)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    gradient, expected = (torch.autograd.grad(value, logits)[0] for value in (loss, reference))
    torch.testing.assert_close(gradient, expected)
    assert gradient.isfinite().all()


def dense(log_probs_NM, ids_NM, vocab_size):
    """Spread kept tokens over the vocabulary; the others have a probability of zero."""
    if ids_NM is None:
        return log_probs_NM
    spread = torch.zeros(len(ids_NM), vocab_size).scatter_add(1, ids_NM, log_probs_NM.exp())  # padded ids repeat 0
    return spread.log()


# ---- the likeliest tokens ----


def test_top_p_keeps_the_smallest_set_of_known_distributions():
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.01, 0.01, 0.01, 0.97]])
    log_probs, ids = distill.keep_top_p(probs.log(), 0.75)
    assert log_probs.shape == ids.shape == (2, 2), "no wider than the largest set"
    assert ids[0].tolist() == [1, 3] and ids[1, 0] == 3
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[0.625, 0.375], [1.0, 0.0]]))


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p_reaches_it_and_would_not_with_one_token_less(top_p):
    probs = random_logits(200, 50).softmax(-1)
    log_probs, ids = distill.keep_top_p(probs.log(), top_p)
    kept = log_probs > -torch.inf
    original = probs.gather(1, ids).double() * kept
    assert kept[:, 0].all(), "at least one token"
    assert (original.sum(-1) > top_p - 1e-6).all()
    smallest = original.masked_fill(~kept, 1).min(-1).values
    assert (original.sum(-1) - smallest < top_p + 1e-6).all()
    left_out = probs.scatter(1, ids, probs.gather(1, ids).masked_fill(kept, 0))
    assert (left_out.max(-1).values <= smallest).all(), "the kept ones are the likeliest"
    torch.testing.assert_close(log_probs.exp(), (original / original.sum(-1, keepdim=True)).float())


@pytest.mark.parametrize("scale", [1.0, 10.0], ids=["flat", "peaked"])
def test_top_p_of_one_keeps_everything(scale):
    logits, full = random_logits(20, 300), random_logits(20, 300, seed=1, scale=scale).log_softmax(-1)
    log_probs, ids = distill.keep_top_p(full, 1.0)
    torch.testing.assert_close(dense(log_probs, ids, 300).exp(), full.exp())
    assert torch.equal(dense(log_probs, ids, 300) > -torch.inf, full.exp() > 0)
    both = [distill.distillation_loss(logits, *targets, 1.0).item() for targets in ((log_probs, ids), (full, None))]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_kept_tokens_do_not_hold_on_to_the_others():
    for tensor in distill.keep_top_p(random_logits(3, 500, scale=20.0).log_softmax(-1), 0.5):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() < 3 * 50 * 8


def test_sequences_of_different_widths_are_joined():
    parts = [distill.keep_top_p(random_logits(n, 9, seed=n).log_softmax(-1), top_p) for n, top_p in ((2, 0.2), (3, 1))]
    log_probs, ids = distill.join(parts, torch.device("cpu"))
    assert log_probs.shape == ids.shape == (5, 9)
    torch.testing.assert_close(dense(log_probs, ids, 9), torch.cat([dense(*part, 9) for part in parts]))


# ---- the targets ----


def test_target_is_the_mean_of_separate_passes(parts):
    teacher, batch = (loaded := parts()).teacher, loaded.batch([3, 0, 9])
    torch.manual_seed(5)
    passes = []
    for _ in range(3):
        with torch.no_grad(), teacher.noisy():
            logits = teacher.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        passes.append(logits.double().softmax(-1)[:, :-1][batch["labels"][:, 1:] != -100])
    assert not torch.allclose(passes[0], passes[1], rtol=0.1)
    torch.manual_seed(5)
    log_probs = distill.mean_log_probs(teacher, batch, 3)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs.double(), (sum(passes) / 3).log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cached_targets_are_those_of_the_rows(parts, temperature):
    """Without noise a target is the same at every draw, so that only a wrong row could make a difference."""
    student = (loaded := parts()).student().requires_grad_(False)
    for logvar in loaded.teacher.network.logvars():
        logvar.data.fill_(-100)
    changes = {"temperature": temperature, "num_samples": 2}
    fresh = loaded.targets(**changes)
    cached, cut = loaded.targets(cache_top_p=1.0, **changes), loaded.targets(cache_top_p=0.5, **changes)
    for numbers in ([7, 2, 10], [2], [0, 10, 7, 2]):
        batch = loaded.batch(numbers)
        expected, ids = fresh(batch)
        assert ids is None
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        flattened = (logits[:, :-1][batch["labels"][:, 1:] != -100] / temperature).log_softmax(-1)
        torch.testing.assert_close(expected, flattened, rtol=1e-5, atol=1e-5)
        vocab_size = expected.shape[1]
        torch.testing.assert_close(dense(*cached(batch), vocab_size), expected, rtol=1e-5, atol=1e-5)
        expected = dense(*distill.keep_top_p(expected, 0.5), vocab_size)
        torch.testing.assert_close(dense(*cut(batch), vocab_size), expected, rtol=1e-5, atol=1e-5)


def test_targets_are_drawn_anew_unless_cached(parts):
    loaded = parts()
    batch = loaded.batch([1, 2])
    fresh, cached = loaded.targets(), loaded.targets(cache_top_p=0.9)
    assert not torch.equal(fresh(batch)[0], fresh(batch)[0])
    assert torch.equal(cached(batch)[0], cached(batch)[0])


# ---- training ----


@BOTH
def test_student_starts_as_the_teacher_without_noise(parts, weights):
    student = (loaded := parts(weights)).student()
    batch = loaded.batch([0, 5])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), loaded.teacher.network.deterministic():
        torch.testing.assert_close(student(**inputs).logits, loaded.teacher.network(**inputs).logits)
    names = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in student.named_parameters() if weights == "full" or "lora_" in name}
    assert not any("dip" in name for name, _ in [*student.named_modules(), *student.named_parameters()])


def test_data_weight_of_one_is_the_models_own_loss(parts):
    student = (loaded := parts()).student()
    batch = loaded.batch([4, 0])
    with torch.no_grad():
        expected = student(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.item()
    assert loaded.loss(student, [4, 0], data_weight=1.0) == pytest.approx(expected, rel=1e-5)


def test_data_weight_mixes_both_losses(parts):
    student = (loaded := parts()).student()
    found = []
    for data_weight in (0.0, 1.0, 0.25):
        torch.manual_seed(0)
        found.append(loaded.loss(student, [4, 0], data_weight=data_weight, cache_top_p=0.9, temperature=2.0))
    assert found[2] == pytest.approx(0.75 * found[0] + 0.25 * found[1], rel=1e-5)
    assert found[0] > 0.01


@BOTH
def test_accumulated_batches_are_one_batch(distil, dip_runs, weights):
    """SGD without clipping: Adam and a clipped gradient would hide a loss of another scale."""
    stock = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "save_strategy": "no"}
    cached = {"cache_top_p": 0.95, "data_weight": 0.5}
    whole = distil(dip_runs[weights], name="whole", training={**stock, "per_device_train_batch_size": 2}, **cached)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    parts = distil(dip_runs[weights], name="parts", training={**stock, **split}, **cached)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    results = [read_results(folder)["scores"]["distilled"]["all"]["nll"] for folder in (whole, parts)]
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    noise_off = read_results(whole)["scores"]["noise_off"]["all"]["nll"]
    assert results[0] != pytest.approx(noise_off, rel=1e-4), "it has learned"


def test_training_approaches_the_ensemble(distil, dip_runs):
    """Whole batches toward cached targets by small steps: a descent."""
    training = {"max_steps": 5, "per_device_train_batch_size": 11, "optim": "sgd", "learning_rate": 0.3}
    folder = distil(dip_runs["full"], training={**training, "save_strategy": "no"}, cache_top_p=1.0, num_samples=4)
    assert losses(folder) == sorted(losses(folder), reverse=True)
    assert losses(folder)[-1] < 0.9 * losses(folder)[0]


# ---- from the command line to the output folder ----

LOAD_PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
full, lora, inputs, outputs = sys.argv[1:]
inputs = torch.load(inputs)
models = [AutoModelForCausalLM.from_pretrained(full), AutoPeftModelForCausalLM.from_pretrained(lora)]
with torch.no_grad():
    torch.save([model.eval()(**inputs).logits for model in models], outputs)
for folder in (full, lora):
    AutoTokenizer.from_pretrained(folder)
assert "dipnet_hf" not in sys.modules
"""


def test_output_folder_needs_nothing_of_this_package(distil, dip_runs, monkeypatch, tmp_path):
    trained, compare = [], distill.compare
    monkeypatch.setattr(distill, "compare", lambda *args: (trained.append(args[1]), compare(*args))[1])
    folders = [distil(dip_runs[weights], name=weights) for weights in ("full", "lora")]
    assert (folders[0] / "model.safetensors").is_file() and (folders[1] / "adapter_model.safetensors").is_file()
    assert json.loads((folders[1] / "adapter_config.json").read_text())["peft_type"] == "LORA"
    inputs = {"input_ids": torch.arange(1, 41).view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = [*folders, tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    command = [sys.executable, "-c", LOAD_PLAIN, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for student, logits in zip(trained, torch.load(tmp_path / "logits.pt"), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, student.eval()(**inputs).logits)


@BOTH
def test_results_compare_noise_off_ensembles_and_student(distil, dip_runs, parts, capsys, weights):
    folder, loaded = distil(dip_runs[weights]), parts(weights)
    results, teacher = read_results(folder), loaded.teacher.network
    scores = results["scores"]
    assert list(scores) == ["noise_off", "ensemble_1", "ensemble_2", "distilled"]
    student = AutoModelForCausalLM.from_pretrained(folder)  # transformers loads an adapter on its base, too
    contexts = {
        "noise_off": (teacher, teacher.deterministic),
        "ensemble_1": (teacher, lambda: teacher.ensemble(1)),
        "ensemble_2": (teacher, lambda: teacher.ensemble(2)),
        "distilled": (student.eval(), torch.no_grad),
    }
    for method, (model, context) in contexts.items():
        for name, size in (("first_2", 2), ("all", 5)):
            with torch.no_grad(), context():
                expected = reference_scores(model, loaded.heldout.select(range(size)))
            assert scores[method][name] == pytest.approx(expected, rel=1e-4, abs=1e-6), (method, name)
    # the teacher's run has measured the same problems, in other batches
    teachers = read_results(dip_runs[weights])["metrics"]
    assert scores["noise_off"]["all"]["nll"] == pytest.approx(teachers["eval_nll"], rel=1e-6)
    assert scores["noise_off"]["all"]["num_tokens"] == teachers["eval_num_tokens"]
    assert len({scores[method]["all"]["nll"] for method in scores}) == 4

    assert results["metrics"]["num_train_sequences"] == 11 and results["metrics"]["num_steps"] == 2
    assert results["provenance"]["config"]["teacher_config"]["weights"] == loaded.run.weights
    assert yaml.safe_load((folder / "config.yaml").read_text())["teacher"] == str(dip_runs[weights])
    printed = capsys.readouterr().out
    assert f"{scores['distilled']['all']['nll']:.4f}" in printed and printed.strip().endswith(str(folder))


def reference_scores(model, problems):
    """One problem at a time, without padding."""
    rows = []
    for problem in problems:
        log_probs = model(input_ids=torch.tensor([problem["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
        targets = torch.tensor(problem["labels"][1:])
        rows += [(row[target], *row.max(0)) + (target,) for row, target in zip(log_probs, targets) if target != -100]
    of_target, largest, predicted, targets = (torch.stack(column) for column in zip(*rows))
    correct = (predicted == targets).double()
    return {
        "nll": -of_target.mean().item(),
        "accuracy": correct.mean().item(),
        "ece": expected_calibration_error(largest.exp(), correct),
        "n": len(problems),
        "num_tokens": len(rows),
    }


def test_cut_problems_are_left_out():
    heldout = Dataset.from_list([{"input_ids": [number] * length} for number, length in enumerate((3, 5, 4, 5))])
    assert [ids[0] for ids in distill.whole(heldout, max_length=5)["input_ids"]] == [0, 2]
    with pytest.raises(ValueError, match="No held-out problem fits into the teacher's max_length=3"):
        distill.whole(heldout, max_length=3)


def test_more_problems_than_there_are_is_all_of_them(distil, dip_runs):
    scores = read_results(distil(dip_runs["full"], training={"max_steps": 1}, heldout_sizes={"many": 1000}))["scores"]
    assert scores["distilled"]["many"]["n"] == 5


@pytest.mark.parametrize("setting", ["num_samples=4", "temperature=4", "cache_top_p=0.2"])
def test_settings_reach_the_targets(distil, dip_runs, setting):
    stock = {"max_steps": 1, "save_strategy": "no"}
    runs = [distil(dip_runs["full"], name="stock", training=stock)]
    runs.append(distil(dip_runs["full"], "--set", setting, name="changed", training=stock))
    assert losses(runs[0]) != losses(runs[1])


# ---- more prompts ----


@pytest.fixture
def prompts(tmp_path):
    """A file of three questions of different lengths."""
    questions = ["1 + 1?", "a longer one, 12 + 3?", "?"]
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"question": question} for question in questions])
    return path, questions


def test_the_ensemble_answers_prompts(parts, prompts):
    (path, questions), loaded = prompts, parts()
    teacher, student, tokenizer = loaded.teacher, loaded.student(), loaded.tokenizer
    for logvar in teacher.network.logvars():
        logvar.data.fill_(3)  # so much that the mean answers otherwise than the network without noise
    answered = distill.answer_prompts(teacher, tokenizer, loaded.config(prompts=str(path), max_new_tokens=6))
    assert tokenizer.padding_side == "right" and answered.features == loaded.rows.features
    for question, row in zip(questions, answered):
        prompt = tokenizer(format_prompt(question))["input_ids"]
        answer = row["input_ids"][len(prompt) :]
        assert row["input_ids"][: len(prompt)] == prompt and row["attention_mask"] == [1] * len(row["input_ids"])
        assert row["labels"] == [-100] * len(prompt) + answer and row["has_answer"] is False
        assert 0 < len(answer) <= 6
        with torch.no_grad(), teacher.samples.ensemble(4):
            mean = teacher.network(input_ids=torch.tensor([row["input_ids"]])).logits[0, len(prompt) - 1 : -1]
            noise_off = student(input_ids=torch.tensor([row["input_ids"]])).logits[0, len(prompt) - 1 : -1]
        assert mean.argmax(-1).tolist() == answer, "the likeliest token of the mean, each time"
        assert noise_off.argmax(-1).tolist() != answer


def test_prompts_of_a_run_in_a_chat_template_are_asked_in_it(parts, prompts, chat_tokenizer):
    (path, questions), loaded, chat = prompts, parts(), Chat("Be brief.")
    loaded.teacher.network.resize_token_embeddings(len(chat_tokenizer), mean_resizing=False)
    config = loaded.config(prompts=str(path), max_new_tokens=3)
    for question, row in zip(questions, distill.answer_prompts(loaded.teacher, chat_tokenizer, config, chat)):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": format_prompt(question)}]
        prompt = chat_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}
        assert 0 < sum(label != -100 for label in row["labels"]) <= 3


def test_a_base_without_an_eos_of_its_own_is_stopped_by_the_tokenizers(parts, prompts):
    (path, _), loaded = prompts, parts()
    config = loaded.config(prompts=str(path), max_new_tokens=6)
    expected = distill.answer_prompts(loaded.teacher, loaded.tokenizer, config)
    generation_config = loaded.teacher.network.generation_config
    generation_config.eos_token_id = generation_config.pad_token_id = None
    assert distill.answer_prompts(loaded.teacher, loaded.tokenizer, config).to_list() == expected.to_list()


def test_a_question_that_is_too_long_is_found_before_any_is_answered(parts, tmp_path, monkeypatch):
    path, loaded = tmp_path / "prompts.jsonl", parts()
    write_jsonl(path, [{"question": "1 + 1?"}, {"question": "1 + " * 26}])
    monkeypatch.setattr(loaded.teacher.network, "generate", lambda **inputs: pytest.fail("answered"))
    message = r"prompts.jsonl: question 2 has 122 tokens, which with max_new_tokens=8 are more than the 128 of"
    with pytest.raises(ValueError, match=message):
        distill.answer_prompts(loaded.teacher, loaded.tokenizer, loaded.config(prompts=str(path), max_new_tokens=8))


def test_a_model_that_could_not_be_saved_is_refused_before_the_training(parts):
    loaded = parts()
    folder = shutil.copytree(loaded.run.model, loaded.output_dir.parent / "base")
    settings = {"eos_token_id": 0, "do_sample": False, "temperature": 0.9}  # as Vicuna's
    (folder / "generation_config.json").write_text(json.dumps(settings))
    loaded.run.model = str(folder)
    with pytest.raises(
        ValueError, match="(?s)generation_config.json of .*base is invalid.*correct it first.*temperature"
    ):
        loaded.student()
    loaded.run.dip = None
    with pytest.raises(ValueError, match="generation_config.json of .*base is invalid"):
        finetune.wrap_model(load_base(loaded.run), loaded.run)


def test_an_answer_ends_with_its_first_eos():
    row = distill.answered_row([5, 6], [7, 0, 0, 8], eos_token_ids={0, 9})
    assert row["input_ids"] == [5, 6, 7, 0] and row["labels"] == [-100, -100, 7, 0]
    assert row["attention_mask"] == [1] * 4


def test_answers_of_the_ensemble_are_no_data(parts, prompts):
    """The data loss is a sum over the true answers, and both losses are divided by all tokens of the step."""
    student = (loaded := parts()).student()
    config = loaded.config(prompts=str(prompts[0]), max_new_tokens=6)
    answered = distill.answer_prompts(loaded.teacher, loaded.tokenizer, config)
    loaded.rows = concatenate_datasets([loaded.rows, answered])
    num_all, num_data = ((loaded.batch(numbers)["labels"] != -100).sum().item() for numbers in ([3, 12], [3]))
    assert num_all > num_data
    of_data, of_both, of_answers = (loaded.loss(student, rows, data_weight=1.0) for rows in ([3], [3, 12], [11, 13]))
    assert of_both == pytest.approx(of_data * num_data / num_all, rel=1e-5)
    assert of_answers == 0 < loaded.loss(student, [11, 13], data_weight=0.0)


def test_prompts_are_rows_of_the_training_set(distil, dip_runs, prompts):
    folder = distil(dip_runs["lora"], prompts=str(prompts[0]), max_new_tokens=4, data_weight=0.5, cache_top_p=0.9)
    metrics = read_results(folder)["metrics"]
    assert metrics["num_train_sequences"] == 14 and metrics["num_steps"] == 2


# ---- resuming ----


@pytest.fixture
def batches(monkeypatch):
    """Collect the rows of every batch that is trained on."""
    seen, compute_loss = [], distill.DistillTrainer.compute_loss

    def record(self, model, inputs, **options):
        seen.append(inputs["index"].tolist())
        return compute_loss(self, model, inputs, **options)

    monkeypatch.setattr(distill.DistillTrainer, "compute_loss", record)
    return seen


@pytest.mark.parametrize("weights, cache_top_p", [("full", None), ("lora", 0.9)])
def test_a_resumed_run_equals_an_uninterrupted_one(distil, dip_runs, tmp_path, batches, weights, cache_top_p):
    whole = distil(dip_runs[weights], name="whole", cache_top_p=cache_top_p)
    shutil.copytree(whole / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
    resumed = distil(dip_runs[weights], name="resumed", cache_top_p=cache_top_p)
    assert len(batches) == 3 and batches[2] == batches[1], "only the second step is repeated"
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 2
    assert read_results(resumed)["scores"] == read_results(whole)["scores"]


def test_a_finished_run_is_not_run_over(distil, dip_runs, batches):
    folder = distil(dip_runs["full"])
    with pytest.raises(ValueError, match="already holds a finished run .*training.output_dir=FOLDER"):
        distil(dip_runs["full"])
    scores = read_results(folder)["scores"]
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match="interrupted run of another configuration; give .*config.yaml to resume it"):
        distil(dip_runs["full"], temperature=2.0)
    distill.main([str(folder / "config.yaml")])
    assert read_results(folder)["scores"] == scores and len(batches) == 2, "a trained model is not trained further"


# ---- mistakes ----


@pytest.fixture
def teacher_copy(dip_runs, tmp_path):
    """Return a function that copies a teacher's folder and changes its configuration."""

    def copy(**changes):
        folder = shutil.copytree(dip_runs["full"], tmp_path / "teacher")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
        return folder

    return copy


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dip": None}, "teacher holds a run without noise to average over: fine-tune with `dip`, or with"),
        ({"weights": "frozen"}, "teacher trained with weights: frozen, so no weights could learn"),
    ],
)
def test_a_teacher_that_cannot_be_distilled_is_refused(distil, teacher_copy, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distil(teacher_copy(**changes))
    assert not (tmp_path / "distilled").exists()


def test_a_missing_or_unfinished_teacher_is_named(distil, teacher_copy, tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no finished run of recipes/finetune.py: run it first"):
        distil(tmp_path / "nowhere")
    (teacher_copy() / "results.json").unlink()
    with pytest.raises(ValueError, match="teacher holds no finished run"):
        distil(tmp_path / "teacher")


def test_problems_without_a_test_split_are_refused(distil, teacher_copy, problems_folder):
    (problems_folder / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="has no test split to compare teacher and student on"):
        distil(teacher_copy(dataset=str(problems_folder)))


def test_a_broken_line_of_prompts_is_named(distil, dip_runs, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "1 + 1?"}\n{"question": 2}\n')
    with pytest.raises(ValueError, match="prompts.jsonl, line 2: question must be text, got 2"):
        distil(dip_runs["full"], prompts=str(path))
    with pytest.raises(ValueError, match="No data file at .*nothing.jsonl"):
        distil(dip_runs["full"], prompts=str(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("temperatures=2", "Unknown key temperatures; did you mean temperature"),
        ("training.learning_rat=1", "Unknown key training.learning_rat; did you mean training.learning_rate"),
        ("temperature=0", "temperature must be positive, got 0"),
        ("temperature=hot", "temperature must be positive, got hot"),
        ("data_weight=2", "data_weight must be between 0 and 1, got 2"),
        ("data_weight=all", "data_weight must be between 0 and 1, got all"),
        ("cache_top_p=0", "cache_top_p must be above 0 and at most 1, or null, got 0"),
        ("cache_top_p=1.5", "cache_top_p must be above 0 and at most 1, or null, got 1.5"),
        ("num_samples=0", "num_samples must be a positive integer, got 0"),
        ("compare_samples=[2, 0]", "compare_samples must be a positive integer, got 0"),
        ("compare_samples=4", r"compare_samples must be a list such as \[2, 8\], got 4"),
        ("compare_samples=[]", r"compare_samples must be a list such as \[2, 8\], got \[\]"),
        ("heldout_sizes={some: 0}", "heldout_sizes must be a positive integer or null, got 0"),
        ("heldout_sizes=[120]", "heldout_sizes must be a mapping such as {all: null}"),
        ("heldout_sizes={}", "heldout_sizes must be a mapping"),
        ("training={seed: 1}", "training.output_dir is not set"),
        ("teacher=null", "lacks teacher"),
    ],
)
def test_mistakes_are_named_before_any_work(distil, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "nowhere", "--set", override)

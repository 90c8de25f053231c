"""The fine-tuning recipe from its command line to `results.json`, on a tiny model: DIP and plain, resumed, refused."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer

from dipnet_hf.answers import WritingLM
from recipes import finetune, packing
from recipes.config import load_config
from recipes.running import load_base, load_tokenizer
from recipes.tokens import format_prompt
from report.output_folder import occupied
from tests.helpers import losses, read_results, write_jsonl

ROOT = Path(__file__).parents[2]
LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


@pytest.fixture
def run(model_folder, problems_folder, tmp_path):
    """Return a function that runs the recipe on the tiny model and returns its output folder."""

    def run_recipe(*arguments, name="run", dip=None, weights=LORA, attn_implementation=None, **training):
        config = {
            "model": str(model_folder),
            "dataset": str(problems_folder),
            "max_length": 64,
            "weights": weights,
            "dip": dip,
            "attn_implementation": attn_implementation,
            "training": {
                "output_dir": str(tmp_path / name),
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "seed": 0,
                "use_cpu": True,
                "logging_steps": 1,
                "save_steps": 2,
                **training,
            },
            "evaluation": {"tasks": []},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        finetune.main([str(path), *arguments])
        return tmp_path / name

    return run_recipe


@pytest.mark.parametrize("weights", [LORA, "full"], ids=["lora", "full"])
@pytest.mark.parametrize("dip", [None, {"init_noise_std": 0.1}], ids=["plain", "dip"])
def test_a_run_leaves_its_model_and_its_figures(run, capsys, model_folder, tokenizer, dip, weights):
    folder = run(dip=dip, weights=weights)
    results = read_results(folder)
    metrics = results["metrics"]
    assert len(losses(folder)) == 4
    assert (metrics["num_steps"], metrics["num_train_sequences"], metrics["num_dropped_train_sequences"]) == (4, 11, 1)
    assert results["provenance"]["config"]["dip"] == dip and results["provenance"]["seed"] == 0
    assert (results["noise"] is None) == (dip is None)
    printed = capsys.readouterr().out
    assert "eval_nll" in printed and str(folder) in printed

    model = AutoModelForCausalLM.from_pretrained(model_folder if dip or weights == LORA else folder)
    if dip or weights == LORA:
        model = PeftModel.from_pretrained(model, folder)
    assert metrics["eval_nll"] == pytest.approx(reference_nll(model.eval(), tokenizer, folder), rel=1e-5)


def reference_nll(model, tokenizer, folder):
    """Token-weighted mean over the held-out problems the run wrote, one problem at a time."""
    total, num_tokens = 0.0, 0
    for line in (folder / "data" / "test.jsonl").read_text().splitlines():
        problem = json.loads(line)
        num_prompt_tokens = len(tokenizer(format_prompt(problem["question"]))["input_ids"])
        text = f"{format_prompt(problem['question'])} {problem['answer']}</s>"
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=input_ids).logits[0, :-1].log_softmax(-1)
        targets = input_ids[0, 1:]
        total -= log_probs.gather(1, targets[:, None])[num_prompt_tokens - 1 :].sum().item()
        num_tokens += len(targets) - num_prompt_tokens + 1
    return total / num_tokens


def test_noise_table_holds_every_channel(run, model_folder):
    folder = run(dip={"init_noise_std": 0.1, "layers_to_transform": [1]})
    (row,) = read_results(folder)["noise"]
    assert row["name"].endswith("layers.1") and len(row["relative_std"]) == 16
    assert sum(row["relative_std"]) / 16 == pytest.approx(row["mean"], rel=1e-3)
    assert min(row["relative_std"]) == pytest.approx(row["min"], rel=1e-3)
    text = (folder / "results.json").read_text()
    assert any(line.count(",") == 15 for line in text.splitlines())  # a list of numbers is one line


def test_the_level_is_found_written_and_resumed(run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dipnet_hf")
    dip = {"init_loss_increase": 0.02}
    base = run(name="base", weights="full", max_steps=30, learning_rate=3e-2)  # one that predicts something
    whole = run("--set", f"model={base}", name="whole", dip=dip)
    level = read_results(whole)["metrics"]["init_noise_std"]
    assert 0.001 < level < 8 and f"Noise level {level:.3g} found" in caplog.text
    for checkpoint in ("checkpoint-2", "checkpoint-4"):  # amid the run, and after its last step
        resumed = tmp_path / checkpoint
        shutil.copytree(whole / checkpoint, resumed / checkpoint)
        run("--set", f"model={base}", name=checkpoint, dip=dip)
        assert read_results(resumed)["metrics"] == read_results(whole)["metrics"]


@pytest.mark.parametrize("dip", [None, {"init_noise_std": 0.1}], ids=["plain", "dip"])
def test_the_best_checkpoint_is_found_on_validation_problems_and_scored(run, model_folder, tokenizer, dip):
    folder = run(
        "--set",
        "num_validation_samples=3",
        dip=dip,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="nll",
        greater_is_better=True,  # so that the last checkpoint is not the best
    )
    results = read_results(folder)
    assert results["metrics"]["num_train_sequences"] == 8  # of twelve three are held out, and one is too long
    on_the_way = {entry["step"]: entry["eval_nll"] for entry in results["log_history"] if "eval_nll" in entry}
    assert sorted(on_the_way) == [2, 4, 6]
    best = results["best_checkpoint"]
    assert best["step"] == max(on_the_way, key=on_the_way.get) < 6
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(model, folder / f"checkpoint-{best['step']}").eval()
    assert best["metrics"]["eval_nll"] == pytest.approx(reference_nll(model, tokenizer, folder), rel=1e-5)
    assert best["metrics"]["eval_nll"] != results["metrics"]["eval_nll"]


def test_plain_and_dip_see_the_same_data_in_the_same_order(run, monkeypatch):
    seen = []
    training_step = Trainer.training_step

    def record(self, model, inputs, *arguments, **options):
        seen.append(inputs["input_ids"].clone())
        return training_step(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", record)
    run(name="plain", max_steps=8)
    run(name="dip", max_steps=8, dip={"init_noise_std": 0.1})
    assert len(seen) == 16
    assert all(torch.equal(plain, dip) for plain, dip in zip(seen[:8], seen[8:], strict=True))


@pytest.mark.parametrize("weights", [LORA, "full"], ids=["lora", "full"])
@pytest.mark.parametrize("dip", [None, {"init_noise_std": 0.1}], ids=["plain", "dip"])
def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path, dip, weights):
    whole = run(name="whole", dip=dip, weights=weights)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run(name="resumed", dip=dip, weights=weights)
    assert read_results(resumed)["metrics"]["eval_nll"] == read_results(whole)["metrics"]["eval_nll"]
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4


def test_a_run_killed_within_a_save_resumes_from_the_checkpoint_before(run, tmp_path):
    whole = run(name="whole", dip={"init_noise_std": 0.1})
    resumed = tmp_path / "resumed"
    for step in (2, 4):
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
    for file in ("trainer_state.json", "optimizer.pt"):
        (resumed / "checkpoint-4" / file).unlink()
    run(name="resumed", dip={"init_noise_std": 0.1})
    assert losses(resumed) == losses(whole)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_two_runs_do_not_write_to_one_folder(run, tmp_path):
    with occupied(tmp_path / "run"), pytest.raises(ValueError, match="Another run writes to .*run now"):
        run(max_steps=1)
    run(max_steps=1)


def test_dry_run_tells_and_stops(run, capsys):
    run("--dry-run", dip={})
    assert "layers.1, relative std auto" in capsys.readouterr().out
    folder = run("--dry-run", dip={"init_noise_std": 0.25})
    printed = capsys.readouterr().out
    assert "init_noise_std: 0.25" in printed and "layers.1, relative std 0.25" in printed
    assert "4 steps" in printed and "num_train_sequences 11" in printed
    assert not list(folder.iterdir())


def test_overrides_reach_the_run(run):
    folder = run("--set", "training.max_steps=1", "max_eval_samples=2", "--set", "max_train_samples=3")
    metrics = read_results(folder)["metrics"]
    assert (metrics["num_steps"], metrics["num_train_sequences"], metrics["num_eval_problems"]) == (1, 3, 2)
    assert len((folder / "data" / "test.jsonl").read_text().splitlines()) == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_eval_samples"] == 2


def test_a_tasks_own_file_is_held_out_in_part_too(run, tmp_path):
    path = tmp_path / "other.jsonl"
    write_jsonl(path, [{"question": "w3 w4", "answer": f"w{5 + i} #### {i}"} for i in range(4)])
    folder = run("--dry-run", "--set", f"evaluation.tasks={{gsm8k_local: {path}}}")
    config = load_config(str(folder.with_suffix(".yaml")), [f"evaluation.tasks={{gsm8k_local: {path}}}"])
    for number, expected in ((None, 4), (3, 3), (9, 4)):
        sets = finetune.prepare_tasks(replace(config, max_eval_samples=number), load_tokenizer(config), None)
        assert {name: len(rows) for name, rows in sets.items()} == {"gsm8k_local": expected}


def test_a_finished_run_is_not_run_over(run):
    run(max_steps=1)
    with pytest.raises(ValueError, match="already holds a finished run .*training.output_dir=FOLDER"):
        run(max_steps=1)


def test_an_interrupted_run_is_not_resumed_with_another_configuration(run):
    folder = run(max_steps=1)
    eval_nll = read_results(folder)["metrics"]["eval_nll"]
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match="interrupted run of another configuration; give .*config.yaml to resume it"):
        run(max_steps=2)
    finetune.main([str(folder / "config.yaml")])
    metrics = read_results(folder)["metrics"]
    assert (metrics["num_steps"], metrics["eval_nll"]) == (1, eval_nll), "a trained model is not trained further"


def test_data_without_a_test_split_trains_but_does_not_score(run, problems_folder):
    (problems_folder / "test.jsonl").unlink()
    assert "eval_nll" not in read_results(run(max_steps=1))["metrics"]
    with pytest.raises(ValueError, match="has no test split to score on"):
        run("--set", "evaluation.tasks=[gsm8k_local]", name="scored")


def test_a_missing_model_is_named(run):
    with pytest.raises(ValueError, match="No model folder at ./nowhere"):
        run("--set", "model=./nowhere")


def test_a_broken_line_stops_the_run_before_training(run, problems_folder, tmp_path):
    with (problems_folder / "train.jsonl").open("a") as file:
        file.write('{"question": "1 + 1?"\n')
    with pytest.raises(ValueError, match="train.jsonl, line 13 is not valid JSON"):
        run()


@pytest.fixture
def chat_model(model_folder, chat_tokenizer, tmp_path):
    """The model with a chat template, and embeddings for its marks."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.resize_token_embeddings(len(chat_tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "chat_model")
    chat_tokenizer.save_pretrained(tmp_path / "chat_model")
    return tmp_path / "chat_model"


def test_a_chat_is_trained_and_scored_in_its_template(run, chat_model, problems_folder, monkeypatch):
    asked = []
    generate = WritingLM.generate_until

    def record(self, requests, *arguments, **options):
        asked.extend(request.args[0] for request in requests)
        return generate(self, requests, *arguments, **options)

    monkeypatch.setattr(WritingLM, "generate_until", record)
    turns = [
        [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(9)
    ]
    rows = problems_folder / "turns.jsonl"
    write_jsonl(rows, [{"messages": messages} for messages in turns])
    tasks = f"evaluation={{tasks: {{gsm8k_local: {problems_folder / 'test.jsonl'}}}, max_new_tokens: 2}}"
    settings = (f"model={chat_model}", f"dataset={rows}", "max_length=128", "validation_fraction=0.3", tasks)
    results = read_results(run("--set", *settings, dip={"init_noise_std": 0.1}, eval_strategy="steps", eval_steps=2))
    assert asked[0] == "<|im_start|>user\nQuestion: 12 + 12?\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    assert results["scores"]["gsm8k_local"]["n"] == 5 and results["scores"]["gsm8k_local"]["eval_nll"] > 0
    assert any("eval_nll" in entry for entry in results["log_history"])
    write_jsonl(rows, [{"messages": [{"role": "system", "content": "Be brief."}, *turns[0]]}] * 9)
    with pytest.raises(ValueError, match="would not be asked as the model is trained"):
        run("--set", *settings, "validation_fraction=null", name="other")


def test_conversations_are_no_problems_of_a_task(run, chat_model, tmp_path):
    (tmp_path / "turns").mkdir()
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "turns" / f"{split}.jsonl", [{"messages": messages}])
    settings = (f"model={chat_model}", f"dataset={tmp_path / 'turns'}", "evaluation.tasks=[gsm8k_local]")
    with pytest.raises(ValueError, match="gsm8k_local reads question, answer, and a test split has messages"):
        run("--set", *settings, "--dry-run")


def test_options_are_learned_and_scored_by_their_own_task(run, tmp_path):
    (tmp_path / "aqua").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{number} + 1?", "options": ["A)1", "B)2"], "correct": "B"} for number in range(4)]
        write_jsonl(tmp_path / "aqua" / f"{split}.jsonl", rows)
    settings = ("--set", f"dataset={tmp_path / 'aqua'}", "training.max_steps=1")
    with pytest.raises(ValueError, match="gsm8k_local reads question, answer, and a test split has question, options"):
        run(*settings, "evaluation.tasks=[gsm8k_local]", "--dry-run", name="refused")
    folder = run(*settings, "evaluation.tasks=[aqua_rat_local]", "evaluation.limit=null")
    scores = json.loads((folder / "results.json").read_text())["scores"]["aqua_rat_local"]
    assert scores["n"] == 4 and len(scores["correct,none"]) == 4 and scores["eval_nll"] > 0


def test_examples_are_shown_and_nothing_is_run(run, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "load_base", lambda config: pytest.fail("loaded"))
    folder = run("--show-examples", "2")
    printed = capsys.readouterr().out
    assert printed.count("tokens, ") == 2 and "[[ #### 2</s>]]" in printed and "labels: -100 x " in printed
    assert not folder.exists()
    with pytest.raises(SystemExit):
        run("--show-examples", "0")


def test_packing_is_refused_without_flash_attention(run):
    with pytest.raises(ValueError, match="packing needs a flash attention"):
        run("--set", "packing=true")


def test_packed_rows_have_the_loss_of_their_sequences(run, monkeypatch):
    """Noise off, one step over all sequences. The other attention that runs here finds them by their positions."""
    pytest.importorskip("trl")
    dip = {"init_noise_std": 0.0, "num_samples": 2}
    settings = {"dip": dip, "attn_implementation": "eager", "max_steps": 1, "per_device_train_batch_size": 11}
    padded = run("--set", "max_length=100", name="padded", **settings)
    monkeypatch.setattr(packing, "is_flash_attention_requested", lambda config: True)
    shapes = []
    training_step = Trainer.training_step

    def record(self, model, inputs, *arguments, **options):
        shapes.append((len(self.train_dataset), *inputs["input_ids"].shape))
        return training_step(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", record)
    packed = run("--set", "packing=true", "max_length=100", name="packed", **settings)
    ((num_rows, num_flattened, num_tokens),) = shapes
    assert num_rows == 4 and num_flattened == 1 and num_tokens > 300  # three of eleven sequences fit into a row
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-3)
    assert read_results(packed)["metrics"]["eval_nll"] == pytest.approx(
        read_results(padded)["metrics"]["eval_nll"], rel=1e-3
    )


@pytest.mark.parametrize("dip", [None, {"init_noise_std": 0.0, "num_samples": 2}], ids=["plain", "dip"])
def test_with_flash_attention_batches_have_no_padding_and_the_same_loss(run, monkeypatch, dip):
    """Noise off. The other attention that runs here finds the sequences by their positions."""
    padded = run(name="padded", dip=dip, attn_implementation="eager")
    monkeypatch.setattr(packing, "is_flash_attention_requested", lambda config: True)
    shapes = []
    training_step = Trainer.training_step

    def record(self, model, inputs, *arguments, **options):
        shapes.append(tuple(inputs["input_ids"].shape))
        return training_step(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", record)
    evaluation = "evaluation={tasks: [gsm8k_local], num_samples: 2, max_new_tokens: 2}" if dip else "dip=null"
    flattened = run("--set", evaluation, name="flattened", dip=dip, attn_implementation="eager")
    assert len(shapes) == 4 and {rows for rows, _ in shapes} == {1}
    assert losses(flattened) == pytest.approx(losses(padded), rel=1e-3)
    nlls = [read_results(folder)["metrics"]["eval_nll"] for folder in (flattened, padded)]
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-3)


def test_scores_the_heldout_problems_of_the_run(run):
    evaluation = "evaluation={tasks: [gsm8k_local], batch_size: 2, max_new_tokens: 2}"
    results = read_results(run("--set", evaluation, max_steps=1, dip={"init_noise_std": 0.1}))
    assert "gsm8k_local" in results["scores"]


def test_an_ensemble_is_evaluated_on_as_many_rows_of_the_model(run, monkeypatch):
    batch_sizes = []
    prediction_step = Trainer.prediction_step

    def record(self, model, inputs, *arguments, **options):
        batch_sizes.append(len(inputs["input_ids"]))
        return prediction_step(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(Trainer, "prediction_step", record)
    evaluation = "evaluation={tasks: [gsm8k_local], num_samples: 2, max_new_tokens: 2}"
    run("--set", evaluation, max_steps=1, dip={"init_noise_std": 0.1}, per_device_eval_batch_size=4)
    assert batch_sizes == [4, 1, *[2, 2, 1]]  # five problems in one pass, and as the mean of two


@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
@pytest.mark.parametrize("dip", [None, {"init_noise_std": 0.1}], ids=["plain", "dip"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_quantized_base_is_trained_loaded_and_merged(run, dip, bits, problems_folder, tokenizer):
    pytest.importorskip("bitsandbytes", reason="quantized models need bitsandbytes")
    settings = {"activation_checkpointing": True, "save_steps": 3}
    folder = run("--set", f"quantization={bits}", dip=dip, name="q", **settings)
    config = load_config(str(folder / "config.yaml"))
    tokens = torch.tensor([tokenizer("Question: 1 + 1?\nAnswer: #### 2")["input_ids"]])
    history = read_results(folder)["log_history"]
    assert history[0]["grad_norm"] > 0

    def loaded(base):
        return PeftModel.from_pretrained(base, folder).eval()

    quantized = loaded(load_base(config))(input_ids=tokens).logits
    dequantized = loaded(load_base(config).dequantize())
    expected = dequantized(input_ids=tokens).logits
    # int8 rounds what comes in, too
    assert difference(quantized, expected) < (0.2 if "load_in_8bit" in bits else 1e-4)
    assert difference(dequantized.merge_and_unload()(input_ids=tokens).logits, expected) < 1e-4


def difference(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


def test_runs_as_a_script(model_folder, problems_folder, tmp_path):
    """As `accelerate launch` does, with recipes/ on the path instead of the root."""
    config = {"model": str(model_folder), "dataset": str(problems_folder), "weights": "full"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "training": {"output_dir": str(tmp_path / "run")}, "max_length": 64}))
    command = [sys.executable, str(ROOT / "recipes" / "finetune.py"), str(path), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 steps" in done.stdout

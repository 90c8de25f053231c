"""TRL's trainers with `DipTrainerMixin`: each cell of the table of docs/trl.md, beside TRL's own."""

import gc
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 needs Python 3.11")
import trl
import trl.experimental.cpo
import trl.experimental.gkd
import trl.experimental.orpo

from dipnet_hf import DipConfig, DipSFTTrainer, DipTrainerMixin, get_dip_model
from dipnet_hf.trl_trainers import TRL_TRAINERS, model_inputs
from tests.helpers import losses, word_tokenizer
from tests.tiny_models import VOCAB_SIZE, build, build_with_outliers

# trl 1.16 sets the old name of a setting that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
disable_progress_bars()
gc.freeze()  # every training collects garbage, which takes seconds among all that TRL imports

PAGE = Path(__file__).parents[1] / "docs" / "trl.md"
MODULES = {"ORPOTrainer": trl.experimental.orpo, "CPOTrainer": trl.experimental.cpo}
NAMES = [trainer.name for trainer in TRL_TRAINERS]
REFERENCED = ["DPOTrainer", "KTOTrainer"]
PAIRED = ["DPOTrainer", "ORPOTrainer", "CPOTrainer", "RewardTrainer"]


def read_table():
    """The cells of the table of the page, by trainer and column."""
    rows = [line.strip("| \n").split("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in row] for row in rows]
    return {name: dict(zip(head, row)) for row in body for name in re.findall(r"`(\w+)`", row[0]) or row[:1]}


TABLE = read_table()


def words(first, number):
    """Words of which each is what `build_with_outliers` expects after the one before."""
    return " ".join(f"w{3 + (first + i) % (VOCAB_SIZE - 3)}" for i in range(number))


PAIRS = [
    {"prompt": words(7 * i, 3), "chosen": " " + words(7 * i + 3, 4), "rejected": " " + words(5 * i, 3)}
    for i in range(4)
]
SINGLE = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]


def lora(name):
    head = ["score"] if name == "RewardTrainer" else None
    return LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=head)


def base_model(name):
    if name != "RewardTrainer":
        return build("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=VOCAB_SIZE, max_position_embeddings=64, num_labels=1, pad_token_id=0)
    return LlamaForSequenceClassification(config).eval()


def dip_model(name, base=None, **config):
    base = base_model(name) if base is None else base
    torch.manual_seed(0)
    defaults = {"weights": lora(name), "init_noise_std": 0.3, "noise_scale": "absolute", "prior_weight": 0.0}
    return get_dip_model(base, DipConfig(**defaults | config))


def stock_model(name):
    base = base_model(name)
    torch.manual_seed(0)
    return get_peft_model(base, lora(name))


def with_noise(trainer_class):
    return type(f"Dip{trainer_class.__name__}", (DipTrainerMixin, trainer_class), {})


def make(name, model, folder, rows=None, **arguments):
    """A trainer of one step on all rows; with the mixin if the model has a DIP adapter, or none yet."""
    module = MODULES.get(name, trl)
    given = {key: arguments.pop(key) for key in ("ref_model", "peft_config") if key in arguments}
    trainer_class = getattr(module, name)
    if given.get("peft_config") is not None or hasattr(model, "prior_loss"):
        trainer_class = with_noise(trainer_class)
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 1, "max_length": 16}
    defaults |= {"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"learning_rate": 0.1, "optim": "sgd", "disable_tqdm": True, "gradient_checkpointing": False}
    args = getattr(module, name.replace("Trainer", "Config"))(output_dir=str(folder), **defaults | arguments)
    rows = Dataset.from_list(rows or (SINGLE if name == "KTOTrainer" else PAIRS))
    return trainer_class(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer(), **given
    )


def count_passes(model):
    """A list that grows with every pass of the network."""
    passes = []
    model.get_base_model().register_forward_pre_hook(lambda *args: passes.append(1))
    return passes


# ---- what works ----


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_it_takes_trls_steps(name, tmp_path):
    runs = []
    for model in (stock_model(name), dip_model(name, init_noise_std=0.0)):
        trainer = make(name, model, tmp_path, max_steps=2)
        passes = count_passes(model)
        trainer.train()
        runs.append((losses(trainer), len(passes), trainer.evaluate()["eval_loss"], model.state_dict()))
    (stock_losses, *stock), (dip_losses, *dip) = runs
    assert dip_losses == pytest.approx(stock_losses, rel=1e-5)
    assert dip[0] == stock[0] == 2 * int(TABLE[name]["passes per step"])
    assert dip[1] == pytest.approx(stock[1], rel=1e-5)
    for key, tensor in stock[2].items():
        torch.testing.assert_close(dip[2][key], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_has_no_noise(name, tmp_path):
    stock = make(name, stock_model(name), tmp_path).evaluate()
    trainer = make(name, dip_model(name), tmp_path)
    found = trainer.evaluate()
    timeless = [key for key in stock if not key.endswith(("time", "second"))]
    assert {key: found[key] for key in timeless} == pytest.approx({key: stock[key] for key in timeless}, rel=1e-5)
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert trainer.state.log_history[0]["nll"] != pytest.approx(stock["eval_loss"], rel=1e-4)


@pytest.fixture(scope="module")
def stock_logs(tmp_path_factory):
    """What TRL's own trainers log of the same rows, by name; a fresh adapter is the base model."""
    logs = {}
    for name in REFERENCED:
        trainer = make(name, stock_model(name), tmp_path_factory.mktemp(name), learning_rate=0.0)
        trainer.train()
        logs[name] = trainer.state.log_history[0]
        assert logs[name]["rewards/chosen"] == 0.0
    return logs


@pytest.mark.parametrize("precompute", [False, True], ids=["in each step", "before"])
@pytest.mark.parametrize("reference", ["copy of the adapter", "base model", "ref_model"])
@pytest.mark.parametrize("name", REFERENCED)
def test_a_reference_has_no_noise(name, reference, precompute, stock_logs, tmp_path):
    arguments = {"learning_rate": 0.0, "precompute_ref_log_probs": precompute}
    if reference == "base model":
        config = DipConfig(weights=lora(name), init_noise_std=0.3, noise_scale="absolute")
        trainer = make(name, base_model(name), tmp_path, peft_config=config, **arguments)
    elif reference == "ref_model":
        trainer = make(name, dip_model(name, weights="full"), tmp_path, ref_model=base_model(name), **arguments)
    else:
        trainer = make(name, dip_model(name).train(), tmp_path, **arguments)
    trainer.train()
    log, expected = trainer.state.log_history[0], stock_logs[name]
    for answer in ("chosen", "rejected"):
        reward = log[f"rewards/{answer}"] / trainer.args.beta  # the log-probability less the reference's
        assert abs(reward) > 1e-3
        assert log[f"logps/{answer}"] - reward == pytest.approx(expected[f"logps/{answer}"], rel=1e-5)


@pytest.mark.parametrize("name", PAIRED)
def test_the_answers_of_a_pair_share_their_noise(name, tmp_path):
    rows = [{**row, "rejected": row["chosen"]} for row in PAIRS]
    trainer = make(name, dip_model(name), tmp_path, rows, learning_rate=0.0)
    trainer.train()
    log = trainer.state.log_history[0]
    margin, level = ("margin", "mean_reward") if name == "RewardTrainer" else ("rewards/margins", "rewards/chosen")
    assert log[margin] == pytest.approx(0.0, abs=1e-6)
    assert log[level] != pytest.approx(trainer.evaluate()[f"eval_{level}"], rel=1e-4)  # there is noise


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name]['level `"auto"`'] == "yes"])
def test_it_calibrates_by_itself(name, tmp_path):
    by_hand = dip_model(name, build_with_outliers(), init_noise_std="auto", noise_scale="relative")
    model = dip_model(name, build_with_outliers(), init_noise_std="auto", noise_scale="relative")
    trainer = make(name, model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    by_hand.calibrate([model_inputs(batch)])
    trainer.train()
    assert model.init_noise_std == pytest.approx(by_hand.init_noise_std, rel=1e-4)
    scales = [[row["scale"] for row in m.noise_summary()] for m in (model, by_hand)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)


def test_a_reward_models_scale_is_measured(tmp_path):
    model = dip_model("RewardTrainer", noise_scale="relative")
    make("RewardTrainer", model, tmp_path).train()
    assert not model.needs_calibration


def test_the_labels_of_calibration_are_the_answers():
    ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    own = {"completion_mask": torch.tensor([[0, 0, 1, 0]]), "label": torch.tensor([1]), "KL_input_ids": ids}
    found = model_inputs(batch | own | {"ref_logps": torch.zeros(1)})
    assert found.keys() == {"input_ids", "attention_mask", "labels"}
    assert found["labels"].tolist() == [[-100, -100, 7, -100]]
    prompt = {f"prompt_{key}": value[:, :2] for key, value in batch.items()}
    chosen = {f"chosen_{key}": value for key, value in batch.items()} | {"chosen_labels": found["labels"]}
    for key, value in model_inputs(prompt | chosen).items():
        assert torch.equal(value, found[key])
    encoder = model_inputs(prompt | {"chosen_labels": ids, "rejected_labels": ids})
    assert encoder["input_ids"].tolist() == [[5, 6]] and encoder["labels"] is ids
    assert model_inputs(batch | {"margin": torch.ones(1)}) == batch


def test_only_the_policy_learns(tmp_path):
    model = dip_model("DPOTrainer")
    trainer = make("DPOTrainer", model, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("default" in name for name in changed)
    assert any("dip_logvar" in name for name in changed) and any("lora_B" in name for name in changed)


def test_checkpointed_layers_repeat_the_noise_of_the_policy(tmp_path):
    """The reference runs between the forward and the backward pass."""
    runs = []
    for checkpointing in (False, True):
        trainer = make("DPOTrainer", dip_model("DPOTrainer"), tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        runs.append(trainer.model.state_dict())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_resumed_equals_uninterrupted(tmp_path):
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    whole = make("DPOTrainer", dip_model("DPOTrainer", noise_scale="relative"), tmp_path, **arguments)
    whole.train()
    resumed = make("DPOTrainer", dip_model("DPOTrainer", noise_scale="relative"), tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if TABLE[name]["evaluation in `model.ensemble`"] == "of the mean"]
)
def test_evaluation_in_an_ensemble_is_of_the_mean(name, tmp_path):
    model = dip_model(name)
    trainer = make(name, model, tmp_path)
    batch = next(iter(trainer.get_eval_dataloader()))
    with model.ensemble(num_samples=4):
        found = trainer.evaluate()["eval_nll_loss"]
        with torch.no_grad():
            metrics = trainer.get_batch_loss_metrics(model.eval(), batch)[1]
            ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
            labels = ids.masked_fill(mask == 0, -100) if name == "ORPOTrainer" else batch["chosen_labels"]
            expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert found == pytest.approx(expected.item(), rel=1e-5) and found == pytest.approx(metrics["nll_loss"])
    assert found != pytest.approx(trainer.evaluate()["eval_nll_loss"], rel=1e-5)


# ---- what is refused, and the ways out ----


def refused(trainer_class, match, model, **arguments):
    """It is refused before anything else: there are no data."""
    with pytest.raises(ValueError, match=match):
        trainer_class(model=model, train_dataset=None, **arguments)


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name]["`num_samples`"] == "1"])
def test_several_samples_are_refused(name):
    trainer_class = with_noise(getattr(MODULES.get(name, trl), name))
    match = f"{name} takes one noise sample per row, got num_samples=2: use num_samples=1"
    refused(trainer_class, match, dip_model(name, num_samples=2))
    refused(trainer_class, match, base_model(name), peft_config=DipConfig(num_samples=2))


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name]['`weights="full"`'] != "yes"])
def test_a_reference_of_full_weights_is_a_model_of_its_own(name):
    """With one they work: see `test_a_reference_has_no_noise`."""
    assert TABLE[name]['`weights="full"`'] == "with `ref_model`"
    match = f"{name} compares with the model before training.*give it as ref_model"
    refused(with_noise(getattr(trl, name)), match, dip_model(name, weights="full"))
    refused(with_noise(getattr(trl, name)), match, base_model(name), peft_config=DipConfig(weights="full"))


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name]['`weights="full"`'] == "yes"])
def test_full_weights_train(name, tmp_path):
    model = dip_model(name, weights="full")
    before = model.get_base_model().model.layers[0].mlp.up_proj.weight.clone()
    make(name, model, tmp_path).train()
    assert not torch.equal(model.get_base_model().model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name]['level `"auto"`'] != "yes"])
def test_a_level_without_tokens_is_refused(name, tmp_path):
    match = f"{name} has no loss per token.*give a number, such as init_noise_std=0.1"
    refused(with_noise(getattr(trl, name)), match, dip_model(name, init_noise_std="auto"))
    refused(with_noise(getattr(trl, name)), match, base_model(name), peft_config=DipConfig())


@pytest.mark.parametrize(
    "name", [name for name in NAMES if TABLE[name]["evaluation in `model.ensemble`"] == "refused"]
)
def test_evaluation_in_an_ensemble_is_refused(name, tmp_path):
    model = dip_model(name)
    trainer = make(name, model, tmp_path)
    with model.ensemble(num_samples=2), pytest.raises(ValueError, match=f"{name} .*evaluate outside"):
        trainer.evaluate()


OTHERS = [trl.GRPOTrainer, trl.RLOOTrainer, trl.experimental.gkd.GKDTrainer]


@pytest.mark.parametrize("trainer_class", OTHERS)
def test_other_trainers_are_refused_by_name(trainer_class):
    name = trainer_class.__name__
    assert TABLE.get(name, TABLE["any other of TRL's"])["written as"] == "refused"
    refused(with_noise(trainer_class), f"TRL's {name} does not work with noise", dip_model("DPOTrainer"))


def test_they_train_without_noise_after_merging(tmp_path):
    args = trl.GRPOConfig(
        **{"output_dir": str(tmp_path), "max_steps": 1, "num_generations": 2, "max_completion_length": 4},
        **{"per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1},
    )
    trainer = trl.GRPOTrainer(
        dip_model("DPOTrainer").merge_and_unload(),
        reward_funcs=lambda completions, **others: [float(len(text)) for text in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    assert len(losses(trainer)) == 1


def test_the_sft_trainer_has_a_class_of_its_own():
    assert TABLE["SFTTrainer"]["written as"] == f"`{DipSFTTrainer.__name__}`"
    refused(with_noise(trl.SFTTrainer), "use DipSFTTrainer", dip_model("DPOTrainer"))
    gkd = type("DipGKDTrainer", (DipSFTTrainer, trl.experimental.gkd.GKDTrainer), {})
    refused(gkd, "TRL's GKDTrainer does not work with noise", dip_model("DPOTrainer"))


def test_the_table_lists_what_works():
    assert [name for name in TABLE if TABLE[name]["written as"] == "with the mixin"] == NAMES

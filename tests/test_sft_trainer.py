"""The same objective inside TRL's SFTTrainer: completion-only, packed and padding-free data, its fused head."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 needs Python 3.11")
import trl
from trl import SFTConfig, SFTTrainer

from dipnet_hf import DipConfig, DipSFTTrainer, DipTrainer, dip_loss, get_dip_model
from tests.helpers import word_tokenizer
from tests.tiny_models import build, make_batch

# trl 1.16 sets the old name of a setting that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")

PAGE = Path(__file__).parents[1] / "docs" / "elsewhere.md"


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)

    def words(n):
        return " ".join(f"w{i}" for i in torch.randint(3, 64, (n,), generator=generator))

    return Dataset.from_list([{"prompt": words(3), "completion": " " + words(2 + i % 4)} for i in range(8)])


def train(tokenizer, rows, tmp_path, trainer_class=DipSFTTrainer, config=None, **arguments):
    config = {"weights": "full", "init_noise_std": 0.3} | (config or {})
    model = get_dip_model(build("llama"), DipConfig(**config))
    defaults = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "bf16": False}
    defaults |= {"use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "max_length": 16}
    args = SFTConfig(output_dir=str(tmp_path), **{**defaults, **arguments})
    seen = {}

    class Spy(trainer_class):
        num_forwards = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.model.training:
                seen["inputs"], seen["rng"] = dict(inputs), torch.get_rng_state()
                count = self.model.get_base_model().register_forward_pre_hook(lambda *a: self._count())
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.model.training:
                count.remove()
            return loss

        def _count(self):
            self.num_forwards += torch.is_grad_enabled()  # the first one compares the logits of one token

    trainer = Spy(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train()
    return trainer, seen, weights


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_samples": 2, "stability_loss_weight": 0.3},
        {"num_samples": 2, "stability_loss_weight": 0.3, "stability_target": "logits"},
        {"num_samples": 4, "sampling": "independent"},
        {"num_samples": 2, "layers_to_transform": [1, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("packing", [False, True])
def test_it_trains_dip_loss_in_one_forward(tokenizer, rows, tmp_path, config, packing):
    arguments = {"packing": True, "packing_strategy": "wrapped"} if packing else {}
    trainer, seen, weights = train(tokenizer, rows, tmp_path, config=config, **arguments)
    assert trainer.num_forwards == 1
    log = trainer.state.log_history[0]

    model = get_dip_model(build("llama"), trainer.model.peft_config["default"]).train()
    # The weights before the step, and the scales that the trainer measured.
    scales = {name: tensor for name, tensor in trainer.model.state_dict().items() if "dip_scale" in name}
    model.load_state_dict(weights | scales)
    torch.set_rng_state(seen["rng"])
    expected = dip_loss(model, {k: v for k, v in seen["inputs"].items() if isinstance(v, torch.Tensor)})
    for name in expected._fields:
        assert log[name] == pytest.approx(getattr(expected, name).item(), rel=1e-4, abs=1e-7)
    if config.get("stability_target") != "logits":
        assert log["mean_token_accuracy"] >= 0 and log["num_tokens"] > 0  # TRL's own metrics are kept


def test_only_the_completion_is_supervised(tokenizer, rows, tmp_path):
    _, seen, _ = train(tokenizer, rows, tmp_path)
    labels = seen["inputs"]["labels"]
    assert (labels[:, :3] == -100).all() and (labels[:, 3:] != -100).any()


def test_padding_free_rows_continue_their_boundaries(tokenizer, rows, tmp_path):
    """The flattened row is repeated once a sample, and the sequence boundaries go on where the last sample ended."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from dipnet_hf.batches import expand_batch

    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    expanded = expand_batch(batch, 2)
    assert expanded["input_ids"].tolist() == [[5, 6, 7, 8, 9]] * 2
    assert expanded["position_ids"].tolist() == [[0, 1, 2, 0, 1]] * 2
    assert expanded["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 10]
    assert expanded["max_length_q"] == 3


def test_peft_config_of_the_trainer(tokenizer, rows, tmp_path):
    """TRL wraps the model itself, as users of `SFTTrainer(peft_config=...)` expect."""
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], max_length=16, logging_steps=1
    )
    trainer = DipSFTTrainer(
        model=build("llama"),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=DipConfig(weights="frozen", task_type="CAUSAL_LM", init_noise_std=0.1),
    )
    trainer.train()
    assert len(trainer.model.noise_summary()) == 3
    assert trainer.state.log_history[0]["noise_std_mean"] > 0


def test_trls_own_trainer_is_told_which_class_to_use(tokenizer, rows, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], max_length=16)
    given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": DipConfig()}
    trainer = SFTTrainer(build("llama"), args, **given)
    with pytest.raises(ValueError, match="never calibrated.*in place of TRL's SFTTrainer with DipSFTTrainer"):
        trainer.train()


def test_trls_own_script_trains_with_noise(tokenizer, rows, tmp_path, monkeypatch):
    """The script of the page."""
    (script,) = re.findall(r"```python\n(# dip_sft.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "dip_sft.py").write_text(script)
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows.to_json(tmp_path / "data" / "train.jsonl")
    settings = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", "use_peft": True}
    settings |= {"use_cpu": True, "bf16": False, "max_steps": 1, "logging_steps": 1, "report_to": "none"}
    settings |= {"max_length": 16, "lora_r": 4, "lora_target_modules": "all-linear"}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    for name in ("SFTTrainer", "get_peft_config"):
        monkeypatch.setattr(trl, name, getattr(trl, name))  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["dip_sft.py", *options])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("dip_sft.py", run_name="__main__")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "DIP" and config["weights"]["r"] == 4
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["log_history"][0]["noise_std_mean"] > 0


def test_both_trainers_agree(tokenizer, rows, tmp_path):
    """TRL's fused head and transformers' own loss are one objective: same batch, same noise, same gradient step."""
    results = []
    for trainer_class in (DipSFTTrainer, DipTrainer):
        if trainer_class is DipTrainer:
            # The rows and the collator that TRL has prepared.
            source = results[0][0]

            def make(model, args, train_dataset, processing_class, source=source):
                return DipTrainer(
                    model=model, args=args, train_dataset=source.train_dataset, data_collator=source.data_collator
                )

            config = DipConfig(weights="full", init_noise_std=0.3, num_samples=2, stability_loss_weight=0.3)
            model = get_dip_model(build("llama"), config)
            trainer = make(model, source.args, rows, tokenizer)
            trainer.train()
        else:
            trainer, _, _ = train(
                tokenizer,
                rows,
                tmp_path,
                trainer_class,
                {"num_samples": 2, "stability_loss_weight": 0.3},
                optim="sgd",  # Adam's first step is the gradient's sign, whatever its size
                learning_rate=0.1,
            )
        results.append((trainer, trainer.model.state_dict()))
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], atol=1e-5, rtol=1e-5)


def test_logvar_survives_the_cast_of_a_quantized_model(tokenizer, rows, tmp_path, monkeypatch):
    """TRL casts what trains to bfloat16 when the base is quantized; log-variances come out float32 and unchanged."""
    model = get_dip_model(
        build("llama"), DipConfig(weights="frozen", init_noise_std=0.123), calibration=[make_batch("llama")]
    )
    with torch.no_grad():
        for logvar in model.logvars():
            logvar.add_(torch.randn_like(logvar))
    before = [logvar.detach().clone() for logvar in model.logvars()]
    model.get_base_model().is_loaded_in_4bit = True
    monkeypatch.setattr("transformers.trainer.validate_quantization_for_training", lambda model: None, raising=False)
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], max_length=16)
    trainer = DipSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    after = trainer.model.logvars()
    assert all(logvar.dtype == torch.float32 for logvar in after)
    assert all(map(torch.equal, after, before)) and len(after) == len(before)


@pytest.mark.parametrize("config", [{}, {"num_samples": 2, "stability_loss_weight": 1e-9}], ids=str)
def test_dft_is_trls(tokenizer, rows, tmp_path, config):
    config = {"init_noise_std": 0.0, "prior_weight": 0.0} | config
    trainer, _, _ = train(tokenizer, rows, tmp_path, config=config, loss_type="dft")
    stock = SFTTrainer(build("llama"), trainer.args, train_dataset=rows, processing_class=tokenizer)
    stock.train()
    nll, expected = trainer.state.log_history[0]["nll"], stock.state.log_history[0]["loss"]
    assert nll == pytest.approx(expected, rel=1e-5) and nll < 0.1  # of the plain loss, ln 64 = 4.16


def test_dft_has_no_logits(tokenizer, rows, tmp_path):
    config = {"num_samples": 2, "stability_loss_weight": 0.3, "stability_target": "logits"}
    with pytest.raises(
        ValueError, match='"logits" needs loss_type="nll", got \'dft\': use stability_target="log_prob"'
    ):
        train(tokenizer, rows, tmp_path, config=config, loss_type="dft")


def test_evaluation_in_an_ensemble_is_of_the_mean(tokenizer, rows, tmp_path):
    model = get_dip_model(build("llama"), DipConfig(weights="full", init_noise_std=0.5, noise_scale="absolute"))
    arguments = {"per_device_eval_batch_size": 8, "use_cpu": True, "bf16": False, "report_to": [], "max_length": 16}
    args = SFTConfig(output_dir=str(tmp_path), **arguments)
    trainer = DipSFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    (batch,) = trainer.get_eval_dataloader()
    with model.ensemble(num_samples=4):
        found = trainer.evaluate()["eval_loss"]
        with torch.no_grad():
            expected = model(**batch).loss.item()
        trainer.args.loss_type = "dft"
        with pytest.raises(ValueError, match='needs loss_type="nll".*evaluate outside model.ensemble'):
            trainer.evaluate()
    trainer.args.loss_type = "nll"
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)

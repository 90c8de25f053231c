"""A finished run that answers otherwise with its method is scored with it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from dipnet_hf.lm_eval_model import DipLM
from dipnet_hf.regularizers import METHODS
from dipnet_hf.regularizers.saved import saved_method
from recipes.tiny_model import tiny_llama, train_tokenizer

QUESTIONS = ["Question: 3 apples and 4 apples?\nAnswer:", "Question: 12 - 5?\nAnswer:"]


@pytest.fixture
def run(tmp_path):
    """Return a function that saves a base, an adapter and a method that has learned, and returns them and a model."""

    def save(name):
        set_seed(0)
        tokenizer = train_tokenizer(QUESTIONS)
        base = tiny_llama(tokenizer)
        base.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        method = METHODS[name](**({"init_std": 0.5} if name == "blob" else {}))
        method.attach(model)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("normality_gate"):
                    parameter.fill_(1.0)
        model.save_pretrained(tmp_path / "adapter")
        method.save(tmp_path / "adapter")
        arguments = {"pretrained": str(tmp_path / "base"), "peft": str(tmp_path / "adapter"), "device": "cpu"}
        batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
        return arguments, model.eval(), method, batch

    return save


def logits(lm, batch, context):
    with torch.no_grad(), context:
        return lm.model(**batch).logits


def test_a_network_that_is_changed_answers_as_it_was_trained(run):
    arguments, model, method, batch = run("normality")
    lm = DipLM(**arguments)
    with torch.no_grad():
        expected = model(**batch).logits
        method.detach()
        without = model(**batch).logits
    found = logits(lm, batch, lm._network())
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(without, expected, atol=1e-3)


def test_samples_answer_as_those_of_the_run(run):
    arguments, model, method, batch = run("blob")
    lm = DipLM(**arguments, num_samples=4, seed=3)
    with torch.no_grad(), method.ensemble(4, seed=3):
        expected = model(**batch).logits
    torch.testing.assert_close(logits(lm, batch, lm._network()), expected)
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)


def test_a_method_of_training_alone_is_left_out(run):
    arguments, *_ = run("sam")
    assert saved_method(arguments["peft"]) is None
    with pytest.raises(ValueError, match="num_samples=4 draws the noise of a DIP adapter"):
        DipLM(**arguments, num_samples=4)

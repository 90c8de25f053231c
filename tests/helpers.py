"""What several test files do: make DIP models and trainers, run them, look inside, write and read files.

The models without noise are in `tiny_models`.
"""

import contextlib
import json
import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing
from datasets import Dataset
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from dipnet_hf import DipConfig, DipTrainer, get_dip_model
from dipnet_hf.noise import BLOCK_LENGTH, fold_in
from dipnet_hf.projection import DipProjection
from dipnet_hf.regularizers import regularize
from tests.tiny_models import VOCAB_SIZE, build, make_batch

# ---- models ----

IA3_TARGETS = {
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "feedforward_modules": ["mlp.c_proj"],
        "fan_in_fan_out": True,
    },
    "vit": {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]},
    "qwen3_moe": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
}
# Every kind of weights, by the name of the tiny model that they train.
WEIGHTS = {
    "lora": lambda name: LoraConfig(r=4, target_modules="all-linear"),
    "lora_and_head": lambda name: LoraConfig(
        r=4,
        target_modules=r".*(c_attn|q_proj)",
        modules_to_save=["classifier" if name == "vit" else "lm_head"],
        bias="lora_only",
    ),
    "dora": lambda name: LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "rslora": lambda name: LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "ia3": lambda name: IA3Config(
        **IA3_TARGETS.get(name, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]})
    ),
    "oft": lambda name: OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "full": lambda name: "full",
    "frozen": lambda name: "frozen",
}


def dip_model(base="llama", calibration=None, **config):
    """A DIP model of `base`, a tiny model or its name; all weights train and the std is 0.3, if not said otherwise."""
    model = build(base) if isinstance(base, str) else base
    torch.manual_seed(0)
    return get_dip_model(model, DipConfig(**{"weights": "full", "init_noise_std": 0.3} | config), calibration)


def calibrated_model(name="llama", weights="lora", **config):
    """A DIP model of a row of `WEIGHTS`, calibrated and in eval mode."""
    config = {"weights": WEIGHTS[weights](name), "init_noise_std": 0.1} | config
    return dip_model(name, [make_batch(name)], **config).eval()


def trained_model(name="llama", weights="lora", **config):
    """A `calibrated_model` whose trainable parameters have moved away from where they start."""
    model = calibrated_model(name, weights, **config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def lora_model(**settings):
    """A tiny Llama with LoRA at all of its linear layers, and no noise; its B is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(build("llama"), config)


class HasALossOfItsOwn(LlamaForCausalLM):
    """A causal model whose loss is no cross entropy."""

    @property
    def loss_function(self):
        return lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean()


def unshifted_bart():
    """A causal model whose labels are not those of the next token: it does not shift them."""
    config = BartConfig(
        **{"vocab_size": 64, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
        **{"dropout": 0.0, "attention_dropout": 0.0, "is_decoder": True, "is_encoder_decoder": False},
    )
    return BartForCausalLM(config)


def save_two_adapters(folder):
    """Save an adapter of LoRA, a head and noise at two layers, and one of noise alone; returns both models by name."""
    base = folder / "base"
    build("llama").save_pretrained(base)
    models = {
        "first": trained_model(weights="lora_and_head", layers_to_transform=[1, 2]),
        "second": trained_model(weights="frozen"),
    }
    for name, model in models.items():
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder / name)
    return models


def checkpointed(model, options):
    """Switch gradient checkpointing on."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    model.enable_input_require_grads()
    return model


# ---- what they answer ----


def logits(model, batch=None, seed=None):
    """The model's answer as it is, or, with a seed, with noise."""
    batch = make_batch("llama") if batch is None else batch
    noise = contextlib.nullcontext() if seed is None else model.sampling(seed)
    with torch.no_grad(), noise:
        return model(**batch).logits


@torch.no_grad()
def predictions(model, batch):
    """The log-probabilities of what stands in place of the supervised tokens, of shape `(tokens, V)`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100].log_softmax(-1)


def gradients(model, loss):
    """The gradients of a loss by the names of the parameters that learn."""
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def regularized_gradients(regularizer, model, batch=None):
    """The gradients of one step with a method, one for each parameter."""
    regularizer.attach(model)
    regularizer.backward(model, batch or {})
    return [parameter.grad for parameter in model.parameters()]


def assert_same(model, other, name="llama"):
    """Both models give the same answer, with and without noise."""
    batch = make_batch(name)
    assert torch.equal(logits(model, batch), logits(other, batch))
    assert torch.equal(logits(model, batch, seed=3), logits(other, batch, seed=3))


# ---- what is inside ----


def projections(model):
    """The modules of the sites by the sites' names, as they stand in a DIP model."""
    suffix = ".dip_projection"
    return {
        name.removesuffix(suffix): module
        for name, module in model.get_base_model().named_modules()
        if name.endswith(suffix)
    }


def record(model, names, at_output=False):
    """Keep what the named modules of `model` take in (or give out) in every forward: a dictionary of lists."""
    seen = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        if at_output:
            module.register_forward_hook(lambda module, args, output, name=name: seen[name].append(output))
        else:
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: seen[name].append(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
    return seen


def site_inputs(model, names, batches):
    """What enters each site without noise, padding left out: `(N, D)` by name."""
    seen = record(model, names)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    masks = [batch["attention_mask"].bool() for batch in batches]
    return {name: torch.cat([x[mask] for x, mask in zip(inputs, masks, strict=True)]) for name, inputs in seen.items()}


def assert_no_trace(model):
    """Nothing of this package is left: no hook, no sub-module, no attribute."""
    for name, module in model.named_modules():
        assert not isinstance(module, DipProjection)
        # PyTorch has no public list of a module's hooks.
        assert not module._forward_pre_hooks and not module._forward_hooks, name
        assert not [attribute for attribute in vars(module) if "dip" in attribute or attribute == "peft_config"]


def noise_by_definition(seed, site_number, sample, position, size):
    """The noise of one token: from a generator of its own for (seed, site, sample, block of positions)."""
    key = fold_in(fold_in(torch.tensor(seed), site_number), sample)
    block, place = divmod(position, BLOCK_LENGTH)
    generator = torch.Generator().manual_seed(int(fold_in(key, block)))
    return torch.randn(BLOCK_LENGTH, size, generator=generator)[place]


# ---- training ----


def make_rows():
    """Sixteen sequences of 5 to 12 tokens, the first three of each a prompt."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(16):
        ids = torch.randint(3, 60, (5 + i % 8,), generator=generator).tolist()
        data.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 3 + ids[3:]})
    return Dataset.from_list(data)


def collate(rows):
    """One batch of the rows of `make_rows`, with padding on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: torch.tensor([row[k] + [v] * (length - len(row[k])) for row in rows]) for k, v in fill.items()}


def make_trainer(model, rows, tmp_path, trainer_class=DipTrainer, **arguments):
    """A trainer of two steps on the rows of `make_rows`."""
    arguments = {"per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 1e-3} | arguments
    defaults = dict(use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True)
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**defaults, **arguments})
    return trainer_class(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def assert_resumes(make_model, make_method, folder, **arguments):
    """A run with a regularizer that goes on from the middle ends as one without a break; returns both trainers."""
    arguments = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2} | arguments
    runs = []
    for checkpoint in (None, str(folder / "checkpoint-1")):
        trainer = make_trainer(make_model(), make_rows(), folder, Trainer, **arguments)
        regularize(trainer, make_method())
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    assert losses(runs[1])[-1] == losses(runs[0])[-1]
    for (name, parameter), other in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    return runs


def word_tokenizer():
    """A tokenizer of the tiny models: token 17 is the word "w17", after padding, the beginning and the end."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB_SIZE)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def losses(run):
    """The training losses that a trainer has logged, or a run of a recipe in its folder."""
    log_history = read_results(run)["log_history"] if isinstance(run, Path) else run.state.log_history
    return [entry["loss"] for entry in log_history if "loss" in entry]


# ---- files and processes ----


def read_results(folder):
    """The `results.json` of a run."""
    return json.loads((folder / "results.json").read_text())


def write_jsonl(path, rows):
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_in_processes(num_processes, function, *arguments):
    """Run `function(rank, *arguments)` in processes of one group on the CPU, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_run_rank, (num_processes, port, function, arguments), nprocs=num_processes)


def _run_rank(rank, num_processes, port, function, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    function(rank, *arguments)

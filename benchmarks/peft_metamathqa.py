"""PEFT's MetaMathQA benchmark with noise: an experiment's folder in, PEFT's JSON out.

    python -m benchmarks.peft_metamathqa benchmarks/experiments/dip/llama-3.2-3B-rank32

The protocol is that of `method_comparison/MetaMathQA` in PEFT's repository: trained on MetaMathQA, validated on 50
problems of GSM8K's training set, tested on GSM8K's test set. What differs is listed in docs/elsewhere.md.
"""

import argparse
import difflib
import json
import platform
import re
import time
from datetime import datetime, timezone
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import PeftConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dipnet_hf import DipConfig, DipTrainer
from recipes.data import make_collator
from report.output_folder import write_whole
from report.provenance import provenance

MAX_CHARACTERS = 1300  # of a question and its answer: about 768 tokens
NUM_VALIDATION_ROWS = 50
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
FINAL_ANSWER = re.compile(r"(?:The (?:final )?answer is:?|####) ")
# PEFT's default_training_params.json. Those of `FIXED` are written down and have no other value here.
DEFAULTS = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "generation_kwargs": {"max_new_tokens": 300},
}
FIXED = {
    "compile": False,
    "use_gc": False,
    "optimizer_type": "AdamW",
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "init_kv_cache_prefix": None,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one experiment and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="folder METHOD/NAME with adapter_config.json")
    parser.add_argument("--train", default="meta-math/MetaMathQA", help="Hub id or folder of the training data")
    parser.add_argument("--test", default="openai/gsm8k", help="Hub id or folder of validation and test data")
    parser.add_argument("--results", type=Path, default=Path("runs/peft_metamathqa"), help="folder to write to")
    args = parser.parse_args(arguments)
    params = read_params(args.experiment)
    config = PeftConfig.from_pretrained(str(args.experiment))
    name = "/".join(args.experiment.resolve().parts[-2:])
    folder = args.results / name.replace("/", "--")
    result = run(name, config, params, args.train, args.test, folder)
    result["provenance"] = provenance(__file__, {"experiment": name, "train": args.train, "test": args.test})
    write_whole(folder.with_suffix(".json"), json.dumps(result, indent=2))
    print(f"test accuracy {result['train_info']['metrics'][-1]['test accuracy']:.3f}, {folder.with_suffix('.json')}")


def read_params(experiment: Path) -> dict:
    """The parameters of PEFT's `training_params.json` over their defaults.

    Raises:
        ValueError: a name that PEFT does not have, or a value that this runner does not know.
    """
    path = experiment / "training_params.json"
    given = json.loads(path.read_text()) if path.exists() else {}
    for name, value in given.items():
        if name not in DEFAULTS | FIXED:
            near = difflib.get_close_matches(name, DEFAULTS | FIXED, n=1)
            raise ValueError(f"{path}: no parameter {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        if name in FIXED and value != FIXED[name]:
            raise ValueError(f"{path}: {name} must be {FIXED[name]!r} here, got {value!r}.")
    optimizer = given.get("optimizer_kwargs", {})
    if unknown := optimizer.keys() - DEFAULTS["optimizer_kwargs"].keys():
        raise ValueError(f"{path}: optimizer_kwargs has {sorted(unknown)}, and this runner knows lr and weight_decay.")
    return DEFAULTS | FIXED | given | {"optimizer_kwargs": DEFAULTS["optimizer_kwargs"] | optimizer}


def run(name: str, config: PeftConfig, params: dict, train: str, test: str, folder: Path) -> dict:
    """Train, validate and test; the result has the keys of PEFT's `log_results`."""
    started, created_at = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    set_seed(params["seed"])
    tokenizer = AutoTokenizer.from_pretrained(params["model_id"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(params["model_id"], dtype=getattr(torch, params["dtype"]))
    model = get_peft_model(base, config)
    progress = Progress(tokenizer, validation_rows(test), params)
    trainer = make_trainer(model, tokenizer, train_rows(train, tokenizer, params), params, folder, progress)
    trainer.train()
    train_time = time.perf_counter() - progress.started - progress.validation_time
    num_trainable, num_total = model.get_nb_trainable_parameters()
    last = {key: progress.metrics[-1][key] for key in ("step", "train loss", "train samples")}
    accuracy = measure_accuracy(model, tokenizer, load_split(test, "test"), params)
    tokens = {"train total tokens": int(trainer.state.num_input_tokens_seen), "forgetting": None}
    model.save_pretrained(folder)
    return {
        "run_info": {
            "created_at": created_at,
            "total_time": time.perf_counter() - started,
            "experiment_name": name,
            "peft_branch": "dipnet_hf",
            "train_config": params,
            "peft_config": config_fields(config),
            "error_msg": "",
        },
        "train_info": {
            **progress.memory_info(),
            "train_time": train_time,
            "file_size": (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
            "num_trainable_params": num_trainable,
            "num_total_params": num_total,
            "status": "success",
            "metrics": [*progress.metrics, {**last, "test accuracy": accuracy, **tokens}],
        },
        "meta_info": meta_info(base),
    }


def make_trainer(model, tokenizer, rows: Dataset, params: dict, folder: Path, progress: "Progress") -> Trainer:
    """PEFT's optimizer and schedule in our trainer, or in transformers' for a method without noise."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=params["batch_size"],
        max_steps=params["max_steps"],
        learning_rate=params["optimizer_kwargs"]["lr"],
        weight_decay=params["optimizer_kwargs"]["weight_decay"],
        max_grad_norm=params["grad_norm_clip"],
        lr_scheduler_type="cosine",
        warmup_steps=params["max_steps"] // 10,
        seed=params["seed"],
        logging_steps=params["eval_steps"],
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to=[],
    )
    trainer_class = DipTrainer if isinstance(model.active_peft_config, DipConfig) else Trainer
    collator = make_collator(tokenizer)
    return trainer_class(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[progress])


class Progress(TrainerCallback):
    """Measures and validates every `eval_steps`.

    Args:
        tokenizer: of the model.
        rows (`Dataset`): to validate on.
        params (`dict`): the experiment's parameters.
    """

    def __init__(self, tokenizer, rows: Dataset, params: dict) -> None:
        self.tokenizer, self.rows, self.params = tokenizer, rows, params
        self.metrics: list[dict] = []
        self.reserved: list[int] = []
        self.validation_time = 0.0
        self.started = self.since = time.perf_counter()
        self.tokens_before = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Leave out what preparing the data and the noise has taken."""
        self.started = self.since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Note the memory."""
        self.reserved.append(reserved_memory())

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Validate; the training loss is without the prior."""
        if "loss" not in logs:
            return
        train_time, tokens = time.perf_counter() - self.since, int(state.num_input_tokens_seen)
        begun = time.perf_counter()
        accuracy = measure_accuracy(model, self.tokenizer, self.rows, self.params)
        self.since = time.perf_counter()
        self.validation_time += self.since - begun
        recent = self.reserved[-self.params["eval_steps"] :]
        self.metrics.append(
            {
                "step": state.global_step,
                "valid accuracy": accuracy,
                "train loss": logs.get("nll", logs["loss"]),
                "train samples": state.global_step * self.params["batch_size"],
                "train time": train_time,
                "eval time": self.since - begun,
                "tokens / sec": (tokens - self.tokens_before) / train_time,
                "mem allocated avg": float(torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0.0,
                "mem reserved avg": sum(recent) / len(recent),
                "elapsed time": self.since - self.started,
            }
        )
        self.tokens_before = tokens

    def memory_info(self) -> dict[str, int]:
        """Bytes that PyTorch has reserved on the accelerator, 0 on a CPU."""
        reserved = torch.tensor(self.reserved, dtype=torch.float64)
        return {
            "accelerator_memory_reserved_avg": int(reserved.mean()),
            "accelerator_memory_max": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
            "accelerator_memory_reserved_99th": int(reserved.quantile(0.99)),
        }


def reserved_memory() -> int:
    """Bytes that PyTorch has reserved on the accelerator now, 0 on a CPU."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


# ---- data ----


def load_split(source: str, split: str) -> Dataset:
    """The rows of a split, with the columns `query` and `response`, MetaMathQA's own."""
    rows = load_dataset(source, "main" if source == "openai/gsm8k" else None, split=split)
    new_names = {"question": "query", "answer": "response"}
    return rows.rename_columns({old: new for old, new in new_names.items() if old in rows.column_names})


def validation_rows(test: str) -> Dataset:
    """The same few rows in every experiment."""
    rows = load_split(test, "train").shuffle(seed=0)
    return rows.select(range(min(NUM_VALIDATION_ROWS, len(rows))))


def train_rows(source: str, tokenizer, params: dict) -> Dataset:
    """Tokens of question and answer, all of them labels, with an end; what is too long in characters is left out."""

    def encode(row: dict) -> dict:
        text = params["query_template"].format(query=row["query"]) + row["response"]
        ids = tokenizer(text)["input_ids"][: params["max_seq_length"]] + [tokenizer.eos_token_id]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}

    rows = load_split(source, "train")
    rows = rows.filter(lambda row: len(f"{row['query']} {row['response']}") <= MAX_CHARACTERS)
    return rows.map(encode, remove_columns=rows.column_names)


# ---- scores ----


@torch.inference_mode()
def measure_accuracy(model, tokenizer, rows: Dataset, params: dict) -> float:
    """The share of greedy answers, noise off, whose final answer is that of the row."""
    was_training = model.training
    model.eval()
    config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **params["generation_kwargs"])
    config.eos_token_id = tokenizer.eos_token_id
    num_right = 0
    for batch in rows.iter(params["batch_size_eval"]):
        prompts = [params["query_template"].format(query=query) for query in batch["query"]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        inputs.pop("token_type_ids", None)
        written = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(written, skip_special_tokens=True)
        num_right += sum(map(is_right, answers, batch["response"]))
    model.train(was_training)
    return num_right / len(rows)


def is_right(answer: str, response: str) -> bool:
    """Whether an answer ends as the row's, which has an end.

    Raises:
        ValueError: the row's has none.
    """
    expected = final_answer(response)
    if expected is None:
        raise ValueError(f"No final answer, '#### ...' or 'The answer is: ...', in the row's answer {response!r}.")
    return final_answer(answer) == expected


def final_answer(text: str) -> float | str | None:
    """What stands behind the last "#### " or "The answer is: ", as a number if it is one; None if neither is there."""
    *before, last = FINAL_ANSWER.split(text)
    if not before:
        return None
    answer = last.strip().partition("\n")[0].strip(" .!?$%")
    try:
        return float(Fraction(answer))
    except (ValueError, ZeroDivisionError):
        return answer


# ---- what PEFT writes down ----


def config_fields(config: PeftConfig) -> dict:
    """The config's fields as JSON can hold them."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def meta_info(base) -> dict:
    """Versions and machine. Commits of packages and dates of models are not looked up."""
    unknown = {"sha": None, "created_at": None}
    versions = {f"{name}-version": _version(name) for name in PACKAGES}
    system = {name: getattr(platform, name)() for name in ("system", "release", "version", "machine", "processor")}
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "model_info": unknown | {"sha": getattr(base.config, "_commit_hash", None)},
        "dataset_info": {"metamath": unknown, "gsm8k": unknown},
        "package_info": versions | {f"{name}-commit-hash": None for name in PACKAGES},
        "system_info": system | {"accelerator": accelerator},
        "pytorch_info": torch.__config__.show(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

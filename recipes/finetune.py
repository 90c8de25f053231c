"""Fine-tune a causal language model on questions, conversations or texts, with DIPNet or without, and score it.

    accelerate launch recipes/finetune.py recipes/configs/stories260k-gsm8k.yaml --set training.learning_rate=1e-4
    accelerate launch recipes/finetune.py recipes/configs/stories260k-gsm8k.yaml --dry-run
    accelerate launch recipes/finetune.py recipes/configs/smollm2-gsm8k-chat.yaml --show-examples 3
    accelerate launch recipes/finetune.py recipes/configs/qwen2.5-7b-gsm8k.yaml --plan 80

Plain `python` works too. The output folder receives the model or adapter, the tokenizer, `config.yaml`, the held-out
problems in `data/test.jsonl`, what was predicted of their tokens in `data/tokens.safetensors`, `results.json` and
`losses.png`. `dip: null` in the configuration is plain fine-tuning of the same weights on the same data in the same
order. A run that was interrupted resumes from its last checkpoint when started again with the same configuration.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dipnet_hf import DipTrainer, get_dip_model
from dipnet_hf.card import read_noise
from dipnet_hf.regularizers import regularize
from dipnet_hf.regularizers.samples import SampledRegularizer
from dipnet_hf.sharding import whole_shape
from eval.task_files import columns_of, resolve_tasks
from recipes.arguments import positive
from recipes.config import FinetuneConfig, dump_config, load_config
from recipes.data import PreparedData, first_rows, heldout_lines, heldout_set, make_collator, prepare_data
from recipes.evaluation import TOKENS_FILE, TokenMetrics, evaluate, save_tokens, score_tasks
from recipes.examples import print_examples
from recipes.packing import PaddingFreeCollator, check_packing, is_padding_free, pack
from recipes.plan import print_plan
from recipes.prompts import check_prompts
from recipes.rows import read_problems
from recipes.running import (
    check_can_be_saved,
    check_devices,
    check_output_dir,
    last_whole_checkpoint,
    load_base,
    load_tokenizer,
    save_model,
    train,
    write_results,
)
from recipes.tokens import Chat, tokenize
from recipes.watching import make_callbacks, watched
from report import format_summary, plot_losses, provenance
from report.output_folder import occupied, write_whole

_NUM_FITTED = 64  # training rows that a method measures after the training


def main(arguments: list[str] | None = None) -> None:
    """Run one configuration from the command line's arguments to `results.json`."""
    args = parse_arguments(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dipnet_hf").setLevel(logging.INFO)  # the level of the noise
    config = load_config(args.config, args.set)
    if args.show_examples is not None:
        show_examples(config, args.show_examples)
        return
    if args.plan is not None:
        print_plan(config, args.plan or None)
        return
    if args.dry_run:
        run(config, dry_run=True)
        return
    with occupied(config.training["output_dir"]):
        run(config)


def run(config: FinetuneConfig, dry_run: bool = False) -> None:
    """Train, score and write the results; a dry run only says what it would do."""
    output_dir = Path(config.training["output_dir"])
    check_devices()
    check_output_dir(output_dir, config)
    training_args = config.training_arguments()

    tokenizer = load_tokenizer(config)
    with training_args.main_process_first():
        data = prepare_data(config, tokenizer)
        task_sets = prepare_tasks(config, tokenizer, data.chat)
    eval_set = data.heldout

    set_seed(training_args.seed)
    model = load_base(config)
    padding_free = is_padding_free(model)
    if config.packing:
        check_packing(model)
    model = wrap_model(model, config)

    trainer_class = Trainer if config.dip is None else DipTrainer
    metrics_of_tokens = TokenMetrics()
    trainer = trainer_class(
        model,
        training_args,
        data_collator=PaddingFreeCollator() if padding_free else make_collator(tokenizer),
        train_dataset=pack(data.train, config.max_length) if config.packing else data.train,
        eval_dataset=data.validation or eval_set,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=TokenMetrics.reduce,
        compute_metrics=metrics_of_tokens,
    )
    if (regularizer := config.make_regularizer()) is not None:
        regularize(trainer, regularizer)
    check_scoring(trainer, config, data)
    watchers = make_callbacks(trainer, tokenizer, config, data)
    if config.evaluation.tasks:
        check_prompts(model, tokenizer, config, data)
    if dry_run:
        describe(trainer, config, data.counts)
        return

    if trainer.is_world_process_zero():
        write_inputs(output_dir, config, data)
    with watched(trainer, watchers):
        train(trainer, last_whole_checkpoint(output_dir))
    trainer.data_collator = make_collator(tokenizer)  # an ensemble takes padded rows
    model.eval()
    if regularizer is not None:
        regularizer.finish()  # a run that had ended was only loaded
    if isinstance(regularizer, SampledRegularizer):
        regularizer.fit(first_batches(trainer, data.train))
    sampler: Any = model if config.dip is not None else regularizer
    evaluated, tokens = evaluate(trainer, eval_set), {}
    if eval_set is not None:
        tokens["one pass"] = torch.cat(metrics_of_tokens.problems)
    save_model(trainer, output_dir)
    scores = score_tasks(trainer, tokenizer, config, data.chat, evaluated, task_sets)
    ensemble_metrics = ensemble_scores = None
    if config.evaluation.num_samples is not None:
        k = config.evaluation.num_samples
        with sampler.ensemble(k):
            ensemble_metrics = evaluate(trainer, eval_set, num_samples=k)
            if eval_set is not None:
                tokens[f"mean of {k}"] = torch.cat(metrics_of_tokens.problems)
            ensemble_scores = score_tasks(trainer, tokenizer, config, data.chat, ensemble_metrics, task_sets, k)
    noise = None if config.dip is None else noise_table(model, output_dir)
    log_history = list(trainer.state.log_history)
    best = score_best_checkpoint(trainer, tokenizer, config, data, task_sets)
    if not trainer.is_world_process_zero():
        return

    metrics = {**data.counts, "num_steps": trainer.state.global_step, **evaluated}
    if config.dip is not None:
        metrics["init_noise_std"] = model.init_noise_std
    results = {
        "metrics": metrics,
        "scores": scores,
        "ensemble_metrics": ensemble_metrics,
        "ensemble_scores": ensemble_scores,
        "best_checkpoint": best,
        "log_history": log_history,
        "provenance": provenance(__file__, asdict(config), seed=training_args.seed),
        "noise": noise,
    }
    save_tokens(output_dir / TOKENS_FILE, tokens)
    write_results(output_dir / "results.json", results)
    print(format_summary(results))
    if any("loss" in entry for entry in log_history):
        plot_losses([str(output_dir / "results.json")], str(output_dir / "losses.png"))
    print(f"Model, tokenizer, config.yaml, results.json and losses.png are in {output_dir}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see recipes/configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys of the configuration"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument(
        "--show-examples", type=positive, metavar="<n>", help="print the first n training rows with labels, and stop"
    )
    parser.add_argument(
        "--plan",
        type=positive_gib,
        nargs="?",
        const=0.0,
        metavar="<GiB>",
        help="print memory and time per step on this machine, or on GPUs of so many GiB, and stop",
    )
    return parser.parse_args(arguments)


def positive_gib(text: str) -> float:
    """Read an amount of memory of the command line."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def show_examples(config: FinetuneConfig, number: int) -> None:
    """Print the first training rows as they are tokenized; nothing but the tokenizer is loaded."""
    training_args, tokenizer = config.training_arguments(), load_tokenizer(config)
    with training_args.main_process_first():
        train_set = prepare_data(config, tokenizer).train
    if training_args.process_index == 0:
        print_examples(train_set.select(range(min(number, len(train_set)))), tokenizer)


def prepare_tasks(config: FinetuneConfig, tokenizer, chat: Chat | None) -> dict[str, Dataset]:
    """Read and tokenize the problems of the tasks that bring a file of their own."""
    files = {name: path for name, path in config.evaluation.tasks.items() if path is not None}
    problems = {name: Dataset.from_list(read_problems(path)) for name, path in files.items()}
    problems = {name: first_rows(rows, config.max_eval_samples) for name, rows in problems.items()}
    tokens = {name: tokenize(rows, tokenizer, chat) for name, rows in problems.items()}
    return {name: heldout_set(rows, config.max_length)[0] for name, rows in tokens.items()}


def wrap_model(model, config: FinetuneConfig):
    """Make the configured weights, and with `dip` the projections, trainable; `DipTrainer` calibrates them."""
    dip = config.dip_config()
    if dip is not None:
        return get_dip_model(model, dip)
    weights = config.peft_config()
    if isinstance(weights, PeftConfig):
        return get_peft_model(model, weights)
    check_can_be_saved(model, config)
    return model


def first_batches(trainer: Trainer, rows: Dataset) -> Iterator[dict[str, torch.Tensor]]:
    """The first training rows in batches, the same on every process; computed as they are asked for."""
    rows = trainer._remove_unused_columns(first_rows(rows, _NUM_FITTED))
    for batch in DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator):
        yield trainer._prepare_inputs(batch)


def check_scoring(trainer: Trainer, config: FinetuneConfig, data: PreparedData) -> None:
    """Refuse a scoring that could not run after the training, or on the way."""
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if is_sharded and (config.evaluation.tasks or config.evaluation.while_training):
        raise ValueError(
            "A sharded model cannot generate; set evaluation.tasks=[] and evaluation.while_training=null, and score "
            "it with eval/run.py."
        )
    if not config.evaluation.tasks:
        return
    of_test_split = [name for name, path in config.evaluation.tasks.items() if path is None]
    if data.heldout is None and of_test_split:
        raise ValueError(f"{config.dataset} has no test split to score on; set evaluation.tasks=[].")
    held_out = [splits["test"].column_names for splits in data.rows if "test" in splits]
    for task in resolve_tasks(of_test_split, {name: {"test": ""} for name in of_test_split}):
        wanted, name = columns_of(task), task["task"]
        if others := [names for names in held_out if not set(wanted) <= set(names)]:
            raise ValueError(
                f"{name} reads {', '.join(wanted)}, and a test split has {', '.join(others[0])}: choose a task that "
                f"reads these, or give it a file of its own, evaluation.tasks={{{name}: FILE}}, or take none, "
                "evaluation.tasks=[]."
            )


def describe(trainer: Trainer, config: FinetuneConfig, counts: dict) -> None:
    """Print what a run would do: configuration, sites, parameters, data and steps."""
    if not trainer.is_world_process_zero():
        return
    print(dump_config(config))
    model: Any = trainer.model
    if config.dip is not None:
        for row in model.noise_summary():
            print(f"site {row['name']}, relative std {model.active_dip_config.init_noise_std}")
    sizes = [(whole_shape(p).numel(), p.requires_grad) for p in model.parameters()]
    num_trainable, num_parameters = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    num_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    print(f"{num_trainable:,} trainable of {num_parameters:,} parameters, {num_steps:,} steps")
    print(", ".join(f"{name} {value:,}" for name, value in counts.items()))


def write_inputs(output_dir: Path, config: FinetuneConfig, data: PreparedData) -> None:
    """Write the resolved configuration and the held-out problems that scoring reads."""
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "config.yaml", dump_config(config))
    if data.heldout is not None:
        write_whole(output_dir / "data" / "test.jsonl", heldout_lines(data.rows))


def score_best_checkpoint(
    trainer: Trainer, tokenizer, config: FinetuneConfig, data: PreparedData, task_sets: dict[str, Dataset]
) -> dict | None:
    """Score, as the last one was, the checkpoint that `training.metric_for_best_model` found best on the way.

    Returns:
        `dict`: its `step`, `metrics` and `scores`; None if the run looked for none, or ended with it.

    Raises:
        ValueError: the checkpoint is not there any more.
    """
    checkpoint = trainer.state.best_model_checkpoint
    if checkpoint is None or trainer.args.load_best_model_at_end:
        return None
    if not Path(checkpoint).is_dir():
        raise ValueError(f"The best checkpoint was {checkpoint}, and there is none: was the run's folder moved?")
    trainer._load_best_model()
    evaluated = evaluate(trainer, data.heldout)
    scores = score_tasks(trainer, tokenizer, config, data.chat, evaluated, task_sets)
    return {"step": int(checkpoint.rpartition("-")[2]), "metrics": evaluated, "scores": scores}


def noise_table(model: PeftModel, output_dir: Path) -> list[dict]:
    """Read each site's learned standard deviations, channel by channel, from the saved adapter.

    Returns:
        `list[dict]`: the rows of `noise_summary`, each with `relative_std`, the list of `exp(logvar / 2)` to four
        digits: the standard deviation in units of the channel's scale.
    """
    learned = read_noise(output_dir)
    rows = []
    for row in model.noise_summary():
        std_D = learned[row["name"]]["std"]
        rows.append({**row, "relative_std": [float(f"{std:.4g}") for std in std_D]})
    return rows


if __name__ == "__main__":
    main()

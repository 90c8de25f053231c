"""Distil the mean of k noisy passes of a run into one plain network, and compare the three.

    accelerate launch recipes/finetune.py recipes/configs/stories260k-gsm8k-300.yaml
    accelerate launch recipes/distill.py recipes/configs/stories260k-gsm8k-300-distill.yaml

The teacher is a DIPNet run, or one of a regularizer with samples, such as dropout. The student starts as the teacher
with its noise switched off, which is what the paper calls distillation (Algorithm 3), and learns the ensemble's mean
prediction (Algorithm 2) on the supervised tokens: KL(mean || student). The output folder receives a plain
model, or a stock PEFT adapter, that needs nothing of this package, the tokenizer, `config.yaml` and `results.json`,
which compares noise off, ensembles and student on the held-out problems.

Shape legend: S samples, B batch, L sequence, V vocabulary, N supervised tokens, M kept tokens of the vocabulary.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, set_seed

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dipnet_hf.architecture import context_length, network_of
from dipnet_hf.batches import supervised
from recipes.config import DistillConfig, FinetuneConfig, dump_config, load_distill_config
from recipes.data import make_collator, prepare_data
from recipes.evaluation import figures_of, summarize_tokens
from recipes.rows import read_json_lines
from recipes.running import (
    check_can_be_saved,
    check_devices,
    check_output_dir,
    last_whole_checkpoint,
    load_base,
    load_dip_run,
    load_plain_run,
    load_tokenizer,
    save_model,
    train,
    write_results,
)
from recipes.teacher import Teacher, load_teacher, load_teacher_config
from recipes.tokens import Chat, prompt_tokens
from report import provenance
from report.output_folder import occupied, write_whole

Targets = tuple[
    torch.Tensor, torch.Tensor | None
]  # log-probabilities (N, M), and which tokens they are of (None: all)


def main(arguments: list[str] | None = None) -> None:
    """Run one configuration from the command line's arguments to `results.json`."""
    args = parse_arguments(arguments)
    config = load_distill_config(args.config, args.set)
    run = load_teacher_config(config.teacher)
    with occupied(config.training["output_dir"]):
        distil(config, run)


def distil(config: DistillConfig, run: FinetuneConfig) -> None:
    """Train the student, compare it with its teacher and write the results."""
    output_dir = Path(config.training["output_dir"])
    check_devices()
    check_output_dir(output_dir, config)
    training_args = config.training_arguments()

    tokenizer = load_tokenizer(run)
    with training_args.main_process_first():
        data = prepare_data(run, tokenizer)
    if data.heldout is None:
        raise ValueError(f"{run.dataset} has no test split to compare teacher and student on.")
    heldout = whole(data.heldout, run.max_length)
    set_seed(training_args.seed)
    teacher = load_teacher(config.teacher, run, training_args.device)
    student = make_student(teacher, config, run)
    train_set = data.train.add_column("has_answer", [True] * len(data.train))
    if config.prompts is not None:
        train_set = concatenate_datasets([train_set, answer_prompts(teacher, tokenizer, config, data.chat)])

    collator = make_collator(tokenizer)
    trainer = DistillTrainer(
        student,
        training_args,
        data_collator=collator,
        train_dataset=train_set.add_column("index", range(len(train_set))),
        processing_class=tokenizer,
    )
    trainer.set_targets(make_targets(teacher, train_set, collator, config), config)
    write_whole(output_dir / "config.yaml", dump_config(config))
    train(trainer, last_whole_checkpoint(output_dir))
    save_model(trainer, output_dir)
    if not trainer.is_world_process_zero():
        return

    results: dict[str, Any] = {
        "metrics": {**data.counts, "num_train_sequences": len(train_set), "num_steps": trainer.state.global_step},
        "scores": compare(teacher, student, heldout, collator, config),
        "log_history": trainer.state.log_history,
        "provenance": provenance(__file__, {**asdict(config), "teacher_config": asdict(run)}, training_args.seed),
    }
    write_results(output_dir / "results.json", results)
    print_scores(results["scores"])
    print(f"The plain model, its tokenizer, config.yaml and results.json are in {output_dir}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see recipes/configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys of the configuration"
    )
    return parser.parse_args(arguments)


# ---- student ----


def make_student(teacher: Teacher, config: DistillConfig, run: FinetuneConfig) -> PreTrainedModel | PeftModel:
    """Make the teacher's noise-free network, without a trace of what makes its samples, trainable as it was."""
    if run.dip is None:
        student: Any = load_plain_run(config.teacher, run, is_trainable=True)
        if run.weights == "full":
            check_can_be_saved(student, run)
        return student
    if run.weights == "full":
        student = load_dip_run(config.teacher, run).merge_and_unload()
        check_can_be_saved(student, run)
        return student.requires_grad_(True)
    with TemporaryDirectory() as folder:  # one per process: none reads what another still writes
        teacher.network.export_weights_adapter(folder)
        return PeftModel.from_pretrained(load_base(run), folder, is_trainable=True)


# ---- targets ----


def mean_log_probs(teacher: Teacher, batch: dict, num_samples: int) -> torch.Tensor:
    """The log of the mean probability over fresh noisy passes at the supervised tokens, of shape `(N, V)`.

    One pass at a time, so that one sample's logits are held at once.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    total: torch.Tensor | None = None
    for _ in range(num_samples):
        with torch.no_grad(), teacher.noisy():
            logits, _ = supervised(teacher.network(**inputs).logits, batch["labels"], shift=True)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        total = log_probs if total is None else torch.logaddexp(total, log_probs)
    assert total is not None  # num_samples is positive
    return total - math.log(num_samples)


def make_targets(
    teacher: Teacher, train_set: Dataset, collator: Callable, config: DistillConfig
) -> Callable[[dict], Targets]:
    """Return the function that gives a batch its targets: drawn at every call, or looked up if they are cached."""

    def draw(batch: dict) -> torch.Tensor:
        return torch.log_softmax(mean_log_probs(teacher, batch, config.num_samples) / config.temperature, dim=-1)

    if config.cache_top_p is None:
        return lambda batch: (draw(batch), None)
    columns = train_set.select_columns(["input_ids", "attention_mask", "labels"])
    cache = [
        keep_top_p(draw(to_device(batch, teacher.network.device)), config.cache_top_p)
        for batch in DataLoader(columns, batch_size=1, collate_fn=collator)
    ]
    return lambda batch: join([cache[index] for index in batch["index"].tolist()], batch["labels"].device)


def keep_top_p(log_probs_NV: torch.Tensor, top_p: float) -> Targets:
    """Keep each token's likeliest successors up to a total probability of `top_p`, normalized; the rest is -inf."""
    sorted_NV, ids_NV = log_probs_NV.sort(dim=-1, descending=True)
    before_NV = sorted_NV.exp().cumsum(-1) - sorted_NV.exp()  # the probability of the likelier ones
    kept = before_NV < (top_p if top_p < 1 else torch.inf)  # rounding lifts the sum to 1 before the last token
    num_kept = int(kept.sum(-1).max())
    kept_NM = sorted_NV.masked_fill(~kept, -torch.inf)[:, :num_kept]
    # A clone, as a view would hold on to all V of them.
    return torch.log_softmax(kept_NM, dim=-1).cpu(), ids_NV[:, :num_kept].clone().cpu()


def join(targets: list[Targets], device: torch.device) -> Targets:
    """Put the sequences' targets one after another, padded to the same number of kept tokens."""
    width = max(log_probs.shape[1] for log_probs, _ in targets)
    log_probs, ids = [], []
    for log_probs_NM, ids_NM in targets:
        assert ids_NM is not None  # cached targets are of some tokens
        missing = (0, width - log_probs_NM.shape[1])
        log_probs.append(torch.nn.functional.pad(log_probs_NM, missing, value=-torch.inf))
        ids.append(torch.nn.functional.pad(ids_NM, missing))
    return torch.cat(log_probs).to(device), torch.cat(ids).to(device)


def answer_prompts(teacher: Teacher, tokenizer, config: DistillConfig, chat: Chat | None = None) -> Dataset:
    """Let the ensemble answer more questions, greedily: rows like the training set's, without a true answer."""
    assert config.prompts is not None
    questions = [row["question"] for row in read_json_lines(config.prompts, columns=("question",))]
    prompts = [prompt_tokens(question, tokenizer, chat) for question in questions]
    check_lengths(prompts, teacher, config)
    padding_side, tokenizer.padding_side = tokenizer.padding_side, "left"
    batch_size = max(1, config.training_arguments().per_device_eval_batch_size // config.num_samples)
    own = teacher.network.generation_config.eos_token_id
    eos_token_ids = {tokenizer.eos_token_id, *([] if own is None else torch.tensor([own]).flatten().tolist())}
    settings = {"eos_token_id": sorted(eos_token_ids), "pad_token_id": tokenizer.pad_token_id, "do_sample": False}
    rows = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer.pad({"input_ids": prompts[start : start + batch_size]}, return_tensors="pt")
        inputs = inputs.to(teacher.network.device)
        with teacher.samples.ensemble(config.num_samples):
            generated = teacher.network.generate(**inputs, max_new_tokens=config.max_new_tokens, **settings)
        prompt_length = inputs["input_ids"].shape[1]
        for prompt, mask, answer in zip(
            generated[:, :prompt_length], inputs["attention_mask"], generated[:, prompt_length:], strict=True
        ):
            rows.append(answered_row(prompt[mask.bool()].tolist(), answer.tolist(), eos_token_ids))
    tokenizer.padding_side = padding_side
    return Dataset.from_list(rows)


def check_lengths(prompts: list[list[int]], teacher: Teacher, config: DistillConfig) -> None:
    """Refuse a question that leaves no room for its answer, before the first one is answered."""
    context = context_length(network_of(teacher.network))
    for number, prompt in enumerate(prompts, start=1):
        if context is not None and len(prompt) + config.max_new_tokens > context:
            raise ValueError(
                f"{config.prompts}: question {number} has {len(prompt)} tokens, which with max_new_tokens="
                f"{config.max_new_tokens} are more than the {context} of the model's context. Leave it out, or lower "
                "max_new_tokens."
            )


def answered_row(prompt: list[int], answer: list[int], eos_token_ids: set[int]) -> dict:
    """Make a training row of a prompt and its answer, which ends with its first eos."""
    end = next((place for place, token in enumerate(answer) if token in eos_token_ids), len(answer))
    answer = answer[: end + 1]
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(prompt + answer),
        "labels": [-100] * len(prompt) + answer,
        "has_answer": False,
    }


# ---- training ----


class DistillTrainer(Trainer):
    """A Trainer whose loss is the KL divergence from the targets, mixed with the data loss."""

    def set_targets(self, targets: Callable[[dict], Targets], config: DistillConfig) -> None:
        """Set where a batch's targets come from, and the loss's temperature and mixing weight."""
        self.targets, self.temperature, self.data_weight = targets, config.temperature, config.data_weight
        self.model_accepts_loss_kwargs = True  # the sums below are divided by the whole step's tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss of one batch, per supervised token of the optimizer step."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        labels = inputs["labels"]
        logits_NV, targets_N = supervised(outputs.logits, labels, shift=True)
        num_items = targets_N.numel() if num_items_in_batch is None else num_items_in_batch
        divergence = distillation_loss(logits_NV, *self.targets(inputs), self.temperature)
        has_answer = inputs["has_answer"].bool()[:, None].expand_as(labels)[:, 1:][labels[:, 1:] != -100]
        nll = torch.nn.functional.cross_entropy(logits_NV[has_answer].float(), targets_N[has_answer], reduction="sum")
        loss = ((1 - self.data_weight) * divergence + self.data_weight * nll) / num_items
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss


def distillation_loss(
    logits_NV: torch.Tensor, target_NM: torch.Tensor, ids_NM: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Sum T^2 KL(target || softmax(logits / T)) over the tokens; -inf in `target_NM` is a probability of zero."""
    log_probs = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    if ids_NM is not None:
        log_probs = log_probs.gather(1, ids_NM)
    kept_target = target_NM.masked_fill(target_NM == -torch.inf, 0.0)  # 0 * inf would be NaN
    return temperature**2 * (target_NM.exp() * (kept_target - log_probs)).sum()


# ---- comparison ----


def whole(heldout: Dataset, max_length: int) -> Dataset:
    """Leave out the problems that were cut, whose answers lack their end."""
    indices = [index for index, ids in enumerate(heldout["input_ids"]) if len(ids) < max_length]
    if not indices:
        raise ValueError(f"No held-out problem fits into the teacher's max_length={max_length}, so none is whole.")
    return heldout.select(indices)


def compare(
    teacher: Teacher, student: torch.nn.Module, heldout: Dataset, collator: Callable, config: DistillConfig
) -> dict[str, dict]:
    """Measure the teacher with its noise off, its ensembles and the student on the held-out problems.

    Returns:
        `dict`: `noise_off`, `ensemble_<k>` and `distilled`, each with a dictionary of scores by held-out size.
    """
    batch_size = config.training_arguments().per_device_eval_batch_size
    sizes = [len(heldout) if size is None else size for size in config.heldout_sizes.values()]
    rows = heldout.select(range(min(max(sizes), len(heldout))))

    def measure_in_batches(model: torch.nn.Module, compare_samples: list[int]) -> dict[int, list[torch.Tensor]]:
        # A problem is as many rows of the model as there are samples.
        loader = DataLoader(rows, max(1, batch_size // max(compare_samples)), collate_fn=collator)
        return measure(model, loader, compare_samples)

    with teacher.samples.ensemble_samples(max(config.compare_samples)):
        ensembles = measure_in_batches(teacher.network, config.compare_samples)
    measured = {
        "noise_off": measure_in_batches(teacher.network, [1])[1],
        **{f"ensemble_{k}": figures for k, figures in ensembles.items()},
        "distilled": measure_in_batches(student.eval(), [1])[1],
    }
    return {
        method: {name: summarize(figures, size) for name, size in config.heldout_sizes.items()}
        for method, figures in measured.items()
    }


@torch.no_grad()
def measure(model: torch.nn.Module, loader: DataLoader, compare_samples: list[int]) -> dict[int, list[torch.Tensor]]:
    """Measure the mean of a model's first k samples at every supervised token.

    Returns:
        `dict[int, list[torch.Tensor]]`: by k, one tensor a problem, of shape `(N, 3)`: the target's log-probability,
        the largest probability, and whether the target had it.
    """
    figures: dict[int, list[torch.Tensor]] = {k: [] for k in compare_samples}
    for batch in loader:
        batch = to_device(batch, next(model.parameters()).device)
        labels = batch.pop("labels")
        logits = model(**batch).logits
        samples = logits if logits.dim() == 4 else logits[None]
        lengths = (labels[:, 1:] != -100).sum(1).tolist()
        total = None
        for k, logits_BLV in enumerate(samples, start=1):
            logits_NV, targets = supervised(logits_BLV, labels, shift=True)
            log_probs = torch.log_softmax(logits_NV.float(), dim=-1)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
            if k in figures:
                figures[k].extend(figures_of(total - math.log(k), targets).cpu().split(lengths))
    return figures


def summarize(figures: list[torch.Tensor], num_problems: int | None) -> dict[str, float]:
    """Average over the tokens of the first problems: NLL in nats, accuracy and calibration of the likeliest token."""
    found = summarize_tokens(figures[:num_problems])
    return {
        "nll": found["nll"],
        "accuracy": found["token_accuracy"],
        "ece": found["token_ece"],
        "n": len(figures[:num_problems]),
        "num_tokens": found["num_tokens"],
    }


def print_scores(scores: dict[str, dict]) -> None:
    """Print a row per method and held-out size."""
    print(f"{'':14}{'problems':>10}{'NLL':>10}{'accuracy':>10}{'ECE':>10}   per token")
    for method, sizes in scores.items():
        for row in sizes.values():
            print(f"{method:14}{row['n']:10}{row['nll']:10.4f}{row['accuracy']:10.4f}{row['ece']:10.4f}")


def to_device(batch: dict, device: torch.device) -> dict:
    """Move a batch's tensors."""
    return {name: value.to(device) for name, value in batch.items()}


if __name__ == "__main__":
    main()

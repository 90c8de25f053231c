"""Programs that are killed, or whose disk is full: started again, they end as if nobody had disturbed them.

`make test-faults` runs these; they take minutes. Each program runs in a child of a server that has imported it, so
that the start takes no time and what is disturbed is the run.
"""

import errno
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from safetensors.torch import load_file

from recipes.running import last_whole_checkpoint
from recipes.tiny_model import tiny_llama, train_tokenizer
from recipes.word_problems import generate_splits
from tests.helpers import write_jsonl

pytestmark = pytest.mark.faults

NUM_KILLS = 30
NUM_WRITES = 40  # more than any of the programs makes
# The harness and torch.save do not say why a file could not be written.
REASONS = ("No space left on device", "File too large", "could not be written")
PROGRAMS = {"finetune": "recipes.finetune", "distill": "recipes.distill", "eval": "eval.run"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*PROGRAMS.values(), __name__])
TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "seed": 0,
    "use_cpu": True,
    "logging_steps": 1,
    "save_steps": 1,
    "save_total_limit": 2,
    "report_to": "none",
}


class Program(NamedTuple):
    """A program, the arguments that let it write to a folder, and a finished run that nobody disturbed."""

    module: str
    arguments: object  # a function of the output folder
    whole: Path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, problems and the configurations of the programs."""
    root = tmp_path_factory.mktemp("faults")
    problems = generate_splits(0, {"train": 12, "test": 4})
    tokenizer = train_tokenizer([f"{row['question']} {row['answer']}" for row in problems["train"]])
    tiny_llama(tokenizer).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "problems").mkdir()
    for split, rows in problems.items():
        write_jsonl(root / "problems" / f"{split}.jsonl", rows)
    finetune = {
        "model": str(root / "model"),
        "dataset": str(root / "problems"),
        "max_length": 256,
        "weights": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"},
        "num_validation_samples": 2,
        "dip": {"init_noise_std": 0.3},
        "training": {**TRAINING, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "nll"},
        "evaluation": {"tasks": ["gsm8k_local"], "max_new_tokens": 4},
    }
    distill = {
        "teacher": str(root / "finetune"),
        "num_samples": 2,
        "compare_samples": [1, 2],
        "heldout_sizes": {"all": None},
        "training": TRAINING,
    }
    (root / "finetune.yaml").write_text(yaml.safe_dump(finetune))
    (root / "distill.yaml").write_text(yaml.safe_dump(distill))
    return root


@pytest.fixture(scope="module", params=PROGRAMS)
def program(root, request):
    """Each of the programs, with a run of its own to compare with."""
    finetune = prepare(root, "finetune")
    return finetune if request.param == "finetune" else prepare(root, request.param)


def prepare(root, name):
    """Run a program undisturbed, once."""

    def arguments(folder):
        if name != "eval":
            return [f"{root}/{name}.yaml", "--set", f"training.output_dir={folder}"]
        model_args = f"pretrained={root}/model,peft={root}/finetune,num_samples=2"
        data = f"word_problems={root}/problems/test.jsonl"
        options = ["--gen_kwargs=max_gen_toks=4", "--batch_size=1", "--log_samples", f"--output_path={folder}"]
        return ["--model_args", model_args, "--tasks=word_problems", "--data", data, *options]

    program = Program(PROGRAMS[name], arguments, root / name)
    if not program.whole.exists():
        assert start(program, program.whole).exitcode == 0
    return program


def start(program, folder, prelude=None, wait=True):
    """Start a program in a process of its own; its output goes to a file beside its folder."""
    process = SERVER.Process(target=run, args=(program.module, program.arguments(folder), f"{folder}.log", prelude))
    process.start()
    if wait:
        process.join()
    return process


def run(module, arguments, log, prelude):
    """What the child does: redirect its output, prepare the fault, and run the program."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prelude is not None:
        fault, *details = prelude
        fault(*details)
    importlib.import_module(module).main(arguments)


def outcome(folder):
    """What a run is about: its figures, and the bytes of its model."""
    (path,) = [*folder.glob("results.json"), *folder.glob("*/results_*.json")]
    results = json.loads(path.read_text())
    names = ("metrics", "scores", "ensemble_scores", "best_checkpoint", "noise", "results", "calibration")
    figures = {name: without_clock(results.get(name)) for name in names}
    losses = [row["loss"] for row in results.get("log_history", []) if "loss" in row]
    return figures, losses, {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def without_clock(value):
    """Drop what depends on the time and the folder."""
    if not isinstance(value, dict):
        return value
    return {name: without_clock(inner) for name, inner in value.items() if "runtime" not in name}


def check_files(folder):
    """Assert that whatever stands under a final name is whole."""
    checkpoint = last_whole_checkpoint(folder)
    for part in (folder, *([Path(checkpoint)] if checkpoint else [])):
        for path in part.glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
        for path in part.glob("*.json"):
            json.loads(path.read_text())
    for path in folder.glob("*/results_*.json"):
        json.loads(path.read_text())


def test_killed_at_random_moments(program, tmp_path):
    begin = time.monotonic()
    assert start(program, tmp_path / "clocked").exitcode == 0
    duration = time.monotonic() - begin
    assert outcome(tmp_path / "clocked") == outcome(program.whole)
    random.seed(0)
    num_killed = 0
    for number in range(2 * NUM_KILLS):  # a run that was faster than the clocked one ends before it is killed
        if num_killed == NUM_KILLS:
            break
        folder = tmp_path / f"killed-{number}"
        process = start(program, folder, wait=False)
        process.join(random.uniform(0, duration))
        process.kill()
        process.join()
        num_killed += process.exitcode != 0
        if folder.exists():
            check_files(folder)
        if process.exitcode != 0 and start(program, folder).exitcode != 0:
            log = Path(f"{folder}.log").read_text()
            assert "already holds a finished run" in log, log[-2000:]  # it was killed after its last write
        assert outcome(folder) == outcome(program.whole)
        shutil.rmtree(folder)
    assert num_killed == NUM_KILLS


def fill_disk_at(number, folder):
    """From the `number`th file on that is opened for writing in a folder, let the system say that the disk is full."""
    opened = 0

    def hook(event, details):
        nonlocal opened
        if event != "open" or not isinstance(details[0], str) or not details[0].startswith(folder):
            return
        if details[0].endswith("run.lock") or not details[2] & (os.O_WRONLY | os.O_RDWR):
            return
        opened += 1
        if opened >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), details[0])

    sys.addaudithook(hook)


def limit_file_size(num_bytes):
    """Let every write beyond a size fail, those of compiled code too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def faults(folder):
    """Every write that a program begins, and some sizes at which a file is cut."""
    return [(fill_disk_at, number, str(folder)) for number in range(1, NUM_WRITES + 1)] + [
        (limit_file_size, size)
        for size in (20_000, 200_000, 2_000_000)  # the log is shorter
    ]


def test_full_disk(program, tmp_path):
    num_failed = 0
    for number, fault in enumerate(faults(tmp_path)):
        folder = tmp_path / f"full-{number}"
        process = start(program, folder, fault)
        check_files(folder)
        if process.exitcode != 0:
            num_failed += 1
            log = Path(f"{folder}.log").read_text()
            assert any(reason in log for reason in REASONS), log[-2000:]
            assert start(program, folder).exitcode == 0, Path(f"{folder}.log").read_text()[-2000:]
        assert outcome(folder) == outcome(program.whole)
        shutil.rmtree(folder)
    assert num_failed >= 4

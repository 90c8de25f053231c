"""Evaluate a model with lm-evaluation-harness: noise off, as an ensemble, or by vote; and say how calibrated it is.

    python eval/run.py --model_args pretrained=BASE,peft=ADAPTER,num_samples=8 --tasks gsm8k_local \\
        --data gsm8k_local=test.jsonl --output_path results/ensemble
    accelerate launch eval/run.py ...

Every flag of `lm_eval run` that is listed below means what it means there. The output folder receives the harness' own
`results_*.json`, with `--log_samples` its `samples_*.jsonl`, and every response as soon as it is finished: the same
command resumes an interrupted run.
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from dataclasses import asdict
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval._cli.run import Run
from lm_eval.api.task import Task
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, sanitize_model_name

if not __package__:  # run as a script: Python put eval/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dipnet_hf.lm_eval_model import VOTE, DipLM, check_mode
from dipnet_hf.responses import Responses
from eval.calibration import FIGURES, calibration, confidences, metric_of
from eval.task_files import TASKS, check_data_files, resolve_tasks
from report import provenance
from report.output_folder import check_files, occupied
from report.tables import format_table

NOT_SUPPORTED = {
    "use_cache": "finished responses are kept in the output folder anyway",
    "cache_requests": "a cached prompt knows neither its data file nor its repeats",
    "check_integrity": "run the tests of the harness there",
    "wandb_args": "log results_*.json afterwards",
    "wandb_config_args": "log results_*.json afterwards",
    "trackio_args": "log results_*.json afterwards",
    "hf_hub_log_args": "upload the output folder afterwards",
}
# What changes no answer; the rest of the configuration is the run's fingerprint, but for the device.
HOW_IT_RUNS = {"batch_size", "config", "log_samples", "max_batch_size", "metadata", "output_path"}
HOW_IT_RUNS |= {"show_config", "verbosity", "write_out", *NOT_SUPPORTED}
UNFINISHED = "unfinished"  # the folder in a run's folder where its results are written


def main(arguments: list[str] | None = None) -> None:
    """Run one evaluation from the command line's arguments to the results."""
    config, data_files, repeats = parse_arguments(arguments)
    check_output(config.output_path)
    fingerprint = describe(config, data_files, repeats)
    manager, tasks, selected = load_tasks(config, data_files)
    for task in tasks:
        set_repeats(task, repeats, config)
    for folder in (config.model_args.get(name) for name in ("pretrained", "peft")):
        if folder is not None and Path(folder).is_dir():
            check_files(folder)
    make_output(config)
    with occupied(config.output_path):
        run(config, fingerprint, manager, tasks, selected)


def run(config: EvaluatorConfig, fingerprint: dict, manager: TaskManager, tasks: list[Task], selected: list) -> None:
    """Load the model, answer what is not answered yet and write the results."""
    # An interrupted run may go on elsewhere.
    responses = Responses(config.output_path, {name: fingerprint[name] for name in fingerprint if name != "device"})
    lm = DipLM.create_from_arg_obj(
        {**config.model_args, "responses": responses},
        {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size, "device": config.device},
    )
    tracker = EvaluationTracker(output_path=str(Path(config.output_path) / UNFINISHED))
    results = evaluate(lm, config, manager, selected, tracker)
    gathered = lm.gather_object({task.task_name: confidences(lm, task) for task in tasks if metric_of(task)})
    if results is None:  # not the main process
        return

    add_calibration(results, tasks, gathered)
    results["provenance"] = provenance(__file__, fingerprint, seed=lm.seed)
    save(results, tracker, config)
    print(format_results(results))


def parse_arguments(arguments: list[str] | None) -> tuple[EvaluatorConfig, dict[str, dict[str, str]], int | None]:
    """Read the command line: the harness' own options, and ours.

    Returns:
        `tuple`: the harness' configuration; the data files by task and split; how often each answer is sampled, or
        None for as often as the task says.
    """
    harness = Run(argparse.ArgumentParser().add_subparsers())._parser
    parser = argparse.ArgumentParser(
        parents=[harness],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK=PATH",
        help="files of the tasks in eval/tasks/; TASK:SPLIT=PATH for another split than test",
    )
    parser.add_argument(
        "--repeats", type=int, metavar="<k>", help="sample each answer k times and vote (default with average=vote)"
    )
    parser.set_defaults(model="dip")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args([_underscores(argument) for argument in arguments])
    data, repeats = args.data, args.repeats
    del args.data, args.repeats
    config = EvaluatorConfig.from_cli(args)
    check_config(config)
    for name in ("pretrained", "peft"):
        if config.model_args.get(name) in (".", ".."):  # the harness names the folder of the results by it
            config.model_args[name] = str(Path(config.model_args[name]).resolve())
    return config, split_data(data), choose_repeats(repeats, config.model_args)


def _underscores(argument: str) -> str:
    """Let `--model-args` be `--model_args`."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def check_config(config: EvaluatorConfig) -> None:
    """Refuse what this program does not do."""
    if config.model != "dip":
        raise ValueError(f"This program evaluates the model dip, got --model {config.model}; use lm_eval run.")
    if "pretrained" not in config.model_args:
        raise ValueError("--model_args needs pretrained=<folder or Hub id>.")
    if not config.tasks:
        raise ValueError("--tasks needs the name of a task.")
    for name, reason in NOT_SUPPORTED.items():
        if getattr(config, name):
            raise ValueError(f"--{name} is not supported: {reason}.")
    if not config.output_path or config.output_path.endswith(".json"):
        raise ValueError(f"--output_path must be a folder, of this run alone; got {config.output_path}.")


def split_data(data: list[str]) -> dict[str, dict[str, str]]:
    """Read `TASK=PATH` and `TASK:SPLIT=PATH` into the paths by task and split."""
    files: dict[str, dict[str, str]] = {}
    for item in data:
        name, equals, path = item.partition("=")
        task, _, split = name.partition(":")
        if not (task and equals and path):
            raise ValueError(f"--data takes TASK=PATH or TASK:SPLIT=PATH, got {item}.")
        files.setdefault(task, {})[split or "test"] = path
    return files


def choose_repeats(repeats: int | None, model_args: dict) -> int | None:
    """Say how often each answer is sampled: in a vote of samples, once by each."""
    num_samples, average = model_args.get("num_samples"), model_args.get("average", "prob")
    check_mode(num_samples, average, model_args.get("seed", 0))
    if repeats is not None and repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}.")
    if average != VOTE:
        return repeats
    if repeats not in (None, num_samples):
        raise ValueError(f"average=vote samples once by each of num_samples={num_samples}, got --repeats {repeats}.")
    return num_samples


def check_output(output_path: str) -> None:
    """Refuse a file, and a folder with a finished run."""
    if Path(output_path).exists() and not Path(output_path).is_dir():
        raise ValueError(f"--output_path must be a folder, and {output_path} is a file. Choose another.")
    if finished := results_file(output_path):
        raise ValueError(
            f"{output_path} already holds a finished run ({finished.name}). Choose another --output_path; or delete "
            "that file to have it written anew from the responses."
        )


def make_output(config: EvaluatorConfig) -> None:
    """Make the folder that the harness will write its results to, or say before the work why that cannot be."""
    model = config.model_args.get("peft") or config.model_args["pretrained"]
    try:
        (Path(config.output_path) / sanitize_model_name(model)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The results of {model} cannot be written to {config.output_path}: {error.strerror}. Choose another "
            "--output_path, or a shorter path to the model."
        ) from error


def results_file(output_path: str) -> Path | None:
    """Find the results that the harness has written."""
    return next(Path(output_path).glob("*/results_*.json"), None)


def load_tasks(config: EvaluatorConfig, data_files: dict[str, dict[str, str]]) -> tuple[TaskManager, list[Task], list]:
    """Load the tasks, those of `eval/tasks/` over their files.

    Returns:
        `tuple`: the harness' manager, all tasks, and the tasks and groups that were selected.
    """
    own_names = TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks
    listed = config.tasks.split(",") if isinstance(config.tasks, str) else config.tasks
    patterns = [name.strip() for name in listed]
    own = {pattern: [name for name in own_names if fnmatchcase(name, pattern)] for pattern in patterns}
    others = [pattern for pattern in patterns if not own[pattern]]
    specs: list = resolve_tasks(dict.fromkeys(name for names in own.values() for name in names), data_files)
    check_data_files(specs)
    manager = TaskManager(include_defaults=False, metadata=config.metadata)
    if others:  # indexing all tasks of the harness takes seconds
        config.tasks = others
        manager = config.process_tasks(config.metadata)
        specs += config.tasks
    loaded = manager.load(specs)
    for name in own_names:
        if name in loaded["tasks"]:
            check_targets(loaded["tasks"][name])
    inner = {name for group in loaded["groups"].values() for name in group.child_names}
    selected = [item for name, item in [*loaded["groups"].items(), *loaded["tasks"].items()] if name not in inner]
    return manager, list(loaded["tasks"].values()), selected


def check_targets(task: Task) -> None:
    """Refuse a problem that has no right answer in the form that the task asks for.

    Raises:
        ValueError: such as options without letters; the message has the problem's number.
    """
    for number, doc in enumerate(task.test_docs(), start=1):
        try:
            task.doc_to_target(doc)
        except ValueError as error:
            raise ValueError(
                f"{task.task_name}: the right answer of problem {number} is not among its options: {error}. They must "
                f"begin with their letters, as in A)1, got {doc!r:.200}."
            ) from error


def set_repeats(task: Task, repeats: int | None, config: EvaluatorConfig) -> None:
    """Sample each answer of a task `repeats` times, and have each of its filters vote before it takes one."""
    if repeats is None or task.OUTPUT_TYPE != "generate_until":
        return
    gen_kwargs = {**task.config.generation_kwargs, **config.gen_kwargs}
    if repeats > 1 and config.model_args.get("average") != VOTE and not normalize_gen_kwargs(gen_kwargs)["do_sample"]:
        raise ValueError(
            f"{repeats} greedy answers of {task.task_name} would be equal. Sample them with --gen_kwargs "
            "do_sample=True,temperature=0.7, or vote over samples with --model_args num_samples=k,average=vote."
        )
    if task.config.repeats == repeats:
        return
    if task.config.repeats != 1:
        raise ValueError(f"{task.task_name} votes over {task.config.repeats} repeats of its own, got {repeats}.")
    pipelines = task.config.filter_list or [{"name": "none", "filter": [{"function": "take_first"}]}]
    if any(pipeline["filter"][0]["function"] == "take_first" for pipeline in pipelines):
        warnings.warn(
            f"{task.task_name} takes answers as they are, so a vote compares whole texts: give it a filter that "
            "extracts the answer.",
            stacklevel=2,
        )
    pipelines = [{**pipeline, "filter": _with_vote(pipeline["filter"], repeats)} for pipeline in pipelines]
    task.set_config("repeats", repeats)
    task.set_config("filter_list", pipelines)
    task._filters = [
        build_filter_ensemble(
            pipeline["name"],
            [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in pipeline["filter"]],
        )
        for pipeline in pipelines
    ]


def _with_vote(steps: list[dict], num_votes: int) -> list[dict]:
    names = [step["function"] for step in steps]
    place = names.index("take_first") if "take_first" in names else len(names)
    return [*steps[:place], {"function": "majority_vote_of_found", "num_votes": num_votes}, *steps[place:]]


def describe(config: EvaluatorConfig, data_files: dict[str, dict[str, str]], repeats: int | None) -> dict:
    """Collect everything that decides the answers: the run's fingerprint."""
    settings = {name: value for name, value in asdict(config).items() if name not in HOW_IT_RUNS}
    weights = {
        f"files of {name}": _list_weights(config.model_args[name])
        for name in ("pretrained", "peft")
        if name in config.model_args
    }
    return {**settings, "data": data_files, "repeats": repeats, **weights}


def _list_weights(folder: str) -> dict[str, str]:
    """Describe the weights in a folder by size and date, so that another training into it is noticed."""
    stats = {path.name: path.stat() for path in sorted(Path(folder).glob("*.safetensors"))}
    return {
        name: f"{stat.st_size} bytes of {datetime.fromtimestamp(stat.st_mtime).isoformat()}"
        for name, stat in stats.items()
    }


def evaluate(
    lm: DipLM, config: EvaluatorConfig, manager: TaskManager, selected: list, tracker: EvaluationTracker
) -> dict | None:
    """Call the harness as its own command line does, but for the samples, which are always wanted."""
    seeds = config.seed or [None] * 4
    return simple_evaluate(
        model=lm,
        model_args=config.model_args,
        tasks=selected,
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        device=config.device,
        limit=config.limit,
        samples=config.samples,
        write_out=config.write_out,
        log_samples=True,
        evaluation_tracker=tracker,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        gen_kwargs=config.gen_kwargs,
        predict_only=config.predict_only,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )


def add_calibration(results: dict, tasks: list[Task], gathered: list[dict[str, list[float]]]) -> None:
    """Give every sample its confidence, and the results the figures of each task and filter."""
    results["calibration"] = {}
    for task in tasks:
        metric, samples = metric_of(task), results["samples"][task.task_name]
        if metric is not None:
            # The harness, too, puts the samples of the processes one after another.
            values = [value for process in gathered for value in process[task.task_name]]
            for sample, value in zip(samples, values, strict=True):
                sample["confidence"] = value
            results["calibration"][task.task_name] = calibration(samples, metric)


def save(results: dict, tracker: EvaluationTracker, config: EvaluatorConfig) -> None:
    """Write the results, and the samples if they are asked for, as the harness does; move them when all are whole."""
    samples = results.pop("samples")
    if config.show_config:
        print(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    output, unfinished = Path(config.output_path), Path(config.output_path) / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed here
    tracker.save_results_aggregated(results=results, samples=samples if config.log_samples else None)
    if config.log_samples:
        for name in results["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])
    written = sorted(unfinished.glob("*/*"), reverse=True)  # the results last: they say that a run is finished
    num_expected = 1 + len(results["configs"]) * config.log_samples
    if len(written) != num_expected:  # the harness only logs what went wrong
        raise OSError(f"The results could not be written to {output}; the responses are kept there.")
    for path in written:
        os.replace(path, output / path.relative_to(unfinished))
    shutil.rmtree(unfinished)


def format_results(results: dict) -> str:
    """Lay out the harness' tables and ours."""
    tables = [make_table(results), *([make_table(results, "groups")] if "groups" in results else [])]
    rows = [
        (task, name, *("-" if figures[figure] is None else f"{figures[figure]:.4g}" for figure in FIGURES))
        for task, by_filter in results["calibration"].items()
        for name, figures in by_filter.items()
    ]
    return "\n".join([*tables, *([format_table(("task", "filter", *FIGURES), rows)] if rows else [])])


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main()

"""Run a study: many methods, each tuned by the same number of trials, over many seeds; and report on what is there.

    python recipes/study.py recipes/configs/study-stories260k-gsm8k.yaml --budget 10m
    python recipes/study.py recipes/configs/study-stories260k-gsm8k.yaml --report

First each method's values are tried and scored on validation problems. Then the best value by mean validation NLL, for
each way of answering, runs with every seed and is scored on the test problems. A cell is one run in a process of its
own, `--jobs` of them at a time; started again, the study goes on with what is missing, and the processes of several
starts share the cells. `--report` writes `study.json`, `study.md` and `study.html` into the study's folder.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes import study_cell
from recipes.arguments import positive
from recipes.config import dump_config
from recipes.study_config import Cell, StudyConfig, final_cells, load_study, tuning_cells
from recipes.study_results import CellResult, finalists, read_cell, summarize
from report.output_folder import occupied, write_whole
from report.provenance import versions
from report.study_page import format_markdown, write_html

BEGUN = "begun.json"  # in a cell's folder: what it shall run
SECONDS_TO_STOP = 10  # what a process has to end by itself
SECONDS_TO_WAIT = 2  # between looks at what other processes of the study do

# A process begins as a copy of this one, which has all imports behind it, and no thread or device of its own yet.
PROCESSES = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)

Runner = Callable[[Cell, float | None], None]  # runs a cell, for so many seconds at most


def main(arguments: list[str] | None = None) -> None:
    """Run the cells that are missing, or report."""
    args = parse_arguments(arguments)
    study = load_study(args.config)
    if unknown := sorted(set(args.only) - study.methods.keys()):
        raise ValueError(f"--only {unknown[0]}: no method of this study; it has {', '.join(study.methods)}.")
    if args.report:
        report(study)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a cell's process ends too
    deadline = None if args.budget is None else time.monotonic() + args.budget
    work = (study, run_process, args.only, deadline, time.time())
    others = [PROCESSES.Process(target=run_study, args=work) for _ in range(args.jobs - 1)]
    try:
        for process in others:
            process.start()
        run_study(*work)
        for process in others:
            process.join()
    finally:
        for process in others:
            stop(process)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, see recipes/configs/study-*.yaml")
    parser.add_argument("--budget", type=seconds_of, metavar="TIME", help="stop after so long, such as 90s, 10m or 2h")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="<n>", help="run so many cells at a time (default 1)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="run the cells of these methods alone")
    parser.add_argument("--report", action="store_true", help="run nothing; write the report of what is there")
    return parser.parse_args(arguments)


def seconds_of(text: str) -> float:
    """Read a time of the command line, such as `10m`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None:
        raise ValueError(text)  # which argparse turns into its own error
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def run_study(study: StudyConfig, run: Runner, only: list[str], deadline: float | None, start: float) -> None:
    """Run the cells that are missing, one at a time, until there is none or too little time for each.

    A cell that fails is left for the next start, by all processes of this one. Where other processes run the last
    cells of the tuning, this waits.

    Args:
        study (`StudyConfig`): what to run.
        run (`Runner`): runs one cell.
        only (`list[str]`): the methods whose cells to run; all of them if empty.
        deadline (`float`, *optional*): by `time.monotonic()`.
        start (`float`): when all processes of this start began, by `time.time()`.
    """
    while True:
        cells = [cell for cell in all_cells(study) if cell.method in (only or study.methods)]
        read = [read_cell(cell) for cell in cells]
        is_waiting = False
        for cell, found in zip(cells, read, strict=True):
            if found.state != "missing":
                continue
            if deadline is not None and time.monotonic() + expected_seconds(cell.method, cells, read) > deadline:
                continue
            with ExitStack() as stack:
                try:
                    stack.enter_context(occupied(cell.folder))
                except ValueError:
                    is_waiting = True
                    continue
                # It may have been finished by another process just now, or have failed since this start.
                if read_cell(cell).state != "missing" or begun(cell) >= start:
                    continue
                run_cell(cell, run, None if deadline is None else deadline - time.monotonic())
            break  # to look at all cells again: their values may be chosen by now
        else:
            if not is_waiting:
                return
            time.sleep(SECONDS_TO_WAIT)


def all_cells(study: StudyConfig) -> list[Cell]:
    """List the cells in the order in which they run; those of a method's final phase as soon as it is chosen."""
    return tuning_cells(study) + final_cells(study, finalists(study))


def run_cell(cell: Cell, run: Runner, seconds_left: float | None) -> None:
    """Run one cell in its folder, which this process occupies, and say how it went."""
    prepare(cell)
    print(f"{cell.folder} ...", flush=True)
    run(cell, seconds_left)
    read = read_cell(cell)
    ended = f"done, {read.seconds:.0f} s" if read.seconds is not None else f"{read.state}, see log.txt"
    print(f"{cell.folder}: {ended}", flush=True)


def prepare(cell: Cell) -> None:
    """Begin anew an unfinished run of another configuration or of other versions."""
    asked = {"config": dump_config(cell.config()), "distill": cell.is_distilled and dump_config(cell.distill_config())}
    text = json.dumps(asked | {"versions": versions()}, indent=1)
    path = cell.folder / BEGUN
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        for folder in (cell.run_folder, cell.student_folder):
            shutil.rmtree(folder, ignore_errors=True)
    write_whole(path, text)
    now = time.time_ns()
    os.utime(path, ns=(now, now))  # the file system's own clock is behind by some milliseconds


def begun(cell: Cell) -> float:
    """When a cell was last begun, by `time.time()`; 0 if never."""
    path = cell.folder / BEGUN
    return path.stat().st_mtime if path.exists() else 0.0


def run_process(cell: Cell, seconds_left: float | None) -> None:
    """Run a cell in a process of its own, which is ended when its time is over or this one is told to end."""
    process = PROCESSES.Process(target=run_logged, args=(cell,))
    process.start()
    try:
        process.join(seconds_left)
    finally:
        stop(process)


def run_logged(cell: Cell) -> None:
    """Run a cell with all that it prints in its `log.txt`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(cell.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(log, descriptor)
        setattr(sys, stream, os.fdopen(descriptor, "w", buffering=1, closefd=False))
    study_cell.run_cell(cell)


def stop(process: multiprocessing.process.BaseProcess) -> None:
    """End a process that still runs, and wait for its end."""
    if not process.is_alive():
        return
    process.terminate()
    process.join(SECONDS_TO_STOP)
    if process.is_alive():
        process.kill()
        process.join()


def expected_seconds(method: str, cells: list[Cell], read: list[CellResult]) -> float:
    """Tell how long a cell will take, by the longest of its method so far, or of any; 0 if none has ended yet."""
    known = [(cell.method, found.seconds) for cell, found in zip(cells, read, strict=True) if found.seconds]
    of_method = [seconds for name, seconds in known if name == method]
    return max(of_method or [seconds for _, seconds in known], default=0.0)


def report(study: StudyConfig) -> None:
    """Write the report into the study's folder."""
    folder = Path(study.output_dir)
    summary = summarize(study)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "study.json", json.dumps(summary, indent=1))
    write_whole(folder / "study.md", format_markdown(summary))
    write_html(summary, folder / "study.html")
    print(f"study.json, study.md and study.html are in {folder}; {len(summary['missing'])} cells are missing")


if __name__ == "__main__":
    main()

"""Where a DIPNet step's added time goes: matrix FLOPs and operators, against the same trainer without DIPNet.

    python benchmarks/step_profile.py            # table and benchmarks/results/step_profile-<device>.json

The steps are those of `step.py` with LoRA at S = 1. FLOPs are those of PyTorch's counter, and exact. The operators
listed are those that DIPNet calls more often than its peer. An operator's share is the time of these additional calls,
as if all its calls took the same time in PyTorch's profiler, over the time of the peer's whole step.
"""

import argparse
import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import step
from benchmarks.measure import write_results

PAIRS = [("S=1 SFT", "SFT"), ("S=1", "Trainer")]
NUM_LISTED = 5


def main(arguments: list[str] | None = None) -> None:
    """Profile both pairs, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=step.HIDDEN_SIZES[-1])
    parser.add_argument("--steps", type=int, default=8, help="profiled steps of each trainer")
    args = parser.parse_args(arguments)
    rows = [compare(args.hidden, name, peer, args.steps) for name, peer in PAIRS]
    for row in rows:
        print(f"{row['side']} over {row['peer']}: FLOPs {row['flops_over_peer']:.3f}")
        for operator in row["operators"]:
            print(f"  {operator['name']:<45} {operator['more_calls']:>4.0f} calls more, {operator['share']:.3f}")
    write_results(__file__, {"hidden": args.hidden, "weights": "lora", "num_steps": args.steps}, rows=rows)


def compare(hidden: int, name: str, peer: str, num_steps: int) -> dict:
    """One trainer beside its peer: FLOPs, and the operators that it calls more often."""
    flops, operators = measure(hidden, name, num_steps)
    peer_flops, peer_operators = measure(hidden, peer, num_steps)
    peer_time = sum(operator.self_cpu_time_total for operator in peer_operators.values())
    more = []
    for key, operator in operators.items():
        peer_count = peer_operators[key].count if key in peer_operators else 0
        if operator.count > peer_count:
            share = operator.self_cpu_time_total * (1 - peer_count / operator.count) / peer_time
            more.append({"name": key, "more_calls": (operator.count - peer_count) / num_steps, "share": share})
    more.sort(key=lambda row: -row["share"])
    return {"side": name, "peer": peer, "flops_over_peer": flops / peer_flops, "operators": more[:NUM_LISTED]}


def measure(hidden: int, side: str, num_steps: int) -> tuple[int, dict]:
    """The FLOPs of a step, and the profiler's averages by operator over several steps."""
    trainer, batch = step.build(hidden, "lora", step.SIDES[side])
    step.step(trainer, batch)
    with FlopCounterMode(display=False) as counter:
        step.step(trainer, batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps):
            step.step(trainer, batch)
    return counter.get_total_flops(), {operator.key: operator for operator in profiler.key_averages()}


if __name__ == "__main__":
    main()

"""Equal workers: adarun has nothing to gain, and must cost next to nothing and leave the shares alone.

Usage: python benchmarks/equal.py --minutes 10 --pairs 5
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median

import harness
from harness import SMOKE_BATCH, Figure, Record, Run, Work

STEPS, SMOKE_STEPS = 160, 9


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="length of the long run")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of torchrun and adarun")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    return parser.parse_args()


def measure(work: Work, count: int, options: list[str], record: Record) -> list[dict[str, Run]]:
    """Run torchrun and adarun in turn."""
    pairs: list[dict[str, Run]] = []
    for number in range(count):
        pairs.append({"torchrun": harness.run(work), "adarun": harness.run(work, options)})
        for label, result in pairs[-1].items():
            record.add(label, result, pair=number, counted_from=pairs[-1]["adarun"].third_window())
    return pairs


def step_seconds(pair: dict[str, Run], label: str) -> float:
    """Return the mean seconds per step from adarun's third window on."""
    return pair[label].mean(pair["adarun"].third_window())


def report(pairs: list[dict[str, Run]], long: Run, *, smoke: bool) -> None:
    """Print what was measured."""
    rows = []
    for label in ("torchrun", "adarun"):
        milliseconds = median(step_seconds(pair, label) for pair in pairs) * 1e3
        rows.append([label, f"{milliseconds:.2f}", f"{pairs[-1][label].loss:.6f}"])
    harness.show_rows(f"two equal workers, {len(pairs)} pairs", ["", "ms per step", "final loss"], rows, smoke=smoke)
    throughput = median(step_seconds(pair, "torchrun") / step_seconds(pair, "adarun") for pair in pairs)
    difference = max(harness.parameter_difference(pair["torchrun"], pair["adarun"]) for pair in pairs)
    minutes = sum(long.seconds) / 60
    changes = harness.share_changes(long.plans[2:])
    figures = [
        Figure("adarun's throughput / torchrun's", throughput, ">= 0.99"),
        Figure(f"changes of shares after window 3, in {minutes:.1f} min", changes, "<= 0", digits=0),
        Figure("parameters differ by, relative", difference, "<= 1e-5", digits=8),
    ]
    harness.show_figures(figures, smoke=smoke)


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments()
    smoke = arguments.smoke
    record = Record("equal", smoke)
    options = ["--window", "3"] if smoke else []
    work = Work(SMOKE_STEPS, global_batch=SMOKE_BATCH) if smoke else Work(STEPS)
    pairs = measure(work, 1 if smoke else arguments.pairs, options, record)
    step = median(step_seconds(pair, "adarun") for pair in pairs)
    steps = SMOKE_STEPS if smoke else round(arguments.minutes * 60 / step)
    long = harness.run(replace(work, steps=steps), options)
    record.add("adarun, long", long)
    report(pairs, long, smoke=smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

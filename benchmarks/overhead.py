"""A nearly empty training step under torchrun and under adarun: the difference is adarun's own time in the worker.

Usage: python benchmarks/overhead.py --pairs 5
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import harness
from harness import Figure, Record, Run, Work

STEPS, SMOKE_STEPS = 4000, 300
SMALL_BATCH = 4


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of torchrun and adarun")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    return parser.parse_args()


def direct_measurement(epochs: int) -> float:
    """Return the CPU microseconds per step of adarun's own code, all threads: its patches against torch's originals."""
    adarun = Path(sys.executable).with_name("adarun")
    script = Path(__file__).with_name("own_time.py")
    with tempfile.TemporaryDirectory() as runs:
        command = [str(adarun), "--standalone", "--runs-dir", runs, str(script), str(epochs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.split("own_time")[1].split()[0])


def step_microseconds(result: Run) -> float:
    """Return the median step after the first tenth of the run."""
    return median(result.seconds[len(result.seconds) // 10 :]) * 1e6


def report(pairs: list[dict[str, Run]], *, smoke: bool) -> None:
    """Print what was measured."""
    rows = []
    for label in ("torchrun", "adarun"):
        medians = [step_microseconds(pair[label]) for pair in pairs]
        rows.append([label, f"{median(medians):.1f}", f"{min(medians):.1f} - {max(medians):.1f}"])
    columns = ["", "us per step", "over the pairs"]
    harness.show_rows(f"a nearly empty step, {len(pairs)} pairs", columns, rows, smoke=smoke)
    added = median(step_microseconds(pair["adarun"]) - step_microseconds(pair["torchrun"]) for pair in pairs)
    figures = [Figure("adarun - torchrun, us per step", added, "<= 20", digits=1)]
    direct = direct_measurement(5 if smoke else 41)
    figures.append(Figure("adarun's own CPU time, us per step", direct, "<= 20", digits=1))
    harness.show_figures(figures, smoke=smoke)


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments()
    smoke = arguments.smoke
    record = Record("overhead", smoke)
    work = Work(SMOKE_STEPS if smoke else STEPS, model="empty", global_batch=SMALL_BATCH)
    pairs: list[dict[str, Run]] = []
    for number in range(1 if smoke else arguments.pairs):
        pairs.append({"torchrun": harness.run(work), "adarun": harness.run(work, ["--adapt", "on"])})
        for label, result in pairs[-1].items():
            record.add(label, result, pair=number)
    report(pairs, smoke=smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

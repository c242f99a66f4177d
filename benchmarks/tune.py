"""`--tune` on examples/digits.py: does it end on the best of eight settings, and what has the way there cost?

Usage: python benchmarks/tune.py --epochs 40

First each setting alone, for a few epochs under torchrun; then one job that starts with the first and tunes. What the best
setting alone would have taken is its start and the median of its epochs, times their number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import harness
from harness import Figure, Record

BATCH_SIZES, THREADS = (16, 32, 64, 128), (1, 2)
SCRIPT = harness.HERE.parent / "examples" / "digits.py"
EPOCH = re.compile(r"epoch (\d+): .* (\S+) s$", re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """One run of the script: its wall seconds, and those of each epoch that it printed."""

    seconds: float
    epochs: list[float]

    @property
    def start_seconds(self) -> float:
        """What is not in any epoch."""
        return self.seconds - sum(self.epochs)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="length of the tuned job")
    parser.add_argument("--sweep-epochs", type=int, default=3, help="epochs for each setting alone")
    parser.add_argument("--width", type=int, default=192, help="channels of the network's first layer")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    return parser.parse_args()


def run(launcher: list[str], script: list[str], threads: int | None, folder: Path) -> Job:
    """Run the script to its end in `folder`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ADARUN_")}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    program = str(Path(sys.executable).parent / launcher[0])
    command = [program, *launcher[1:], "--standalone", "--nproc-per-node", "2", *script]
    began = time.monotonic()
    output = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds = time.monotonic() - began
    # An epoch trained twice, around a restart, counts as it was trained last.
    return Job(seconds, list({number: float(taken) for number, taken in EPOCH.findall(output)}.values()))


def script(batch_size: object, epochs: int, width: int) -> list[str]:
    """The script with its arguments."""
    given = {"batch-size": batch_size, "epochs": epochs, "width": width, "checkpoint": "digits.pt"}
    return [str(SCRIPT), *itertools.chain(*((f"--{name}", str(value)) for name, value in given.items()))]


def tune(epochs: int, width: int, folder: Path) -> tuple[Job, list[dict[str, object]]]:
    """The tuned job, and what it decided."""
    listed = [f"batch_size={','.join(map(str, BATCH_SIZES))}", f"OMP_NUM_THREADS={','.join(map(str, THREADS))}"]
    launcher = ["adarun", *itertools.chain(*(("--tune", one) for one in listed))]
    job = run(launcher, script("{batch_size}", epochs, width), None, folder)
    log = next(folder.glob("runs/*/events.jsonl"))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return job, [event for event in events if event["type"] == "tuned"]


def main() -> None:
    """Sweep, tune, report."""
    arguments = parse_arguments()
    smoke = arguments.smoke
    record = Record("tune", smoke)
    epochs, sweep_epochs, width = (3, 2, 8) if smoke else (arguments.epochs, arguments.sweep_epochs, arguments.width)
    settings = list(itertools.product(BATCH_SIZES[:1] if smoke else BATCH_SIZES, THREADS))
    alone: dict[str, Job] = {}
    for batch_size, threads in settings:
        with tempfile.TemporaryDirectory() as folder:
            job = run(["torchrun"], script(batch_size, sweep_epochs, width), threads, Path(folder))
        alone[f"batch_size={batch_size} OMP_NUM_THREADS={threads}"] = job
        record.write(type="alone", batch_size=batch_size, threads=threads, seconds=job.seconds, epochs=job.epochs)
    with tempfile.TemporaryDirectory() as folder:
        tuned, decisions = tune(epochs, width, Path(folder))
    record.write(type="tuned", seconds=tuned.seconds, epochs=tuned.epochs, decisions=decisions)
    pace = {name: median(job.epochs[1:]) for name, job in alone.items()}
    best = min(pace, key=lambda name: pace[name])
    ended = str(decisions[-1]["chosen"]) if decisions else ""
    rows = [[name, f"{seconds:.2f}", "best" if name == best else ""] for name, seconds in pace.items()]
    harness.show_rows("each setting alone, under torchrun", ["setting", "s per epoch", ""], rows, smoke=smoke)
    total = alone[best].start_seconds + epochs * pace[best]
    restarts = sum(bool(decision["restart"]) for decision in decisions)
    rows = [["best alone", best, f"{total:.1f}", "0"], ["tuned", ended, f"{tuned.seconds:.1f}", str(restarts)]]
    harness.show_rows(f"{epochs} epochs", ["", "setting in the end", "s", "restarts"], rows, smoke=smoke)
    figures = [
        Figure("tuned / best alone, whole job", tuned.seconds / total, "<= 1.15"),
        Figure("epoch of the setting in the end / of the best", pace.get(ended, float("nan")) / pace[best], "<= 1.03"),
    ]
    harness.show_figures(figures, smoke=smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

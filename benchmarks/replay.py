"""`adarun replay`: how fast it reads a long log, and whether what it predicts comes true.

Usage: python benchmarks/replay.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import harness
import msgspec
import numpy as np
from harness import Figure, Record, Work

from adarun.events import (
    SCHEMA_VERSION,
    Asked,
    Decision,
    Logged,
    Plan,
    RunEnded,
    RunStarted,
    Step,
    Window,
    WorkersStarted,
)
from adarun.replay import what_if
from adarun.replay.foreign import import_csv
from adarun.runlog import RunLog

TRACES = Path(__file__).parents[1] / "tests" / "data" / "traces"
ADARUN = Path(sys.executable).parent / "adarun"
NUM_WORKERS, SHARE, STEP_SECONDS = 8, 32, 0.05
STEPS_PER_WINDOW = 40
# For each trace, what its README says of it.
BOUNDS = [("AR", "oracle", 1.944), ("ST", "oracle", 1.004), ("AR", "static", 1.934)]
Rows = list[list[str]]


class RowRecord(Record):
    """A record of rows instead of training runs."""

    def keep(self, **row: object) -> None:
        """Keep one row."""
        self.write(type="row", **row)


def long_run(num_windows: int, steps_per_window: int) -> Iterator[Logged]:
    """The events of a run of eight workers, one of them slower, with a decision in each window."""
    rng = np.random.default_rng(0)
    ranks, now, even = list(range(NUM_WORKERS)), 1.7e9, [SHARE] * NUM_WORKERS
    adapted = [SHARE - 4 if rank == 3 else SHARE + (rank < 5) for rank in ranks]
    cost = np.where(np.arange(NUM_WORKERS) == 3, 1.2, 1.0) * STEP_SECONDS * 0.8
    yield RunStarted(schema=SCHEMA_VERSION, run="long", command=["train.py"], at=now)
    yield WorkersStarted(attempt=0, ranks=ranks, world_size=NUM_WORKERS, num_nodes=1, group_rank=0, at=now)
    yield from (Asked(rank=rank, step=0) for rank in ranks)
    for number in range(num_windows):
        start = number * steps_per_window
        shares = adapted if number else even
        reason = "kept: this split is the best one"
        yield Plan(number=number, start=start, stop=start + steps_per_window, shares=shares, reason=reason)
        busy = cost * np.array(shares) / SHARE * np.exp(0.05 * rng.standard_normal((steps_per_window, NUM_WORKERS)))
        for step, row in enumerate(busy.tolist(), start):
            longest = max(row) + 0.002
            now += longest
            for rank, seconds in enumerate(row):
                phases = {"data": 0.02 * seconds, "forward": 0.3 * seconds, "backward": 0.66 * seconds}
                yield Step(
                    rank=rank,
                    step=step,
                    samples=shares[rank],
                    wait=longest - seconds,
                    update=0.02 * seconds,
                    ended=now,
                    **phases,
                )
        mean, length = busy.mean(axis=0), float(busy.max(axis=1).mean()) + 0.002
        yield Window(
            plan=number,
            steps=steps_per_window,
            step_seconds=length,
            samples=[float(share) for share in shares],
            busy_seconds=mean.tolist(),
            wait_seconds=(length - mean).tolist(),
            noise=[0.008] * NUM_WORKERS,
        )
        yield Decision(
            plan=number,
            before=shares,
            proposed=shares,
            chosen=shares,
            fixed_seconds=[0.0] * NUM_WORKERS,
            sample_seconds=(mean / np.array(shares)).tolist(),
            gain=0.0,
            gain_error=0.01,
            reason=reason,
            at=now,
        )
    yield RunEnded(exit_code=0, at=now)


def write_log(directory: Path, num_windows: int, steps_per_window: int) -> None:
    """Write such a run's log, not through the queue that a live run has."""
    RunLog(directory, {"run": directory.name, "adapt": "on", "window": 0, "shares": []}).close()
    encoder = msgspec.json.Encoder()
    with (directory / "events.jsonl").open("wb") as file:
        for event in long_run(num_windows, steps_per_window):
            file.write(encoder.encode(event) + b"\n")


def replayed(directory: Path) -> tuple[float, float, float]:
    """How long `adarun replay` takes, how long to its first output, in seconds; and its memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen([str(ADARUN), "replay", str(directory)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    first = time.perf_counter() - started
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"adarun replay failed with code {process.returncode}")
    return time.perf_counter() - started, first, usage.ru_maxrss / 1e3


def long_logs(record: RowRecord, folder: Path, num_windows: int, repeats: int) -> tuple[Rows, list[Figure]]:
    """A long log; one with a quarter of its steps in as many windows; and an ordinary one."""
    kinds = {
        "long": (num_windows, STEPS_PER_WINDOW),
        "thin": (num_windows, STEPS_PER_WINDOW // 4),
        "ordinary": (30, 40),
    }
    rows, medians = [], {}
    for name, (windows, steps) in kinds.items():
        write_log(folder / name, windows, steps)
        runs = [replayed(folder / name) for _ in range(repeats)]
        medians[name] = [median(values) for values in zip(*runs, strict=True)]
        reports = windows * steps * NUM_WORKERS
        record.keep(part="long", log=name, reports=reports, windows=windows, runs=runs)
        seconds, first, memory = medians[name]
        rows.append([name, f"{reports:,}", str(windows), f"{seconds:.2f} s", f"{first:.2f} s", f"{memory:.0f} MB"])
    return rows, [
        Figure("a) seconds for a log of 1,000,000 step reports", medians["long"][0], "<= 3.0", digits=2),
        Figure("a) its memory, MB", medians["long"][2], "<= 500", digits=0),
        Figure("a) its memory over that of a quarter of the steps", medians["long"][2] / medians["thin"][2], "<= 1.10"),
        Figure("a) seconds to the first output for an ordinary run", medians["ordinary"][1], "<= 0.5", digits=2),
    ]


def recorded(work: Work, options: list[str]) -> what_if.Run:
    """Train, and read the log."""
    before = work.slow.throttled() if work.slow else 0
    with harness.training(work, options) as started:
        started.finish()
        run = what_if.load_run(next((started.folder / "runs").iterdir()))
    if work.slow and work.slow.throttled() == before:
        raise RuntimeError("the quota did not hold the slow worker back: the figures would mean nothing")
    return run


def mean_step(run: what_if.Run) -> float:
    """Seconds per step of a recorded run."""
    return run.step_seconds / sum(len(group.busy) for group in run.groups)


def come_true(record: RowRecord, quota: int, pairs: int, steps: int, batch: int) -> tuple[Rows, list[Figure]]:
    """Runs with the even split, what they would have taken if adapted, and what adapted runs do take."""
    rows, errors = [], []
    (question,) = what_if.parse("adapt")
    with harness.slow_group(quota) as slow:
        work = Work(steps=steps, global_batch=batch, slow=slow)
        for pair in range(pairs):
            even = recorded(work, ["--adapt", "observe"])
            foreseen = what_if.answer(even, question)
            adapted = recorded(work, [])
            measured = mean_step(adapted)
            errors.append(foreseen.step_seconds / measured - 1.0)
            last = ",".join(str(worker.share) for worker in adapted.story.workers)
            record.keep(
                part="prediction",
                quota=quota,
                pair=pair,
                even=mean_step(even),
                predicted=foreseen.step_seconds,
                error=foreseen.error,
                predicted_shares=foreseen.shares,
                measured=measured,
                measured_shares=last,
            )
            predicted = f"{foreseen.step_seconds * 1e3:.1f} +- {foreseen.step_seconds * foreseen.error * 1e3:.1f}"
            shares = ",".join(map(str, foreseen.shares))
            rows.append(
                [
                    f"{quota} %",
                    f"{mean_step(even) * 1e3:.1f}",
                    predicted,
                    shares,
                    f"{measured * 1e3:.1f}",
                    last,
                    f"{errors[-1]:+.1%}",
                ]
            )
    typical = median(map(abs, errors))
    return rows, [Figure(f"b) predicted / measured - 1 at {quota} %, median of {pairs}", typical, "<= 0.05")]


def bounds(record: RowRecord) -> tuple[Rows, list[Figure]]:
    """The traces' ratios, to three digits."""
    rows, figures = [], []
    for name, asked, expected in BOUNDS:
        run = import_csv(TRACES / f"bytedance-{name}.csv")
        (question,) = what_if.parse(asked)
        speed = what_if.answer(run, question).speed
        record.keep(part="traces", trace=name, asked=asked, speed=speed)
        rows.append([name, asked, f"{speed:.4f}", f"{expected:.3f}"])
        figures.append(Figure(f"c) {name}, {asked}: off by", abs(round(speed, 3) - expected), "<= 0.0005", digits=4))
    return rows, figures


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of an even and an adapted run, for each quota")
    parser.add_argument("--quota", type=int, nargs="*", default=[50, 33], help="percent of a core that worker 1 has")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    record = RowRecord("replay", smoke)
    figures: list[Figure] = []

    def show(title: str, columns: list[str], part: tuple[Rows, list[Figure]]) -> None:
        rows, more = part
        harness.show_rows(title, columns, rows, smoke=smoke)
        figures.extend(more)

    with tempfile.TemporaryDirectory(prefix="adarun-bench-") as name:
        columns = ["log", "step reports", "windows", "whole", "first output", "memory"]
        part = long_logs(record, Path(name), 5 if smoke else 3125, 1 if smoke else 5)
        show("a) reading long logs", columns, part)
    show("c) traces of production jobs", ["trace", "what if", "speed", "known"], bounds(record))
    columns = ["worker 1 has", "even, ms", "predicted, ms", "shares", "measured, ms", "shares", "off by"]
    for quota in arguments.quota[:1] if smoke else arguments.quota:
        pairs, steps = (1, 40) if smoke else (arguments.pairs, 200)
        batch = harness.SMOKE_BATCH if smoke else harness.GLOBAL_BATCH
        part = come_true(record, quota, pairs, steps, batch)
        show(f"b) predictions, worker 1 at {quota} % of a core", columns, part)
    harness.show_figures(figures, smoke=smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

"""The split on simulated workers and recorded traces: how soon it is right, how right, and what deciding it costs.

Usage: python benchmarks/split.py
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import harness
import numpy as np
from harness import Figure, Record

from adarun.control.controller import Controller
from adarun.control.split import Floats, finish_seconds, min_max_split
from adarun.events import Window
from adarun.simulate.cluster import Cluster, Noise, affine
from adarun.simulate.communication import Link, Network
from adarun.simulate.job import Job, Setting, measured

TRACES = Path(__file__).parents[1] / "tests" / "data" / "traces"
SHARE = 64
STEPS = 20
FIXED_PARTS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
SIZES = [8, 32, 128, 512, 2048, 10_000]
NOISES = [0.01, 0.02, 0.05, 0.10, 0.15, 0.20]
Rows = list[list[str]]


class Rig:
    """A simulated job under the live controller, which starts from an even split."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.global_batch = cluster, SHARE * cluster.num_workers
        instant = Link(0.0, 0.0)
        self._job = Job(cluster, Network(cluster.num_workers, 1, instant, instant), 0.0)
        self.controller = Controller(cluster.num_workers)
        self.controller.start(self.global_batch)
        self.num_changes = 0
        lower = np.ones(cluster.num_workers, dtype=np.int64)
        best = min_max_split(cluster.fixed, cluster.per_sample, self.global_batch, lower, lower * self.global_batch)
        self.best_seconds = finish_seconds(cluster.fixed, cluster.per_sample, best)

    def run_window(self, steps: int = STEPS) -> Window:
        """Run a window and decide the next shares."""
        before = self.controller.shares
        window = self._job.run(before, Setting(), steps).window
        self.controller.learn(window)
        self.controller.decide(window, self.global_batch)
        self.num_changes += self.controller.shares != before
        return window

    def excess(self) -> float:
        """How much longer than under the best split a step takes, without noise, under the present shares."""
        cluster = self.cluster
        return finish_seconds(cluster.fixed, cluster.per_sample, self.controller.shares) / self.best_seconds - 1.0


class RowRecord(Record):
    """A record of rows instead of training runs."""

    def keep(self, **row: Any) -> None:
        """Keep one row."""
        self.write(type="row", **row)


def two_re_tunings(record: RowRecord) -> tuple[Rows, list[Figure]]:
    """One worker at half speed; how far from the best split after at most two changes of shares."""
    rows, worst = [], 0.0
    for num_workers in (2, 4, 8):
        excesses = []
        for fixed_part in FIXED_PARTS:
            costs = affine([1.0, 2.0, *[1.0] * (num_workers - 2)], fixed_part, SHARE)
            rig = Rig(Cluster(*costs, np.random.default_rng(0)))
            excess = rig.excess()
            for _ in range(30):
                rig.run_window()
                if rig.num_changes <= 2:
                    excess = rig.excess()
            excesses.append(excess)
            record.keep(part="re-tunings", workers=num_workers, fixed_part=fixed_part, excess=excess)
        worst = max(worst, *excesses)
        rows.append([f"{num_workers} workers", *[f"{excess:.1%}" for excess in excesses]])
    return rows, [Figure("a) step / best step after at most 2 re-tunings, worst", 1.0 + worst, "<= 1.02")]


def many_workers(
    record: RowRecord, sizes: Sequence[int], steps: Sequence[int], num_windows: int
) -> tuple[Rows, list[Figure]]:
    """Workers of different speeds, steps that vary by 5 %: windows until within 1 % of the best split for good."""
    rows, worst = [], 0.0
    for num_workers in sizes:
        for num_steps in steps:
            rng = np.random.default_rng(num_workers)
            costs = affine(np.exp(0.3 * rng.standard_normal(num_workers)), 0.1, SHARE)
            rig = Rig(Cluster(*costs, rng, Noise(own=0.05)))
            even, excesses = rig.excess(), []
            for _ in range(num_windows):
                rig.run_window(num_steps)
                excesses.append(rig.excess())
            far = [number for number, excess in enumerate(excesses) if excess > 0.01]
            settled = far[-1] + 2 if far else 1
            worst = max(worst, excesses[-1])
            record.keep(part="many", workers=num_workers, steps=num_steps, excesses=excesses, changes=rig.num_changes)
            after = [f"{excesses[min(number, num_windows) - 1]:.1%}" for number in (1, 3, 10, num_windows)]
            windows = str(settled) if settled <= num_windows else "never"
            rows.append(
                [f"{num_workers} workers", str(num_steps), f"{even:.0%}", *after, windows, str(rig.num_changes)]
            )
    return rows, [
        Figure(f"b) step / best step after {num_windows} windows, worst", 1.0 + worst, "<= 1.01"),
    ]


def replay(name: str, steps_per_window: int, share: int = 256) -> tuple[float, int]:
    """Even shares' time over the controller's on a trace, from the third window on, and how often shares changed."""
    with (TRACES / name).open() as file:
        entries = [(int(row["worker"]), float(row["compute_seconds"])) for row in csv.DictReader(file)]
    num_workers = 1 + max(worker for worker, _ in entries)
    trace: Floats = np.array([seconds for _, seconds in entries]).reshape(-1, num_workers)
    controller, changes = Controller(num_workers), 0
    controller.start(share * num_workers)
    even_seconds = actual_seconds = 0.0
    for number, start in enumerate(range(0, len(trace), steps_per_window)):
        steps, shares = trace[start : start + steps_per_window], controller.shares
        busy = steps * np.array(shares) / share
        if number >= 2:
            even_seconds += float(steps.max(axis=1).sum())
            actual_seconds += float(busy.max(axis=1).sum())
        window = measured(busy, np.full(num_workers, busy.max(axis=1).mean()), shares)
        controller.learn(window)
        controller.decide(window, share * num_workers)
        changes += controller.shares != shares
    return even_seconds / actual_seconds, changes


def traces(record: RowRecord) -> tuple[Rows, list[Figure]]:
    """A job with a straggler and a healthy one, with windows of two and four steps."""
    rows, gains, changes = [], {}, {}
    for name in ("AR", "ST"):
        for steps in (2, 4):
            gains[name, steps], changes[name, steps] = replay(f"bytedance-{name}.csv", steps)
            record.keep(part="traces", trace=name, steps=steps, gain=gains[name, steps], changes=changes[name, steps])
            rows.append([name, str(steps), f"{gains[name, steps]:.3f}", str(changes[name, steps])])
    return rows, [
        Figure("c) even / adapted on AR, worst", min(gains["AR", 2], gains["AR", 4]), ">= 1.92"),
        Figure("c) even / adapted on ST, worst", min(gains["ST", 2], gains["ST", 4]), ">= 0.999"),
        Figure("c) changes of shares on ST", changes["ST", 2] + changes["ST", 4], "<= 0", digits=0),
    ]


def noise_alone(record: RowRecord, seeds: Iterable[int], num_windows: int) -> tuple[Rows, list[Figure]]:
    """32 workers of the same speed: what acting on noise costs."""
    seeds, rows, worst = list(seeds), [], 1.0
    for noise in NOISES:
        gains, changes = [], 0
        for seed in seeds:
            costs = affine(np.ones(32), 0.0, SHARE)
            rig = Rig(Cluster(*costs, np.random.default_rng(seed), Noise(own=noise)))
            seconds = 0.0
            for _ in range(num_windows):
                seconds += 1.0 + rig.excess()
                rig.run_window()
            gains.append(num_windows / seconds)
            changes += rig.num_changes
        worst = min(worst, *gains)
        record.keep(part="noise", sd=noise, gains=gains, changes=changes)
        rows.append([f"{noise:.0%}", f"{min(gains):.4f}", f"{median(gains):.4f}", str(changes)])
    return rows, [
        Figure(f"d) even / adapted under noise alone, worst of {len(seeds)} seeds", worst, ">= 0.995", digits=4)
    ]


def decision_time(record: RowRecord, num_workers: int, repeats: int) -> tuple[Rows, list[Figure]]:
    """How long the controller takes to learn a window and to decide."""
    rng = np.random.default_rng(1)
    costs = affine(np.exp(0.3 * rng.standard_normal(num_workers)), 0.1, SHARE)
    rig = Rig(Cluster(*costs, rng, Noise(own=0.05)))
    window = rig.run_window()
    learned, decided = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        rig.controller.learn(window)
        between = time.perf_counter()
        rig.controller.decide(window, rig.global_batch)
        learned.append((between - started) * 1e3)
        decided.append((time.perf_counter() - between) * 1e3)
    record.keep(part="time", workers=num_workers, learned_ms=learned, decided_ms=decided)
    whole = median(one + other for one, other in zip(learned, decided, strict=True))
    rows = [[f"{num_workers} workers", f"{median(learned):.2f}", f"{median(decided):.2f}", f"{whole:.2f}"]]
    return rows, [Figure(f"e) ms to learn and decide for {num_workers} workers", whole, "<= 10", digits=2)]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the runs with noise alone")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    record = RowRecord("split", smoke)
    sizes, seeds = (SIZES[:2], range(1)) if smoke else (SIZES, range(arguments.seeds))
    parts = {
        "a) step over the best one, one worker at half speed": (
            ["fixed part of the cost", *[f"{part:.1f}" for part in FIXED_PARTS]],
            two_re_tunings(record),
        ),
        "b) step over the best one, after so many windows": (
            ["", "steps", "even", "1", "3", "10", "last", "windows to 1 %", "changes"],
            many_workers(record, sizes, [20] if smoke else [20, 100], 10 if smoke else 60),
        ),
        "c) production traces": (["trace", "steps per window", "even / adapted", "changes"], traces(record)),
        "d) noise alone, 32 workers, even / adapted": (
            ["sd of a step", "worst", "median", "changes"],
            noise_alone(record, seeds, 10 if smoke else 100),
        ),
        "e) ms per decision": (
            ["", "learn", "decide", "together"],
            decision_time(record, 100 if smoke else 10_000, 3 if smoke else 15),
        ),
    }
    for title, (columns, (rows, _)) in parts.items():
        harness.show_rows(title, columns, rows, smoke=smoke)
    harness.show_figures([figure for _, (_, figures) in parts.values() for figure in figures], smoke=smoke)


if __name__ == "__main__":
    main()

"""A busy process arrives on worker 1's core while the training runs, and leaves again: how soon are the shares right?

Usage: python benchmarks/neighbour.py --pairs 3
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import harness
from harness import GLOBAL_BATCH, SMOKE_BATCH, Figure, Plan, Record, Run, Work

TOLERANCE = GLOBAL_BATCH // 48  # 2 % of the batch


@dataclass(frozen=True)
class Schedule:
    """At which steps the neighbour comes and goes, and the run ends."""

    arrive: int
    leave: int
    end: int

    def phases(self) -> dict[str, tuple[int, int]]:
        """Return the first step of each phase and the one after its last."""
        return {"before": (0, self.arrive), "during": (self.arrive, self.leave), "after": (self.leave, self.end)}


FULL, SMOKE = Schedule(160, 400, 640), Schedule(9, 18, 27)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of torchrun and adarun")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    return parser.parse_args()


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep worker 1's core busy."""
    core = sorted(os.sched_getaffinity(0))[1]
    loop = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    # A session of its own, as another user's process would have: the kernel may share a core out by session.
    process = subprocess.Popen([sys.executable, "-c", loop], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(schedule: Schedule, global_batch: int, adarun: Sequence[str] | None) -> Run:
    """Run the work, with the neighbour there for a part of it."""
    with harness.training(Work(schedule.end, global_batch=global_batch), adarun) as started:
        started.wait_for(schedule.arrive)
        with busy_neighbour():
            started.wait_for(schedule.leave)
        return started.finish()


def near(one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two splits are the same but for 2 % of the batch."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= TOLERANCE


def windows_to_settle(plans: Sequence[Plan], start: int, stop: int) -> float:
    """Return which plan begun in a phase is the first from which on all are near the phase's last.

    1 is the best possible: the first plan after the change is right already. Infinite where the shares stayed as they were.
    """
    before = [plan.shares for plan in plans if plan.start < start]
    begun = [plan.shares for plan in plans if start <= plan.start < stop]
    if not begun or near(begun[-1], before[-1]):
        return math.inf
    away = [number for number, shares in enumerate(begun, start=1) if not near(shares, begun[-1])]
    return max(away, default=0) + 1


def report(pairs: list[dict[str, Run]], schedule: Schedule, *, smoke: bool) -> None:
    """Print what was measured."""
    rows, figures = [], []
    for phase, (start, stop) in schedule.phases().items():
        middle = (start + stop) // 2
        row = [phase, f"{start}-{stop}"]
        for label in ("torchrun", "adarun"):
            row += [f"{median(pair[label].mean(begin, stop) for pair in pairs) * 1e3:.1f}" for begin in (start, middle)]
        plans = [plan for plan in pairs[-1]["adarun"].plans if plan.start < stop]
        row += [",".join(map(str, plans[-1].shares))]
        rows.append(row)
        if phase != "before":
            windows = [windows_to_settle(pair["adarun"].plans, start, stop) for pair in pairs]
            listed = ", ".join(f"{count:.0f}" for count in windows)
            name = f"windows until settled, {phase} the neighbour's stay (worst of {listed})"
            figures.append(Figure(name, max(windows), "<= 3", digits=0))
    columns = ["neighbour", "steps", "torchrun ms", "second half", "adarun ms", "second half", "last shares"]
    harness.show_rows(f"a busy neighbour comes and goes, {len(pairs)} pairs", columns, rows, smoke=smoke)
    harness.show_figures(figures, smoke=smoke)


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments()
    smoke = arguments.smoke
    schedule, batch, options = (SMOKE, SMOKE_BATCH, ["--window", "3"]) if smoke else (FULL, GLOBAL_BATCH, [])
    record = Record("neighbour", smoke)
    pairs: list[dict[str, Run]] = []
    for number in range(1 if smoke else arguments.pairs):
        pairs.append({"torchrun": run(schedule, batch, None), "adarun": run(schedule, batch, options)})
        for label, result in pairs[-1].items():
            record.add(label, result, pair=number, arrive=schedule.arrive, leave=schedule.leave)
    report(pairs, schedule, smoke=smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

"""One of two workers has a part of its core only: torchrun, adarun, and the best split that a search can find.

Usage: python benchmarks/slow_worker.py --quota 50 --pairs 5
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import harness
from harness import GLOBAL_BATCH, SMOKE_BATCH, STEPS_PER_EPOCH, Figure, Record, Run, SlowGroup, Work

STEPS, SEARCH_STEPS, SMOKE_STEPS = 110, 60, 9
TARGETS = {50: ">= 1.40", 33: ">= 1.80"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quota", type=int, choices=sorted(TARGETS), default=50, help="percent of a core for worker 1")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of torchrun, adarun, best fixed split")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    return parser.parse_args()


def search(cost: Callable[[int], float], start: int) -> dict[int, float]:
    """Walk downhill from `start` in steps of 2 and 1; return the cost of every point tried."""
    tried = {start: cost(start)}
    best, stride = start, 2
    while stride:
        for point in (best - stride, best + stride):
            if point not in tried and 0 < point < GLOBAL_BATCH:
                tried[point] = cost(point)
        better = min(tried, key=lambda point: tried[point])
        if better == best:
            stride //= 2
        best = better
    return tried


def fixed(slow_share: int) -> list[str]:
    """Return adarun's options for a fixed split."""
    return ["--shares", f"{GLOBAL_BATCH - slow_share},{slow_share}"]


def find_best(slow: SlowGroup, record: Record, percent: int) -> int:
    """Search the best fixed split; print one row per split; return the slow worker's share."""
    applied: dict[int, str] = {}

    def epoch_seconds(slow_share: int) -> float:
        result = harness.run(Work(SEARCH_STEPS, slow=slow), fixed(slow_share))
        record.add("search", result, slow_share=slow_share)
        applied[slow_share] = ",".join(map(str, result.plans[-1].shares))
        return result.mean(result.third_window()) * STEPS_PER_EPOCH

    tried = search(epoch_seconds, ideal(percent))
    rows = [[fixed(share)[1], applied[share], f"{tried[share]:.3f}"] for share in sorted(tried)]
    harness.show_rows(
        "search for the best fixed split, one run each", ["split", "applied", "s per epoch"], rows, smoke=False
    )
    return min(tried, key=lambda share: tried[share])


def ideal(percent: int) -> int:
    """Return the slow worker's share if the work were all that a step costs."""
    return round(GLOBAL_BATCH * percent / (100 + percent))


def measure(work: Work, slow_share: int, pairs: int, options: list[str], record: Record) -> list[dict[str, Run]]:
    """Run torchrun, adarun and the fixed split in turn, so many rounds."""
    contenders = {"torchrun": None, "adarun": options, "best fixed": [*options, *fixed(slow_share)]}
    rounds = []
    for number in range(pairs):
        rounds.append({label: harness.run(work, adarun) for label, adarun in contenders.items()})
        for label, result in rounds[-1].items():
            record.add(label, result, round=number, counted_from=rounds[-1]["adarun"].third_window())
    return rounds


def epochs(rounds: list[dict[str, Run]], label: str) -> list[float]:
    """Return the seconds per epoch in each round, over the steps from adarun's third window on."""
    return [runs[label].mean(runs["adarun"].third_window()) * STEPS_PER_EPOCH for runs in rounds]


def ratio(rounds: list[dict[str, Run]], label: str, to: str) -> float:
    """Return the median over the rounds of one contender's time relative to another's."""
    return median(a / b for a, b in zip(epochs(rounds, label), epochs(rounds, to), strict=True))


def report(rounds: list[dict[str, Run]], percent: int, *, smoke: bool) -> None:
    """Print what was measured."""
    rows = []
    for label in rounds[0]:
        last = rounds[-1][label]
        shares = ",".join(map(str, last.plans[-1].shares)) if last.plans else "even"
        difference = max(harness.parameter_difference(runs["torchrun"], runs[label]) for runs in rounds)
        speedup = ratio(rounds, "torchrun", label)
        seconds = median(epochs(rounds, label))
        rows.append([label, shares, f"{seconds:.3f}", f"{speedup:.3f}", f"{last.loss:.6f}", f"{difference:.1e}"])
    columns = ["", "last shares", "s per epoch", "times torchrun", "final loss", "parameters differ by"]
    harness.show_rows(f"worker 1 at {percent} % of its core, {len(rounds)} rounds", columns, rows, smoke=smoke)
    figures = [
        Figure("torchrun / adarun", ratio(rounds, "torchrun", "adarun"), TARGETS[percent]),
        Figure("adarun / best fixed", ratio(rounds, "adarun", "best fixed"), "<= 1.03"),
    ]
    harness.show_figures(figures, smoke=smoke)


def main() -> None:
    """Search, measure, report."""
    arguments = parse_arguments()
    smoke = arguments.smoke
    record = Record("slow_worker", smoke)
    with harness.slow_group(arguments.quota) as slow:
        if smoke:
            work = Work(SMOKE_STEPS, global_batch=SMOKE_BATCH, slow=slow)
            rounds = measure(work, ideal(arguments.quota), 1, ["--window", "3"], record)
        else:
            best = find_best(slow, record, arguments.quota)
            rounds = measure(Work(STEPS, slow=slow), best, arguments.pairs, [], record)
    report(rounds, arguments.quota, smoke=smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

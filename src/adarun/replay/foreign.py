"""Step times that another program has written, as the events of a run: what would adarun have done?"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adarun.control.split import Floats
from adarun.errors import AdarunError
from adarun.events import SCHEMA_VERSION, Logged, RunStarted, Step, WorkersStarted
from adarun.replay.what_if import Recorder, Run, ready
from adarun.runlog import Skipped

COLUMNS = ("step", "worker", "compute_seconds")
# Every worker had the same share; how large it was only sets the unit of shares.
SHARE = 256


def import_csv(path: Path) -> Run:
    """A run from a table with the columns `step`, `worker`, `compute_seconds`, under equal shares and without communication.

    A worker's time is taken to go with its share, since one share alone does not show what part of it is fixed.

    Raises:
        AdarunError: it cannot be read, or has no such columns.
    """
    skipped = Skipped()
    times = read_table(path, skipped)
    recorder = Recorder()
    recorder.see(list(events_of(path, times)))
    run = ready(recorder, {"run": path.name, "adapt": "off"}, skipped)
    for group in run.groups:
        # All that is known to be no part of the work is known here: nothing.
        group.busy, group.extra = group.busy + group.extra, np.zeros_like(group.extra)
        group.fixed, group.fixed_error = np.zeros_like(group.fixed), np.zeros_like(group.fixed)
    return run


def read_table(path: Path, skipped: Skipped) -> Floats:
    """Compute seconds, shape (steps, workers); rows that are no numbers, and steps that lack a worker, are left out.

    Raises:
        AdarunError: nothing is left.
    """
    entries: dict[int, dict[int, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in COLUMNS if column not in (reader.fieldnames or [])]:
                raise AdarunError(f"{path} has no column {missing[0]}; it needs {', '.join(COLUMNS)}")
            for row in reader:
                try:
                    step, worker, seconds = int(row["step"]), int(row["worker"]), float(row["compute_seconds"])
                except (TypeError, ValueError):
                    skipped.lines += 1
                    continue
                if not (0.0 < seconds < 1e9 and step >= 0 and worker >= 0):
                    skipped.lines += 1
                    continue
                entries.setdefault(step, {})[worker] = seconds
    except (OSError, csv.Error) as error:
        raise AdarunError(f"{path} cannot be read ({error})") from None
    workers = sorted({worker for row in entries.values() for worker in row})
    rows = [[row[worker] for worker in workers] for _, row in sorted(entries.items()) if len(row) == len(workers)]
    skipped.lines += sum(len(row) for row in entries.values() if len(row) != len(workers))
    if len(rows) < 2:
        raise AdarunError(f"{path} has fewer than two steps with a time of every worker")
    return np.array(rows)


def events_of(path: Path, times: Floats) -> Iterator[Logged]:
    """The events of a run whose workers took these times, and waited for the slowest in every step."""
    ranks, now = list(range(times.shape[1])), 0.0
    yield RunStarted(schema=SCHEMA_VERSION, run=path.name, command=[path.name], at=0.0)
    yield WorkersStarted(attempt=0, ranks=ranks, world_size=len(ranks), num_nodes=1, group_rank=0, at=0.0)
    for number, row in enumerate(times.tolist()):
        longest = max(row)
        now += longest
        for rank, seconds in zip(ranks, row, strict=True):
            yield Step(
                rank=rank,
                step=number,
                samples=SHARE,
                data=0.0,
                forward=0.0,
                backward=seconds,
                wait=longest - seconds,
                update=0.0,
                ended=now,
            )

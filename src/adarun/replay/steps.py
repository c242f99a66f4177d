"""Joins the reports of all workers for the same step, and sums them up window by window.

A log may hold millions of reports, so nothing here is done report by report, and what is kept grows with the windows alone,
unless all steps are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from msgspec.structs import astuple

from adarun.control.split import Floats, Ints
from adarun.events import Step

# A report's fields, in the order of `Step`.
RANK, STEP, SAMPLES, DATA, FORWARD, BACKWARD, WAIT, UPDATE, ENDED, COUNTED = range(10)
NUM_FIELDS = 10
# A run without plans is cut into windows of so many steps.
UNPLANNED_STEPS = 20
# Reports that wait for another worker's of the same step; beyond so many that one is taken to be lost.
MAX_PENDING = 200_000
# What is summed up for each worker and window.
SUMS = ("samples", "data", "compute", "other", "waiting", "communication")


def table(reports: Sequence[Step]) -> Floats:
    """Reports as numbers, a row each; every field is exact in a double."""
    flat = np.fromiter(chain.from_iterable(map(astuple, reports)), np.float64, NUM_FIELDS * len(reports))
    return flat.reshape(-1, NUM_FIELDS)


@dataclass
class WindowSums:
    """The steps of one window, over all workers: `sums` has a row for each of `SUMS`, an entry a worker."""

    plan: int
    start: int
    shares: list[int]
    sums: Floats
    # Steps that were seen of all workers.
    num_steps: int = 0
    seconds: float = 0.0
    began: float = np.inf
    ended: float = 0.0
    # What each worker took to get the first batch, if it may have waited for the plan in doing so.
    first_data: Floats | None = None

    def asking(self) -> Floats:
        """What each worker waited for the plan, as far as it can be told: what its first batch took longer than the others."""
        if self.first_data is None or self.num_steps < 2:
            return np.zeros(self.sums.shape[1])
        usual = (self.sums[1] - self.first_data) / (self.num_steps - 1)
        waited: Floats = np.maximum(0.0, self.first_data - usual)
        return waited


@dataclass
class Group:
    """One worker group: the steps from one start of the workers to the next."""

    attempt: int
    ranks: list[int]
    began: float
    # All steps that are complete, if they are to be kept: arrays of shape (steps, workers, fields).
    kept: list[Floats] | None = None
    windows: list[WindowSums] = field(default_factory=list)
    state: str = ""
    ended: float = 0.0
    num_incomplete: int = 0
    _by_plan: dict[int, WindowSums] = field(default_factory=dict)
    _starts: list[int] = field(default_factory=list)
    _plans: list[tuple[int, list[int]]] = field(default_factory=list)
    _pending: list[Floats] = field(default_factory=list)

    def plan(self, number: int, start: int, shares: list[int]) -> None:
        """Take in a plan; steps from its start on are a window of their own."""
        self._starts.append(start)
        # The log of one node among several knows its own workers' steps alone.
        self._plans.append((number, [shares[rank] for rank in self.ranks if rank < len(shares)]))

    def add(self, reports: Floats) -> None:
        """Take in reports; each step counts when all workers have reported it."""
        self._pending.append(reports)
        rows = np.concatenate(self._pending)
        rows = rows[np.lexsort((rows[:, RANK], rows[:, STEP]))]
        _, counts = np.unique(rows[:, STEP], return_counts=True)
        complete = np.repeat(counts == len(self.ranks), counts)
        whole = rows[complete].reshape(-1, len(self.ranks), NUM_FIELDS)
        rest = rows[~complete]
        if len(rest) > MAX_PENDING:
            self.num_incomplete += len(rest) - MAX_PENDING // 2
            rest = rest[-(MAX_PENDING // 2) :]
        self._pending = [rest]
        if len(whole):
            self._sum_up(whole)

    def finish(self) -> None:
        """No more reports will come: steps that not all workers have reported stay out."""
        self.num_incomplete += sum(map(len, self._pending))
        self._pending = []
        self.windows.sort(key=lambda window: window.start)

    def steps(self) -> Floats:
        """The steps that were kept, shape (steps, workers, fields)."""
        return np.concatenate(self.kept) if self.kept else np.zeros((0, len(self.ranks), NUM_FIELDS))

    def _sum_up(self, whole: Floats) -> None:
        if self.kept is not None:
            self.kept.append(whole)
        numbers = whole[:, 0, STEP].astype(np.int64)
        if self._starts:
            window = np.maximum(0, np.searchsorted(self._starts, numbers, side="right") - 1)
        else:
            window = numbers // UNPLANNED_STEPS
        starts = np.concatenate([[0], np.flatnonzero(np.diff(window)) + 1])
        seconds = whole[:, :, DATA : UPDATE + 1].sum(axis=2)
        # One row a window for everything: windows are many in a long log, and each call of numpy takes microseconds.
        sums = np.add.reduceat(columns(whole), starts)
        lengths = np.add.reduceat(seconds.mean(axis=1), starts).tolist()
        began = np.minimum.reduceat((whole[:, :, ENDED] - seconds).min(axis=1), starts).tolist()
        ended = np.maximum.reduceat(whole[:, :, ENDED].max(axis=1), starts).tolist()
        counts = np.diff(np.append(starts, len(whole))).tolist()
        for piece, start in enumerate(starts.tolist()):
            target = self._window(int(window[start]), whole[start])
            first = target.num_steps == 0 and target.start > 0 and int(numbers[start]) == target.start
            target.sums += sums[piece]
            if first:
                # A copy: a view would keep all of these steps.
                target.first_data = whole[start, :, DATA].copy()
            target.num_steps += counts[piece]
            target.seconds += lengths[piece]
            target.began = min(target.began, began[piece])
            target.ended = max(target.ended, ended[piece])

    def _window(self, number: int, step: Floats) -> WindowSums:
        if self._plans:
            (plan, shares), start = self._plans[number], self._starts[number]
        else:
            plan, start, shares = number, number * UNPLANNED_STEPS, step[:, SAMPLES].astype(np.int64).tolist()
        if plan not in self._by_plan:
            made = WindowSums(plan, start, shares, np.zeros((len(SUMS), len(self.ranks))))
            self._by_plan[plan] = made
            self.windows.append(made)
        return self._by_plan[plan]


def columns(whole: Floats) -> Floats:
    """For each step what is summed up, shape (steps, sums, workers)."""
    wait = whole[:, :, WAIT]
    # What even the worker who waits least waits is communication; what the others wait more is for slower workers.
    communication = wait.min(axis=1, keepdims=True)
    other = np.where(whole[:, :, COUNTED] > 0.0, 0.0, whole[:, :, UPDATE])
    compute = whole[:, :, FORWARD] + whole[:, :, BACKWARD] + whole[:, :, UPDATE] - other
    both = np.broadcast_to(communication, wait.shape)
    return np.stack([whole[:, :, SAMPLES], whole[:, :, DATA], compute, other, wait - communication, both], axis=1)


def samples_of(steps: Floats) -> Ints:
    """Each worker's samples in each step, shape (steps, workers)."""
    samples: Ints = steps[:, :, SAMPLES].astype(np.int64)
    return samples

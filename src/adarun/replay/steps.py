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
SUMS = ("samples", "data", "compute", "other", "waiting", "communication", "adarun")


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
        cuts = np.flatnonzero(np.diff(window)) + 1
        for piece, number in zip(np.split(whole, cuts), window[np.concatenate([[0], cuts])].tolist(), strict=True):
            self._add_to(self._window(number, piece), piece)

    def _window(self, number: int, piece: Floats) -> WindowSums:
        if self._plans:
            (plan, shares), start = self._plans[number], self._starts[number]
        else:
            plan, start, shares = number, number * UNPLANNED_STEPS, piece[0, :, SAMPLES].astype(np.int64).tolist()
        # Newest first: a step that was completed late belongs to one of the last.
        for window in reversed(self.windows):
            if window.plan == plan:
                return window
            if window.plan < plan:
                break
        made = WindowSums(plan, start, shares, np.zeros((len(SUMS), len(self.ranks))))
        self.windows.append(made)
        return made

    def _add_to(self, window: WindowSums, piece: Floats) -> None:
        wait = piece[:, :, WAIT]
        # What even the worker who waits least waits is communication; what the others wait more is for slower workers.
        communication = wait.min(axis=1, keepdims=True)
        counted = piece[:, :, COUNTED] > 0.0
        other = np.where(counted, 0.0, piece[:, :, UPDATE])
        data = piece[:, :, DATA].sum(axis=0)
        asking = np.zeros(len(self.ranks))
        if window.num_steps == 0 and window.start > 0 and int(piece[0, 0, STEP]) == window.start and len(piece) > 1:
            # A worker that waits for a plan does so in asking for its first batch.
            asking = np.maximum(0.0, piece[0, :, DATA] - np.median(piece[1:, :, DATA], axis=0))
        window.sums += [
            piece[:, :, SAMPLES].sum(axis=0),
            data - asking,
            (piece[:, :, FORWARD] + piece[:, :, BACKWARD] + piece[:, :, UPDATE] - other).sum(axis=0),
            other.sum(axis=0),
            (wait - communication).sum(axis=0),
            np.broadcast_to(communication, wait.shape).sum(axis=0),
            asking,
        ]
        seconds = piece[:, :, DATA : UPDATE + 1].sum(axis=2)
        window.num_steps += len(piece)
        window.seconds += float(seconds.mean(axis=1).sum())
        window.began = min(window.began, float((piece[:, :, ENDED] - seconds).min()))
        window.ended = max(window.ended, float(piece[:, :, ENDED].max()))


def samples_of(steps: Floats) -> Ints:
    """Each worker's samples in each step, shape (steps, workers)."""
    samples: Ints = steps[:, :, SAMPLES].astype(np.int64)
    return samples

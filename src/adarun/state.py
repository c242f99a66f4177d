"""What is known of a job: `fold` takes in one event after the other, live and when a log is read again.

Knows no socket, clock, file or torch. A `State` belongs to whoever folds into it; `fold` changes nothing else.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from adarun.events import Logged, Notice, Plan, Resources, Step, Window, WorkersStarted

Floats = npt.NDArray[np.float64]

# The first steps of a worker group (allocator, bucket rebuild) and of new shares say little about the later ones.
WARMUP_STEPS = 5
SETTLE_STEPS = 1
# Fewer say nothing.
MIN_COUNTED_STEPS = 5
# A step this much longer than the median holds something else than training, say a checkpoint. Both must hold: a CPU quota
# stalls short steps for many times their length, but never for longer than its period of 0.1 s or so.
OUTLIER_RATIO = 10.0
OUTLIER_SECONDS = 0.25
# A worker has changed inside a window if its mean steps before and after differ by so much, and by so many standard errors:
# the largest of 40 places reaches 3 in pure noise.
CHANGE_RATIO = 1.1
CHANGE_ERRORS = 6.0


@dataclass
class Totals:
    """Sums over all steps of one worker."""

    steps: int = 0
    samples: int = 0
    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    wait: float = 0.0
    update: float = 0.0
    first_began: float = math.inf
    last_ended: float = 0.0

    def add(self, step: Step) -> None:
        """Take in one step."""
        self.steps += 1
        self.samples += step.samples
        self.data += step.data
        self.forward += step.forward
        self.backward += step.backward
        self.wait += step.wait
        self.update += step.update
        self.first_began = min(self.first_began, step.ended - step.seconds)
        self.last_ended = max(self.last_ended, step.ended)

    @property
    def busy_seconds(self) -> float:
        """Time not spent waiting for other workers."""
        return self.data + self.forward + self.backward + self.update

    @property
    def utilisation(self) -> float:
        """Busy time as a part of the whole, from 0 to 1."""
        whole = self.busy_seconds + self.wait
        return self.busy_seconds / whole if whole else 0.0


@dataclass
class State:
    """The job as seen so far."""

    attempt: int = 0
    world_size: int = 0
    num_nodes: int = 1
    plans: list[Plan] = field(default_factory=list)
    notices: dict[str, Notice] = field(default_factory=dict)
    totals: dict[int, Totals] = field(default_factory=dict)
    resources: dict[int, Resources] = field(default_factory=dict)
    ever_uneven: bool = False
    # Counted steps since the last window was closed: rank -> [(samples, busy, wait, seconds, step)].
    fresh: dict[int, list[tuple[int, float, float, float, int]]] = field(default_factory=dict)

    @property
    def plan(self) -> Plan | None:
        """The newest plan of the present worker group."""
        return self.plans[-1] if self.plans else None


def fold(state: State, event: Logged) -> State:
    """Take in one event."""
    if isinstance(event, Step):
        state.totals.setdefault(event.rank, Totals()).add(event)
        if _counts(state, event):
            measured = (event.samples, event.busy_seconds, event.wait, event.seconds, event.step)
            state.fresh.setdefault(event.rank, []).append(measured)
    elif isinstance(event, Plan):
        state.plans.append(event)
        state.ever_uneven = state.ever_uneven or not event.even
    elif isinstance(event, Window):
        state.fresh = {}
    elif isinstance(event, WorkersStarted):
        state.attempt, state.world_size, state.num_nodes = event.attempt, event.world_size, event.num_nodes
        state.plans, state.fresh, state.notices = [], {}, {}
    elif isinstance(event, Notice):
        state.notices.setdefault(event.key, event)
    elif isinstance(event, Resources):
        state.resources[event.rank] = event
    return state


def _counts(state: State, step: Step) -> bool:
    if not step.counted or step.step < WARMUP_STEPS:
        return False
    # Newest first: a report is rarely older than the plan before the last.
    for number in range(len(state.plans) - 1, -1, -1):
        plan = state.plans[number]
        if plan.start <= step.step:
            before = state.plans[max(0, number - 1)]
            changed = plan.shares != before.shares or not plan.same_pace(before)
            return not changed or step.step >= plan.start + SETTLE_STEPS
    return True


def close_window(state: State) -> Window | None:
    """Sum up the fresh steps, or None while a worker has too few of them to say anything.

    Times are means over the steps with the worker's full share, an outlier counted at the limit that makes it one.
    """
    measured = newest_measured(state)
    if measured is None:
        return None
    plan, tables = measured
    # What was before a change says nothing of what comes, and a mean over both speaks of neither.
    num_last = min(steps_since_change(capped(table[:, 1])) for table in tables)
    tables = [table[-num_last:] for table in tables]
    samples, busy, wait, noise, seconds = [], [], [], [], []
    for table in tables:
        times = capped(table[:, 1])
        # Where only some steps synchronise, these are no outliers.
        whole = capped(table[:, 3]) if plan.sync_period == 1 else times + table[:, 2]
        samples.append(float(table[0, 0]))
        busy.append(float(times.mean()))
        wait.append(float(table[:, 2].mean()))
        noise.append(float(times.std(ddof=1) / math.sqrt(len(times)) / times.mean()))
        seconds.append(float(whole.mean()))
    return Window(
        plan=plan.number,
        steps=max(len(table) for table in tables),
        step_seconds=float(np.mean(seconds)),
        samples=samples,
        busy_seconds=busy,
        wait_seconds=wait,
        noise=noise,
        sync_seconds=shared_wait(tables),
    )


def shared_wait(tables: list[Floats]) -> float:
    """The mean over steps of the shortest wait: the last worker to be ready waits for the network alone."""
    steps, waits = [table[:, 4] for table in tables], [table[:, 2] for table in tables]
    if any(not np.array_equal(steps[0], others) for others in steps[1:]):
        common = functools.reduce(np.intersect1d, steps)
        if not len(common):
            return float(min(own.mean() for own in waits))
        waits = [own[np.isin(of, common)] for own, of in zip(waits, steps, strict=True)]
    return float(np.min(waits, axis=0).mean())


def capped(seconds: Floats) -> Floats:
    """Times of steps, shape (steps,), an outlier brought down to the limit that makes it one."""
    return np.minimum(seconds, max(OUTLIER_SECONDS, OUTLIER_RATIO * float(np.median(seconds))))


def steps_since_change(seconds: Floats) -> int:
    """How many of the last steps belong together: all of them, or those after the place where they changed most."""
    count = len(seconds)
    first = np.arange(MIN_COUNTED_STEPS, count - MIN_COUNTED_STEPS + 1)
    if not len(first):
        return count
    sums, squares = np.cumsum(seconds), np.cumsum(seconds**2)
    before, after = sums[first - 1] / first, (sums[-1] - sums[first - 1]) / (count - first)
    within = squares[-1] - first * before**2 - (count - first) * after**2
    error = np.sqrt(np.maximum(within, 0.0) / (count - 2) * (1.0 / first + 1.0 / (count - first)))
    errors = np.abs(after - before) / np.maximum(error, 1e-12)
    at = int(np.argmax(errors))
    ratio = max(after[at] / before[at], before[at] / after[at])
    return count - int(first[at]) if errors[at] > CHANGE_ERRORS and ratio > CHANGE_RATIO else count


def newest_measured(state: State) -> tuple[Plan, list[Floats]] | None:
    """The newest plan under whose shares every worker has fresh steps enough, and these steps, a table a worker.

    Reports of one rank may run ahead of another's, so the fresh steps can be of two plans; a window speaks of one.
    """
    for number in range(len(state.plans) - 1, max(-1, len(state.plans) - 4), -1):
        plan = state.plans[number]
        since = number
        while since > max(0, number - 3) and plan.same_pace(state.plans[since - 1]):
            since -= 1
        first, stop = state.plans[since].start, plan.stop
        tables = [
            np.array(
                [row for row in state.fresh.get(rank, []) if row[0] == share and first <= row[4] < stop],
                dtype=np.float64,
            )
            for rank, share in enumerate(plan.shares)
        ]
        if all(len(table) >= MIN_COUNTED_STEPS for table in tables):
            return plan, tables
    return None

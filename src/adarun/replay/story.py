"""What happened in a run, from its log: where the time went, who held it up, what was decided and what that brought."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec
import numpy as np

from adarun.control.controller import Controller
from adarun.control.split import Floats
from adarun.errors import AdarunError
from adarun.events import (
    Decision,
    Logged,
    Lost,
    Notice,
    Paced,
    Plan,
    Refused,
    Resources,
    RunEnded,
    RunStarted,
    Step,
    Tuned,
    Window,
    WorkersEnded,
    WorkersStarted,
)
from adarun.replay.steps import SUMS, Group, WindowSums, table
from adarun.runlog import Skipped, read_about, read_batches
from adarun.state import CHANGE_RATIO

# What a change has brought is told from so many windows before and after it.
COMPARED_WINDOWS = 5
# A straggler's story may have a window in between in which it kept up.
FORGIVEN_WINDOWS = 1
# What a straggler has cost must be so much of the time to be worth a sentence.
WORTH_TELLING = 0.01


class Parts(msgspec.Struct, frozen=True):
    """Where time went, in seconds: of one worker, or the mean of all."""

    starting: float = 0.0  # before the first step of a worker group, and after its last
    data: float = 0.0
    compute: float = 0.0
    waiting: float = 0.0  # for slower workers
    communication: float = 0.0
    other: float = 0.0  # inside steps that held an evaluation or the like, and what was not reported
    adarun: float = 0.0  # waiting for plans, as far as it can be told apart, and restarts for other settings

    @property
    def whole(self) -> float:
        """All of it."""
        return float(sum(getattr(self, name) for name in self.__struct_fields__))


class WorkerStory(msgspec.Struct, frozen=True):
    """One worker, over the whole run."""

    rank: int
    steps: int
    samples: int
    share: int  # the last one
    parts: Parts
    slow: float | None  # its time per sample over the others' median; None where there are no others
    cpu_fraction: float | None = None
    memory_bytes: int | None = None


class WindowStory(msgspec.Struct, frozen=True):
    """The steps under one plan; lists have an entry per worker, seconds are means per step."""

    plan: int
    attempt: int
    start: int
    steps: int
    began: float  # since the run's start
    ended: float
    step_seconds: float
    shares: list[int]
    busy: list[float]
    waiting: list[float]
    communication: float

    @property
    def rate(self) -> float:
        """Samples per second while it ran."""
        return sum(self.shares) / self.step_seconds if self.step_seconds else 0.0


class Change(msgspec.Struct, frozen=True):
    """Something that was decided and changed; gains are relative, None where they are not known."""

    kind: str  # re-split, rolled back, even, given, tuned, paced
    at: float  # since the run's start
    step: int
    before: str
    after: str
    reason: str
    expected: float | None = None
    expected_error: float | None = None
    brought: float | None = None
    brought_error: float | None = None


class Attempt(msgspec.Struct, frozen=True):
    """A worker group; `state` is torch's word for how it ended, empty while it runs."""

    attempt: int
    began: float
    ended: float | None
    state: str
    workers: int
    steps: int


class Straggler(msgspec.Struct, frozen=True):
    """The worker that has held the others up most, and when."""

    rank: int
    slow: float
    since: float
    since_step: int
    until: float | None  # None if to the end


class Story(msgspec.Struct, frozen=True):
    """All of it; moments are seconds since the run's start, which is a Unix time."""

    run: str
    command: list[str]
    adapt: str
    policy: str | None
    host: str
    started: float
    seconds: float
    exit_code: int | None  # None while it runs, or if the launcher was killed
    ended: bool
    steps: int
    samples: int
    rate: float  # samples per second, from the first step to the last
    parts: Parts
    workers: list[WorkerStory]
    windows: list[WindowStory]
    num_decisions: int
    changes: list[Change]
    attempts: list[Attempt]
    straggler: Straggler | None
    gain: float | None  # over the even split
    gain_error: float | None
    why_even: str
    notices: list[str]
    refused: list[str]
    lost_reports: int
    incomplete_reports: int
    skipped_lines: int
    num_nodes: int


class Teller:
    """Takes in a log's events, batch by batch, and tells the story at the end."""

    def __init__(self, *, keep_steps: bool = False) -> None:
        self.groups: list[Group] = []
        self.started: RunStarted | None = None
        self.ended: RunEnded | None = None
        self.num_events = 0
        # Reports of the present worker group so far.
        self.num_reports = 0
        # Where in the batch the reports begin that no group has been given yet.
        self._first_new = 0
        self._keep = keep_steps
        self._newest = 0.0
        self._windows: list[Window] = []
        # Sizes of worker groups, and the windows under them.
        self._measured: list[int | Window] = []
        self._decisions: list[tuple[int, int, Decision]] = []
        self._tuned: list[Tuned] = []
        self._paced: list[Paced] = []
        self._plans: list[Plan] = []
        self._notices: dict[str, str] = {}
        self._refused: list[str] = []
        self._resources: dict[int, Resources] = {}
        self._lost = 0
        self._num_nodes = 1

    def see(self, batch: Sequence[Logged]) -> None:
        """Take in some events."""
        self.num_events += len(batch)
        taken = 0
        for number in [number for number, event in enumerate(batch) if type(event) is not Step]:
            event = batch[number]
            self.num_reports += number - taken
            if isinstance(event, WorkersStarted):
                self._take(batch[self._first_new : number])
                self._first_new = number
            self._see(event)
            taken = number + 1
        self.num_reports += len(batch) - taken
        self._take(batch[self._first_new :])
        self._first_new = 0

    def _take(self, batch: Sequence[Logged]) -> None:
        reports = [event for event in batch if type(event) is Step]
        if reports and not self.groups:
            self._begin(0, sorted({report.rank for report in reports}), reports[0].ended - reports[0].seconds)
        if reports:
            self.groups[-1].add(table(reports))

    def _begin(self, attempt: int, ranks: list[int], at: float) -> None:
        self.num_reports = 0
        self.groups.append(Group(attempt, ranks, at, kept=[] if self._keep else None))

    def _see(self, event: Logged) -> None:
        self._newest = max(self._newest, getattr(event, "at", 0.0))
        if isinstance(event, Resources):
            self._resources[event.rank] = event
        elif isinstance(event, Plan):
            self._plans.append(event)
            if self.groups:
                self.groups[-1].plan(event.number, event.start, event.shares)
        elif isinstance(event, Window):
            self._windows.append(event)
            self._measured.append(event)
        elif isinstance(event, Decision):
            self._decisions.append((len(self._windows), self._plans[-1].stop if self._plans else 0, event))
        elif isinstance(event, Tuned):
            self._tuned.append(event)
        elif isinstance(event, Paced):
            self._paced.append(event)
        elif isinstance(event, WorkersStarted):
            self._begin(event.attempt, event.ranks, event.at)
            self._num_nodes = event.num_nodes
            self._measured.append(event.world_size)
        elif isinstance(event, WorkersEnded) and self.groups:
            self.groups[-1].state, self.groups[-1].ended = event.state, event.at
        else:
            self._hear(event)

    def _hear(self, event: Logged) -> None:
        if isinstance(event, Notice):
            self._notices.setdefault(event.key, event.text)
        elif isinstance(event, Refused):
            self._refused.append(event.reason)
        elif isinstance(event, Lost):
            self._lost += event.reports
        elif isinstance(event, RunStarted):
            self.started = event
        elif isinstance(event, RunEnded):
            self.ended = event

    def fitted(self) -> Controller | None:
        """A controller that has learned the run's windows, as the live one had; None where there is no window."""
        controller: Controller | None = None
        for one in self._measured:
            if isinstance(one, int):
                # What was learned of the workers stays, if they are as many.
                if controller is None or len(controller.model.fixed) != one:
                    controller = Controller(one)
            elif controller is not None and len(controller.model.fixed) == len(one.samples):
                controller.shares = [int(share) for share in one.samples]
                controller.learn(one)
        return controller if controller is not None and controller.actual_seconds else None

    # --- the end -------------------------------------------------------------------------------------------------------

    def story(self, about: dict[str, Any], skipped: Skipped) -> Story:
        """What happened, with what `run.json` says of it."""
        for group in self.groups:
            group.finish()
        sums = [window for group in self.groups for window in group.windows]
        began = self.started.at if self.started else min([g.began for g in self.groups], default=0.0)
        newest = max([self._newest, *(window.ended for window in sums)], default=began)
        seconds = max(0.0, (self.ended.at if self.ended else newest) - began)
        windows = [told(window, group.attempt, began) for group in self.groups for window in group.windows]
        samples = int(sum(window.sums[0].sum() for window in sums))
        active = max((w.ended for w in sums), default=0.0) - min((w.began for w in sums), default=0.0)
        workers = self._workers(seconds)
        gain, error, why_even = self._gain()
        return Story(
            run=str(about.get("run") or (self.started.run if self.started else "")),
            command=self.started.command if self.started else [],
            adapt=str(about.get("adapt", "")),
            policy=about.get("policy"),
            host=str(about.get("host", "")),
            started=began,
            seconds=seconds,
            exit_code=self.ended.exit_code if self.ended else None,
            ended=self.ended is not None,
            steps=sum(window.num_steps for window in sums),
            samples=samples,
            rate=samples / active if active > 0.0 else 0.0,
            parts=mean_parts([worker.parts for worker in workers]),
            workers=workers,
            windows=windows,
            num_decisions=len(self._decisions) + len(self._tuned) + len(self._paced),
            changes=sorted(self._changes(windows, began), key=lambda change: change.at),
            attempts=[self._attempt(group, began) for group in self.groups],
            straggler=find_straggler(windows, self.groups[-1].ranks) if self.groups else None,
            gain=gain,
            gain_error=error,
            why_even=why_even,
            notices=list(self._notices.values()),
            refused=self._refused,
            lost_reports=self._lost,
            incomplete_reports=sum(group.num_incomplete for group in self.groups),
            skipped_lines=skipped.lines,
            num_nodes=self._num_nodes,
        )

    def _attempt(self, group: Group, began: float) -> Attempt:
        return Attempt(
            attempt=group.attempt,
            began=group.began - began,
            ended=group.ended - began if group.state else None,
            state=group.state,
            workers=len(group.ranks),
            steps=sum(window.num_steps for window in group.windows),
        )

    def _workers(self, seconds: float) -> list[WorkerStory]:
        ranks = sorted({rank for group in self.groups for rank in group.ranks})
        totals = {rank: np.zeros(len(SUMS) + 1) for rank in ranks}
        steps, shares = dict.fromkeys(ranks, 0), dict.fromkeys(ranks, 0)
        for group in self.groups:
            for window in group.windows:
                asking = window.asking()
                for column, rank in enumerate(group.ranks):
                    totals[rank][:-1] += window.sums[:, column]
                    totals[rank][-1] += asking[column]
                    steps[rank] += window.num_steps
                    shares[rank] = window.shares[column]
        restarts = self._retuning_seconds()
        starting = max(0.0, self._between_steps(seconds) - restarts)
        busy = {rank: (total[1] + total[2]) / max(1.0, total[0]) for rank, total in totals.items()}
        return [
            self._worker(
                rank, steps[rank], shares[rank], totals[rank], slowness(busy, rank), starting, restarts, seconds
            )
            for rank in ranks
        ]

    def _worker(
        self,
        rank: int,
        steps: int,
        share: int,
        total: Any,
        slow: float | None,
        starting: float,
        restarts: float,
        seconds: float,
    ) -> WorkerStory:
        samples, data, compute, other, waiting, communication, adarun = total.tolist()
        data -= adarun
        known = starting + restarts + data + compute + other + waiting + communication + adarun
        used = self._resources.get(rank)
        parts = Parts(
            starting=starting,
            data=data,
            compute=compute,
            waiting=waiting,
            communication=communication,
            other=other + max(0.0, seconds - known),
            adarun=adarun + restarts,
        )
        return WorkerStory(
            rank=rank,
            steps=steps,
            samples=int(samples),
            share=share,
            parts=parts,
            slow=slow,
            cpu_fraction=used.cpu_fraction if used else None,
            memory_bytes=used.memory_bytes if used else None,
        )

    def _between_steps(self, seconds: float) -> float:
        """The time outside of all worker groups' first to last step."""
        spans = [
            max(w.ended for w in group.windows) - min(w.began for w in group.windows)
            for group in self.groups
            if group.windows
        ]
        return max(0.0, seconds - sum(spans))

    def _retuning_seconds(self) -> float:
        """From the last step under one setting to the first under the next."""
        stops = [
            (max(w.ended for w in before.windows), min(w.began for w in after.windows))
            for before, after in zip(self.groups, self.groups[1:], strict=False)
            if before.state == "RETUNED" and before.windows and after.windows
        ]
        return sum(max(0.0, begins - ended) for ended, begins in stops)

    def _gain(self) -> tuple[float | None, float | None, str]:
        if not self._plans:
            return None, None, "no plan was made, so nothing could be adapted"
        if all(plan.even for plan in self._plans):
            return None, None, self._plans[-1].reason
        controller = self.fitted()
        if controller is None:
            return None, None, "the run was too short to measure"
        return controller.even_seconds / controller.actual_seconds - 1.0, controller.gain_error, ""

    def _changes(self, windows: Sequence[WindowStory], began: float) -> Iterable[Change]:
        at_step = {window.start: window for window in windows}
        for seen, step, decision in self._decisions:
            if decision.chosen == decision.before:
                continue
            kind = decision.reason.partition(":")[0]
            brought, error = compare(self._windows, seen, decision)
            expected = kind == "re-split"
            begun = at_step.get(step)
            yield Change(
                kind=kind,
                at=decision.at - began if decision.at else (begun.began if begun else 0.0),
                step=step,
                before=",".join(map(str, decision.before)),
                after=",".join(map(str, decision.chosen)),
                reason=decision.reason,
                expected=decision.gain if expected else None,
                expected_error=decision.gain_error if expected else None,
                brought=brought,
                brought_error=error,
            )
        yield from self._given(windows)
        for number, tuned in enumerate(self._tuned):
            if tuned.restart:
                rates = rates_after(self._tuned[number + 1 :], tuned)
                yield Change(
                    kind="tuned",
                    at=tuned.at - began,
                    step=-1,
                    before=tuned.before,
                    after=tuned.chosen,
                    reason=tuned.reason,
                    brought=rates,
                )
        for paced in self._paced:
            if paced.chosen != paced.before:
                yield Change(
                    kind="paced",
                    at=paced.at - began,
                    step=-1,
                    before=paced.before,
                    after=paced.chosen,
                    reason=paced.reason,
                    expected=paced.gain,
                )

    def _given(self, windows: Sequence[WindowStory]) -> Iterable[Change]:
        """Changes of the shares that no decision stands for: those that the user gave."""
        at_plan = {window.plan: window for window in windows}
        for before, plan in zip(self._plans, self._plans[1:], strict=False):
            window = at_plan.get(plan.number)
            if window and before.attempt == plan.attempt and before.shares != plan.shares and "given" in plan.reason:
                yield Change(
                    kind="given",
                    at=window.began,
                    step=plan.start,
                    before=",".join(map(str, before.shares)),
                    after=",".join(map(str, plan.shares)),
                    reason=plan.reason,
                )


def told(window: WindowSums, attempt: int, began: float) -> WindowStory:
    """A window in means per step."""
    _, data, compute, other, waiting, communication = window.sums / max(1, window.num_steps)
    return WindowStory(
        plan=window.plan,
        attempt=attempt,
        start=window.start,
        steps=window.num_steps,
        began=window.began - began,
        ended=window.ended - began,
        step_seconds=window.seconds / max(1, window.num_steps),
        shares=window.shares,
        busy=(data + compute + other).tolist(),
        waiting=waiting.tolist(),
        communication=float(communication.mean()),
    )


def mean_parts(parts: Sequence[Parts]) -> Parts:
    """The mean of all workers'."""
    if not parts:
        return Parts()
    return Parts(**{name: fmean(getattr(part, name) for part in parts) for name in Parts.__struct_fields__})


def slowness(busy: dict[int, float], rank: int) -> float | None:
    """A worker's busy time per sample over the median of the others."""
    others = [seconds for other, seconds in busy.items() if other != rank]
    return float(busy[rank] / median(others)) if others and median(others) > 0.0 else None


def compare(windows: Sequence[Window], seen: int, decision: Decision) -> tuple[float | None, float | None]:
    """How much faster the steps after a decision were than those before it, and how far off that may be."""
    before = under(reversed(windows[:seen]), decision.before)
    after = under(windows[seen:], decision.chosen)
    if not before or not after:
        return None, None
    spread = [np.std(np.log(times), ddof=1) if len(times) > 1 else math.nan for times in (before, after)]
    known = [value for value in spread if not math.isnan(value)]
    usual = max(known) if known else 0.0
    error = usual * math.hypot(1.0 / math.sqrt(len(before)), 1.0 / math.sqrt(len(after)))
    return fmean(before) / fmean(after) - 1.0, float(error) if known else None


def under(windows: Iterable[Window], shares: Sequence[int]) -> list[float]:
    """The step times of the next windows, as long as they are under these shares."""
    times: list[float] = []
    for window in windows:
        if window.samples != shares or len(times) == COMPARED_WINDOWS:
            break
        times.append(window.step_seconds)
    return times


def rates_after(later: Sequence[Tuned], tuned: Tuned) -> float | None:
    """What a change of setting has brought: the rates of both, as the next lap under the new one shows them."""
    before = max((rate for rate in tuned.rates if rate), default=0.0)
    for following in later:
        if following.before == tuned.chosen:
            changed = [new for old, new in zip(tuned.rates, following.rates, strict=True) if new and new != old]
            return changed[0] / before - 1.0 if changed and before else None
    return None


def find_straggler(windows: Sequence[WindowStory], ranks: Sequence[int]) -> Straggler | None:
    """The worker that was slower than the others for longest, weighed by how much; None if that hardly mattered."""
    spans: list[tuple[float, int, list[int], Floats]] = []
    windows = [window for window in windows if len(window.shares) == len(ranks) and window.steps]
    if len(ranks) < 2 or not windows:
        return None
    per_sample = np.array([window.busy for window in windows]) / np.array([window.shares for window in windows])
    lengths = np.array([window.steps * window.step_seconds for window in windows])
    whole = float(lengths.sum())
    for column in range(len(ranks)):
        others = np.median(np.delete(per_sample, column, axis=1), axis=1)
        slow = per_sample[:, column] / np.maximum(others, 1e-15)
        for span in spans_of(np.flatnonzero(slow >= CHANGE_RATIO).tolist()):
            spans.append((float(((slow - 1.0) * lengths)[span].sum()), column, span, slow[span]))
    if not spans:
        return None
    held, column, span, slow = max(spans, key=lambda one: one[0])
    # One window among several may be chance.
    if held < WORTH_TELLING * whole or len(span) < min(2, len(windows)):
        return None
    during = [windows[number] for number in span]
    return Straggler(
        rank=ranks[column],
        slow=float(np.average(slow, weights=[window.steps for window in during])),
        since=during[0].began,
        since_step=during[0].start,
        until=None if span[-1] == len(windows) - 1 else during[-1].ended,
    )


def spans_of(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers that follow one another, or nearly so, together."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number - spans[-1][-1] <= 1 + FORGIVEN_WINDOWS:
            spans[-1].append(number)
        else:
            spans.append([number])
    return spans


def tell(directory: Path) -> Story:
    """The story of the run whose log is in a folder.

    Raises:
        AdarunError: there is no log, it is of a newer schema, or it is none of adarun's.
    """
    teller, skipped = Teller(), Skipped()
    for batch in read_batches(directory, skipped):
        teller.see(batch)
    require_events(directory, teller.num_events, skipped)
    return teller.story(read_about(directory), skipped)


def require_events(directory: Path, num_events: int, skipped: Skipped) -> None:
    """Say what is wrong with a log in which nothing can be read.

    Raises:
        AdarunError: it has no event.
    """
    path = directory / "events.jsonl"
    if not num_events and skipped.lines:
        raise AdarunError(f"{path} is no run log of adarun: none of its {skipped.lines} lines is an event")
    if not num_events:
        raise AdarunError(f"{path} is empty: nothing has happened in that run yet")

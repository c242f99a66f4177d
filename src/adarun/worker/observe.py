"""Where a worker's time goes, cut at five boundaries that partition each step.

    draw -> data -> drawn -> forward -> backward starts -> backward -> gradients ready -> wait -> synchronised -> update -> draw

On the CPU a boundary is a clock reading. On CUDA, where the host runs ahead of the device, it is an event in the current
stream, read after the device passed it, so nothing waits for the device.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import Any

import torch

from adarun.events import MAX_REPORTS, Step, Steps

# Reports kept while the hub does not read: about a minute of very short steps.
MAX_PENDING = 1 << 16

DATA, FORWARD, BACKWARD, WAIT, UPDATE = range(5)

# step, samples, counted, seconds by phase (five), the host's clock at its end, and on CUDA the marks: (phase, event) each.
# Flat, since the garbage collector then need not look at those that wait to be sent.
Marks = list[tuple[int, Any]]
RawStep = tuple[int, int, bool, float, float, float, float, float, float, Marks | None]


class Observer:
    """Collects marks in the training thread and turns them into reports in the sending one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.cuda = False
        self.lost = 0
        # Moments are logged as Unix times but measured on the monotonic clock, which nobody sets.
        self._epoch = time.time() - time.perf_counter()
        # Of the open step: the phase that runs, since when, and the sums so far; on CUDA all marks instead.
        self._phase, self._since = DATA, 0.0
        self._seconds = [0.0] * 5
        self._marks: Marks | None = None
        self._open = False
        self._step = self._samples = 0
        self._counted = True
        self._closed: deque[RawStep] = deque()
        self._spare_events: deque[Any] = deque()

    # The next three run in every step: what they share is written out, since each call in Python costs up to a microsecond.

    def begin(self) -> None:
        """The script draws its next batch: the step before ends here."""
        now = time.perf_counter()
        if self._open:
            self._close(now)
        self._phase, self._since, self._counted, self._seconds = DATA, now, True, [0.0] * 5
        if self.cuda:
            self._marks = [(DATA, self._event())]

    def drawn(self, step: int, samples: int) -> None:
        """The batch is there."""
        now = time.perf_counter()
        self._seconds[DATA] += now - self._since
        self._phase, self._since = FORWARD, now
        self._open, self._step, self._samples = True, step, samples
        if self._marks is not None:
            self._marks.append((FORWARD, self._event()))

    def phase(self, phase: int) -> None:
        """Another phase begins inside the open step."""
        if self._open:
            now = time.perf_counter()
            self._seconds[self._phase] += now - self._since
            self._phase, self._since = phase, now
            if self._marks is not None:
                self._marks.append((phase, self._event()))

    def now(self) -> float:
        """The present moment on the clock of the reports, as a Unix time."""
        return self._epoch + time.perf_counter()

    def disturb(self) -> None:
        """Something that is not training happens inside this step: do not draw conclusions from it."""
        self._counted = False

    def end(self) -> None:
        """The loop over the loader is over, so the open step is."""
        if self._open:
            self._close(time.perf_counter())
        self._counted = True

    def drain(self) -> Steps | None:
        """The finished steps since the last call, at most `MAX_REPORTS`; None if there are none."""
        reports: list[Step] = []
        while self._closed and len(reports) < MAX_REPORTS:
            raw = self._closed[0]
            marks = raw[-1]
            if marks is not None and not marks[-1][1].query():
                break
            reports.append(self._report(self._closed.popleft()))
        if not reports and not self.lost:
            return None
        lost, self.lost = self.lost, 0
        return Steps(reports=reports, lost=lost)

    def _event(self) -> Any:
        event = self._spare_events.popleft() if self._spare_events else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _close(self, now: float) -> None:
        seconds = self._seconds
        seconds[self._phase] += now - self._since
        if self._marks is not None:
            self._marks.append((UPDATE, self._event()))
        self._closed.append((self._step, self._samples, self._counted, *seconds, now, self._marks))  # type: ignore[arg-type]
        self._open = False
        if len(self._closed) > MAX_PENDING:
            self._closed.popleft()
            self.lost += 1

    def _report(self, raw: RawStep) -> Step:
        step, samples, counted, data, forward, backward, wait, update, ended, marks = raw
        if marks is not None:
            seconds = [0.0] * 5
            for (phase, began), (_, until) in itertools.pairwise(marks):
                seconds[phase] += max(0.0, began.elapsed_time(until) / 1000.0)
            self._spare_events.extend(event for _, event in marks)
            data, forward, backward, wait, update = seconds
        # Tenths of a microsecond are enough for the log; round() takes five times as long.
        return Step(
            rank=self.rank,
            step=step,
            samples=samples,
            data=int(data * 1e7 + 0.5) / 1e7,
            forward=int(forward * 1e7 + 0.5) / 1e7,
            backward=int(backward * 1e7 + 0.5) / 1e7,
            wait=int(wait * 1e7 + 0.5) / 1e7,
            update=int(update * 1e7 + 0.5) / 1e7,
            ended=int((self._epoch + ended) * 1e6 + 0.5) / 1e6,
            counted=counted,
        )

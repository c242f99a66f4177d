"""Where a worker's time goes, cut at five boundaries that partition each step.

    draw -> data -> drawn -> forward -> backward starts -> backward -> gradients ready -> wait -> synchronised -> update -> draw

On the CPU a boundary is a clock reading. On CUDA, where the host runs ahead of the device, it is an event in the current
stream, read after the device passed it, so nothing waits for the device.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from adarun.events import MAX_REPORTS, Step, Steps

# Reports kept while the hub does not read: about a minute of very short steps.
MAX_PENDING = 1 << 16

DATA, FORWARD, BACKWARD, WAIT, UPDATE = range(5)

# step, samples, counted, marks; a mark is (the phase that begins here, host seconds, CUDA event or None).
Mark = tuple[int, float, Any]
RawStep = tuple[int, int, bool, list[Mark]]


class Observer:
    """Collects marks in the training thread and turns them into reports in the sending one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.cuda = False
        self.lost = 0
        # Moments are logged as Unix times but measured on the monotonic clock, which nobody sets.
        self._epoch = time.time() - time.perf_counter()
        self._marks: list[Mark] = []
        self._open: tuple[int, int] | None = None
        self._counted = True
        self._closed: deque[RawStep] = deque()
        self._spare_events: deque[Any] = deque()

    def begin(self) -> None:
        """The script draws its next batch: the step before ends here."""
        self._close(DATA)
        self._marks = [self._mark(DATA)]

    def drawn(self, step: int, samples: int) -> None:
        """The batch is there."""
        self._open = (step, samples)
        self._marks.append(self._mark(FORWARD))

    def phase(self, phase: int) -> None:
        """Another phase begins inside the open step."""
        if self._open is not None:
            self._marks.append(self._mark(phase))

    def disturb(self) -> None:
        """Something that is not training happens inside this step: do not draw conclusions from it."""
        self._counted = False

    def end(self) -> None:
        """The loop over the loader is over, so the open step is."""
        self._close(UPDATE)

    def drain(self) -> Steps | None:
        """The finished steps since the last call, at most `MAX_REPORTS`; None if there are none."""
        reports: list[Step] = []
        while self._closed and len(reports) < MAX_REPORTS:
            raw = self._closed[0]
            if raw[3][-1][2] is not None and not raw[3][-1][2].query():
                break
            reports.append(self._report(self._closed.popleft()))
        if not reports and not self.lost:
            return None
        lost, self.lost = self.lost, 0
        return Steps(reports=reports, lost=lost)

    def _mark(self, phase: int) -> Mark:
        if not self.cuda:
            return (phase, time.perf_counter(), None)
        event = self._spare_events.popleft() if self._spare_events else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return (phase, time.perf_counter(), event)

    def _close(self, phase: int) -> None:
        if self._open is not None:
            step, samples = self._open
            self._closed.append((step, samples, self._counted, [*self._marks, self._mark(phase)]))
            if len(self._closed) > MAX_PENDING:
                self._closed.popleft()
                self.lost += 1
        self._open, self._counted, self._marks = None, True, []

    def _report(self, raw: RawStep) -> Step:
        step, samples, counted, marks = raw
        seconds = [0.0] * 5
        phase, began, event = marks[0]
        for mark in marks[1:]:
            if event is None:
                seconds[phase] += mark[1] - began
            else:
                seconds[phase] += max(0.0, event.elapsed_time(mark[2]) / 1000.0)
            phase, began, event = mark
        if event is not None:
            self._spare_events.extend(mark[2] for mark in marks)
        data, forward, backward, wait, update = [round(value, 7) for value in seconds]
        return Step(
            rank=self.rank,
            step=step,
            samples=samples,
            data=data,
            forward=forward,
            backward=backward,
            wait=wait,
            update=update,
            ended=round(self._epoch + began, 6),
            counted=counted,
        )

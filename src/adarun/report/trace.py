"""A run as a Chrome trace, which Perfetto and chrome://tracing open: a track per worker, a slice per phase of a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from adarun.events import Decision, Logged, Notice, Paced, Plan, Resources, Step, Tuned, WorkersEnded, WorkersStarted
from adarun.runlog import Skipped, read_batches

PHASES = ("data", "forward", "backward", "wait", "update")
CONTROL = 0  # the track of the decisions, in a process of its own; the workers are in process 1


def write_trace(directory: Path, path: Path) -> None:
    """Write the trace of the run in `directory` to a file, event by event.

    Raises:
        OSError: it cannot be written.
    """
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        lead = b""
        for event in trace_events(directory):
            file.write(lead + encoder.encode(event))
            lead = b",\n"
        file.write(b"\n]}\n")


def trace_events(directory: Path) -> Iterator[dict[str, Any]]:
    """The trace's events; moments are in microseconds since the first one in the log."""
    named: set[int] = set()
    yield {"ph": "M", "name": "process_name", "pid": 0, "tid": CONTROL, "args": {"name": "adarun"}}
    yield {"ph": "M", "name": "thread_name", "pid": 0, "tid": CONTROL, "args": {"name": "decisions"}}
    yield {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "workers"}}
    ends: dict[int, float] = {}
    began, now = 0.0, 0.0
    for batch in read_batches(directory, Skipped()):
        for event in batch:
            at = event.ended if isinstance(event, Step) else getattr(event, "at", 0.0)
            now = max(now, at)
            began = began or (at - event.seconds if isinstance(event, Step) else at)
            if isinstance(event, Step):
                if event.rank not in named:
                    named.add(event.rank)
                    yield {
                        "ph": "M",
                        "name": "thread_name",
                        "pid": 1,
                        "tid": event.rank,
                        "args": {"name": f"rank {event.rank}"},
                    }
                # Clocks are read one after the other: a step may seem to begin a little before the last one's end.
                yield from slices(event, began, ends.get(event.rank, 0.0))
                ends[event.rank] = max(ends.get(event.rank, 0.0), micro(event.ended - began))
            else:
                yield from marks(event, (at or now) - began)


def slices(step: Step, began: float, not_before: float) -> Iterator[dict[str, Any]]:
    """A step, and the phases in it; slices of a track must not overlap unless one is inside the other."""
    moments = [step.ended - step.seconds - began]
    for name in PHASES:
        moments.append(moments[-1] + getattr(step, name))
    end = max(not_before, micro(step.ended - began))
    at = [min(end, max(not_before, micro(moment))) for moment in moments]
    where = {"ph": "X", "pid": 1, "tid": step.rank}
    args = {"samples": step.samples, "counted": step.counted}
    yield {**where, "name": f"step {step.step}", "cat": "step", "ts": at[0], "dur": length(at[0], end), "args": args}
    for name, start, stop in zip(PHASES, at[:-1], at[1:], strict=True):
        if stop > start:
            yield {**where, "name": name, "cat": "phase", "ts": start, "dur": length(start, stop)}


def length(start: float, stop: float) -> float:
    """Microseconds between two moments, to the nanosecond."""
    return round(stop - start, 3)


def marks(event: Logged, at: float) -> Iterator[dict[str, Any]]:
    """What happened besides steps: instants on the track of the decisions, and counters."""
    if isinstance(event, Plan):
        shares = {f"rank {rank}": share for rank, share in enumerate(event.shares)}
        yield {"ph": "C", "name": "shares", "pid": 0, "tid": CONTROL, "ts": micro(at), "args": shares}
    elif isinstance(event, Resources):
        used = {f"rank {event.rank}": round(event.cpu_fraction, 3)}
        yield {"ph": "C", "name": "cpu", "pid": 1, "tid": 0, "ts": micro(at), "args": used}
    elif isinstance(event, Decision | Tuned | Paced):
        yield instant(event.reason, at)
    elif isinstance(event, Notice):
        yield instant(event.text, at)
    elif isinstance(event, WorkersStarted):
        yield instant(f"attempt {event.attempt} starts", at)
    elif isinstance(event, WorkersEnded):
        yield instant(f"attempt {event.attempt} ends: {event.state}", at)


def instant(name: str, at: float) -> dict[str, Any]:
    """A moment with a name."""
    return {"ph": "i", "s": "g", "name": name, "cat": "adarun", "pid": 0, "tid": CONTROL, "ts": micro(at)}


def micro(seconds: float) -> float:
    """Microseconds, to the nanosecond."""
    return round(max(0.0, seconds) * 1e6, 3)

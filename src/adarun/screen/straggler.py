"""Which worker holds the others back, and why, from what was measured of each; pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from adarun.events import WorkerNow

# Who is busy so much of a step longer than the median of the others makes them wait.
HOLDS_BACK = 0.05
# The part of its excess that a single cause must explain.
EXPLAINS = 0.5
# CPU time per second of work, against the others'.
THROTTLED = 0.75
# Only who computes on the CPU can miss it.
COMPUTES_ON_CPU = 0.5
FULL_MEMORY = 0.9


def straggler(workers: Sequence[WorkerNow]) -> tuple[int | None, str, str]:
    """Rank, cause and a sentence; the cause is data, cpu, memory, share or compute. None if nobody holds the others back."""
    measured = [row for row in workers if row.busy_seconds > 0.0]
    if len(measured) < 2:
        return None, "", ""
    slow = max(measured, key=lambda row: row.busy_seconds)
    others = [row for row in measured if row is not slow]
    excess = slow.busy_seconds - median(row.busy_seconds for row in others)
    if excess <= HOLDS_BACK * (slow.busy_seconds + slow.wait_seconds):
        return None, "", ""
    cause, why = _cause(slow, others, excess)
    return slow.rank, cause, f"rank {slow.rank} holds the others back by {excess * 1e3:.1f} ms: {why}"


def _cause(slow: WorkerNow, others: Sequence[WorkerNow], excess: float) -> tuple[str, str]:
    data = slow.data_seconds - median(row.data_seconds for row in others)
    if data > EXPLAINS * excess:
        return "data", f"waits {slow.data_seconds * 1e3:.1f} ms for its data"
    capacity = slow.gpu_capacity_bytes
    if capacity and (slow.gpu_memory_bytes or 0) > FULL_MEMORY * capacity:
        return "memory", f"its GPU's memory is {(slow.gpu_memory_bytes or 0) / capacity:.0%} full"
    usual = median(_cpu_per_busy(row) for row in others)
    if slow.gpu_fraction is None and usual > COMPUTES_ON_CPU and 0.0 < _cpu_per_busy(slow) < THROTTLED * usual:
        return "cpu", f"gets {slow.cpu_fraction:.0%} of a core, throttled or shared"
    mine, theirs = _per_sample(slow), median(_per_sample(row) for row in others)
    if mine and theirs and mine <= theirs * (1.0 + HOLDS_BACK):
        return "share", f"its share of {slow.share} samples is large for it"
    if mine and theirs:
        return "compute", f"{mine * 1e3:.2f} ms a sample, the others {theirs * 1e3:.2f} ms"
    return "compute", "computes for longer"


def _cpu_per_busy(row: WorkerNow) -> float:
    """CPU seconds per second of work: of a process that the kernel holds back it is below the others'."""
    seconds = row.busy_seconds + row.wait_seconds
    return (row.cpu_fraction or 0.0) * seconds / row.busy_seconds


def _per_sample(row: WorkerNow) -> float:
    return (row.busy_seconds - row.data_seconds) / row.share if row.share else 0.0

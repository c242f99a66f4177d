"""The integer split of a global batch that lets the last worker finish first.

A worker's cost is affine: a_i + c_i k seconds for k samples. A split that is merely proportional to speed overshoots as
soon as a worker has a fixed cost a_i > 0.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
# Left-over samples are handed out to many workers at once, so often; what is left then, one by one.
VECTOR_ROUNDS = 50


def finish_seconds(fixed: Floats, per_sample: Floats, shares: Sequence[int] | Ints) -> float:
    """When the last worker is done, in seconds; all arrays have shape (workers,)."""
    return float(np.max(fixed + per_sample * np.asarray(shares, dtype=np.float64)))


def min_max_split(fixed: Floats, per_sample: Floats, total: int, lower: Ints, upper: Ints) -> Ints:
    """The integer shares in [lower, upper] that sum to `total` and finish earliest.

    Water-filling gives the real-valued optimum, which never exceeds the integer one in any worker; from its floor, each
    left-over sample goes to whoever finishes first with it. Both together are exact, in O(n log n).

    Args:
        fixed: a_i >= 0, seconds, shape (workers,).
        per_sample: c_i > 0, seconds per sample, shape (workers,).
        total: the global batch.
        lower: smallest allowed share per worker.
        upper: largest allowed share per worker.

    Raises:
        ValueError: no split within the bounds sums to `total`.
    """
    if not lower.sum() <= total <= upper.sum():
        raise ValueError(f"no split of {total} samples lies between {lower.sum()} and {upper.sum()}")
    # As the water level (the finish time) rises, a worker takes 1/c_i samples a second between its two breakpoints.
    levels = np.concatenate([fixed + per_sample * lower, fixed + per_sample * upper])
    slopes = np.concatenate([1.0 / per_sample, -1.0 / per_sample])
    order = np.argsort(levels, kind="stable")
    levels, slopes = levels[order], np.cumsum(slopes[order])
    filled = lower.sum() + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(levels))])
    at = int(np.searchsorted(filled, total, side="right")) - 1
    level = levels[at] + ((total - filled[at]) / slopes[at] if at < len(levels) - 1 and slopes[at] > 0 else 0.0)
    # The tiny step down keeps rounding errors from lifting a share above its real-valued optimum.
    ideal = (level - fixed) / per_sample
    shares: Ints = np.clip(np.floor(ideal - 1e-9 * (1.0 + np.abs(ideal))), lower, upper).astype(np.int64)
    return hand_out(fixed, per_sample, shares, upper, total - int(shares.sum()))


def hand_out(fixed: Floats, per_sample: Floats, shares: Ints, upper: Ints, left: int) -> Ints:
    """Give each of the `left` samples to whoever finishes first with one more; the lower rank on a tie."""
    shares = shares.copy()
    # All at once to those who would all have had one before anybody had two; with very unequal rates that would take long.
    for _ in range(VECTOR_ROUNDS):
        if left <= 0:
            return shares
        finish = np.where(shares < upper, fixed + per_sample * (shares + 1), np.inf)
        first = np.argsort(finish, kind="stable")[:left]
        first = first[finish[first] < (finish + per_sample).min()]
        shares[first] += 1
        left -= len(first)
    # Plain numbers: one look into an array takes as long as the whole rest of a turn.
    given, most, base, step = shares.tolist(), upper.tolist(), fixed.tolist(), per_sample.tolist()
    heap = [(base[i] + step[i] * (given[i] + 1), i) for i in range(len(given)) if given[i] < most[i]]
    heapq.heapify(heap)
    for _ in range(left):
        _, i = heap[0]
        given[i] += 1
        if given[i] < most[i]:
            heapq.heapreplace(heap, (base[i] + step[i] * (given[i] + 1), i))
        else:
            heapq.heappop(heap)
    return np.array(given, dtype=np.int64)

"""What may not be tried, and what ends early: every answer is a reason in words, or an empty string for "go ahead"."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# The job may take so many times as long as the baseline would have for the same work, at any moment.
BUDGET = 1.05
# A trial this much slower than the incumbent ends after so many steps.
ABORT_FACTOR = 1.5
ABORT_STEPS = 3
# How often a switch has to pay for itself in the time that is left.
PAYBACK = 3.0
MEMORY_PART = 0.9
# Shares closer than this factor tell nothing of the slope: allocators work in blocks.
DISTINCT_SHARES = 1.25


class Budget:
    """Conservative exploration (Wu et al., ICML 2016): what was gained over the baseline may be spent, and a little more.

    Work is counted in useful samples. Times are meant without what all workers share (`CostModel.common`): a hotter machine
    room is no trial's fault.
    """

    def __init__(self) -> None:
        self.spent_seconds = 0.0
        # How long the baseline would have taken for the same work.
        self.baseline_seconds = 0.0
        self._baseline_rate = 0.0

    def start(self, baseline_rate: float) -> None:
        """Set what the baseline does, in useful samples per second; what was spent so far stays."""
        self._baseline_rate = baseline_rate

    def spend(self, useful: float, seconds: float) -> None:
        """Take in what was done since the last call, and how long it took."""
        self.spent_seconds += seconds
        self.baseline_seconds += useful / self._baseline_rate

    def refuses(
        self,
        useful: float,
        lowest_rate: float,
        incumbent_rate: float,
        *,
        rest: float = 0.0,
        cost_seconds: float = 0.0,
    ) -> str:
        """Why a trial of so much work must not be made, if it may be as slow as `lowest_rate`.

        A NaN stands for no idea: then it is as slow as a trial can be before it is aborted. `rest` is the work that is
        known to follow, done at least as fast as by the incumbent; `cost_seconds` is what the switch takes, and back again.
        """
        rate = incumbent_rate / ABORT_FACTOR
        if not math.isnan(lowest_rate):
            rate = max(rate, lowest_rate)
        spent = self.spent_seconds + cost_seconds + useful / rate + rest / incumbent_rate
        allowed = BUDGET * (self.baseline_seconds + (useful + rest) / self._baseline_rate)
        if spent <= allowed:
            return ""
        return (
            f"refused: the job could then have taken {spent:.1f} s, and {allowed:.1f} s is what the baseline allows it"
        )


class Memory:
    """How much memory one worker takes for a share: affine from two distinct shares, proportional from one."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        # The smallest and the largest share that were seen, with their peaks.
        self._peaks: dict[float, float] = {}

    def see(self, share: float, peak: float) -> None:
        """Take in the peak of some steps, in the same unit as the capacity."""
        self._peaks[share] = max(peak, self._peaks.get(share, 0.0))
        self._peaks = {k: self._peaks[k] for k in (min(self._peaks), max(self._peaks))}

    def predict(self, share: float) -> float:
        """The peak for a share, or 0 before any was seen."""
        if not self._peaks:
            return 0.0
        low, high = min(self._peaks), max(self._peaks)
        if high < DISTINCT_SHARES * low:
            return self._peaks[high] * share / high
        slope = max(0.0, self._peaks[high] - self._peaks[low]) / (high - low)
        return self._peaks[high] + slope * (share - high)

    def largest_share(self, limit: int) -> int:
        """The most samples, up to `limit`, for which the peak stays within the allowed part; at least what was seen."""
        if not self._peaks:
            return limit
        allowed, low, high = MEMORY_PART * self.capacity, int(max(self._peaks)), limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.predict(middle) <= allowed else (low, middle - 1)
        return low

    def refuses(self, share: float) -> str:
        """Why this worker must not be given such a share; one no larger than it had may always come back."""
        peak = self.predict(share)
        if share <= max(self._peaks, default=0.0) or peak <= MEMORY_PART * self.capacity:
            return ""
        return (
            f"{share:g} samples would need {peak / self.capacity:.0%} of its memory, "
            f"and {MEMORY_PART:.0%} is the most allowed"
        )


def refuses_switch(saved: float, remaining_seconds: float, cost_seconds: float) -> str:
    """Why a switch does not pay that saves a part of the time that is left and costs some of it first."""
    gain = saved * remaining_seconds
    if gain >= PAYBACK * cost_seconds:
        return ""
    return f"refused: the switch costs {cost_seconds:.1f} s and would save {max(0.0, gain):.1f} s, not {PAYBACK:g} times as much"


def aborts(trial_seconds: Sequence[float], incumbent_seconds: float) -> str:
    """Why a trial ends at once, from its steps so far; all times are per useful sample."""
    if len(trial_seconds) < ABORT_STEPS:
        return ""
    # One long step may be an accident.
    times = statistics.median(trial_seconds) / incumbent_seconds
    if times < ABORT_FACTOR:
        return ""
    return f"aborted: after {len(trial_seconds)} steps the trial is {times:.1f} times as slow as the incumbent"

"""Decides the shares of the next plan from the windows so far; live and replayed alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adarun.control.cost import NOISE_FLOOR, CostModel
from adarun.control.guard import Memory
from adarun.control.split import Floats, Ints, finish_seconds, min_max_split
from adarun.events import Decision, Window, apportion

# No change for less; but once the split is uneven, to move a few samples more is cheap.
DEAD_BAND = 0.02
REFINEMENT = 0.005
GAIN_ERRORS = 2.5
# A change that turns out so much worse, and beyond its error, is taken back.
WORSE = 0.01
# After so many windows a change that is neither better nor worse stays.
TRIAL_WINDOWS = 8
# How much step times are taken to vary from window to window before they have shown it.
FIRST_SPREAD = 0.02
SPREAD_MEMORY = 0.9
MIN_WINDOW_STEPS = 20
MIN_WINDOW_SECONDS = 2.0
MAX_WINDOW_STEPS = 1_000_000
FIRST_HOLD = 4
MAX_HOLD = 64


@dataclass
class Trial:
    """Shares that a change has left, to go back to, and how long a step took under them, relative to `CostModel.common`."""

    shares: list[int]
    seconds: float
    error: float


class Controller:
    """The model of one worker group's costs and the shares it has now."""

    def __init__(self, num_workers: int, scripted: Sequence[Sequence[int]] = (), max_share: int = 0) -> None:
        """`scripted`: splits to cycle through instead of deciding, one a plan, as proportions of the global batch.

        `max_share`: the most samples per step that a worker may get, 0 for no limit.
        """
        self.model = CostModel(num_workers)
        self.shares: list[int] = []
        self.step_seconds = 0.0
        self.actual_seconds = 0.0
        self.even_seconds = 0.0
        self._num_workers = num_workers
        self._scripted = scripted
        self._num_scripted = 0
        self._max_share = max_share
        # By rank, where the device's memory is known.
        self.memories: dict[int, Memory] = {}
        # Step times of the windows under the present shares, relative to `CostModel.common`.
        self._times: list[float] = []
        # The variance of their logarithms from window to window.
        self._times_variance = FIRST_SPREAD**2
        self._trial: Trial | None = None
        self._failed: list[int] = []
        self._hold = 0
        self._next_hold = FIRST_HOLD

    def window_steps(self) -> int:
        """How many steps the next plan covers: enough to measure, few enough to react."""
        if self.step_seconds <= 0.0:
            return MIN_WINDOW_STEPS
        return min(MAX_WINDOW_STEPS, max(MIN_WINDOW_STEPS, math.ceil(MIN_WINDOW_SECONDS / self.step_seconds)))

    def start(self, global_batch: int) -> list[int]:
        """The first shares of a worker group, and all that it may have while it is frozen: even ones."""
        even = apportion([1] * self._num_workers, global_batch)
        if even != self.shares:
            self._times, self._trial = [], None
        self.shares = even
        return self.shares

    def next_scripted(self, global_batch: int) -> list[int] | None:
        """The next of the splits that the user asked for, or None if there are none."""
        if not self._scripted:
            return None
        weights = self._scripted[self._num_scripted % len(self._scripted)]
        self._num_scripted += 1
        self.shares = apportion(weights, global_batch)
        return self.shares

    def learn(self, window: Window) -> None:
        """Take in what was measured under the present shares."""
        self.model.learn(window)
        self.step_seconds = window.step_seconds
        self._take_time(window.step_seconds / self.model.common)
        # What the even split would have taken: the same step but for its longest busy time.
        samples = np.array(window.samples)
        even = np.full(self._num_workers, samples.sum() / self._num_workers)
        saved = float(self.model.predict(even).max() - self.model.predict(samples).max())
        self.actual_seconds += window.steps * window.step_seconds
        self.even_seconds += window.steps * (window.step_seconds + saved)

    def forget_times(self) -> None:
        """Steps will take another time for another reason than the shares: compare none with those before."""
        self._times, self._trial = [], None

    def decide(self, window: Window, global_batch: int) -> Decision:
        """The shares after `window`, which `learn` has taken in."""
        model, now = self.model, self.shares
        bounds = (np.ones(self._num_workers, dtype=np.int64), self._largest_shares(global_batch))
        # A sample is never free, whatever the fit says.
        per_sample: Floats = np.maximum(model.per_sample, 1e-12)
        best = min_max_split(model.fixed, per_sample, global_batch, *bounds).tolist()
        now_seconds = finish_seconds(model.fixed, per_sample, now)
        best_seconds = finish_seconds(model.fixed, per_sample, best)
        # Everything of a step that is not the longest busy time stays as it is.
        rest = max(0.0, window.step_seconds - now_seconds)
        gain = (now_seconds + rest) / (best_seconds + rest) - 1.0
        chosen, reason = self._choose(best, gain)
        if capped := np.flatnonzero(np.array(best) >= bounds[1]).tolist():
            reason += f"; rank {capped[0]} may have no more than {best[capped[0]]} samples"
        if chosen != now:
            self.shares, self._times = chosen, []
        return Decision(
            plan=window.plan,
            before=now,
            proposed=best,
            chosen=chosen,
            fixed_seconds=np.round(model.fixed, 9).tolist(),
            sample_seconds=np.round(model.per_sample, 12).tolist(),
            gain=round(gain, 6),
            gain_error=round(self._error(now, best), 6),
            reason=reason,
        )

    def _largest_shares(self, global_batch: int) -> Ints:
        """The most that each worker may get; never less than it has, since the even split is the user's own."""
        limit = self._max_share or global_batch
        largest = np.full(self._num_workers, limit, dtype=np.int64)
        for rank, memory in self.memories.items():
            largest[rank] = memory.largest_share(limit)
        return np.maximum(largest, self.shares)

    @property
    def gain_error(self) -> float:
        """How far off the estimated gain over the even split may be, relative."""
        return self._error(apportion([1] * self._num_workers, sum(self.shares)), self.shares)

    def _error(self, now: list[int], best: list[int]) -> float:
        """How far off the predicted gain may be, relative: the errors of the two workers that it compares."""
        model = self.model
        slowest_now = int(np.argmax(model.predict(np.array(now, dtype=np.float64))))
        slowest_then = int(
            np.argmax(model.predict(np.array(best, dtype=np.float64)) * (np.arange(len(best)) != slowest_now))
        )
        return float(math.hypot(model.error[slowest_now], model.error[slowest_then]))

    def _choose(self, best: list[int], gain: float) -> tuple[list[int], str]:
        now, changed = self.shares, self._unrelated_change()
        if changed:
            # Times from before it are of another machine.
            self._times, self._trial = self._times[-1:], None
            self._hold = 0
        elif self._trial is not None and (reason := self._judge(self._trial)):
            back, self._failed, self._trial = self._trial.shares, now, None
            return back, reason
        if self._hold > 0:
            self._hold -= 1
            return now, f"kept: the last change made it worse, {self._hold} more windows before another"
        if best == now:
            return now, "kept: this split is the best one"
        even = max(now) - min(now) <= 1
        if gain <= (DEAD_BAND if even else REFINEMENT):
            return now, f"kept: the best split would gain {gain:.1%}, which is not worth a change"
        error = self._error(now, best)
        # The more workers, the further off is the one that looks slowest; in a split already made for them that is settled.
        among = self._num_workers if even else 2
        if gain <= math.sqrt(GAIN_ERRORS**2 + 2.0 * math.log(max(1.0, among / 2))) * error:
            return now, f"kept: a gain of {gain:.1%} is within the noise of {error:.1%}"
        if self._trial is None:
            self._trial = Trial(now, float(np.mean(self._times)), self._times_error())
        slowest = int(np.argmax(self.model.predict(np.array(now, dtype=np.float64))))
        return best, f"re-split: rank {slowest} holds a step back, a gain of {gain:.0%} is expected"

    def _take_time(self, seconds: float) -> None:
        if self._times and not self.model.changed.any():
            squared = math.log(seconds / self._times[-1]) ** 2 / 2.0
            # An accident says little of the usual.
            squared = min(squared, 9.0 * self._times_variance)
            self._times_variance = SPREAD_MEMORY * self._times_variance + (1.0 - SPREAD_MEMORY) * squared
        self._times.append(seconds)

    def _unrelated_change(self) -> bool:
        """Whether a worker changed for another reason than what was tried."""
        tried, usual = self.shares, self.shares
        if self._trial is not None:
            usual = self._trial.shares
        elif self._hold > 0:
            tried = self._failed
        # Who was given more and became slower did so because of it, and when it is taken back becomes faster again.
        others = np.array(tried) <= np.array(usual)
        return bool((self.model.changed & others).any())

    def _judge(self, trial: Trial) -> str:
        """Why the trial is to be taken back, or an empty string; ends it if it is known to be none the worse."""
        seconds = float(np.mean(self._times))
        change, error = seconds / trial.seconds - 1.0, math.hypot(trial.error, self._times_error())
        if change > max(WORSE, GAIN_ERRORS * error):
            self._hold, self._next_hold = self._next_hold, min(MAX_HOLD, 2 * self._next_hold)
            scale = self.model.common * 1e3
            return (
                f"rolled back: a step takes {seconds * scale:.1f} ms, before the change it took "
                f"{trial.seconds * scale:.1f} ms; no new split for {self._hold} windows"
            )
        if change < -GAIN_ERRORS * error or len(self._times) >= TRIAL_WINDOWS:
            self._trial = None
        return ""

    def _times_error(self) -> float:
        """The relative error of the mean of `_times`."""
        return math.sqrt(max(self._times_variance, NOISE_FLOOR**2) / len(self._times))

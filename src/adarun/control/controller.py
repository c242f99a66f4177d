"""Decides the shares of the next plan from the windows so far; live and replayed alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adarun.control.cost import CostModel
from adarun.control.split import Floats, finish_seconds, min_max_split
from adarun.events import Decision, Window, apportion

DEAD_BAND = 0.02
GAIN_ERRORS = 2.0
WORSE = 0.05
MIN_WINDOW_STEPS = 20
MIN_WINDOW_SECONDS = 2.0
MAX_WINDOW_STEPS = 1_000_000
FIRST_HOLD = 4
MAX_HOLD = 64


class Controller:
    """The model of one worker group's costs and the shares it has now."""

    def __init__(self, num_workers: int, scripted: Sequence[Sequence[int]] = ()) -> None:
        """`scripted`: splits to cycle through instead of deciding, one a plan, as proportions of the global batch."""
        self.model = CostModel(num_workers)
        self.shares: list[int] = []
        self.step_seconds = 0.0
        self.actual_seconds = 0.0
        self.even_seconds = 0.0
        self._num_workers = num_workers
        self._scripted = scripted
        self._num_scripted = 0
        # The shares before the last change, how long a step then took, and how sure that was.
        self._before: tuple[list[int], float, float] | None = None
        self._hold = 0
        self._next_hold = FIRST_HOLD

    def window_steps(self) -> int:
        """How many steps the next plan covers: enough to measure, few enough to react."""
        if self.step_seconds <= 0.0:
            return MIN_WINDOW_STEPS
        return min(MAX_WINDOW_STEPS, max(MIN_WINDOW_STEPS, math.ceil(MIN_WINDOW_SECONDS / self.step_seconds)))

    def start(self, global_batch: int) -> list[int]:
        """The first shares of a worker group, and all that it may have while it is frozen: even ones."""
        self.shares = apportion([1] * self._num_workers, global_batch)
        self._before = None
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
        # What the even split would have taken: the same step but for its longest busy time.
        samples = np.array(window.samples)
        even = np.full(self._num_workers, samples.sum() / self._num_workers)
        saved = float(self.model.predict(even).max() - self.model.predict(samples).max())
        self.actual_seconds += window.steps * window.step_seconds
        self.even_seconds += window.steps * (window.step_seconds + saved)

    def decide(self, window: Window, global_batch: int) -> Decision:
        """The shares after `window`, which `learn` has taken in."""
        model, now = self.model, self.shares
        bounds = (np.ones(self._num_workers, dtype=np.int64), np.full(self._num_workers, global_batch, dtype=np.int64))
        # A sample is never free, whatever the fit says.
        per_sample: Floats = np.maximum(model.per_sample, 1e-12)
        best = [int(k) for k in min_max_split(model.fixed, per_sample, global_batch, *bounds)]
        now_seconds = finish_seconds(model.fixed, per_sample, now)
        best_seconds = finish_seconds(model.fixed, per_sample, best)
        # Everything of a step that is not the longest busy time stays as it is.
        rest = max(0.0, window.step_seconds - now_seconds)
        gain = (now_seconds + rest) / (best_seconds + rest) - 1.0
        error = self._error(now, best)
        chosen, reason = self._choose(window, now, best, gain, error)
        if chosen != now:
            self._before = (now, window.step_seconds, error)
            self.shares = chosen
        return Decision(
            plan=window.plan,
            before=now,
            proposed=best,
            chosen=chosen,
            fixed_seconds=[round(float(a), 9) for a in model.fixed],
            sample_seconds=[round(float(c), 12) for c in model.per_sample],
            gain=round(gain, 6),
            gain_error=round(error, 6),
            reason=reason,
        )

    def _error(self, now: list[int], best: list[int]) -> float:
        """How far off the predicted gain may be, relative: the errors of the two workers that it compares."""
        model = self.model
        errors = np.hypot(model.error, model.surprise)
        slowest_now = int(np.argmax(model.predict(np.array(now, dtype=np.float64))))
        slowest_then = int(
            np.argmax(model.predict(np.array(best, dtype=np.float64)) * (np.arange(len(best)) != slowest_now))
        )
        return float(math.hypot(errors[slowest_now], errors[slowest_then]))

    def _choose(
        self, window: Window, now: list[int], best: list[int], gain: float, error: float
    ) -> tuple[list[int], str]:
        before, self._before = self._before, None
        jumped = self.model.jumped
        if before is not None:
            old, old_seconds, old_error = before
            # Who was given more and then jumped did so because of it; who was not has another reason.
            blamed = not (jumped & (np.array(now) <= np.array(old))).any()
            if blamed and window.step_seconds > old_seconds * (
                1.0 + max(WORSE, GAIN_ERRORS * math.hypot(error, old_error))
            ):
                self._hold, self._next_hold = self._next_hold, min(MAX_HOLD, 2 * self._next_hold)
                return old, (
                    f"rolled back: a step takes {window.step_seconds * 1e3:.1f} ms, before the change it took "
                    f"{old_seconds * 1e3:.1f} ms; no new split for {self._hold} windows"
                )
        if self._hold > 0 and (before is not None or not jumped.any()):
            self._hold -= 1
            return now, f"kept: the last change made it worse, {self._hold} more windows before another"
        if best == now:
            return now, "kept: this split is the best one"
        if gain <= DEAD_BAND:
            return now, f"kept: the best split would gain {gain:.1%}, which is not worth a change"
        # The more workers, the further off is the one that looks slowest.
        if gain <= math.sqrt(GAIN_ERRORS**2 + 2.0 * math.log(max(1.0, self._num_workers / 2))) * error:
            return now, f"kept: a gain of {gain:.1%} is within the noise of {error:.1%}"
        slowest = int(np.argmax(self.model.predict(np.array(now, dtype=np.float64))))
        return best, f"re-split: rank {slowest} holds a step back, a gain of {gain:.0%} is expected"

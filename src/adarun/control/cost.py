"""The affine cost model busy_i(k) = a_i + c_i k of every worker, learned window by window.

Bayesian least squares with forgetting. Until a worker was seen at two shares nothing tells a from c; the prior says that a
tenth of the time, give or take three tenths, is fixed. The part of a change that all workers share (a hotter machine room,
a longer sequence) is no reason to re-split: the history follows it. A jump of one worker rescales its history instead of
wiping it, since what made it slower mostly made all of its work slower.
"""

from __future__ import annotations

import math

import numpy as np

from adarun.control.split import Floats
from adarun.events import Window

MEMORY = 0.8  # a window's weight against the next one's
FIXED_PART = 0.1
FIXED_PART_ERROR = 0.3
NOISE_FLOOR = 0.005
FIRST_SURPRISE = 0.03  # before any window could surprise
JUMP = math.log(1.1)
JUMP_ERRORS = 4.0
JUMP_SURPRISE = 0.07  # what a jump counts for: less than it was, so as not to make us deaf to the next one


class CostModel:
    """Weighted sums of (k, y), one row of each array per worker; weights are inverse relative variances."""

    def __init__(self, num_workers: int) -> None:
        self.fixed: Floats = np.zeros(num_workers)
        self.per_sample: Floats = np.zeros(num_workers)
        # The relative error of a worker's level, and the usual size of what a window brings that the model did not foresee.
        self.error: Floats = np.full(num_workers, np.inf)
        self.surprise: Floats = np.full(num_workers, FIRST_SURPRISE)
        self.jumped = np.zeros(num_workers, dtype=np.bool_)
        self._w, self._wk, self._wkk = np.zeros(num_workers), np.zeros(num_workers), np.zeros(num_workers)
        self._wy, self._wky = np.zeros(num_workers), np.zeros(num_workers)
        self._known = False

    def predict(self, shares: Floats) -> Floats:
        """Busy seconds per worker for `shares`, shape (workers,)."""
        return self.fixed + self.per_sample * shares

    def learn(self, window: Window) -> None:
        """Take in one window."""
        k, y = np.array(window.samples), np.array(window.busy_seconds)
        error = np.maximum(np.array(window.noise), NOISE_FLOOR)
        self.jumped = np.zeros(len(k), dtype=np.bool_)
        if self._known:
            self._rescale(np.full(len(k), common_factor(y / self.predict(k))))
            self._rescale_after_jumps(np.log(y / self.predict(k)), error, self._relative_error(k))
        weight = 1.0 / error**2
        for name, value in (("_w", 1.0), ("_wk", k), ("_wkk", k * k), ("_wy", y), ("_wky", k * y)):
            setattr(self, name, MEMORY * getattr(self, name) + weight * value)
        self._fit()
        self._known = True

    def _rescale(self, factor: Floats) -> None:
        self._wy *= factor
        self._wky *= factor
        self.fixed, self.per_sample = self.fixed * factor, self.per_sample * factor

    def _relative_error(self, k: Floats) -> Floats:
        """How far off a prediction for `k` may be because the fixed part is known badly."""
        a11, a12, a22 = self._w + 1.0 / FIXED_PART_ERROR**2, self._wk, self._wkk
        variance = (a22 - 2.0 * k * a12 + k * k * a11) / (a11 * a22 - a12 * a12)
        error: Floats = np.sqrt(np.maximum(variance, 0.0))
        return error

    def _rescale_after_jumps(self, change: Floats, error: Floats, foreseen: Floats) -> None:
        beyond = np.maximum(np.maximum(error, self.surprise), foreseen)
        self.jumped = np.abs(change) > np.maximum(JUMP, JUMP_ERRORS * beyond)
        self._rescale(np.where(self.jumped, np.exp(change), 1.0))
        seen = np.where(self.jumped, JUMP_SURPRISE, np.maximum(np.abs(change) - foreseen, 0.0))
        self.surprise = np.maximum(NOISE_FLOOR, np.sqrt(MEMORY * self.surprise**2 + (1.0 - MEMORY) * seen**2))

    def _fit(self) -> None:
        level = self._wy / self._w
        # Sums in units of the level, so that the relative variances above apply; the prior is one more observation of a/level.
        prior = 1.0 / FIXED_PART_ERROR**2
        a11, a12, a22 = self._w + prior, self._wk, self._wkk
        b1, b2 = self._wy / level + prior * FIXED_PART, self._wky / level
        determinant = a11 * a22 - a12 * a12
        fixed = (a22 * b1 - a12 * b2) / determinant
        self.fixed = np.clip(fixed, 0.0, 0.95) * level
        mean_k = self._wk / self._w
        # Through the mean point whatever the clip did: the level is what was measured best.
        self.per_sample = (level - self.fixed) / mean_k
        self.error = 1.0 / np.sqrt(self._w)


def common_factor(ratios: Floats) -> float:
    """The part of a change that all workers share: by how much even the least changed one changed."""
    return float(max(1.0, ratios.min()) if ratios.min() > 1.0 else min(1.0, ratios.max()))

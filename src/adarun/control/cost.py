"""The affine cost model busy_i(k) = a_i + c_i k of every worker, learned window by window.

Bayesian least squares with forgetting. Until a worker was seen at two shares nothing tells a from c; the prior says that a
small part of the time, give or take most of it, is fixed. The part of a change that all workers share (a hotter machine
room, a longer sequence) is no reason to re-split: the history follows it. A change point of one worker rescales its history
instead of wiping it, since what made it slower mostly made all of its work slower.
"""

from __future__ import annotations

import numpy as np

from adarun.control.cusum import Cusum
from adarun.control.split import Bools, Floats
from adarun.events import Window

MEMORY = 0.95  # a window's weight against the next one's
FIXED_PART = 0.02
# As the fit's prior it is loose, so that two shares settle it; what a prediction may be off by is bounded, since the fixed
# part lies between none and all.
FIXED_PART_ERROR = 0.75
FIXED_PART_SPREAD = 0.5
NOISE_FLOOR = 0.005
# How much a window's mean usually differs from what the steps inside it let expect, before any window has shown it.
FIRST_SURPRISE = 0.03
SURPRISE_MEMORY = 0.97
# What is further off than so many standard deviations is a change or an accident, and says little of the usual.
SURPRISE_CAP = 3.0
# Where any worker changed by less, it may be chance that all changed in the same direction.
COMMON_ERRORS = 1.5


class CostModel:
    """Weighted sums of (k, y), one row of each array per worker; weights are inverse relative variances."""

    def __init__(self, num_workers: int) -> None:
        self.fixed: Floats = np.zeros(num_workers)
        self.per_sample: Floats = np.zeros(num_workers)
        # The relative error of a worker's level, and the standard deviation of windows around it.
        self.error: Floats = np.full(num_workers, np.inf)
        self.surprise: Floats = np.full(num_workers, FIRST_SURPRISE)
        self.changed: Bools = np.zeros(num_workers, dtype=np.bool_)
        # How much slower all workers together have become since the first window.
        self.common = 1.0
        self._cusum = Cusum(num_workers)
        self._num_windows = 0
        self._w, self._wk, self._wkk = np.zeros(num_workers), np.zeros(num_workers), np.zeros(num_workers)
        self._wy, self._wky = np.zeros(num_workers), np.zeros(num_workers)

    def predict(self, shares: Floats) -> Floats:
        """Busy seconds per worker for `shares`, shape (workers,)."""
        return self.fixed + self.per_sample * shares

    def fixed_part(self) -> tuple[Floats, Floats]:
        """Each worker's fixed part of its busy time where it was seen, 0 to 1, and how far off that may be."""
        a11, a12, a22 = self._w + 1.0 / FIXED_PART_SPREAD**2, self._wk, self._wkk
        return self.fixed * self._w / self._wy, np.sqrt(a22 / (a11 * a22 - a12 * a12))

    def learn(self, window: Window) -> None:
        """Take in one window."""
        k, y = np.array(window.samples), np.array(window.busy_seconds)
        noise = np.maximum(np.array(window.noise), NOISE_FLOOR)
        if self._num_windows:
            self._follow(k, y, noise)
        self._num_windows += 1
        weight = 1.0 / (noise**2 + self.surprise**2)
        for name, value in (("_w", 1.0), ("_wk", k), ("_wkk", k * k), ("_wy", y), ("_wky", k * y)):
            setattr(self, name, MEMORY * getattr(self, name) + weight * value)
        self._fit()

    def _follow(self, k: Floats, y: Floats, noise: Floats) -> None:
        foreseen = self._relative_error(k)
        variance = noise**2 + self.surprise**2 + foreseen**2
        ratio = y / self.predict(k)
        if (np.abs(np.log(ratio)) > COMMON_ERRORS * np.sqrt(variance)).all():
            common = common_factor(ratio)
            self.common *= common
            ratio /= common
            self._rescale(np.full(len(k), common))
        change = np.log(ratio)
        # The fewer windows there were, the less sure is the surprise itself, and with it the level's error.
        unsure = (1.0 + 1.0 / self._num_windows) ** 2 - 1.0
        spread = np.sqrt(variance + unsure * (self.surprise**2 + self.error**2))
        since, shift = self._cusum.see(change, spread)
        self.changed = since > 0.0
        self._rescale(np.exp(shift))
        # Of its level no more is known than those windows say.
        kept = np.where(self.changed, np.minimum(1.0, since / (self._w * (noise**2 + self.surprise**2))), 1.0)
        for name in ("_w", "_wk", "_wkk", "_wy", "_wky"):
            setattr(self, name, kept * getattr(self, name))
        # Of what was seen, the surprise is given the part that it has in what was expected.
        seen = self.surprise**2 * np.minimum(change**2 / variance, SURPRISE_CAP**2)
        # At first a mean, the first guess being one of the values; later with forgetting.
        young = 1.0 / (self._num_windows + 1)
        part = max(1.0 - SURPRISE_MEMORY, young)
        # One worker's first windows say little of how much it varies: what all of them do counts too.
        seen = (1.0 - young) * seen + young * seen.mean()
        self.surprise = np.sqrt(np.maximum((1.0 - part) * self.surprise**2 + part * seen, NOISE_FLOOR**2))

    def _rescale(self, factor: Floats) -> None:
        self._wy *= factor
        self._wky *= factor
        self.fixed, self.per_sample = self.fixed * factor, self.per_sample * factor

    def _relative_error(self, k: Floats) -> Floats:
        """How far off a prediction for `k` may be: the level's error, and the fixed part's away from where it was seen."""
        a11, a12, a22 = self._w + 1.0 / FIXED_PART_SPREAD**2, self._wk, self._wkk
        variance = (a22 - 2.0 * k * a12 + k * k * a11) / (a11 * a22 - a12 * a12)
        error: Floats = np.sqrt(np.maximum(variance, 0.0)) * (self._wy / self._w) / self.predict(k)
        return error

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

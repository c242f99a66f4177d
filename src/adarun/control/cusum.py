"""Change points: two-sided CUSUM on each worker's standardised log time (Page, Biometrika 1954)."""

from __future__ import annotations

import math

import numpy as np

from adarun.control.split import Floats

# Half of the smallest shift to be found quickly, in standard deviations: the drift that is optimal for a shift of 2.
DRIFT = 1.0
FALSE_ALARMS_PER_WINDOW = 1 / 3000


def threshold(num_workers: int) -> float:
    """The level at which `num_workers` workers together give about one false alarm in 3,000 windows of Gaussian noise.

    Siegmund's approximation of a one-sided CUSUM's run length, exp(2d(h + 1.166)) / 2d^2, solved for h (Sequential
    Analysis, 1985).
    """
    run_length = 2 * num_workers / FALSE_ALARMS_PER_WINDOW
    return math.log(2.0 * DRIFT**2 * run_length) / (2.0 * DRIFT) - 1.166


class Cusum:
    """The sums of every worker, upwards and downwards, and what they were made of."""

    def __init__(self, num_workers: int) -> None:
        self._threshold = threshold(num_workers)
        shape = (2, num_workers)
        self._level, self._sum, self._count = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def see(self, change: Floats, spread: Floats) -> tuple[Floats, Floats]:
        """Take in one window's log changes and their standard deviations, each of shape (workers,).

        Returns:
            For each worker, how many windows ago it has changed, and by how much: the mean change since then, less the
            standard error by which an alarm overstates it. Both are 0 where nothing has changed.
        """
        signed = np.stack([change, -change])
        self._level = np.maximum(0.0, self._level + signed / spread - DRIFT)
        runs = self._level > 0.0
        self._sum = np.where(runs, self._sum + signed, 0.0)
        self._count = np.where(runs, self._count + 1.0, 0.0)
        alarms = self._level > self._threshold
        count = np.where(alarms, self._count, 1.0)
        shift = np.where(alarms, np.maximum(0.0, self._sum / count - spread / np.sqrt(count)), 0.0)
        self._level[:, alarms.any(axis=0)] = 0.0
        since: Floats = np.where(alarms, count, 0.0).max(axis=0)
        return since, shift[0] - shift[1]

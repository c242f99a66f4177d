"""Workers as cost models: affine compute, noise that lasts, slow states and rare stalls.

Arrays have shape (workers,) or (steps, workers); times are seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adarun.control.split import Floats, Ints


@dataclass(frozen=True)
class Noise:
    """How steps differ from what a worker's cost says; nothing, unless asked for. Chances are per step and worker."""

    # Standard deviations of log seconds: of all workers together, and of each on its own.
    common: float = 0.0
    own: float = 0.0
    # The correlation of both from one step to the next: an AR(1) process.
    memory: float = 0.0
    # A worker goes to and fro between two states, a Markov chain; in the slow one all takes so many times as long.
    slow_factor: float = 1.0
    slow_begins: float = 0.0
    slow_ends: float = 1.0
    stall: float = 0.0
    stall_seconds: float = 0.0


def affine(seconds: Floats | Sequence[float], fixed_part: float, share: float) -> tuple[Floats, Floats]:
    """The fixed seconds and the seconds per sample of workers that take `seconds` for `share`, a part of them fixed."""
    whole = np.asarray(seconds, dtype=np.float64)
    return fixed_part * whole, (1.0 - fixed_part) * whole / share


class Cluster:
    """Workers that take fixed + per_sample * share seconds for a step, times mean-one noise; it lasts from run to run."""

    def __init__(self, fixed: Floats, per_sample: Floats, rng: np.random.Generator, noise: Noise = Noise()) -> None:
        self.fixed, self.per_sample, self.noise = fixed, per_sample, noise
        self._rng = rng
        # Both processes begin as they are in the long run.
        self._common = noise.common * rng.standard_normal()
        self._own: Floats = noise.own * rng.standard_normal(len(fixed))
        often = noise.slow_begins / (noise.slow_begins + noise.slow_ends) if noise.slow_begins else 0.0
        self._slow = rng.random(len(fixed)) < often

    @property
    def num_workers(self) -> int:
        """How many workers there are."""
        return len(self.fixed)

    def predict(self, shares: Sequence[int] | Ints) -> Floats:
        """Busy seconds of a step without noise, shape (workers,)."""
        seconds: Floats = self.fixed + self.per_sample * np.asarray(shares, dtype=np.float64)
        return seconds

    def run(self, shares: Sequence[int] | Ints, num_steps: int) -> Floats:
        """Busy seconds of the next steps, shape (steps, workers)."""
        seconds: Floats = self.predict(shares) * np.array([self._factor() for _ in range(num_steps)])
        if self.noise.stall:
            seconds += self.noise.stall_seconds * (self._rng.random(seconds.shape) < self.noise.stall)
        return seconds

    def _factor(self) -> Floats:
        """How many times as long as its cost each worker's next step takes."""
        noise, rng = self.noise, self._rng
        fresh = np.sqrt(1.0 - noise.memory**2)
        self._common = noise.memory * self._common + noise.common * fresh * rng.standard_normal()
        self._own = noise.memory * self._own + noise.own * fresh * rng.standard_normal(self.num_workers)
        if noise.slow_begins:
            self._slow ^= rng.random(self.num_workers) < np.where(self._slow, noise.slow_ends, noise.slow_begins)
        # The mean of exp(x) is exp(variance / 2).
        factor: Floats = np.exp(self._common + self._own - (noise.common**2 + noise.own**2) / 2.0)
        return np.where(self._slow, noise.slow_factor * factor, factor)

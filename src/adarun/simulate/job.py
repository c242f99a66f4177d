"""A simulated job: steps of a cluster, exchanges over a network, and what was measured of them, window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adarun.control.reward import Goodput, Outcome
from adarun.control.split import Floats, Ints
from adarun.events import Window
from adarun.simulate.cluster import Cluster
from adarun.simulate.communication import Network, peer_offset
from adarun.simulate.consensus import efficiency, squared_distance


@dataclass(frozen=True)
class Setting:
    """The discrete knobs: how the workers exchange, and after how many steps."""

    topology: str = "ring"
    sync_period: int = 1

    @property
    def name(self) -> str:
        """As the knobs are given on a command line."""
        return f"topology={self.topology} sync_period={self.sync_period}"


@dataclass(frozen=True)
class Measured:
    """What a window showed."""

    window: Window
    reward: float  # useful samples per second

    @property
    def utilisation(self) -> float:
        """R(s): the mean over workers of busy / (busy + wait), 0 to 1."""
        busy, wait = np.array(self.window.busy_seconds), np.array(self.window.wait_seconds)
        return float((busy / (busy + wait)).mean())

    @property
    def overhead(self) -> float:
        """C(s): the part of a step that even the worker who waits least waits; what others wait more is imbalance."""
        return min(self.window.wait_seconds) / self.window.step_seconds


class Job:
    """Workers that exchange `num_bytes` each; `drift` is a step's, in units of the squared critical consensus distance."""

    def __init__(self, cluster: Cluster, network: Network, num_bytes: float, drift: float = 0.0) -> None:
        """Raises ValueError if cluster and network are not of as many workers."""
        if cluster.num_workers != network.num_workers:
            raise ValueError(f"{cluster.num_workers} workers cannot be in a network of {network.num_workers}")
        self.cluster, self.network = cluster, network
        self._num_bytes, self._drift = num_bytes, drift
        self._num_steps = 0
        # When each worker came to the end of the last step.
        self._clock: Floats = np.zeros(cluster.num_workers)

    def predict(self, shares: Sequence[int] | Ints, setting: Setting) -> Outcome:
        """A step without noise: T'(s) is the longest compute and the exchange's part of a step."""
        return Outcome(
            samples=float(np.sum(shares)),
            compute_seconds=float(self.cluster.predict(shares).max()),
            exposed_seconds=self._exchange_seconds(setting) / setting.sync_period,
            efficiency=self._efficiency(setting),
        )

    def run(self, shares: Sequence[int] | Ints, setting: Setting, num_steps: int) -> Measured:
        """Run the next steps, two at least, under these shares and this setting."""
        busy = self.cluster.run(shares, num_steps)
        before = self._clock
        for row in busy:
            self._clock = self._clock + row
            self._num_steps += 1
            if self._num_steps % setting.sync_period == 0:
                self._exchange(setting)
        window = measured(busy, (self._clock - before) / num_steps, shares)
        rate = window.step_seconds
        outcome = Outcome(float(np.sum(shares)), rate, 0.0, self._efficiency(setting))
        return Measured(window, Goodput().reward(outcome))

    def _exchange(self, setting: Setting) -> None:
        """All wait for the last one; in gossip each waits only for the one it takes from."""
        clock = self._clock
        if setting.topology == "gossip":
            offset = peer_offset(self._num_steps // setting.sync_period, len(clock))
            ready: Floats = np.maximum(clock, np.roll(clock, offset))
        else:
            ready = np.full(len(clock), clock.max())
        self._clock = ready + self._exchange_seconds(setting)

    def _exchange_seconds(self, setting: Setting) -> float:
        return self.network.seconds(setting.topology, self._num_bytes)

    def _efficiency(self, setting: Setting) -> float:
        num_workers = self.cluster.num_workers
        return efficiency(squared_distance(setting.topology, setting.sync_period, num_workers, self._drift))


def measured(busy: Floats, step_seconds: Floats, shares: Sequence[int] | Ints) -> Window:
    """What the hub would say of some steps: `busy` has shape (steps, workers), the mean `step_seconds` shape (workers,)."""
    mean = busy.mean(axis=0)
    return Window(
        plan=0,
        steps=len(busy),
        step_seconds=float(step_seconds.mean()),
        samples=np.asarray(shares, dtype=np.float64).tolist(),
        busy_seconds=mean.tolist(),
        wait_seconds=np.maximum(0.0, step_seconds - mean).tolist(),
        noise=(busy.std(axis=0, ddof=1) / math.sqrt(len(busy)) / mean).tolist(),
    )

"""A random job and some settings to choose among, for as many windows as it has: what a policy is trained and judged in."""

from __future__ import annotations

import itertools
import math

import numpy as np

from adarun.control.policy import Incumbent, Option, Policy, Situation
from adarun.control.reward import Goodput
from adarun.control.split import Ints, min_max_split
from adarun.simulate.cluster import Cluster, Noise, affine
from adarun.simulate.communication import TOPOLOGIES, Link, Network
from adarun.simulate.job import Job, Measured, Setting

MAX_OPTIONS = 8
NUM_WINDOWS, WINDOW_STEPS = 20, 8
SHARE = 32
NUM_BYTES = 4e8
# The predictions are off by so much: a standard deviation of the logarithm. Some jobs and options have none at all.
PREDICTION_ERROR = 0.15
UNPREDICTED = 0.2
# Every setting; the first is the exact one that a job starts with.
SETTINGS = [Setting(topology, period) for period, topology in itertools.product((1, 2, 4, 8), TOPOLOGIES)]


class Episode:
    """The job, what is known of its options, and the situation after the first window, which ran under the first option."""

    def __init__(self, rng: np.random.Generator, num_windows: int = NUM_WINDOWS) -> None:
        self._job = draw_job(rng)
        self._shares = best_shares(self._job.cluster)
        others = rng.permutation(np.arange(1, len(SETTINGS)))[: rng.integers(1, MAX_OPTIONS)]
        self._settings = [SETTINGS[number] for number in (0, *others)]
        foreseen = [Goodput().reward(self._job.predict(self._shares, setting)) for setting in self._settings]
        # Without noise; with it, settings that wait for fewer workers, or more rarely, gain a little more.
        self.best = max(foreseen)
        self.options = self._predicted(foreseen, rng)
        # In some jobs nobody knows when they end.
        self._remaining_known = rng.random() >= UNPREDICTED
        self.remaining = num_windows
        self._incumbent = Incumbent(0)
        self.reward = self.run(0)

    def run(self, index: int) -> float:
        """Run the next window under an option; returns its reward in useful samples per second."""
        measured = self._job.run(self._shares, self._settings[index], WINDOW_STEPS)
        self._incumbent.learn(index, measured.reward)
        self.situation = self._look(measured)
        self.remaining -= 1
        return measured.reward

    def _look(self, measured: Measured) -> Situation:
        remaining = self.remaining - 1 if self._remaining_known else 0
        return Situation(measured.utilisation, measured.overhead, self._incumbent.index, remaining)

    def _predicted(self, rewards: list[float], rng: np.random.Generator) -> list[Option]:
        error = np.exp(PREDICTION_ERROR * rng.standard_normal(len(rewards)))
        unknown = (rng.random(len(rewards)) < UNPREDICTED) | (rng.random() < UNPREDICTED)
        predicted = np.where(unknown, math.nan, error * rewards)
        return [Option(setting.name, float(value)) for setting, value in zip(self._settings, predicted, strict=True)]


def play(episode: Episode, policy: Policy) -> float:
    """Let a policy choose to the end; the mean reward over that of the best option, 1 being perfect."""
    policy.learn(episode.situation, 0, episode.reward)
    rewards = []
    while episode.remaining:
        situation = episode.situation
        index = policy.choose(situation, episode.options).index
        rewards.append(episode.run(index))
        policy.learn(situation, index, rewards[-1])
    return float(np.mean(rewards)) / episode.best


def draw_job(rng: np.random.Generator) -> Job:
    """Any job: few workers or many, from one that hardly exchanges to one that mostly does, in any kind of noise."""

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    num_nodes, workers_per_node = int(rng.integers(2, 9)), int(rng.choice([1, 2, 4, 8]))
    seconds = 0.1 * np.exp(0.2 * rng.standard_normal(num_nodes * workers_per_node))
    noise = Noise(
        common=between(0.005, 0.05),
        own=between(0.005, 0.15),
        memory=rng.uniform(0.0, 0.9),
        slow_factor=rng.uniform(1.0, 2.0),
        slow_begins=between(1e-4, 1e-2) / len(seconds),
        slow_ends=0.05,
        stall=between(1e-5, 1e-3) / len(seconds),
        stall_seconds=0.5,
    )
    # An exchange takes from a hundredth of a step to several steps.
    slow, latency = between(1e-3, 0.5) / NUM_BYTES, between(1e-6, 1e-3)
    network = Network(
        num_nodes, workers_per_node, inside=Link(0.1 * latency, slow / between(1.0, 30.0)), between=Link(latency, slow)
    )
    cluster = Cluster(*affine(seconds, rng.uniform(0.0, 0.5), SHARE), rng, noise)
    return Job(cluster, network, NUM_BYTES, drift=between(1e-3, 1.0))


def best_shares(cluster: Cluster) -> Ints:
    """The best split of `SHARE` samples a worker, which the split's own control would have found."""
    lower = np.ones(cluster.num_workers, dtype=np.int64)
    total = SHARE * cluster.num_workers
    return min_max_split(cluster.fixed, cluster.per_sample, total, lower, lower * total)

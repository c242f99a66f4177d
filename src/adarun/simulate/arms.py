"""A test problem for policies: 36 settings of four knobs, their true rewards, and a structural model that is somewhat wrong.

The cluster is another one for every seed. A step takes `accumulation` micro-batches and an exchange of the gradients, which
happens every `sync_period` steps; larger batches, rarer exchanges and coarser gradients teach less per sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from adarun.control.policy import Incumbent, Option, Policy, Situation
from adarun.control.reward import Goodput, Outcome
from adarun.control.split import Floats

NUM_WORKERS = 8
MICRO_BATCHES, ACCUMULATIONS, SYNC_PERIODS = (16, 32, 64), (1, 2, 4), (1, 4)
# Compression by name: how often the exchanged bytes are halved.
HALVINGS = {"none": 0, "bf16": 1, "int8": 2, "powersgd": 4}
NUM_DECISIONS = 60
PARAMETER_ERROR = 0.15
RESIDUAL = 0.05
NOISE = 0.03


@dataclass(frozen=True)
class Setting:
    """One value of each knob; the first of all is what torchrun does."""

    micro_batch: int
    accumulation: int
    sync_period: int
    compression: str

    @property
    def name(self) -> str:
        """As the knobs are given on a command line."""
        return " ".join(f"{knob}={value}" for knob, value in vars(self).items())


def settings(*, sync_free: bool) -> list[Setting]:
    """36 settings: with two sync periods and two kinds of compression, or with period 1 and four kinds."""
    kinds = list(HALVINGS)[:2] if sync_free else list(HALVINGS)
    periods = SYNC_PERIODS if sync_free else (1,)
    return [Setting(*values) for values in itertools.product(MICRO_BATCHES, ACCUMULATIONS, periods, kinds)]


@dataclass(frozen=True)
class Cluster:
    """The structural model's parameters."""

    fixed: float  # seconds per micro-batch
    per_sample: float
    latency: float  # alpha: seconds per exchange
    transfer: float  # beta times the bytes of uncompressed gradients: seconds
    noise_scale: float  # of the gradient, in samples (McCandlish et al., 2018)
    drift: float  # what each step without an exchange takes from a sample's worth
    coarseness: float  # what each halving of the bytes takes from it

    def outcome(self, setting: Setting) -> Outcome:
        """What a step gives and takes: affine compute, alpha-beta communication, statistical efficiency."""
        batch = NUM_WORKERS * setting.micro_batch * setting.accumulation
        halvings = HALVINGS[setting.compression]
        exchange = self.latency + self.transfer / 2**halvings
        growth = (self.noise_scale + NUM_WORKERS * MICRO_BATCHES[0]) / (self.noise_scale + batch)
        loss = (1.0 + self.drift * (setting.sync_period - 1)) * (1.0 + self.coarseness * halvings)
        return Outcome(
            samples=batch,
            compute_seconds=setting.accumulation * (self.fixed + self.per_sample * setting.micro_batch),
            exposed_seconds=exchange / setting.sync_period,
            efficiency=growth / loss,
        )

    def misjudged(self, rng: np.random.Generator) -> Cluster:
        """The same cluster as one believes it to be: each parameter is off by a log-normal error."""
        return Cluster(*(value * math.exp(PARAMETER_ERROR * rng.standard_normal()) for value in astuple(self)))


def draw_cluster(rng: np.random.Generator) -> Cluster:
    """Any cluster, from one whose link hardly matters to one that mostly waits for it."""

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    per_sample = between(1e-3, 1e-2)
    compute = per_sample * MICRO_BATCHES[0]
    return Cluster(
        fixed=compute * between(0.05, 1.0),
        per_sample=per_sample,
        latency=compute * between(0.01, 0.1),
        transfer=compute * between(0.1, 3.0),
        noise_scale=between(300.0, 5000.0),
        drift=between(0.005, 0.05),
        coarseness=between(0.003, 0.03),
    )


class Problem:
    """What a policy sees, its options, and what it does not, their true rewards."""

    def __init__(self, seed: int, *, sync_free: bool = True) -> None:
        rng = np.random.default_rng(seed)
        every = settings(sync_free=sync_free)
        cluster = draw_cluster(rng)
        believed, goodput = cluster.misjudged(rng), Goodput()
        self.outcomes = [cluster.outcome(setting) for setting in every]
        self.options = [Option(setting.name, goodput.reward(believed.outcome(setting))) for setting in every]
        residual = 1.0 + RESIDUAL * rng.standard_normal(len(every))
        self.rewards: Floats = np.array([goodput.reward(outcome) for outcome in self.outcomes]) * residual
        # The same for every policy: the n-th decision for an option meets the same luck.
        self._noise: Floats = 1.0 + NOISE * rng.standard_normal((NUM_DECISIONS, len(every)))

    def measured(self, decision: int, choice: int) -> float:
        """The reward of an option as the window of this decision shows it."""
        return float(self.rewards[choice] * self._noise[decision, choice])

    def situation(self, running: int, incumbent: int, decision: int) -> Situation:
        """The job while `running` is in force, before its decision of this number."""
        outcome = self.outcomes[running]
        overhead = outcome.exposed_seconds / outcome.step_seconds
        return Situation(1.0 - overhead, overhead, incumbent, NUM_DECISIONS - decision)


@dataclass(frozen=True)
class Game:
    """What a policy chose in each decision, and the incumbent after it."""

    problem: Problem
    choices: Sequence[int]
    incumbents: Sequence[int]

    def decisions_to_settle(self, within: float = 0.05) -> int:
        """After how many decisions the incumbent is as near to the oracle, and stays so; one more than all if it never is."""
        rewards = self.problem.rewards
        far = np.flatnonzero(rewards[list(self.incumbents)] < (1.0 - within) * rewards.max())
        return int(far[-1]) + 2 if len(far) else 1

    def regret(self) -> float:
        """What was lost against the oracle, in decisions' worth of its reward."""
        rewards = self.problem.rewards
        return float((1.0 - rewards[list(self.choices)] / rewards.max()).sum())

    def relative_times(self) -> Floats:
        """After each decision, the time so far over the baseline's for the same work; every decision does the same work."""
        rewards = self.problem.rewards
        times: Floats = rewards[0] / rewards[list(self.choices)]
        return np.cumsum(times) / np.arange(1, len(times) + 1)


def play(problem: Problem, policy: Policy) -> Game:
    """Let a policy decide to the end, from the baseline on."""
    incumbent, running = Incumbent(0), 0
    choices, incumbents = [], []
    for decision in range(NUM_DECISIONS):
        situation = problem.situation(running, incumbent.index, decision)
        running = policy.choose(situation, problem.options).index
        reward = problem.measured(decision, running)
        policy.learn(situation, running, reward)
        incumbent.learn(running, reward)
        choices.append(running)
        incumbents.append(incumbent.index)
    return Game(problem, choices, incumbents)

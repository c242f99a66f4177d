"""Bandits on a Gaussian belief about the logarithm of every option's reward.

What the structural model predicts is the prior mean. Its error, the residual, has three parts: one common to all options, one
that options share by the settings they share (a link slower than the model thinks is so for every option that uses it as much),
and one of each option alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adarun.control.policy import USUAL_NOISE, Choice, Mean, Option, Situation, certain, measured_first
from adarun.control.split import Floats

# Standard deviations of the residual's parts, in logarithms: with a structural model, and without one.
COMMON = 0.2
SHARED, OWN = 0.07, 0.07
SHARED_UNMODELLED, OWN_UNMODELLED = 0.4, 0.3
# For how many measurements the usual noise counts.
NOISE_COUNT = 10
# An option that failed is taken to give this part of what the incumbent gives.
FAILED = 0.1
# A residual beyond so many standard deviations is the option's own.
ODD = 3.0
# An option is drawn only if it is so likely to beat the incumbent by so much.
WORTHWHILE = 0.02
LIKELY = 0.15
# Propensities are counted in so many draws.
NUM_DRAWS = 256
# How many standard deviations `Ucb` hopes for.
HOPE = 1.0


class Belief:
    """What is believed of each option's log reward, from its prediction and from what was measured."""

    def __init__(self) -> None:
        self._means: dict[int, Mean] = {}
        self._prior: tuple[Floats, Floats] | None = None

    def knows(self, index: int) -> bool:
        """Whether this option was measured."""
        return index in self._means

    def learn(self, incumbent: int, choice: int, reward: float) -> None:
        """Take in one measurement."""
        known = self._means.get(incumbent)
        least = FAILED * math.exp(known.value) if known else np.finfo(float).tiny
        self._means.setdefault(choice, Mean()).see(math.log(max(reward, least)))

    def posterior(self, options: Sequence[Option], incumbent: int) -> tuple[Floats, Floats]:
        """The mean and the covariance of all options' log rewards; the incumbent must have been measured."""
        if self._prior is None:
            self._prior = prior(options)
        predicted, covariance = self._prior[0], self._prior[1].copy()
        seen = list(self._means)
        # Predictions were made where the job was measured first: what is odd about a later incumbent is its own. Without any,
        # an option is taken to be like the incumbent.
        base = seen[0] if any(option.predicted > 0.0 for option in options) else incumbent
        count = np.array([self._means[i].count for i in seen])
        centre = self._means[base].value - predicted[base]
        residual = np.array([self._means[i].value for i in seen]) - predicted[seen] - centre
        # What fails where much was expected says little of the others.
        covariance[seen, seen] += np.maximum(0.0, (residual / ODD) ** 2 - covariance[seen, seen] + COMMON**2)
        measured = covariance[np.ix_(seen, seen)] + np.diag(self._noise_variance() / count)
        gain = np.linalg.solve(measured, covariance[seen])
        return predicted + centre + residual @ gain, covariance - covariance[:, seen] @ gain

    def _noise_variance(self) -> float:
        """From the repeated measurements of all options, and the usual noise while those are few."""
        squares = sum(mean.squares for mean in self._means.values())
        repeats = sum(mean.count - 1 for mean in self._means.values())
        return (NOISE_COUNT * USUAL_NOISE**2 + squares) / (NOISE_COUNT + repeats)


def prior(options: Sequence[Option]) -> tuple[Floats, Floats]:
    """The mean and the covariance of the log rewards, but for a common level, before anything was measured.

    An option without a prediction is taken to be like the others, give or take more.
    """
    predicted = np.array([option.predicted for option in options])
    known = predicted > 0.0
    mean = np.zeros(len(options))
    mean[known] = np.log(predicted[known])
    mean[~known] = mean[known].mean() if known.any() else 0.0
    shared, own = np.where(known, SHARED, SHARED_UNMODELLED), np.where(known, OWN, OWN_UNMODELLED)
    return mean, COMMON**2 + np.outer(shared, shared) * likeness(options) + np.diag(own**2)


def likeness(options: Sequence[Option]) -> Floats:
    """For each two options, the part of their settings (the words of their names) that they share."""
    words = [set(option.name.split()) for option in options]
    vocabulary = sorted(set().union(*words))
    has = np.array([[word in own for word in vocabulary] for own in words], dtype=np.float64)
    has /= np.linalg.norm(has, axis=1, keepdims=True)
    alike: Floats = has @ has.T
    return alike


class Thompson:
    """Truncated Thompson sampling: draws each option as often as it is thought to be the best of those worth a try."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        # Of its own, so that how often propensities are asked for changes no choice.
        self._counting = np.random.default_rng(int(rng.integers(1 << 62)))
        self._belief = Belief()

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """An option that may well beat the incumbent, or the incumbent."""
        now = situation.incumbent
        if not self._belief.knows(now):
            return measured_first(now, options)
        mean, covariance = self._belief.posterior(options, now)
        chance = chance_to_beat(mean, covariance, now)
        worth = np.flatnonzero(chance >= LIKELY)
        if not len(worth):
            return certain(now, options, f"kept: no option is likely to beat {options[now].name}")
        arms = np.append(worth, now)
        mean, covariance = mean[arms], covariance[np.ix_(arms, arms)]
        # Whoever challenges the incumbent has to be better by what makes a change worth while.
        mean[-1] += math.log1p(WORTHWHILE)
        root = np.linalg.cholesky(covariance + 1e-9 * np.eye(len(arms)))
        drawn = int(arms[np.argmax(mean + root @ self._rng.standard_normal(len(arms)))])
        draws = mean + self._counting.standard_normal((NUM_DRAWS, len(arms))) @ root.T
        # One more for each: none of them is impossible.
        counts = 1.0 + np.bincount(np.argmax(draws, axis=1), minlength=len(arms))
        propensities = np.zeros(len(options))
        propensities[arms] = counts / counts.sum()
        return Choice(drawn, tuple(propensities.tolist()), explain(options, now, drawn, chance))

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Take in one reward."""
        self._belief.learn(situation.incumbent, choice, reward)


class Ucb:
    """The option whose reward may be highest: its mean and some standard deviations, which is GP-UCB."""

    def __init__(self) -> None:
        self._belief = Belief()

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """The most promising option, the incumbent included."""
        now = situation.incumbent
        if not self._belief.knows(now):
            return measured_first(now, options)
        mean, covariance = self._belief.posterior(options, now)
        best = int(np.argmax(mean + HOPE * np.sqrt(np.maximum(np.diag(covariance), 0.0))))
        return certain(best, options, explain(options, now, best, chance_to_beat(mean, covariance, now)))

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Take in one reward."""
        self._belief.learn(situation.incumbent, choice, reward)


def chance_to_beat(mean: Floats, covariance: Floats, incumbent: int) -> Floats:
    """How likely each option is to be better than the incumbent by what makes a change worth while; 0 for itself."""
    own = np.diag(covariance)
    variance = np.maximum(own + own[incumbent] - 2.0 * covariance[incumbent], 1e-12)
    margin = (mean - mean[incumbent] - math.log1p(WORTHWHILE)) / np.sqrt(variance)
    chance = np.array([0.5 * math.erfc(-m / math.sqrt(2.0)) for m in margin.tolist()])
    chance[incumbent] = 0.0
    return chance


def explain(options: Sequence[Option], now: int, chosen: int, chance: Floats) -> str:
    """Why an option was chosen, in words."""
    if chosen == now:
        return f"kept: {options[now].name} looks best"
    return (
        f"tried: {options[chosen].name} has a chance of {chance[chosen]:.0%} to beat {options[now].name} "
        f"by over {WORTHWHILE:.0%}"
    )

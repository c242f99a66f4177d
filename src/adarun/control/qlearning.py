"""Tabular Q-learning (Watkins, 1989) over a coarse view of the job: how busy its workers are, and how much they communicate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adarun.control.policy import Choice, Option, Situation, measured_first

# Utilisation and overhead are cut into so many equal parts each.
NUM_BINS = 4
EPSILON = 0.02
# An option never tried is taken to give so many times what is predicted for it, or, without a model, what the incumbent gives.
OPTIMISM, OPTIMISM_UNMODELLED = 1.05, 1.5
# What follows a choice hardly depends on it: the next one may choose anything again.
DISCOUNT = 0.1
# A value is the mean of its first measurements, then follows with this step.
SMALLEST_STEP = 0.1

State = tuple[int, int]


class Row(NamedTuple):
    """One entry of the table, plain data. Values are relative to what the run's first incumbent gave."""

    utilisation: int
    overhead: int
    option: str
    value: float
    tries: int


class QLearning:
    """Epsilon-greedy on a table of state and option, with an optimistic start."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._table: dict[tuple[State, str], tuple[float, int]] = {}
        # The option that was measured first, and what it gave: the table's unit.
        self._reference = 0
        self._scale = 0.0
        # State, option and relative reward of what was learned since the last choice: what it led to is not known yet.
        self._pending: list[tuple[State, int, float]] = []

    @classmethod
    def from_table(cls, rng: np.random.Generator, rows: Sequence[Row]) -> QLearning:
        """Go on with what another run has learned."""
        policy = cls(rng)
        policy._table = {((row.utilisation, row.overhead), row.option): (row.value, row.tries) for row in rows}
        return policy

    def to_table(self) -> list[Row]:
        """What was learned up to the last choice, in the order of its state and option."""
        return [Row(*state, option, *entry) for (state, option), entry in sorted(self._table.items())]

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """The option of the highest value, or sometimes any."""
        if not self._scale:
            return measured_first(situation.incumbent, options)
        state = discretise(situation)
        self._settle(state, options)
        values = self._values(state, options)
        best = int(np.argmax(values))
        chances = np.full(len(options), EPSILON / len(options))
        chances[best] += 1.0 - EPSILON
        chosen = int(self._rng.choice(len(options), p=chances))
        how = "has the highest value" if chosen == best else "is tried at random"
        reason = f"{options[chosen].name} {how} at {situation.utilisation:.0%} busy, {situation.overhead:.0%} waiting"
        return Choice(chosen, tuple(chances.tolist()), reason)

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Take in a reward; the table has it from the next choice on, when the state that followed is known."""
        if not self._scale:
            self._reference, self._scale = choice, reward
        if self._scale:
            self._pending.append((discretise(situation), choice, reward / self._scale))

    def _values(self, state: State, options: Sequence[Option]) -> list[float]:
        unit = options[self._reference].predicted
        return [self._value(state, option, option.predicted / unit) for option in options]

    def _value(self, state: State, option: Option, expected: float) -> float:
        if entry := self._table.get((state, option.name)):
            return entry[0]
        return OPTIMISM_UNMODELLED if math.isnan(expected) else OPTIMISM * expected

    def _settle(self, next_state: State, options: Sequence[Option]) -> None:
        for state, choice, reward in self._pending:
            target = (1.0 - DISCOUNT) * reward + DISCOUNT * max(self._values(next_state, options))
            value, count = self._table.get((state, options[choice].name), (0.0, 0))
            step = max(SMALLEST_STEP, 1.0 / (count + 1))
            self._table[state, options[choice].name] = (value + step * (target - value), count + 1)
        self._pending = []


def discretise(situation: Situation) -> State:
    """The state in which a situation is: the bins of its utilisation and of its overhead."""
    return bin_of(situation.utilisation), bin_of(situation.overhead)


def bin_of(fraction: float) -> int:
    """The bin of a number from 0 to 1."""
    return min(NUM_BINS - 1, int(fraction * NUM_BINS))

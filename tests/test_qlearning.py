"""Tabular Q-learning: its states, its table, and what a kept table is worth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adarun.control.policy import Option, Situation
from adarun.control.qlearning import QLearning, Row

OPTIONS = [Option(name) for name in ("H=1", "H=2", "H=4", "H=8")]


def situation(overhead: float) -> Situation:
    return Situation(1.0 - overhead, overhead, incumbent=0, remaining=0)


def reward(overhead: float, choice: int) -> float:
    """Where communication takes long, rare exchanges pay; where it does not, they only cost."""
    return 100.0 * (1.0 + (0.3 if overhead > 0.5 else -0.2) * choice)


def trained(decisions: int = 200) -> QLearning:
    """A policy that saw both kinds of job, in turn."""
    policy = QLearning(np.random.default_rng(0))
    for number in range(decisions):
        overhead = 0.8 if number % 2 else 0.1
        choice = policy.choose(situation(overhead), OPTIONS).index
        policy.learn(situation(overhead), choice, reward(overhead, choice))
    return policy


def most_likely(policy: QLearning, overhead: float) -> int:
    return int(np.argmax(policy.choose(situation(overhead), OPTIONS).propensities))


def test_each_state_has_its_own_best_option() -> None:
    """One policy learns to exchange rarely where communication is slow, and at every step where it is not."""
    policy = trained()
    assert most_likely(policy, 0.8) == 3
    assert most_likely(policy, 0.1) == 0


def test_a_table_survives_being_written_down() -> None:
    """A table is plain data: through JSON and back it is the same, and the next run starts where the last one ended."""
    rows = trained().to_table()
    read = [Row(*row) for row in json.loads(json.dumps(rows))]
    assert rows == read
    # All but the last, whose next state is unknown.
    assert sum(row.tries for row in rows) == 199
    policy = QLearning.from_table(np.random.default_rng(1), read)
    assert rows == policy.to_table()
    policy.choose(situation(0.8), OPTIONS)
    # Another job, ten times as fast: the table is relative to what the incumbent gives.
    policy.learn(situation(0.8), 0, 1000.0)
    assert most_likely(policy, 0.8) == 3


def test_an_optimistic_start_tries_every_option() -> None:
    """Even the options that chance does not pick are tried once before one is settled on."""
    policy = trained(40)
    assert {option.name for option in OPTIONS} == {row.option for row in policy.to_table() if row.overhead == 3}


def test_with_a_model_the_promising_options_come_first() -> None:
    """The optimistic start follows the predictions: what is predicted to be much worse is tried by chance alone."""
    policy = QLearning(np.random.default_rng(0))
    options = [Option("slow", 50.0), Option("now", 100.0), Option("fast", 150.0)]
    at = Situation(0.9, 0.1, incumbent=1, remaining=0)
    choices, chances = [], []
    for _ in range(10):
        choice = policy.choose(at, options)
        choices.append(choice.index)
        chances.append(choice.propensities[0])
        policy.learn(at, choices[-1], options[choices[-1]].predicted)
    assert choices[:2] == [1, 2]
    assert max(chances) < 0.02


def test_every_option_stays_possible() -> None:
    """Epsilon-greedy keeps a known chance for each option, which a later comparison of policies needs."""
    propensities = trained().choose(situation(0.8), OPTIONS).propensities
    assert sorted(propensities) == pytest.approx([0.005, 0.005, 0.005, 0.985])

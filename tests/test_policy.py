"""Policies: one contract for all of them, and what the ones that learn come to on a problem of known rewards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from adarun.control import bandit
from adarun.control.built_in import BUILT_IN, built_in
from adarun.control.policy import Incumbent, Mean, Option, Policy, Situation
from adarun.simulate.arms import NOISE, Game, Problem, play

NAMES = [f"batch_size={size} OMP_NUM_THREADS={threads}" for size, threads in itertools.product((32, 64), (1, 2, 4))]
REWARDS = [100.0, 120.0, 90.0, 150.0, 60.0, 110.0]
UNMODELLED = [Option(name) for name in NAMES]
MODELLED = [Option(name, 1.1 * reward) for name, reward in zip(NAMES, REWARDS, strict=True)]
LEARNING = ["thompson", "ucb", "qlearning"]
START = Situation(utilisation=0.7, overhead=0.3, incumbent=0, remaining=0)


def make(name: str, seed: int = 0) -> Policy:
    policy = built_in(name, np.random.default_rng(seed), option=NAMES[3])
    assert policy is not None
    return policy


def run(policy: Policy, options: list[Option], num_decisions: int = 60, noise: float = 0.0) -> list[int]:
    """What a policy chooses where the options give REWARDS."""
    rng, incumbent, choices = np.random.default_rng(1), Incumbent(0), []
    for number in range(num_decisions):
        situation = Situation(0.7, 0.3, incumbent.index, num_decisions - number)
        choice = policy.choose(situation, options).index
        reward = REWARDS[choice] * (1.0 + noise * float(rng.standard_normal()))
        policy.learn(situation, choice, reward)
        incumbent.learn(choice, reward)
        choices.append(choice)
    return choices


# --- the contract of every policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("options", [MODELLED, UNMODELLED, MODELLED[:1]], ids=["modelled", "unmodelled", "single"])
def test_every_choice_is_an_option_with_its_propensity_and_reason(name: str, options: list[Option]) -> None:
    """Propensities are one number per option and sum to 1, what was chosen was possible, and a reason is given."""
    policy = built_in(name, np.random.default_rng(0), option=NAMES[0])
    assert policy is not None
    for _ in range(20):
        choice = policy.choose(START, options)
        assert len(options) == len(choice.propensities)
        assert sum(choice.propensities) == pytest.approx(1.0)
        assert min(choice.propensities) >= 0.0
        assert choice.propensities[choice.index] > 0.0
        assert choice.reason
        policy.learn(START, choice.index, REWARDS[choice.index])


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_same_randomness_gives_the_same_choices(name: str) -> None:
    """Two policies with equal generators choose alike, decision by decision."""
    assert run(make(name), MODELLED, noise=NOISE) == run(make(name), MODELLED, noise=NOISE)


@pytest.mark.parametrize("name", BUILT_IN)
def test_options_are_chosen_as_often_as_their_propensities_say(name: str) -> None:
    """Over 2,000 choices in the same situation, no option's frequency is off its propensity by over 4 points."""
    policy = make(name)
    options = [Option(name, 100.0 + index) for index, name in enumerate(NAMES)]
    policy.choose(START, options)
    policy.learn(START, 0, 100.0)
    choices = [policy.choose(START, options) for _ in range(2000)]
    frequencies = np.bincount([choice.index for choice in choices], minlength=len(options)) / len(choices)
    claimed = np.mean([choice.propensities for choice in choices], axis=0)
    assert list(claimed) == pytest.approx(list(frequencies), abs=0.04)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_incumbent_is_measured_first(name: str) -> None:
    """But for the user's own choice, every policy looks at what the job does anyway before it tries anything."""
    expected = 3 if name == "fixed" else 0
    assert expected == make(name).choose(START, MODELLED).index


# --- those that learn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("options", [MODELLED, UNMODELLED], ids=["modelled", "unmodelled"])
def test_the_best_option_is_found(name: str, options: list[Option]) -> None:
    """With and without a model, the option that gives most is what the last decisions mostly choose."""
    choices = run(make(name), options, noise=NOISE)
    assert choices[-20:].count(3) >= 17


@pytest.mark.parametrize("name", LEARNING)
def test_a_failed_option_is_not_chosen_again(name: str) -> None:
    """A reward of 0 ends the trials of its own option, not of another that shares its settings."""
    policy, choices = make(name), []
    for _ in range(30):
        choice = policy.choose(START, MODELLED).index
        policy.learn(START, choice, {0: 100.0, 3: 0.0, 5: 130.0}.get(choice, 90.0))
        choices.append(choice)
    assert 1 <= choices.count(3) <= 2
    assert choices[-10:].count(5) >= 8


@pytest.mark.parametrize("seed", range(5))
def test_without_a_model_thompson_looks_at_each_option_about_once(seed: int) -> None:
    """Where nothing is predicted, the options much worse than the best are tried at most once, and the best one stays."""
    choices = run(make("thompson", seed), UNMODELLED, noise=NOISE)
    worse = [index for index, reward in enumerate(REWARDS) if reward < 0.8 * max(REWARDS) and index]
    assert max(choices.count(index) for index in worse) <= 1
    assert choices[-1] == 3


def test_thompson_tries_nothing_that_is_unlikely_to_beat_the_incumbent() -> None:
    """Where the model says that the incumbent is best by far, no other option is possible."""
    policy = make("thompson")
    options = [Option(name, 100.0 if index else 200.0) for index, name in enumerate(NAMES)]
    policy.learn(START, 0, 200.0)
    for _ in range(20):
        choice = policy.choose(START, options)
        assert choice.propensities == (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        assert choice.reason.startswith("kept: no option is likely to beat")
        policy.learn(START, choice.index, 200.0)


def test_what_one_option_shows_is_believed_of_those_that_share_its_settings() -> None:
    """A setting that disappoints lowers the belief in the other options that have it, and in them most."""
    belief = bandit.Belief()
    options = [Option(name, 100.0) for name in ("a=1 b=1", "a=1 b=2", "a=2 b=1", "a=2 b=2")]
    belief.learn(0, 0, 100.0)
    belief.learn(0, 2, 80.0)
    mean, _ = belief.posterior(options, 0)
    assert mean[3] < mean[1]


def test_the_noise_is_learned_from_repeated_measurements() -> None:
    """An option measured often and always alike is known better than one measured as often with scatter."""
    errors = []
    for scatter in (0.0, 0.2):
        belief = bandit.Belief()
        for number in range(20):
            belief.learn(0, 0, 100.0 * (1.0 + scatter * (-1) ** number))
        _, covariance = belief.posterior(UNMODELLED, 0)
        errors.append(math.sqrt(covariance[0, 0]))
    assert errors[0] < 0.01 < errors[1]


@pytest.mark.parametrize("sync_free", [True, False])
def test_thompson_is_nearly_free_and_soon_there(sync_free: bool) -> None:
    """On 30 test problems: within 5 % of the oracle after 10 decisions, at most 2 lost, and never slow, by the median."""
    games = [play(Problem(seed, sync_free=sync_free), make("thompson", seed)) for seed in range(30)]

    def median(of: Callable[[Game], float]) -> float:
        return float(np.median([of(game) for game in games]))

    assert median(Game.decisions_to_settle) <= 10
    assert median(Game.regret) <= 2.0
    assert median(lambda game: float(game.relative_times().max())) <= 1.02


# --- the others -----------------------------------------------------------------------------------------------------------


def test_fixed_names_the_options_when_there_is_none_of_its_name() -> None:
    """A misspelt option is an error that lists the right names."""
    policy = built_in("fixed", np.random.default_rng(0), option="batch_size=33")
    assert policy is not None
    with pytest.raises(
        ValueError, match=r"no option is named 'batch_size=33'; there are batch_size=32 OMP_NUM_THREADS=1"
    ):
        policy.choose(START, MODELLED)


def test_another_name_is_none_of_the_built_in_ones() -> None:
    """What adarun does not know is left to the entry points."""
    assert built_in("annealing", np.random.default_rng(0)) is None


def test_the_incumbent_changes_for_a_better_option_only() -> None:
    """One lucky window of 1 % is not enough, a better one is; and the old incumbent returns when the luck is over."""
    incumbent = Incumbent(0)
    for _ in range(4):
        incumbent.learn(0, 100.0)
    incumbent.learn(1, 101.0)
    assert incumbent.index == 0
    incumbent.learn(2, 110.0)
    assert incumbent.index == 2
    incumbent.learn(2, 85.0)
    assert incumbent.index == 0


def test_a_mean_follows_what_drifts() -> None:
    """After a hundred windows of another value, an old mean is within 5 % of the change."""
    mean = Mean()
    for value in [1.0] * 1000 + [2.0] * 100:
        mean.see(value)
    assert mean.value == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("name", LEARNING)
def test_predictions_may_be_missing_for_some_options(name: str) -> None:
    """An option of which nothing is predicted is tried like the others, and found if it is the best."""
    options = [Option(option.name) if index == 3 else option for index, option in enumerate(MODELLED)]
    assert run(make(name), options, noise=NOISE)[-20:].count(3) >= 17


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_was_measured_before_the_first_choice_counts(name: str) -> None:
    """A policy may be told of several windows before it is asked for the first time."""
    policy = make(name)
    for _ in range(3):
        policy.learn(START, 0, 100.0)
    assert not policy.choose(START, MODELLED).reason.endswith("measured first")

"""The cost model: what it learns of a worker's fixed and per-sample cost, and what it takes for a change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from adarun.control.cost import CostModel, common_factor
from adarun.events import Window


def window(shares: Sequence[float], busy: Sequence[float], noise: float = 0.0) -> Window:
    """A window in which the workers were busy for so long with their shares."""
    return Window(
        plan=0,
        steps=20,
        step_seconds=max(busy),
        samples=list(shares),
        busy_seconds=list(busy),
        wait_seconds=[max(busy) - seconds for seconds in busy],
        noise=[noise] * len(busy),
    )


def learned(*windows: tuple[Sequence[float], Sequence[float]], noise: float = 0.0) -> CostModel:
    """A model that has seen these windows, each given as shares and busy seconds."""
    model = CostModel(len(windows[0][0]))
    for shares, busy in windows:
        model.learn(window(shares, busy, noise))
    return model


def predicted(model: CostModel, *shares: float) -> list[float]:
    return [float(seconds) for seconds in model.predict(np.array(shares))]


def test_the_first_window_is_predicted_again() -> None:
    """After one window the model says what it saw, for the shares it saw."""
    assert pytest.approx(predicted(learned(([32, 32], [1.0, 2.0])), 32, 32)) == [1.0, 2.0]


def test_a_small_part_is_taken_for_fixed_until_two_shares_were_seen() -> None:
    """One share cannot tell fixed from per-sample cost, so a new worker has a small fixed part, whatever its speed."""
    model = learned(([32, 32], [1.0, 2.0]))
    fixed_parts = model.fixed / model.predict(np.array([32.0, 32.0]))
    assert fixed_parts[0] == pytest.approx(fixed_parts[1])
    assert 0.0 < fixed_parts[0] < 0.2


@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.7])
def test_two_shares_tell_fixed_from_per_sample_cost(part: float) -> None:
    """Once each worker was seen at two shares, a third is predicted to within 2 % whatever part of the cost is fixed."""
    speed = np.array([1.0, 2.0])

    def busy(*shares: float) -> list[float]:
        return [float(s) for s in speed * (part + (1.0 - part) * np.array(shares) / 32)]

    model = learned(((32, 32), busy(32, 32)), ((42, 22), busy(42, 22)))
    assert busy(48, 16) == pytest.approx(predicted(model, 48, 16), rel=0.02)


def test_no_cost_is_negative() -> None:
    """A worker whose time grows faster than its share is not given a negative fixed cost."""
    model = learned(([32, 32], [1.0, 1.0]), ([40, 24], [1.6, 0.6]))
    assert (model.fixed >= 0.0).all()
    assert (model.per_sample > 0.0).all()


def test_old_windows_are_forgotten() -> None:
    """A worker that drifts by 5 % is predicted at its new level, not at the mean of all it ever did."""
    model = learned(*[([32, 32], [1.0, 1.0])] * 20, *[([32, 32], [1.0, 1.05])] * 20)
    assert pytest.approx(predicted(model, 32, 32), rel=0.005) == [1.0, 1.05]


@pytest.mark.parametrize("factor", [0.25, 0.8, 1.25, 4.0])
def test_a_common_change_of_speed_leaves_the_workers_relation(factor: float) -> None:
    """When all workers take longer or shorter by one factor, what one takes relative to another stays."""
    steady = learned(*[([32, 32], [1.0, 1.5])] * 5)
    changed = learned(*[([32, 32], [1.0, 1.5])] * 4, ([32, 32], [factor, 1.5 * factor]))
    before, after = steady.predict(np.array([40.0, 24.0])), changed.predict(np.array([40.0, 24.0]))
    assert float(before[1] / before[0]) == pytest.approx(float(after[1] / after[0]))


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_seconds_stay_seconds_after_a_common_change_of_speed(factor: float) -> None:
    """When all workers become slower for good, the model predicts what they take now: a gain is counted in real seconds."""
    model = learned(*[([32, 32], [1.0, 1.5])] * 4, *[([32, 32], [factor, 1.5 * factor])] * 4)
    assert [factor, 1.5 * factor] == pytest.approx(predicted(model, 32, 32), rel=0.02)


def test_a_common_change_of_speed_is_no_surprise() -> None:
    """What all workers go through together makes none of them less trusted."""
    factors = [1.08 if number % 2 else 1.0 for number in range(40)]
    together = learned(*[([32, 32], [factor, 1.5 * factor]) for factor in factors])
    steady = learned(*[([32, 32], [1.0, 1.5])] * 40)
    assert list(steady.surprise) == list(together.surprise)


def test_a_jump_of_one_worker_is_followed_at_once() -> None:
    """A worker that suddenly takes twice as long is predicted at its new level after one window."""
    model = learned(*[([32, 32], [1.0, 1.0])] * 10, ([32, 32], [1.0, 2.0]))
    assert pytest.approx(predicted(model, 32, 32), rel=0.02) == [1.0, 2.0]


def test_a_jump_keeps_what_is_known_of_the_fixed_part() -> None:
    """A worker that becomes twice as slow in all its work keeps the part of it that is fixed: history is rescaled, not wiped."""
    model = learned(*[([32, 32], [1.0, 1.0]), ([34, 30], [1.0 + 1 / 32, 1.0 - 1 / 32])] * 10)
    part = model.fixed[1] / model.predict(np.array([32.0, 32.0]))[1]
    model.learn(window([34, 30], [1.0 + 1 / 32, 2.0 * (1.0 - 1 / 32)]))
    assert part == pytest.approx(model.fixed[1] / model.predict(np.array([32.0, 32.0]))[1], abs=0.05)


def test_noise_is_no_jump() -> None:
    """Changes within the measured noise do not part two equal workers: after 20 windows at 10 % noise they are still alike."""
    rng = np.random.default_rng(0)
    windows = [([32, 32], [float(s) for s in 1.0 + 0.1 * rng.standard_normal(2)]) for _ in range(20)]
    first, second = predicted(learned(*windows, noise=0.1), 32, 32)
    assert first == pytest.approx(second, rel=0.1)


def test_more_windows_make_a_level_surer_and_noise_makes_it_less_sure() -> None:
    """The stated error of a level falls with the windows seen and grows with their noise."""
    steady = [([32, 32], [1.0, 1.0])]
    assert learned(*steady * 5, noise=0.05).error[0] < learned(*steady, noise=0.05).error[0]
    assert learned(*steady, noise=0.02).error[0] < learned(*steady, noise=0.05).error[0]


def test_a_worker_that_surprises_is_trusted_less() -> None:
    """What a window brings that the model did not foresee is remembered, per worker."""
    restless = [([32, 32], [1.0, 1.0 + 0.04 * (-1) ** n]) for n in range(20)]
    surprise = learned(*restless).surprise
    assert surprise[1] > 2.0 * surprise[0]


@pytest.mark.parametrize(
    ("expected", "ratios"),
    [(1.0, [1.0, 1.0]), (1.2, [1.2, 2.0]), (0.8, [0.5, 0.8]), (1.0, [0.9, 1.1]), (1.0, [1.0, 3.0])],
)
def test_the_common_factor_is_the_least_change(expected: float, ratios: list[float]) -> None:
    """Workers share only the change of the one that changed least, and nothing if some got faster and others slower."""
    assert expected == common_factor(np.array(ratios))

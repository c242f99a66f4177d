"""The guard: what may be tried, for how long, and what is taken back; every refusal says why."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adarun.control.guard import Budget, Memory, aborts, refuses_switch

GIB = float(1 << 30)


def budget(windows: int, rate: float = 100.0) -> Budget:
    """The budget of a job that has run so many windows of 1,000 useful samples at the baseline, 100 a second."""
    started = Budget()
    started.start(100.0)
    for _ in range(windows):
        started.spend(1000.0, 1000.0 / rate)
    return started


# --- the budget -----------------------------------------------------------------------------------------------------------


def test_a_trial_must_fit_the_budget_even_if_it_is_as_slow_as_feared() -> None:
    """After nine windows at the baseline, one at two thirds of its rate is within 5 % of ten of them; after eight, not."""
    assert budget(9).refuses(1000.0, 100.0 / 1.5, 100.0) == ""
    expected = "refused: the job could then have taken 95.0 s, and 94.5 s is what the baseline allows it"
    assert expected == budget(8).refuses(1000.0, 100.0 / 1.5, 100.0)


def test_an_unknown_option_is_as_slow_as_a_trial_may_be() -> None:
    """Without a prediction, or with a worse one, a trial counts as 1.5 times the incumbent's time: then it is aborted."""
    for lowest in (math.nan, 1.0):
        assert budget(9).refuses(1000.0, lowest, 100.0) == ""
        assert budget(8).refuses(1000.0, lowest, 100.0)


def test_what_was_gained_may_be_spent() -> None:
    """A job that has become faster than the baseline can afford a trial at once."""
    assert budget(1, rate=200.0).refuses(1000.0, math.nan, 100.0) == ""


@pytest.mark.parametrize("seed", range(5))
def test_the_job_never_takes_more_than_the_budget(seed: int) -> None:
    """Whatever is proposed, if no trial is slower than feared, the time is at no moment over 1.05 of the baseline's."""
    rng, job = np.random.default_rng(seed), budget(0)
    job.spend(1000.0, 10.0)
    for _ in range(300):
        lowest = float(rng.uniform(70.0, 110.0))
        rate = 100.0 if job.refuses(1000.0, lowest, 100.0) else float(rng.uniform(lowest, 110.0))
        job.spend(1000.0, 1000.0 / rate)
        assert job.spent_seconds <= 1.05 * job.baseline_seconds + 1e-6


# --- memory and shares ----------------------------------------------------------------------------------------------------


def seen(*peaks: tuple[float, float]) -> Memory:
    memory = Memory(10.0 * GIB)
    for share, gib in peaks:
        memory.see(share, gib * GIB)
    return memory


@pytest.mark.parametrize(
    ("peaks", "expected"),
    [
        ([], 0.0),
        ([(32, 4.0)], 8.0),
        ([(32, 4.0), (16, 3.0)], 6.0),
        ([(16, 3.0), (32, 4.0), (24, 3.4)], 6.0),
        # One sample apart, the difference is the allocator's.
        ([(31, 4.0), (32, 4.0)], 8.0),
        # An earlier peak counts, not the last reading.
        ([(32, 4.0), (32, 3.0)], 8.0),
        # A small share that took more, say in an evaluation, is no reason to hope.
        ([(16, 4.0), (32, 3.0)], 3.0),
    ],
)
def test_memory_is_proportional_from_one_share_and_affine_from_two(
    peaks: list[tuple[float, float]], expected: float
) -> None:
    """What a share of 64 takes follows from what smaller ones took."""
    assert expected == pytest.approx(seen(*peaks).predict(64) / GIB)


def test_no_share_is_given_that_would_fill_the_memory() -> None:
    """The largest share is the last for which at most 90 % of the device's memory is foreseen."""
    assert seen((32, 4.0)).largest_share(1000) == 72
    assert seen((32, 4.0), (16, 3.0)).largest_share(1000) == 112
    assert seen((32, 4.0)).largest_share(50) == 50


def test_a_share_that_a_worker_has_had_is_never_refused() -> None:
    """A job that runs at 95 % of its memory may go on, and nothing is refused where nothing is known."""
    assert seen((32, 9.5)).largest_share(1000) == 32
    assert seen().largest_share(1000) == 1000


# --- switches and trials --------------------------------------------------------------------------------------------------


def test_a_switch_pays_three_times_or_is_refused() -> None:
    """A restart of 10 s for 5 % of what is left needs ten minutes of it."""
    assert refuses_switch(0.05, 600.0, 10.0) == ""
    expected = "refused: the switch costs 10.0 s and would save 29.0 s, not 3 times as much"
    assert expected == refuses_switch(0.05, 580.0, 10.0)


@pytest.mark.parametrize(
    ("steps", "aborted"),
    [
        ([1.6, 1.6], False),
        ([1.4, 1.4, 1.4], False),
        ([1.5, 1.5, 1.5], True),
        # An accident is not the trial's fault.
        ([9.0, 1.1, 1.1], False),
        ([9.0, 1.1, 1.7], True),
    ],
)
def test_a_trial_ends_after_three_steps_at_one_and_a_half_times_the_time(steps: list[float], aborted: bool) -> None:
    """Fewer steps say too little; the median of three decides."""
    reason = aborts(steps, 1.0)
    assert aborted == bool(reason)
    assert not aborted or reason.startswith("aborted: after 3 steps the trial is 1.")


def test_the_rest_of_the_job_and_the_cost_of_a_switch_count() -> None:
    """A trial that a short job cannot afford fits a long one whose rest goes at the incumbent's speed."""
    job = Budget()
    job.start(100.0)
    job.spend(1000.0, 10.0)
    assert job.refuses(1000.0, 80.0, 100.0, cost_seconds=10.0)
    assert job.refuses(1000.0, 80.0, 100.0, cost_seconds=10.0, rest=100_000.0) == ""
    assert job.refuses(1000.0, 80.0, 100.0, rest=1_000.0, cost_seconds=1.0)
    assert job.refuses(1000.0, 80.0, 130.0, rest=1_000.0, cost_seconds=1.0) == ""

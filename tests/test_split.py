"""The split of a global batch: exact, within its bounds, and kind to a worker with a fixed cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adarun.control.split import finish_seconds, min_max_split
from adarun.events import apportion

EXACT = settings(derandomize=True, deadline=None, database=None, max_examples=150)
# Eighths are exact in binary, so finish times of one split are the same number however they are added up.
EIGHTHS = st.integers(0, 80).map(lambda n: n / 8)
POSITIVE_EIGHTHS = st.integers(1, 80).map(lambda n: n / 8)


def floats(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def all_splits(total: int, lower: list[int], upper: list[int]) -> Iterator[tuple[int, ...]]:
    """Every split within the bounds, by trying them all."""
    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    return (shares for shares in itertools.product(*ranges) if sum(shares) == total)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[float], list[int], list[int], int]:
    """A small split to find: fixed costs, costs per sample, bounds, and a total between them."""
    num_workers = draw(st.integers(1, 4))
    fixed = draw(st.lists(EIGHTHS, min_size=num_workers, max_size=num_workers))
    per_sample = draw(st.lists(POSITIVE_EIGHTHS, min_size=num_workers, max_size=num_workers))
    lower = draw(st.lists(st.integers(0, 3), min_size=num_workers, max_size=num_workers))
    upper = [low + draw(st.integers(0, 6)) for low in lower]
    return fixed, per_sample, lower, upper, draw(st.integers(sum(lower), sum(upper)))


@EXACT
@given(problems())
def test_the_split_finishes_as_early_as_the_best_of_all_splits(
    problem: tuple[list[float], list[float], list[int], list[int], int],
) -> None:
    """No other split within the bounds finishes earlier: brute force over all of them agrees exactly."""
    fixed, per_sample, lower, upper, total = problem
    shares = min_max_split(floats(fixed), floats(per_sample), total, ints(lower), ints(upper))
    earliest = min(
        finish_seconds(floats(fixed), floats(per_sample), other) for other in all_splits(total, lower, upper)
    )
    assert earliest == finish_seconds(floats(fixed), floats(per_sample), shares)


@EXACT
@given(problems())
def test_the_split_sums_to_the_batch_and_keeps_its_bounds(
    problem: tuple[list[float], list[float], list[int], list[int], int],
) -> None:
    """Every sample is given to one worker, and no worker gets fewer or more than its bounds allow."""
    fixed, per_sample, lower, upper, total = problem
    shares = min_max_split(floats(fixed), floats(per_sample), total, ints(lower), ints(upper))
    assert total == shares.sum()
    assert (ints(lower) <= shares).all()
    assert (shares <= ints(upper)).all()


@EXACT
@given(
    st.lists(st.tuples(st.floats(0.0, 1e3), st.floats(1e-12, 1e3)), min_size=1, max_size=40),
    st.integers(0, 100_000),
)
def test_the_split_sums_to_the_batch_whatever_the_costs(costs: list[tuple[float, float]], extra: int) -> None:
    """Costs that differ by fifteen orders of magnitude lose or invent no sample."""
    fixed, per_sample = floats([a for a, _ in costs]), floats([c for _, c in costs])
    total, ones = len(costs) + extra, np.ones(len(costs), dtype=np.int64)
    shares = min_max_split(fixed, per_sample, total, ones, ones * total)
    assert total == shares.sum()
    assert shares.min() >= 1


@pytest.mark.parametrize("total", [3, 21])
def test_bounds_that_no_split_can_keep_are_refused(total: int) -> None:
    """A total below all lower bounds or above all upper ones raises ValueError."""
    with pytest.raises(ValueError, match=f"no split of {total} samples lies between 4 and 20"):
        min_max_split(floats([0.0, 0.0]), floats([1.0, 1.0]), total, ints([2, 2]), ints([10, 10]))


def test_a_fixed_cost_makes_a_share_less_than_proportional() -> None:
    """Of two workers that take 1 s and 2 s for an even share, the slow one gets less than a third if half of it is fixed."""
    even, total = 48, 96
    fixed, per_sample = floats([0.5, 1.0]), floats([0.5 / even, 1.0 / even])
    shares = min_max_split(fixed, per_sample, total, ints([1, 1]), ints([total, total]))
    assert list(shares) == [80, 16]
    assert shares[1] < total / 3


def test_workers_without_fixed_cost_share_in_proportion_to_their_speed() -> None:
    """Two workers at 1 and 2 s per even share get two thirds and one third."""
    shares = min_max_split(floats([0.0, 0.0]), floats([1.0, 2.0]), 96, ints([1, 1]), ints([96, 96]))
    assert list(shares) == [64, 32]


def test_ten_thousand_workers_are_split_exactly() -> None:
    """The split of 10,000 workers is the best one: any earlier finish leaves samples over."""
    rng = np.random.default_rng(7)
    num_workers, total = 10_000, 1_000_003
    fixed, per_sample = rng.integers(0, 2000, num_workers), rng.integers(1, 100, num_workers)
    lower, upper = np.ones(num_workers, dtype=np.int64), rng.integers(50, 1000, num_workers)
    shares = min_max_split(fixed.astype(np.float64), per_sample.astype(np.float64), total, lower, upper)
    assert total == shares.sum()
    assert (lower <= shares).all()
    assert (shares <= upper).all()
    # All costs are whole, so the next earlier finish is one second before: who could do how much by then?
    earlier = int((fixed + per_sample * shares).max()) - 1
    possible = np.minimum(upper, (earlier - fixed) // per_sample)
    assert possible.sum() < total or (possible < lower).any()


@EXACT
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(0, 10_000))
def test_apportioned_shares_sum_up_and_leave_nobody_without_a_sample(weights: list[int], extra: int) -> None:
    """The shares of a batch of any size sum to it, with at least one sample each."""
    total = len(weights) + extra
    shares = apportion(weights, total)
    assert total == sum(shares)
    assert min(shares) >= 1


@EXACT
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(0, 10_000))
def test_apportioned_shares_are_proportional(weights: list[int], extra: int) -> None:
    """Where everybody's part is a sample or more, shares are in proportion to the weights, to within a sample."""
    total = sum(weights) + extra
    for share, weight in zip(apportion(weights, total), weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1


def test_weights_that_sum_to_the_batch_are_its_shares() -> None:
    """Shares given as numbers of samples are taken as they are."""
    assert apportion([90, 6], 96) == [90, 6]


def test_apportioning_gives_left_over_samples_to_the_lower_rank_on_a_tie() -> None:
    """Every rank computes the same shares, so a tie is broken by rank."""
    assert apportion([1, 1, 1, 1], 10) == [3, 3, 2, 2]


def test_fewer_samples_than_workers_cannot_be_apportioned() -> None:
    """A batch that leaves a worker without a sample raises ValueError."""
    with pytest.raises(ValueError, match="2 samples cannot be cut among 3 workers"):
        apportion([1, 1, 1], 2)

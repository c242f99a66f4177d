"""Change points: noise raises no alarm, and a shift raises one soon."""

from __future__ import annotations

import numpy as np
import pytest

from adarun.control.cusum import Cusum

SPREAD = 0.02


def alarms(changes: np.ndarray) -> np.ndarray:
    """Which workers changed in each window; both of shape (windows, workers)."""
    cusum = Cusum(changes.shape[1])
    return np.array([cusum.see(change, np.full(len(change), SPREAD))[0] > 0.0 for change in changes])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_workers", [2, 8, 64, 1024])
def test_noise_raises_at_most_two_alarms_in_a_thousand_windows(num_workers: int, seed: int) -> None:
    """Whatever the number of workers, 1,000 windows of pure noise alarm at most twice in all."""
    noise = SPREAD * np.random.default_rng(seed).standard_normal((1000, num_workers))
    assert int(alarms(noise).sum()) <= 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("num_workers", [2, 8, 32])
def test_a_shift_of_two_standard_deviations_is_found_within_six_windows(num_workers: int, sign: float) -> None:
    """Half of all shifts by two standard deviations, up or down, are found in six windows, in the right worker."""
    delays = []
    for seed in range(101):
        changes = SPREAD * np.random.default_rng(seed).standard_normal((40, num_workers))
        changes[:, 1] += sign * 2.0 * SPREAD
        found = np.flatnonzero(alarms(changes)[:, 1])
        delays.append(int(found[0]) + 1 if len(found) else 40)
    assert float(np.median(delays)) <= 6


def test_a_large_shift_is_found_at_once_and_measured() -> None:
    """A worker that becomes twice as slow is found in its first window, with its shift to within a standard error."""
    cusum = Cusum(2)
    assert not cusum.see(np.zeros(2), np.full(2, SPREAD))[0].any()
    since, shift = cusum.see(np.array([0.0, np.log(2.0)]), np.full(2, SPREAD))
    assert list(since) == [0.0, 1.0]
    assert list(shift) == pytest.approx([0.0, np.log(2.0) - SPREAD])

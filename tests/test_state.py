"""What is summed up of a window: the steps that belong together."""

from __future__ import annotations

import numpy as np
import pytest

from adarun.events import Plan, Step
from adarun.state import State, close_window, fold, steps_since_change


def state_of(seconds: list[list[float]]) -> State:
    """A state that has seen steps of two workers, each busy for so long, under one even plan."""
    state = State(world_size=2)
    fold(state, Plan(0, 0, 1000, [8, 8]))
    for rank, busy in enumerate(seconds):
        for number, one in enumerate(busy):
            fold(state, Step(rank, 10 + number, 8, 0.0, one, 0.0, 0.0, 0.0, 0.0))
    return state


@pytest.mark.parametrize("changed_at", [5, 12, 20, 35])
@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_a_window_in_which_a_worker_changes_speaks_of_what_is_now(factor: float, changed_at: int) -> None:
    """When a worker becomes slower or faster in mid-window, the window's times are those after it, of both workers."""
    rng = np.random.default_rng(0)
    steady, changing = 1.0 + 0.03 * rng.standard_normal((2, 40))
    changing[changed_at:] *= factor
    window = close_window(state_of([steady.tolist(), changing.tolist()]))
    assert window is not None
    assert window.steps == 40 - changed_at
    assert window.busy_seconds == pytest.approx([1.0, factor], rel=0.03)


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_noise_is_no_change(noise: float) -> None:
    """In 500 windows of noise, all of the steps belong together."""
    rng = np.random.default_rng(0)
    lengths = {steps_since_change(1.0 + noise * rng.standard_normal(40)) for _ in range(500)}
    assert lengths == {40}

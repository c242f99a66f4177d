"""The controller on simulated workers and on real traces: it finds the best split, follows changes, and leaves noise alone."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from adarun.control.controller import Controller
from adarun.control.split import finish_seconds, min_max_split
from adarun.events import Decision, Window

TRACES = Path(__file__).parent / "data" / "traces"
Floats = npt.NDArray[np.float64]
# What the workers of a window cost: fixed seconds and seconds per sample, one entry a worker.
Costs = Callable[[int], tuple[Floats, Floats]]
STEPS = 20


def measured(busy: Floats, shares: list[int], exchange: float = 0.0) -> Window:
    """The window of some steps: `busy` has shape (steps, workers), and each step ends when the slowest is done."""
    steps = busy.max(axis=1) + exchange
    return Window(
        plan=0,
        steps=len(busy),
        step_seconds=float(steps.mean()),
        samples=[float(share) for share in shares],
        busy_seconds=[float(s) for s in busy.mean(axis=0)],
        wait_seconds=[float(s) for s in (steps[:, None] - busy).mean(axis=0)],
        noise=[float(s) for s in busy.std(axis=0, ddof=1) / math.sqrt(len(busy)) / busy.mean(axis=0)],
    )


class Simulation:
    """Workers of known cost under a controller; what it chose and what that really took, window by window."""

    def __init__(self, num_workers: int, global_batch: int, seed: int = 0) -> None:
        self.controller = Controller(num_workers)
        self.controller.start(global_batch)
        self.global_batch = global_batch
        self.rng = np.random.default_rng(seed)
        self.shares: list[list[int]] = []
        self.seconds: list[float] = []
        self.decisions: list[Decision] = []

    def see(self, busy: Floats, exchange: float = 0.0) -> None:
        """Measure a window under the present shares and decide the next ones."""
        shares = list(self.controller.shares)
        window = measured(busy, shares, exchange)
        self.shares.append(shares)
        self.controller.learn(window)
        self.decisions.append(self.controller.decide(window, self.global_batch))

    def run(self, costs: Costs, num_windows: int, *, step_noise: float = 0.0, window_noise: float = 0.0) -> Simulation:
        """Run windows of STEPS steps; the noises are standard deviations, relative to a worker's time."""
        for _ in range(num_windows):
            fixed, per_sample = costs(len(self.shares))
            shares, num_workers = self.controller.shares, len(fixed)
            noise = (1.0 + step_noise * self.rng.standard_normal((STEPS, num_workers))) * (
                1.0 + window_noise * self.rng.standard_normal(num_workers)
            )
            busy = (fixed + per_sample * np.array(shares)) * np.maximum(noise, 0.01)
            self.seconds.append(finish_seconds(fixed, per_sample, shares))
            self.see(busy)
        return self

    def changes(self) -> list[int]:
        """The windows that began with other shares than the one before."""
        chosen = [*self.shares, self.controller.shares]
        return [number for number in range(1, len(chosen)) if chosen[number] != chosen[number - 1]]


def cost(speeds: list[float], fixed_part: float, even: float) -> tuple[Floats, Floats]:
    """Workers that take `speeds` seconds for an even share, of which a part is fixed."""
    seconds = np.array(speeds)
    return fixed_part * seconds, (1.0 - fixed_part) * seconds / even


def best_seconds(fixed: Floats, per_sample: Floats, global_batch: int) -> float:
    """How long the best split takes."""
    lower = np.ones(len(fixed), dtype=np.int64)
    return finish_seconds(
        fixed, per_sample, min_max_split(fixed, per_sample, global_batch, lower, lower * global_batch)
    )


# --- a lasting difference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed_part", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize(("num_workers", "even"), [(2, 32), (2, 512), (4, 64), (8, 64)])
def test_a_worker_at_half_speed_is_relieved_in_two_re_splits(num_workers: int, even: int, fixed_part: float) -> None:
    """Whatever part of the cost is fixed, at most two re-splits come to within 2 % of the best split."""
    global_batch = even * num_workers
    costs = cost([1.0, 2.0, *[1.0] * (num_workers - 2)], fixed_part, even)
    job = Simulation(num_workers, global_batch).run(lambda _: costs, 30)
    settled = ([0, *job.changes()] + [29] * 3)[2] if len(job.changes()) >= 2 else 29
    assert job.seconds[settled] <= 1.02 * best_seconds(*costs, global_batch)


def test_the_gain_is_predicted_and_estimated_as_it_is() -> None:
    """The gain that a decision expects, and the one the run is said to have had, are the true ones to within 5 %."""
    costs = cost([1.0, 2.0], 0.1, 32)
    job = Simulation(2, 64).run(lambda _: costs, 50, step_noise=0.01)
    expected = job.seconds[0] / best_seconds(*costs, 64) - 1.0
    assert expected == pytest.approx(job.decisions[0].gain, abs=0.05)
    actual = job.controller.even_seconds / job.controller.actual_seconds
    assert job.seconds[0] * 50 / sum(job.seconds) == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
def test_the_gain_is_counted_in_real_seconds_after_a_common_change_of_speed(factor: float) -> None:
    """When all workers become slower or faster for good, the estimated gain is still that of the shares, to within 5 %."""
    before, after = cost([1.0, 2.0], 0.1, 32), cost([factor, 2.0 * factor], 0.1, 32)
    job = Simulation(2, 64).run(lambda window: before if window < 5 else after, 50)
    even = sum(finish_seconds(*(before if window < 5 else after), [32, 32]) for window in range(50))
    actual = job.controller.even_seconds / job.controller.actual_seconds
    assert even / sum(job.seconds) == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_slow_worker_is_relieved_after_a_common_slow_down(factor: float) -> None:
    """A worker that is 15 % slower than the others is relieved, whatever all of them went through before."""
    stages = [cost([1.0, 1.0], 0.1, 32), cost([factor, factor], 0.1, 32), cost([factor, 1.15 * factor], 0.1, 32)]
    job = Simulation(2, 64).run(lambda window: stages[min(window // 5, 2)], 30)
    assert job.seconds[-1] <= 1.03 * best_seconds(*stages[2], 64)


def test_a_difference_within_the_dead_band_is_left_alone() -> None:
    """A split that would gain 1.9 % is not worth a change, however sure it is."""
    costs = cost([1.0, 1.039], 0.1, 5000)
    assert 1.015 < finish_seconds(*costs, [5000, 5000]) / best_seconds(*costs, 10_000) < 1.02
    job = Simulation(2, 10_000).run(lambda _: costs, 100)
    assert job.changes() == []
    assert job.decisions[-1].reason.endswith("which is not worth a change")


def test_a_difference_beyond_the_dead_band_is_acted_upon() -> None:
    """A split that surely gains 4 % is made."""
    costs = cost([1.0, 1.09], 0.1, 5000)
    job = Simulation(2, 10_000).run(lambda _: costs, 30)
    assert job.seconds[-1] <= 1.02 * best_seconds(*costs, 10_000)
    assert job.changes() != []


def test_a_decision_says_what_it_was_made_of() -> None:
    """A re-split is logged with the shares before, proposed and chosen, the fitted costs, the gain, and the worker to blame."""
    costs = cost([1.0, 2.0], 0.02, 32)
    first = Simulation(2, 64).run(lambda _: costs, 1).decisions[0]
    assert first.before == [32, 32]
    assert [43, 21] == first.proposed == first.chosen
    assert pytest.approx([a + c * 32 for a, c in zip(first.fixed_seconds, first.sample_seconds, strict=True)]) == [
        1.0,
        2.0,
    ]
    assert f"re-split: rank 1 holds a step back, a gain of {first.gain:.0%} is expected" == first.reason


def test_no_worker_gets_more_than_the_user_allows() -> None:
    """With --max-share 40 the fast worker gets 40 samples and no more, and the decision says so."""
    job = Simulation(2, 64)
    job.controller = Controller(2, max_share=40)
    job.controller.start(64)
    job.run(lambda _: cost([1.0, 3.0], 0.1, 32), 10)
    assert job.shares[-1] == [40, 24]
    assert job.decisions[0].reason.endswith("; rank 0 may have no more than 40 samples")


# --- no lasting difference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_equal_workers_keep_equal_shares_under_the_noise_of_steps(num_workers: int, seed: int) -> None:
    """300 windows in which each step of each worker varies by 5 % bring no change of shares."""
    costs = cost([1.0] * num_workers, 0.2, 512)
    job = Simulation(num_workers, 512 * num_workers, seed).run(lambda _: costs, 300, step_noise=0.05)
    assert job.changes() == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_workers", [2, 4])
def test_equal_workers_keep_equal_shares_under_the_noise_of_windows(num_workers: int, seed: int) -> None:
    """300 windows in which all steps of a worker vary together by 5 %, which no window can see, bring no change of shares."""
    costs = cost([1.0] * num_workers, 0.2, 32)
    job = Simulation(num_workers, 32 * num_workers, seed).run(lambda _: costs, 300, step_noise=0.01, window_noise=0.05)
    assert job.changes() == []


@pytest.mark.parametrize("num_workers", [2, 8])
def test_a_common_slow_down_changes_no_shares(num_workers: int) -> None:
    """All workers becoming up to four times slower or faster together, again and again, is no reason to re-split."""
    factors = np.random.default_rng(5).choice([0.5, 0.8, 1.0, 1.3, 2.0], 100)
    costs = [cost([float(factor)] * num_workers, 0.2, 512) for factor in factors]
    job = Simulation(num_workers, 512 * num_workers).run(lambda window: costs[window], 100, step_noise=0.03)
    assert job.changes() == []


def test_a_common_slow_down_keeps_uneven_shares() -> None:
    """All workers becoming slower together does not undo or repeat a split that was found before."""
    before, after = cost([1.0, 2.0], 0.1, 32), cost([1.6, 3.2], 0.1, 32)
    job = Simulation(2, 64).run(lambda window: after if 20 <= window < 40 else before, 60)
    assert [window for window in job.changes() if window >= 20] == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.01, 0.02, 0.05, 0.1, 0.15, 0.2])
def test_32_equal_workers_lose_nothing_to_noise(noise: float, seed: int) -> None:
    """With steps that vary by up to 20 %, the splits of 100 windows take at most half a percent longer than even ones."""
    costs = cost([1.0] * 32, 0.0, 32)
    job = Simulation(32, 1024, seed).run(lambda _: costs, 100, step_noise=noise)
    assert 100 * finish_seconds(*costs, [32] * 32) / sum(job.seconds) >= 0.995


# --- a difference that comes and goes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed_part", [0.0, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_a_neighbour_is_made_room_for_and_its_leaving_noticed(num_workers: int, fixed_part: float) -> None:
    """A worker that takes twice as long has fewer samples within two windows, and near even ones within three of its recovery."""
    even = 64
    alone = cost([1.0] * num_workers, fixed_part, even)
    beside = cost([1.0, 2.0, *[1.0] * (num_workers - 2)], fixed_part, even)
    job = Simulation(num_workers, even * num_workers).run(
        lambda window: beside if 10 <= window < 30 else alone, 50, step_noise=0.01
    )
    assert [window for window in job.changes() if window <= 10] == []
    assert job.seconds[12] <= 1.03 * best_seconds(*beside, even * num_workers)
    assert job.seconds[33] <= 1.03 * best_seconds(*alone, even * num_workers)


# --- a change that was wrong ---------------------------------------------------------------------------------------------


def test_a_change_that_made_steps_slower_is_rolled_back_and_held() -> None:
    """Steps that take longer under new shares bring the old ones back, with the reason, and no new try for four windows."""
    job = Simulation(2, 64)
    speeds = np.array([1.0, 1.4]) / 32
    for _ in range(7):
        uneven = job.controller.shares != [32, 32]
        # Whatever it is that slows uneven steps: it is not in any worker's busy time.
        job.see(np.tile(speeds * np.array(job.controller.shares), (STEPS, 1)), exchange=0.5 if uneven else 0.0)
    assert job.decisions[0].chosen != [32, 32]
    assert job.decisions[1].chosen == [32, 32]
    assert job.decisions[1].reason.startswith("rolled back: a step takes ")
    assert job.decisions[1].reason.endswith("no new split for 4 windows")
    assert [decision.chosen for decision in job.decisions[2:6]] == [[32, 32]] * 4
    assert all(decision.reason.startswith("kept: the last change made it worse") for decision in job.decisions[2:6])


def test_a_neighbour_is_made_room_for_while_a_split_is_held() -> None:
    """A worker that suddenly takes twice as long is relieved at once, though the last change was taken back just before."""
    job = Simulation(2, 64)
    speeds = np.array([1.0, 1.4]) / 32
    for number in range(6):
        uneven = job.controller.shares != [32, 32]
        slow = np.array([1.0, 2.0 if number == 5 else 1.0])
        job.see(np.tile(slow * speeds * np.array(job.controller.shares), (STEPS, 1)), exchange=0.5 if uneven else 0.0)
    assert job.decisions[4].reason.startswith("kept: the last change made it worse, 1 more windows")
    assert job.decisions[5].reason.startswith("re-split: rank 1 holds a step back")


def test_each_roll_back_holds_for_longer() -> None:
    """What failed is tried again ever more rarely: after 4, 8, 16 windows."""
    job = Simulation(2, 64)
    speeds = np.array([1.0, 1.4]) / 32
    for _ in range(45):
        uneven = job.controller.shares != [32, 32]
        job.see(np.tile(speeds * np.array(job.controller.shares), (STEPS, 1)), exchange=0.5 if uneven else 0.0)
    tried = [number for number, shares in enumerate(job.shares) if shares != [32, 32]]
    assert [int(gap) - 1 for gap in np.diff(tried)] == [5, 9, 17]


@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_a_worker_that_cannot_take_more_is_not_given_more_again_and_again(factor: float) -> None:
    """If the fast worker becomes slow as soon as it has more, its share is taken back and seldom raised: 5 bad windows of 40."""
    job = Simulation(2, 64)
    num_bad = 0
    for _ in range(40):
        shares = np.array(job.controller.shares)
        # Above 36 samples rank 0 runs out of cache or memory, so it is slower in all of its work.
        busy = np.array([1.0 if shares[0] <= 36 else factor, 1.5]) * shares / 32
        num_bad += bool(busy.max() > 1.01 * 1.5)
        job.see(np.tile(busy, (STEPS, 1)))
    assert num_bad <= 5
    assert any(decision.reason.startswith("rolled back") for decision in job.decisions)


def test_a_neighbour_of_the_relieved_worker_is_not_blamed_on_the_change() -> None:
    """If a worker that was given less becomes slower, the change is not taken back: the worker is relieved further."""
    job = Simulation(2, 64)
    job.see(np.tile(np.array([1.0, 1.5]), (STEPS, 1)))
    fewer = job.controller.shares[1]
    assert fewer < 32
    job.see(np.tile(np.array([1.0, 4.0]) * np.array(job.controller.shares) / 32, (STEPS, 1)))
    assert job.controller.shares[1] < fewer


# --- traces of real jobs -------------------------------------------------------------------------------------------------


def replay(name: str, steps_per_window: int, even: int) -> tuple[Simulation, float]:
    """Replay a trace, a worker's time taken to be proportional to its share; the gain is counted from the third window on."""
    with (TRACES / name).open() as file:
        rows = [(int(row["worker"]), float(row["compute_seconds"])) for row in csv.DictReader(file)]
    num_workers = 1 + max(worker for worker, _ in rows)
    trace = np.array([seconds for _, seconds in rows]).reshape(-1, num_workers)
    job = Simulation(num_workers, even * num_workers)
    even_seconds = actual_seconds = 0.0
    for start in range(0, len(trace), steps_per_window):
        steps = trace[start : start + steps_per_window]
        busy = steps * np.array(job.controller.shares) / even
        if len(job.shares) >= 2:
            even_seconds += float(steps.max(axis=1).sum())
            actual_seconds += float(busy.max(axis=1).sum())
        job.see(busy)
    return job, even_seconds / actual_seconds


@pytest.mark.parametrize("steps_per_window", [2, 4])
def test_a_real_straggler_is_relieved(steps_per_window: int) -> None:
    """On a production job with one slow worker of four, even shares take at least 1.92 times as long as the chosen ones."""
    _, gain = replay("bytedance-AR.csv", steps_per_window, 256)
    assert gain >= 1.92


@pytest.mark.parametrize("steps_per_window", [2, 4, 8])
def test_a_healthy_job_is_left_alone(steps_per_window: int) -> None:
    """On a production job in which there is nothing to gain the shares never change."""
    job, gain = replay("bytedance-ST.csv", steps_per_window, 256)
    assert job.changes() == []
    assert gain == 1.0


# --- windows and scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expected", "seconds"), [(20, 10.0), (20, 0.1), (40, 0.05), (200, 0.01), (1_000_000, 1e-7)])
def test_a_window_has_at_least_20_steps_and_takes_at_least_2_seconds(expected: int, seconds: float) -> None:
    """A window is long enough to measure in, and a million steps at most."""
    job = Simulation(2, 64)
    assert job.controller.window_steps() == 20
    job.see(np.full((STEPS, 2), seconds))
    assert expected == job.controller.window_steps()


def test_scripted_splits_are_cycled_through() -> None:
    """Splits that the user gave come in turn, cut to the global batch, and begin anew."""
    controller = Controller(2, scripted=[[3, 1], [1, 1]])
    assert [controller.next_scripted(20) for _ in range(3)] == [[15, 5], [10, 10], [15, 5]]
    assert Controller(2).next_scripted(20) is None

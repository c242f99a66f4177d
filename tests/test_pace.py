"""How often the workers synchronise, and by what means: begun where it pays, bounded by what was measured, taken back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from adarun.control.bandit import Thompson
from adarun.control.pace import (
    BASE_PERIOD,
    EXACT,
    FIRST_HOLD,
    GROWTH,
    LOSS_WINDOWS,
    MOST,
    MOST_DISTANCE,
    Allowed,
    Forecast,
    Pacer,
    power_of_two,
)
from adarun.control.planner import Planner, Settings
from adarun.control.policy import Off, Policy
from adarun.events import Averaged, Learned, Notice, Paced, Plan, PlanRequest, Refusal, Window, WorkersStarted

AUTO = Allowed(periods=(1, MOST))
BATCH = 64


def averaged(step: int, steps: int, seconds: float, distance: float, rank: int) -> Averaged:
    """One rank's report of an average of replicas of length 1."""
    return Averaged(step=step, steps=steps, seconds=seconds, distance=distance, norm=1.0, checksum=7, rank=rank)


class Network:
    """Two equal workers on a link: what their windows and reports look like under any pace."""

    def __init__(self, pacer: Pacer, compute: float, once: float, *, drift: float = 1e-4, lr: float = 0.1) -> None:
        self.pacer, self.compute, self.once, self.drift, self.lr = pacer, compute, once, drift, lr
        self.step = 0
        self.sent = {"none": 1.0, "bf16": 0.5, "powersgd": 0.9}
        self.loss = lambda step: 2.0 - 0.1 * math.log(step + 1.0)

    def window(self, steps: int = 64, forced: str = "") -> Paced:
        """Run a window and let the pacer decide."""
        pace = self.pacer.pace
        steps = max(steps, pace.sync_period)
        once = self.once * (self.sent[pace.compression] if pace == EXACT or pace.sync_period == 1 else 1.0)
        if pace.sync_period > 1:
            for at in range(self.step + pace.sync_period, self.step + steps + 1, pace.sync_period):
                distance = self.drift * math.sqrt(pace.sync_period)
                for rank, seconds in enumerate((once, once + 0.01)):
                    self.pacer.see(averaged(at, pace.sync_period, seconds, distance, rank))
        self.step += steps
        for rank in range(2):
            loss = self.loss(self.step)
            self.pacer.see(Learned(step=self.step, steps=steps, loss=loss, spread=0.01, lr=self.lr, rank=rank))
        whole = self.compute + once / pace.sync_period
        window = Window(
            plan=0,
            steps=steps,
            step_seconds=whole,
            samples=[BATCH / 2] * 2,
            busy_seconds=[self.compute] * 2,
            wait_seconds=[once / pace.sync_period] * 2,
            noise=[0.001] * 2,
            sync_seconds=once / pace.sync_period,
        )
        return self.pacer.decide(window, BATCH, forced)


def pacer(allowed: Allowed = AUTO, workers: int = 2, policy: type[Policy] | None = None) -> Pacer:
    """A pacer that has just begun; its knobs are chosen by Thompson sampling, or by `policy`."""

    def make(_values: Sequence[str]) -> Policy:
        return policy() if policy else Thompson(np.random.default_rng(0))

    return Pacer(allowed, workers, make)


# --- the sync period -----------------------------------------------------------------------------------------------------


def test_on_a_slow_network_the_period_grows_step_by_step_to_what_is_enough() -> None:
    """From 1, by no more than the growth a window, to the power of two from which on synchronisation is under 5 % of a step."""
    network = Network(pacer(), compute=0.04, once=0.015)
    periods = [network.pacer.pace.sync_period]
    for _ in range(8):
        network.window()
        periods.append(network.pacer.pace.sync_period)
    assert periods[0] == 1
    assert all(after <= GROWTH * before for before, after in itertools.pairwise(periods))
    assert periods[-1] == 8
    assert 0.015 / 8 / (0.04 + 0.015 / 8) < 0.05 < 0.015 / 4 / (0.04 + 0.015 / 4)


@pytest.mark.parametrize("once", [0.001, 0.008])
def test_where_synchronisation_is_cheap_nothing_is_begun(once: float) -> None:
    """On a fast network the workers go on synchronising in every step: a small gain is not worth what is not exact."""
    network = Network(pacer(), compute=0.04, once=once)
    reasons = [network.window().reason for _ in range(10)]
    assert network.pacer.pace == EXACT
    assert all(reason.startswith("kept: ") for reason in reasons)


def test_the_learning_rate_bounds_the_period() -> None:
    """While the learning rate is high, periods stay within a bound; as it falls, they grow with its inverse square (QSR)."""
    network = Network(pacer(), compute=0.01, once=1.0)
    for _ in range(8):
        network.window()
    assert network.pacer.pace.sync_period == BASE_PERIOD
    network.lr /= 8.0
    network.window()
    assert network.pacer.pace.sync_period == 16
    network.lr /= 2.0
    paced = network.window()
    assert network.pacer.pace.sync_period == 64
    assert "the learning rate is 0.00625" in paced.reason


def test_a_warm_up_does_not_count_as_a_decay() -> None:
    """While the learning rate only grows, each one is the highest so far."""
    network = Network(pacer(), compute=0.01, once=1.0)
    for lr in (0.001, 0.002, 0.01, 0.05, 0.1, 0.1):
        network.lr = lr
        network.window()
        assert network.pacer.pace.sync_period <= BASE_PERIOD


def test_replicas_far_apart_shorten_the_period() -> None:
    """Where replicas drift apart by more than is allowed, they are averaged as often as keeps them within it."""
    network = Network(pacer(), compute=0.01, once=1.0, drift=MOST_DISTANCE / 2.1)
    distances = []
    for _ in range(8):
        distances.append(network.window().distance)
    assert network.pacer.pace.sync_period == 4
    assert distances[-1] is not None
    assert distances[-1] <= MOST_DISTANCE


def test_a_range_is_kept_to() -> None:
    """`--sync-period 2:8` begins with 2 and never leaves the range; a fixed one never changes."""
    network = Network(pacer(Allowed(periods=(2, 8))), compute=0.01, once=1.0)
    periods = set()
    for _ in range(6):
        network.window()
        periods.add(network.pacer.pace.sync_period)
    assert periods == {2, 8}
    network = Network(pacer(Allowed(periods=(6, 6))), compute=0.04, once=0.001)
    for _ in range(4):
        network.window()
    assert network.pacer.pace.sync_period == 6


def test_what_forces_the_exact_way_wins() -> None:
    """With a reason to synchronise in every step, that is what happens, and the log has the reason."""
    network = Network(pacer(Allowed(periods=(8, 8))), compute=0.01, once=1.0)
    network.window()
    assert network.pacer.pace.sync_period == 8
    assert network.window(forced="a GradScaler").reason == "exact: a GradScaler"
    assert network.pacer.pace == EXACT


def test_the_outer_step_waits_for_a_long_period() -> None:
    """The outer step is taken only where the period is long enough for it."""
    network = Network(pacer(Allowed(periods=(1, MOST), outer="nesterov")), compute=0.01, once=1.0)
    seen = {}
    for _ in range(6):
        network.window()
        network.lr /= 3.0
        seen[network.pacer.pace.sync_period] = network.pacer.pace.outer
    assert min(seen) < 32 <= max(seen)
    assert all(outer == ("nesterov" if period >= 32 else "none") for period, outer in seen.items())


# --- the trip-wire -------------------------------------------------------------------------------------------------------


def test_a_loss_worse_than_forecast_takes_local_steps_back() -> None:
    """A loss above its forecast in two windows in a row returns to exact for some windows; one bad window does not."""
    network = Network(pacer(), compute=0.01, once=1.0)
    for _ in range(8):
        network.window()
    usual, network.loss = network.loss, lambda _step: 2.5
    network.window()
    assert network.pacer.pace != EXACT
    network.loss = usual
    network.window()
    network.loss = lambda _step: 2.5
    reasons = [network.window().reason for _ in range(LOSS_WINDOWS)]
    assert reasons[-1].startswith("rolled back: the loss is worse than forecast")
    assert network.pacer.pace == EXACT
    network.loss = lambda _step: 2.4
    for _ in range(FIRST_HOLD):
        network.window()
        assert network.pacer.pace == EXACT
    network.window()
    assert network.pacer.pace != EXACT


def test_a_loss_that_is_gone_takes_local_steps_back() -> None:
    """A loss that was a number and is none any more is worse than any forecast."""
    network = Network(pacer(), compute=0.01, once=1.0)
    for _ in range(4):
        network.window()
    assert network.pacer.pace != EXACT
    network.loss = lambda _step: None  # type: ignore[assignment, return-value]
    network.window()
    assert network.pacer.pace == EXACT


def test_noise_around_any_usual_course_trips_nothing() -> None:
    """Over 200 courses of 50 windows, power laws and plateaus with noise, at most two trip."""
    trips = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        forecast, level, power = Forecast(), rng.uniform(0.5, 5.0), rng.uniform(0.0, 0.6)
        noise = rng.uniform(0.001, 0.1)
        for window in range(1, 51):
            loss = level * (0.2 + window**-power) * (1.0 + noise * rng.standard_normal())
            trips += forecast.see(64 * window, loss, noise * loss)
    assert trips <= 2


def test_a_rising_loss_is_seen_within_a_few_windows() -> None:
    """A loss that turns and grows by 5 % a window trips within six windows."""
    forecast, rng = Forecast(), np.random.default_rng(0)
    for window in range(1, 15):
        assert not forecast.see(64 * window, 2.0 * window**-0.2 * (1.0 + 0.005 * rng.standard_normal()), 0.01)
    late = [forecast.see(64 * window, 1.19 * 1.05 ** (window - 14), 0.01) for window in range(15, 21)]
    assert any(late)


# --- compression and topology --------------------------------------------------------------------------------------------


def test_compression_settles_on_the_fastest() -> None:
    """The compression with the shortest steps is in force in the end; where there is nothing to gain, none is tried."""
    allowed = Allowed(compressions=("none", "bf16", "powersgd"))
    network = Network(pacer(allowed), compute=0.04, once=0.4)
    paced = [network.window() for _ in range(40)]
    assert network.pacer.pace.compression == "bf16"
    assert paced[-1].options == ["none", "bf16", "powersgd"]
    assert sum(paced[-1].propensities) == pytest.approx(1.0, abs=1e-3)
    network = Network(pacer(allowed), compute=0.04, once=0.001)
    assert {network.window().chosen for _ in range(10)} == {EXACT.name}


def test_the_policy_off_leaves_the_first_value() -> None:
    """With --policy off no knob that a policy chooses is ever changed."""
    network = Network(pacer(Allowed(compressions=("none", "bf16")), policy=Off), compute=0.04, once=0.4)
    assert {network.window().chosen for _ in range(10)} == {EXACT.name}


def test_few_workers_do_not_gossip() -> None:
    """With `--topology auto` two workers average all together; of eight some windows may gossip, once steps are local."""
    allowed = Allowed(periods=(1, 4), topologies=("allreduce", "gossip"))
    for workers, expected in ((2, {"allreduce"}), (8, {"allreduce", "gossip"})):
        network = Network(pacer(allowed, workers), compute=0.01, once=1.0)
        names = {network.window().chosen.split("topology=")[1] for _ in range(20)}
        assert names == expected


# --- the plans -----------------------------------------------------------------------------------------------------------


def planner(allowed: Allowed) -> Planner:
    """A job with two workers that have both asked for their first plan."""
    made = Planner(Settings(window=6, allowed=allowed), lambda _values: Off())
    made.see(WorkersStarted(attempt=0, ranks=[0, 1], world_size=2, num_nodes=1, group_rank=0, at=0.0))
    for rank in range(2):
        made.answer(rank, request(0))
    return made


def request(step: int) -> PlanRequest:
    return PlanRequest(step=step, global_batch=BATCH, dataset_size=1000)


def test_a_fixed_period_begins_with_the_second_plan() -> None:
    """The first plan synchronises in every step; the second has the period, and a whole number of them."""
    made = planner(Allowed(periods=(4, 4)))
    plan, _ = made.answer(0, request(6))
    assert isinstance(plan, Plan)
    assert (plan.start, plan.stop, plan.sync_period) == (6, 14, 4)


def test_a_worker_that_asks_for_no_plans_keeps_all_exact() -> None:
    """As long as one rank may not follow plans, none steps by its own gradients."""
    made = Planner(Settings(window=6, allowed=Allowed(periods=(4, 4))), lambda _values: Off())
    made.see(WorkersStarted(attempt=0, ranks=[0, 1], world_size=2, num_nodes=1, group_rank=0, at=0.0))
    plans = [made.answer(0, request(step))[0] for step in (0, 6, 12)]
    assert all(isinstance(plan, Plan) and plan.sync_period == 1 for plan in plans)


def test_a_notice_keeps_all_exact() -> None:
    """After a worker's notice that local steps would be wrong, plans have none."""
    made = planner(Allowed(periods=(4, 4)))
    made.see(Notice(key="grad_scaler", text="a GradScaler", synchronises=True, rank=1))
    plan, _ = made.answer(0, request(6))
    assert isinstance(plan, Plan)
    assert plan.sync_period == 1


def test_replicas_that_differ_after_an_average_end_the_job() -> None:
    """Averaging that silently did nothing is found by the checksums: the next plan is refused, with the reason."""
    made = planner(Allowed(periods=(4, 4)))
    for rank, checksum in enumerate((7, 8)):
        made.see(Averaged(step=9, steps=4, seconds=0.1, distance=0.1, norm=1.0, checksum=checksum, rank=rank))
    answer, _ = made.answer(0, request(6))
    assert isinstance(answer, Refusal)
    assert "after the average at step 9 the replicas of ranks 0 and 1 differ" in answer.reason


@pytest.mark.parametrize(
    ("value", "down", "up"), [(0.0, 1, 1), (1.0, 1, 1), (3.0, 2, 4), (8.0, 8, 8), (1e9, MOST, MOST)]
)
def test_powers_of_two(value: float, down: int, up: int) -> None:
    """The neighbouring powers of two, within bounds."""
    assert (power_of_two(value), power_of_two(value, up=True)) == (down, up)

"""Chooses how the workers synchronise: how often, with which compression of gradients, with whom.

All of it changes the mathematics, so it is off until the user allows it, is used only where it gains much, and is taken back
where the training suffers: the loss is the trip-wire.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adarun.control.guard import Budget
from adarun.control.policy import Choice, Incumbent, Option, Policy, Situation, certain
from adarun.events import Averaged, Learned, Paced, Window

# Synchronisation that takes a smaller part of a step than this is not worth any more local steps.
ENOUGH = 0.05
# What is not exact must promise at least so much before it is begun.
WORTHWHILE = 0.25
# H grows by no more than this factor a window, so that every stage is measured before the next.
GROWTH = 8
# QSR (Gu et al., ICLR 2024): H is at most this, or (alpha / lr)^2 where that is more. Its alpha was 0.25 to 0.31 of the highest
# learning rate for SGD, and 2.2 of it for AdamW.
BASE_PERIOD = 8
ALPHA = 0.5
MOST = 1024
# Replicas further apart than this part of their average's length are averaged more often (Kong et al., ICML 2021, bound it
# by what a step moves; this bound is coarser, and does not depend on the optimizer).
MOST_DISTANCE = 0.05
# DiLoCo's outer step needs many inner ones.
OUTER_PERIOD = 32
# Bytes that are sent: under a compression relative to float32 gradients, under a topology to an all-reduce. That sends all nearly
# twice, and waits for everybody, where a gossip sends all once.
SENT = {"none": 1.0, "bf16": 0.5, "powersgd": 0.25, "allreduce": 1.0, "gossip": 0.5}
GOSSIP_WORKERS = 4
# The loss: worse than its forecast by this part or so many standard errors, so many windows in a row.
LOSS_PART = 0.02
LOSS_ERRORS = 3.0
LOSS_WINDOWS = 2
FORECAST_POINTS, FORECAST_WINDOWS = 4, 12
FIRST_HOLD, MOST_HOLD = 8, 64
# By what factor a rate may fall short of its prediction.
PREDICTION_ERROR = 1.2


@dataclass(frozen=True)
class Pace:
    """A setting of the knobs that change the mathematics; the default changes nothing."""

    sync_period: int = 1
    compression: str = "none"
    topology: str = "allreduce"
    outer: str = "none"

    @property
    def name(self) -> str:
        """In words, as the log has it."""
        words = f"sync_period={self.sync_period} compression={self.compression} topology={self.topology}"
        return words if self.outer == "none" else f"{words} outer={self.outer}"


@dataclass(frozen=True)
class Allowed:
    """What the user allows: a range of sync periods, compressions and topologies to choose from, and the outer step."""

    periods: tuple[int, int] = (1, 1)
    compressions: tuple[str, ...] = ("none",)
    topologies: tuple[str, ...] = ("allreduce",)
    outer: str = "none"

    @property
    def exact(self) -> bool:
        """Whether nothing but torchrun's own way is allowed."""
        return self == AS_TORCHRUN

    def first(self) -> Pace:
        """What a job begins with, once all workers are known to take part."""
        return self.with_outer(Pace(self.periods[0], self.compressions[0], self.topologies[0]))

    def with_outer(self, pace: Pace) -> Pace:
        """The same with the outer step, where its period is long enough for one."""
        return replace(pace, outer=self.outer if pace.sync_period >= OUTER_PERIOD else "none")


EXACT, AS_TORCHRUN = Pace(), Allowed()
# Gives the policy for a knob with these values.
MakePolicy = Callable[[Sequence[str]], Policy]


class Forecast:
    """What the loss should be: a straight line in the logarithm of the step, of which half the descent is counted on."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=FORECAST_WINDOWS)
        self._num_worse = 0
        self.value: float | None = None

    def see(self, step: int, loss: float, loss_error: float) -> bool:
        """Take in a window's mean loss and its standard error; whether it is the second in a row that is worse than forecast."""
        at = math.log(step + 1.0)
        self.value, error = self._at(at)
        error = math.hypot(max(error, loss_error), loss_error)
        worse = self.value is not None and loss > self.value + max(LOSS_PART * abs(self.value), LOSS_ERRORS * error)
        self._num_worse = self._num_worse + 1 if worse else 0
        if not worse:
            self._points.append((at, loss))
        return self._num_worse >= LOSS_WINDOWS

    def _at(self, at: float) -> tuple[float | None, float]:
        """The forecast and its standard error."""
        if len(self._points) < FORECAST_POINTS:
            return None, 0.0
        steps, losses = np.array(self._points).T
        slope, level = np.polyfit(steps, losses, 1)
        rest = losses - (level + slope * steps)
        error = float(np.sqrt((rest**2).sum() / (len(losses) - 2) * (1.0 + 1.0 / len(losses))))
        slope = min(0.0, float(slope))
        newest = float(losses[-3:].mean() + slope * (steps[-1] - steps[-3:].mean()))
        return newest + 0.5 * slope * (at - float(steps[-1])), error


class Arms:
    """One knob's values, chosen by a policy under a budget; the first is the baseline."""

    def __init__(self, values: Sequence[str], policy: Policy) -> None:
        self.values = list(values)
        self.options: list[Option] = []
        self.propensities: tuple[float, ...] = ()
        self._policy = policy
        self._incumbent = Incumbent(0)
        self._budget = Budget()
        self._rates = [0.0] * len(values)

    def learn(self, value: str, situation: Situation, rate: float, samples: float, seconds: float) -> None:
        """Take in what a window under `value` gave, in samples per second."""
        index = self.values.index(value)
        self._policy.learn(replace(situation, incumbent=self._incumbent.index), index, rate)
        self._incumbent.learn(index, rate)
        self._rates[index] = rate
        if self._rates[0]:
            self._budget.start(self._rates[0])
            self._budget.spend(samples, seconds)

    def choose(self, situation: Situation, predicted: Sequence[float], samples: float) -> tuple[str, str]:
        """The value for the next window, and why; `predicted` are samples per second."""
        self.options = [Option(name, rate) for name, rate in zip(self.values, predicted, strict=True)]
        now = self._incumbent.index
        choice: Choice = self._policy.choose(replace(situation, incumbent=now), self.options)
        if choice.index != now and self._rates[now]:
            known = self._rates[choice.index] or predicted[choice.index] / PREDICTION_ERROR
            if refusal := self._budget.refuses(samples, known, self._rates[now]):
                choice = certain(now, self.options, f"{refusal} ({choice.reason})")
        self.propensities = choice.propensities
        return self.values[choice.index], choice.reason


class Pacer:
    """The setting of one job, from window to window."""

    def __init__(self, allowed: Allowed, num_workers: int, make_policy: MakePolicy) -> None:
        self.pace = EXACT
        self.reason = "the first window of these workers"
        # Why a worker may have learned something else than the others, if one may.
        self.apart = ""
        self._allowed = allowed
        compressions, topologies = allowed.compressions, allowed.topologies
        self._compressions = Arms(compressions, make_policy(compressions)) if len(compressions) > 1 else None
        gossips = len(topologies) > 1 and num_workers >= GOSSIP_WORKERS
        self._topologies = Arms(topologies, make_policy(topologies)) if gossips else None
        self._forecast = Forecast()
        self._peak_lr = 0.0
        self._lr: float | None = None
        # Since the last window: each average's seconds and distances by step, and each report's loss.
        self._averaged: dict[int, list[Averaged]] = {}
        self._learned: list[Learned] = []
        self._knew_loss = False
        self._hold, self._next_hold = 0, FIRST_HOLD
        self._begun = False

    def restart(self) -> None:
        """New workers, all at one step of their own: the setting stays, what the last ones reported does not."""
        self._forecast, self._knew_loss, self.apart = Forecast(), False, ""
        self._averaged, self._learned = {}, []

    def go_on(self, forced: str) -> None:
        """A new plan is due and nothing was measured."""
        if forced:
            self.pace = EXACT
        elif not self._begun and not self._hold:
            self.pace, self._begun, self.reason = self._allowed.first(), True, "as the user set it"

    def see(self, event: Averaged | Learned) -> None:
        """Take in a worker's report."""
        if isinstance(event, Learned):
            self._learned.append(event)
            if event.lr is not None:
                self._lr = event.lr
                self._peak_lr = max(self._peak_lr, event.lr)
            return
        others = self._averaged.setdefault(event.step, [])
        # A gossip leaves replicas apart, and may be followed by an average after the same step.
        same = [other for other in others if other.checksum is not None and event.checksum is not None]
        for other in same[:1]:
            if not self.apart and other.checksum != event.checksum:
                self.apart = (
                    f"after the average at step {event.step} the replicas of ranks {other.rank} and {event.rank} differ; "
                    "start the job without --sync-period and report this"
                )
        others.append(event)

    def decide(self, window: Window, global_batch: int, forced: str) -> Paced:
        """The setting after `window`; `forced` is why it has to be the exact one, if it has to."""
        before = self.pace
        once, compute = self._times(window)
        step = compute + once / before.sync_period
        (loss, loss_error), distance = self._mean_loss(), self._distance()
        if loss is None:
            # A loss that is no longer a number is left out.
            tripped = self._knew_loss and bool(self._learned)
        else:
            tripped = self._forecast.see(self._newest_step(), loss, loss_error)
        rate, samples = global_batch / max(1e-9, step), float(global_batch * window.steps)
        situation = Situation(utilisation=compute / step, overhead=1.0 - compute / step, incumbent=0, remaining=0)
        arms = self._arms(before)
        if arms is not None:
            arms.learn(self._value(before), situation, rate, samples, samples / rate)
        self.pace, reason = self._choose(once, compute, distance, tripped, forced)
        chosen_by = self._arms(self.pace) if self.pace != EXACT or not (forced or tripped or self._hold) else None
        if chosen_by is not None:
            reason = self._choose_arm(chosen_by, situation, once, compute, global_batch, samples, reason)
        self._averaged, self._learned, self.reason = {}, [], reason
        return Paced(
            plan=window.plan,
            before=before.name,
            chosen=self.pace.name,
            communication=round(once / before.sync_period / step, 6),
            reason=reason,
            gain=round(step / max(1e-9, compute + once / self.pace.sync_period) - 1.0, 6),
            distance=distance,
            loss=loss,
            forecast=self._forecast.value,
            lr=self._lr,
            options=[option.name for option in chosen_by.options] if chosen_by else [],
            propensities=[round(chance, 4) for chance in chosen_by.propensities] if chosen_by else [],
        )

    # --- what was measured -------------------------------------------------------------------------------------------

    def _times(self, window: Window) -> tuple[float, float]:
        """Seconds of one synchronisation that nothing hides, and of a step without it."""
        quickest = [min(event.seconds for event in events) for events in self._averaged.values()]
        if self.pace == EXACT or not quickest:
            return window.sync_seconds, max(1e-9, window.step_seconds - window.sync_seconds)
        return float(np.mean(quickest)), max(window.busy_seconds)

    def _mean_loss(self) -> tuple[float | None, float]:
        """The window's mean loss over all workers, and its standard error."""
        known = [(event.loss, event.spread or 0.0, event.steps) for event in self._learned if event.loss is not None]
        if not known:
            return None, 0.0
        self._knew_loss = True
        losses, spreads, steps = np.array(known).T
        return float(losses.mean()), float(np.sqrt((spreads**2 / steps).sum()) / len(known))

    def _newest_step(self) -> int:
        return max((event.step for event in self._learned), default=0)

    def _distance(self) -> float | None:
        """The replicas' root mean square distance from their average, relative to its length."""
        known = [
            event.distance / event.norm
            for events in self._averaged.values()
            for event in events
            if event.distance is not None and event.norm
        ]
        return float(np.sqrt(np.mean(np.square(known)))) if known else None

    # --- what is chosen ----------------------------------------------------------------------------------------------

    def _choose(
        self, once: float, compute: float, distance: float | None, tripped: bool, forced: str
    ) -> tuple[Pace, str]:
        allowed, now = self._allowed, self.pace
        if forced:
            return EXACT, f"exact: {forced}"
        if tripped and now != EXACT:
            self._hold, self._next_hold = self._next_hold, min(MOST_HOLD, 2 * self._next_hold)
            self._forecast = Forecast()
            return EXACT, f"rolled back: the loss is worse than forecast; exact for {self._hold} windows"
        if self._hold:
            self._hold -= 1
            return EXACT, f"exact: the loss was worse than forecast, {self._hold} more windows"
        if not self._begun:
            self._begun = True
            if (first := allowed.first()) != EXACT:
                return first, "as the user set it"
        least, most = allowed.periods
        if least == most:
            return (now if now != EXACT else allowed.first()), "kept: the sync period is fixed"
        period, reason = self._period(once, compute, distance)
        period = min(max(period, least), most)
        pace = replace(now if now != EXACT else allowed.first(), sync_period=period)
        return allowed.with_outer(pace), reason

    def _period(self, once: float, compute: float, distance: float | None) -> tuple[int, str]:
        """The sync period by its three bounds, and which of them binds."""
        now = self.pace.sync_period
        part = once / (compute + once)
        enough = power_of_two(once * (1.0 - ENOUGH) / (ENOUGH * compute), up=True)
        if now == 1 and part < ENOUGH:
            return 1, f"kept: synchronisation takes {part:.0%} of a step"
        bounds = [(enough, f"synchronisation then takes under {ENOUGH:.0%} of a step")]
        bounds.append((self._period_by_lr(), f"the learning rate is {self._lr or 0:g}"))
        if distance is not None and distance > 0.0:
            # Replicas drift apart at least like the square root of the steps.
            bounds.append(
                (power_of_two(now * (MOST_DISTANCE / distance) ** 2), f"the replicas are {distance:.1%} apart")
            )
        wanted, why = min(bounds, key=lambda bound: bound[0])
        wanted = min(max(1, wanted), self._allowed.periods[1])
        gain = (compute + once / now) / (compute + once / wanted) - 1.0
        if now == 1 and gain < WORTHWHILE:
            return 1, f"kept: a sync period of {wanted} would gain {gain:.0%}, too little for what is not exact"
        if wanted == now or (now < wanted < 2 * now):
            return now, f"kept: {why}"
        if wanted > GROWTH * now:
            return GROWTH * now, f"grown: {wanted} is allowed ({why}), step by step; a gain of {gain:.0%} is expected"
        return wanted, f"{'grown' if wanted > now else 'shrunk'}: {why}"

    def _period_by_lr(self) -> int:
        if not self._lr:
            return BASE_PERIOD
        return power_of_two(max(BASE_PERIOD, (ALPHA * self._peak_lr / self._lr) ** 2))

    def _arms(self, pace: Pace) -> Arms | None:
        """The knob that a policy chooses under this pace: compression while gradients are averaged, topology after."""
        return self._compressions if pace.sync_period == 1 and pace.topology == "allreduce" else self._topologies

    def _value(self, pace: Pace) -> str:
        return pace.compression if self._arms(pace) is self._compressions else pace.topology

    def _choose_arm(
        self,
        arms: Arms,
        situation: Situation,
        once: float,
        compute: float,
        global_batch: int,
        samples: float,
        reason: str,
    ) -> str:
        if arms is self._compressions and situation.overhead < ENOUGH:
            return f"kept: synchronisation takes {situation.overhead:.0%} of a step"
        whole, period = once / SENT[self._value(self.pace)], self.pace.sync_period
        predicted = [global_batch / (compute + whole * SENT[value] / period) for value in arms.values]
        value, why = arms.choose(situation, predicted, samples)
        if arms is self._compressions:
            self.pace = replace(self.pace, compression=value)
            return f"{reason}; compression {why}"
        self.pace = replace(self.pace, topology=value)
        return f"{reason}; topology {why}"


def power_of_two(value: float, *, up: bool = False) -> int:
    """The power of two next to `value`, from 1 to `MOST`: the one below, or above."""
    exponent = math.log2(max(1.0, min(float(MOST), value)))
    return 1 << (math.ceil(exponent - 1e-9) if up else math.floor(exponent + 1e-9))

"""Which of several settings a job's workers run under: judged lap by lap, changed by a restart right after a checkpoint.

A *lap* lies between two moments at which the workers begin a loop over their training loader: an epoch, as a rule, with its
evaluation and its checkpoint. Its rate, in samples per second of the wall clock, is what a setting is judged by. Pure: the
moments in the events are its only clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from adarun.control.guard import Budget, aborts, refuses_switch
from adarun.control.policy import Incumbent, Option, Policy, Situation
from adarun.events import Logged, Loop, Step, Tuned, WorkersStarted
from adarun.state import WARMUP_STEPS

# What trying a setting of which nothing is known may be hoped to save.
HOPE = 0.1
# A trial is judged by its last steps: the median of all of them, anew in each step, would hold up the hub in a long epoch.
ABORT_WINDOW = 101
NO_RESUME = (
    "the script began with epoch {0} again after it was restarted at epoch {1}, so it does not resume from what it saves; "
    "no more settings are tried"
)


@dataclass
class Boundary:
    """Where a lap begins: known once every rank has reached it."""

    step: int
    at: float
    epoch: int = -1
    saved: bool = False
    ranks: set[int] = field(default_factory=set)


@dataclass
class Steps:
    """The steps since the last boundary that were reported, by number: samples of all ranks, and seconds."""

    samples: dict[int, int] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    # Seconds per sample of this rank's counted steps.
    paces: list[float] = field(default_factory=list)


class Tuner:
    """Follows a job through laps and restarts, and says under which setting it should go on."""

    def __init__(self, names: Sequence[str], policy: Policy, num_laps: int = 0) -> None:
        """`names`: the settings in words, the first being what the user had; `num_laps`: how many laps the job has, if known."""
        self.names = names
        self.current = 0
        self.ever_saved = False
        self.stopped = ""
        self.num_laps_done = 0
        self.num_restarts = 0
        self.rates = [0.0] * len(names)
        self.restart_seconds: list[float] = []
        self._options = [Option(name) for name in names]
        self._policy = policy
        self._num_laps = num_laps
        self._incumbent = Incumbent(0)
        self._budget = Budget()
        self._paces = [math.nan] * len(names)
        self._laps = [0] * len(names)
        self._began = math.inf
        # The epoch at whose beginning the workers were stopped, and when.
        self._left: tuple[int, float] | None = None
        self._start_attempt(0)

    @property
    def incumbent(self) -> int:
        """The setting to go back to."""
        return self._incumbent.index

    def see(self, event: Logged) -> Tuned | None:
        """Take in an event; a decision, if it was time for one. With `restart`, the workers must be restarted at once."""
        if isinstance(event, WorkersStarted):
            self._start_attempt(event.world_size)
            self._began = min(self._began, event.at)
            self._attempt_began = event.at
        elif self._leaving:
            return None  # of workers that are about to be stopped
        elif isinstance(event, Step):
            return self._step(event)
        elif isinstance(event, Loop):
            self._loop(event)
            return self._close_lap()
        return None

    def _start_attempt(self, world_size: int) -> None:
        self._world_size = world_size
        self._leaving = False
        self._attempt_began = 0.0
        self._lap: Boundary | None = None
        self._next: Boundary | None = None
        self._reached = [-1] * world_size
        self._steps = Steps()

    # --- what is seen --------------------------------------------------------------------------------------------------

    def _loop(self, event: Loop) -> None:
        if self._next is None or event.step > self._next.step:
            self._next = Boundary(event.step, event.at, event.epoch)
        if event.step == self._next.step:
            self._next.at = max(self._next.at, event.at)
            self._next.saved |= event.saved
            self._next.ranks.add(event.rank)
        self.ever_saved |= event.saved

    def _step(self, event: Step) -> Tuned | None:
        self._reached[event.rank] = event.step
        steps = self._steps
        steps.samples[event.step] = steps.samples.get(event.step, 0) + event.samples
        if event.rank == 0 and event.counted and event.step >= WARMUP_STEPS and event.samples:
            steps.busy.append(event.busy_seconds)
            steps.waiting.append(event.wait)
            steps.paces.append(event.seconds / event.samples)
            if reason := self._aborts():
                assert self._lap is not None
                self._budget.spend(0.0, event.ended - self._lap.at)
                self._learn(self.rates[self.incumbent] * self._paces[self.incumbent] / median(steps.paces))
                return self._switch(self.incumbent, (), reason, event.ended)
        return self._close_lap()

    def _aborts(self) -> str:
        known = self._paces[self.incumbent]
        if self.current == self.incumbent or self._laps[self.current] or math.isnan(known) or self.stopped:
            return ""
        return aborts(self._steps.paces[-ABORT_WINDOW:], known)

    # --- laps ----------------------------------------------------------------------------------------------------------

    def _close_lap(self) -> Tuned | None:
        """Judge the lap that ends at the next boundary, once all ranks are there with all their reports."""
        end = self._next
        if end is None or len(end.ranks) < self._world_size or min(self._reached) < end.step - 1:
            return None
        lap, self._lap, self._next = self._lap, end, None
        before = [step for step in self._steps.samples if step < end.step]
        samples = sum(self._steps.samples.pop(step) for step in before)
        measured, self._steps = self._steps, Steps(self._steps.samples)
        if lap is None:
            self._arrive(end)
            return None
        self._take_lap(measured, samples, end.at - lap.at)
        return self._decide(end, measured) if end.saved and not self.stopped else None

    def _arrive(self, begin: Boundary) -> None:
        """The first boundary of an attempt: what the start cost, and whether the script has resumed."""
        self.restart_seconds.append(begin.at - self._attempt_began)
        if self._left is not None:
            (epoch, stopped_at), self._left = self._left, None
            self.restart_seconds[-1] = begin.at - stopped_at
            self._budget.spend(0.0, begin.at - stopped_at)
            if 0 <= begin.epoch < epoch:
                self.stopped = NO_RESUME.format(begin.epoch, epoch)

    def _take_lap(self, measured: Steps, samples: int, seconds: float) -> None:
        if seconds <= 0.0 or not samples:
            return
        self.num_laps_done += 1
        self._laps[self.current] += 1
        if measured.paces:
            self._paces[self.current] = median(measured.paces)
        self._situation = self._look(measured)
        self._samples = samples
        self._learn(samples / seconds)
        if self._laps[0] == self.num_laps_done:
            self._budget.start(self.rates[0])
        self._budget.spend(samples, seconds)

    def _look(self, measured: Steps) -> Situation:
        busy, waiting = sum(measured.busy), sum(measured.waiting)
        whole = max(busy + waiting, 1e-9)
        remaining = max(0, self._num_laps - self.num_laps_done)
        return Situation(busy / whole, waiting / whole, self.incumbent, remaining)

    def _learn(self, rate: float) -> None:
        self._policy.learn(self._situation, self.current, rate)
        self._incumbent.learn(self.current, rate)
        laps = max(1, self._laps[self.current])
        self.rates[self.current] += (rate - self.rates[self.current]) / laps

    # --- decisions -----------------------------------------------------------------------------------------------------

    def _decide(self, now: Boundary, measured: Steps) -> Tuned:
        choice = self._policy.choose(self._look(measured), self._options)
        wanted, reason = choice.index, choice.reason
        if wanted != self.current and (refusal := self._refuses(wanted, now.at)):
            wanted, reason = self.current, f"{refusal} (wanted: {self._options[wanted].name})"
            # A trial that is over must not go on for want of a better one, if going back pays.
            if self.current != self.incumbent and not self._refuses(self.incumbent, now.at):
                wanted = self.incumbent
        return self._switch(wanted, choice.propensities, reason, now.at)

    def _refuses(self, wanted: int, now: float) -> str:
        cost, known, rate = self.restart_cost, self.rates[wanted], self.rates[self.incumbent]
        elapsed = now - self._began
        lap_seconds = self._samples / rate
        # A job whose end is unknown is taken to be half done.
        left = (self._num_laps - self.num_laps_done) * lap_seconds if self._num_laps else elapsed
        if wanted == self.incumbent:
            return refuses_switch(1.0 - self.rates[self.current] / rate, left, cost)
        if self._laps[wanted] >= 2 and known < rate:
            return f"refused: {self._options[wanted].name} gave {known:.1f} samples/s, the incumbent gives {rate:.1f}"
        if refusal := refuses_switch(1.0 - rate / known if known > rate else HOPE, left, cost):
            return refusal
        rest = max(0, self._num_laps - self.num_laps_done - 1) * self._samples
        # There and, if it is no better, back again.
        return self._budget.refuses(self._samples, known or math.nan, rate, rest=rest, cost_seconds=2.0 * cost)

    @property
    def restart_cost(self) -> float:
        """What a restart has cost so far, in seconds: from the end of a lap to the beginning of the next."""
        return sum(self.restart_seconds) / max(1, len(self.restart_seconds))

    def _switch(self, wanted: int, propensities: Sequence[float], reason: str, at: float) -> Tuned:
        before, restart = self.current, wanted != self.current
        if restart:
            assert self._lap is not None
            self._leaving = True
            self.num_restarts += 1
            self.current, self._left = wanted, (self._lap.epoch, at)
        return Tuned(
            lap=self.num_laps_done,
            before=self._options[before].name,
            chosen=self._options[wanted].name,
            rates=[round(rate, 3) for rate in self.rates],
            propensities=[round(chance, 4) for chance in propensities],
            restart=restart,
            cost_seconds=round(self.restart_cost, 3),
            reason=reason,
        )

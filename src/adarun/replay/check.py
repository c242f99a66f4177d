"""Repeats a run's decisions from its log: the same events through the same code must give the same plans, word for word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from adarun.control.pace import Allowed
from adarun.control.planner import Planner, Settings
from adarun.control.policy import Policy
from adarun.control.qlearning import QLearning, Row
from adarun.control.tuner import Tuner
from adarun.errors import AdarunError, Diverged
from adarun.events import Asked, Decision, Logged, Paced, Plan, PlanRequest, RunEnded, Tuned, Window, WorkersStarted
from adarun.policies import Tuning, load
from adarun.replay.story import require_events
from adarun.runlog import Skipped, read_about, read_batches

# Another processor may round the last digit of a logarithm otherwise.
TOLERANCE = 1e-9


def check(directory: Path) -> int:
    """Repeat a run's decisions; returns how many there were.

    Raises:
        Diverged: one of them comes out otherwise.
        AdarunError: the log cannot be read, or says too little.
    """
    skipped, num_events = Skipped(), 0
    repeater = Repeater(read_about(directory))
    try:
        for batch in read_batches(directory, skipped):
            num_events += len(batch)
            for event in batch:
                repeater.see(event)
        repeater.finish()
    except Diverged as error:
        if skipped.lines:
            raise Diverged(f"{error} ({skipped.lines} lines of the log could not be read, which may be why)") from None
        raise
    require_events(directory, num_events, skipped)
    return repeater.num_decisions


class Repeater:
    """A planner and a tuner that see what the hub saw, beside what they said then."""

    def __init__(self, about: dict[str, Any]) -> None:
        """`about`: what run.json says of the run.

        Raises:
            AdarunError: it does not say what the user asked for.
        """
        self.num_decisions = 0
        self.planner = Planner(
            settings(about), lambda values: policy({**about, "settings": list(values)}, about["policy"])
        )
        self.tuner = tuner(about)
        self._askers: dict[int, str] = {}
        self._asked_step = 0
        # What the planner said in one go, up to the plan that ends it.
        self._said: list[Logged] = []
        self._tuned: Tuned | None = None

    def see(self, event: Logged) -> None:
        """Take in the next event of the log; what was decided then is decided again.

        Raises:
            Diverged: it comes out otherwise.
        """
        if self._tuned is not None:
            tuned, self._tuned = self._tuned, None
            self._compare([event], [tuned])
        elif isinstance(event, Window | Decision | Paced):
            self._said.append(event)
        elif isinstance(event, Plan):
            said, self._said = [*self._said, event], []
            self._compare(said, self._plan(event))
        elif isinstance(event, Tuned):
            self._compare([event], [])
        elif isinstance(event, RunEnded):
            self.finish()
        else:
            self._take(event)

    def finish(self) -> None:
        """The log is at its end; the last window was closed then.

        Raises:
            Diverged: it comes out otherwise.
        """
        if self._said:
            said, self._said = self._said, []
            self._compare(said, self.planner.finish())

    def _take(self, event: Logged) -> None:
        if isinstance(event, WorkersStarted):
            self._askers, self._asked_step = {}, 0
        elif isinstance(event, Asked):
            self._askers[event.rank], self._asked_step = event.frozen, event.step
        self.planner.see(event)
        if self.tuner is not None:
            self._tuned = self.tuner.see(event)

    def _plan(self, plan: Plan) -> list[Logged]:
        if not self._askers:
            raise AdarunError("this log cannot be checked: it does not say which workers asked for plans")
        rank, frozen = next(iter(self._askers.items()))
        first = not self.planner.state.plans
        step = self._asked_step if first else plan.start
        _, events = self.planner.answer(
            rank, PlanRequest(step=step, global_batch=sum(plan.shares), dataset_size=0, frozen=frozen)
        )
        return events

    def _compare(self, logged: list[Logged], repeated: list[Logged]) -> None:
        for then, now in zip(logged, repeated, strict=False):
            if difference := differs(then, now):
                raise Diverged(f"the decision after {self._where()} comes out otherwise: {difference}")
        if len(logged) != len(repeated):
            one, other = (logged, "was") if len(logged) > len(repeated) else (repeated, "is now")
            extra = one[min(len(logged), len(repeated))]
            text = msgspec.json.encode(extra).decode()
            raise Diverged(f"the decision after {self._where()} comes out otherwise: there {other} {text} in addition")
        self.num_decisions += any(isinstance(event, Decision | Tuned | Paced | Plan) for event in logged)

    def _where(self) -> str:
        plan = self.planner.state.plan
        return f"plan {plan.number} (steps {plan.start} to {plan.stop - 1})" if plan else "the start"


def settings(about: dict[str, Any]) -> Settings:
    """What the user asked for, from run.json.

    Raises:
        AdarunError: it does not say so.
    """
    try:
        shares = (about["adapt"], about["window"], about["shares"], about.get("max_share", 0))
        if "sync_periods" not in about:
            return Settings(*shares)
        least, most = about["sync_periods"]
        compressions, topologies = tuple(about["compressions"]), tuple(about["topologies"])
        return Settings(*shares, Allowed((least, most), compressions, topologies, about["outer"]))
    except KeyError as error:
        raise AdarunError(f"run.json is missing, or says nothing of {error}: what was asked for is not known") from None


def tuner(about: dict[str, Any]) -> Tuner | None:
    """The tuner of a run, as it was at the start; None where nothing was tuned."""
    names = about.get("settings")
    if not names:
        return None
    return Tuner(names, policy(about, about["policy"]), about.get("epochs") or 0)


def policy(about: dict[str, Any], name: str) -> Policy:
    """A policy for a run's settings: with the run's own seed, and with what it had learned before."""
    seed = about.get("seed") or 0
    if name == "qlearning":
        rows = msgspec.convert(about.get("learned") or [], list[Row])
        return QLearning.from_table(np.random.default_rng(seed), rows)
    return load(Tuning(about["settings"], name, seed, about.get("epochs") or 0))


def differs(then: Logged, now: Logged) -> str:
    """In what two events differ, in words; the moment of a decision is the clock's, and floats may differ a little."""
    if type(then) is not type(now):
        return f"a {kind_of(then)} then, a {kind_of(now)} now"
    for name in then.__struct_fields__:
        one, other = getattr(then, name), getattr(now, name)
        if name != "at" and not alike(one, other):
            return f"{name} of the {kind_of(then)} was {one} and is now {other}"
    return ""


def kind_of(event: Logged) -> str:
    """An event's tag."""
    return str(event.__struct_config__.tag)


def alike(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of floats."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-12)
    return bool(one == other)

"""The run of plans: immutable, numbered, without gaps, each decided when the first worker needs it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from adarun.control.controller import Controller
from adarun.control.guard import Memory
from adarun.control.pace import AS_TORCHRUN, EXACT, Allowed, MakePolicy, Pace, Pacer
from adarun.control.policy import Off
from adarun.events import (
    Asked,
    Averaged,
    Learned,
    Logged,
    Notice,
    Plan,
    PlanRequest,
    Refusal,
    Resources,
    Window,
    WorkersStarted,
)
from adarun.state import State, close_window, fold

# A worker asks for the step it draws next; one that asks much further ahead is broken.
MAX_AHEAD = 100_000
FACTS_KEPT = 256
# The first plan synchronises in every step whatever is allowed; on a slow network that takes long.
FIRST_PACED_STEPS = 12


@dataclass(frozen=True)
class Settings:
    """What the user asked for."""

    adapt: str = "on"
    window: int = 0
    scripted: Sequence[Sequence[int]] = ()
    max_share: int = 0
    allowed: Allowed = AS_TORCHRUN


class Planner:
    """Folds a job's events into its state and answers plan requests from it."""

    def __init__(self, settings: Settings, make_policy: MakePolicy = lambda _values: Off()) -> None:
        """`make_policy` gives a new policy for a knob with these values, where one chooses."""
        self.state = State()
        self.pacer: Pacer | None = None
        self._make_policy = make_policy
        self.controller: Controller | None = None
        self._settings = settings
        self._askers: dict[int, str] = {}
        self._facts: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._next_number = 0
        self._out: list[Logged] = []

    def see(self, event: Logged) -> None:
        """Take in an event that somebody else logs."""
        fold(self.state, event)
        if isinstance(event, WorkersStarted):
            # Plans start anew with the worker group; what was learned of the workers stays, if they are as many.
            if self.controller is None or len(self.controller.model.fixed) != event.world_size:
                self.controller = Controller(event.world_size, self._settings.scripted, self._settings.max_share)
                if not self._settings.allowed.exact:
                    self.pacer = Pacer(self._settings.allowed, event.world_size, self._make_policy)
            if self.pacer is not None:
                self.pacer.restart()
            self._askers, self._facts = {}, OrderedDict()
        elif isinstance(event, Averaged | Learned):
            if self.pacer is not None:
                self.pacer.see(event)
        elif isinstance(event, Asked):
            self._askers[event.rank] = event.frozen
        elif isinstance(event, Resources):
            self._see_memory(event)

    def _see_memory(self, event: Resources) -> None:
        controller = self.controller
        if controller is None or not controller.shares or not event.gpu_memory_bytes or not event.gpu_capacity_bytes:
            return
        memory = controller.memories.setdefault(event.rank, Memory(event.gpu_capacity_bytes))
        memory.see(controller.shares[event.rank], event.gpu_memory_bytes)

    def answer(self, rank: int, request: PlanRequest) -> tuple[Plan | Refusal, list[Logged]]:
        """The plan for `request.step`, and the events to log for it."""
        self._out = []
        return self._answer(rank, request), self._out

    def frozen(self, rank: int) -> str:
        """Why the split must stay even, as this rank has said it last."""
        return self._askers.get(rank, "")

    def finish(self) -> list[Logged]:
        """Close the last window; the events to log for it."""
        self._out = []
        self._close_window()
        return self._out

    @property
    def scripted(self) -> bool:
        """Whether the user gave the shares."""
        return bool(self._settings.scripted)

    def why_even(self) -> str:
        """Why the split has to stay even, or an empty string."""
        if self._settings.adapt != "on":
            return f"--adapt {self._settings.adapt}"
        return self._obstacle(lambda notice: notice.freezes) or next(
            (reason for reason in self._askers.values() if reason), ""
        )

    def why_exact(self) -> str:
        """Why the workers have to synchronise in every step, as DDP does, or an empty string."""
        return self._obstacle(lambda notice: notice.synchronises)

    def _obstacle(self, forbids: Callable[[Notice], bool]) -> str:
        """What keeps the workers from doing anything else than under torchrun, for all knobs or as a notice says."""
        state = self.state
        if state.num_nodes > 1:
            return "the job spans several nodes, which this version only measures"
        if said := next((notice.text for notice in state.notices.values() if forbids(notice)), ""):
            return said
        if missing := sorted(set(range(state.world_size)) - set(self._askers)):
            return f"rank {missing[0]} has not asked for a plan, so it may not follow one"
        return ""

    def _emit(self, event: Logged) -> None:
        fold(self.state, event)
        self._out.append(event)

    def _answer(self, rank: int, request: PlanRequest) -> Plan | Refusal:
        state = self.state
        if self.controller is None or request.global_batch < state.world_size:
            return Refusal(f"a global batch of {request.global_batch} cannot be shared by {state.world_size} workers")
        if refusal := self._disagreement(rank, request):
            return refusal
        if self.pacer is not None and self.pacer.apart:
            return Refusal(self.pacer.apart)
        if self._askers.get(rank) != request.frozen:
            self._askers[rank] = request.frozen
            self._emit(Asked(rank=rank, step=request.step, frozen=request.frozen))
        stop = state.plans[-1].stop if state.plans else 0
        if request.step >= stop + MAX_AHEAD:
            return Refusal(f"rank {rank} asks for step {request.step} while plans end at {stop}")
        while not state.plans or state.plans[-1].stop <= request.step:
            self._emit(self._next_plan(request))
        return next(plan for plan in reversed(state.plans) if plan.start <= request.step)

    def _disagreement(self, rank: int, request: PlanRequest) -> Refusal | None:
        """Ranks that draw different batches at the same step cannot be given parts of one."""
        mine = (request.global_batch, request.dataset_size, request.loop, request.loop_start)
        facts = self._facts.setdefault(request.step, mine)
        if len(self._facts) > FACTS_KEPT:
            self._facts.popitem(last=False)
        if facts == mine:
            return None
        text = f"at step {request.step} rank {rank} draws {batch_in_words(mine)}, another rank {batch_in_words(facts)}"
        if all(plan.even for plan in self.state.plans):
            if "disagree" not in self.state.notices:
                self._emit(Notice(key="disagree", text=f"{text}, so the split stays even", freezes=True, rank=rank))
            return None
        return Refusal(f"{text}; start the job with --adapt observe")

    def _next_plan(self, request: PlanRequest) -> Plan:
        assert self.controller is not None
        state, controller, total = self.state, self.controller, request.global_batch
        number, self._next_number = self._next_number, self._next_number + 1
        start = state.plans[-1].stop if state.plans else 0
        steps = self._settings.window
        if not state.plans or sum(controller.shares) != total:
            window, shares, reason = None, controller.start(total), "even: the first window of these workers"
            if self.pacer is not None:
                steps = steps or FIRST_PACED_STEPS
        else:
            window = self._close_window()
            shares, reason = self._decide(window, total)
        pace = self._pace(window, total)
        steps = steps or controller.window_steps()
        # Whole periods, so that every plan ends with replicas that are the same.
        steps = -(-steps // pace.sync_period) * pace.sync_period
        return Plan(
            number=number,
            start=start,
            stop=max(start + steps, request.step + 1 if not state.plans else 0),
            shares=shares,
            attempt=state.attempt,
            reason=reason,
            sync_period=pace.sync_period,
            compression=pace.compression,
            topology=pace.topology,
            outer=pace.outer,
        )

    def _pace(self, window: Window | None, total: int) -> Pace:
        """How the workers synchronise under the next plan; as DDP does until all are known to follow plans."""
        pacer, controller = self.pacer, self.controller
        if pacer is None or controller is None or not self.state.plans:
            return EXACT
        before, forced = pacer.pace, self.why_exact()
        if window is None:
            pacer.go_on(forced)
        else:
            self._emit(pacer.decide(window, total, forced))
        if pacer.pace != before:
            # Steps take another time for another reason than the shares.
            controller.forget_times()
        return pacer.pace

    def _decide(self, window: Window | None, total: int) -> tuple[list[int], str]:
        assert self.controller is not None
        controller, why_even = self.controller, self.why_even()
        if not why_even and (scripted := controller.next_scripted(total)):
            return scripted, "given by --shares"
        if window is None:
            if why_even:
                return controller.start(total), f"even: {why_even}"
            return controller.shares, "kept: too little was measured"
        decision = controller.decide(window, total)
        if why_even:
            decision = msgspec.structs.replace(
                decision, chosen=controller.start(total), reason=f"even: {why_even} ({decision.reason})"
            )
        self._emit(decision)
        return decision.chosen, decision.reason

    def _close_window(self) -> Window | None:
        window = close_window(self.state)
        if window is not None and self.controller is not None and self.controller.shares:
            self._emit(window)
            self.controller.learn(window)
        return window


def batch_in_words(facts: tuple[int, ...]) -> str:
    """What a rank says of its batch, for a message."""
    global_batch, dataset_size, loop, loop_start = facts
    return (
        f"a global batch of {global_batch} from {dataset_size} samples in its loop {loop}, begun at step {loop_start}"
    )

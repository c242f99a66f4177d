"""The planner: one run of plans without gaps, the same for every rank, and even until it is safe not to be."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adarun.control.planner import Planner, Settings
from adarun.events import Decision, Logged, Notice, Plan, PlanRequest, Refusal, Resources, Step, Window, WorkersStarted
from adarun.state import OUTLIER_SECONDS, State, close_window, fold

BATCH = 64
DATASET = 1000


def started(world_size: int = 2, *, attempt: int = 0, num_nodes: int = 1) -> WorkersStarted:
    """A worker group comes up."""
    return WorkersStarted(
        attempt=attempt,
        ranks=list(range(world_size)),
        world_size=world_size,
        num_nodes=num_nodes,
        group_rank=0,
        at=0.0,
    )


def request(step: int, *, frozen: str = "", **facts: int) -> PlanRequest:
    return PlanRequest(step=step, frozen=frozen, **{"global_batch": BATCH, "dataset_size": DATASET, **facts})


def report(rank: int, step: int, samples: int, seconds: float, *, slowest: float, counted: bool = True) -> Step:
    """A step in which a worker computed for `seconds` and waited for the slowest one."""
    return Step(
        rank=rank,
        step=step,
        samples=samples,
        data=0.0,
        forward=0.0,
        backward=seconds,
        wait=slowest - seconds,
        update=0.0,
        ended=step * slowest,
        counted=counted,
    )


class Job:
    """Workers of known speed that ask a planner and report to it, in step."""

    def __init__(self, settings: Settings | None = None, speeds: tuple[float, ...] = (1.0, 2.0)) -> None:
        self.planner = Planner(settings or Settings())
        self.speeds = speeds
        self.log: list[Logged] = []
        self.see(started(len(speeds)))

    def see(self, event: Logged) -> None:
        self.log.append(event)
        self.planner.see(event)

    def ask(self, rank: int, asked: PlanRequest) -> Plan | Refusal:
        answer, events = self.planner.answer(rank, asked)
        self.log += events
        return answer

    def plan(self, rank: int, step: int, frozen: str = "") -> Plan:
        answer = self.ask(rank, request(step, frozen=frozen))
        assert isinstance(answer, Plan), answer
        return answer

    def window(self) -> Plan:
        """All ranks ask for the next plan and run its steps."""
        start = self.planner.state.plans[-1].stop if self.planner.state.plans else 0
        plans = [self.plan(rank, start) for rank in range(len(self.speeds))]
        plan = plans[0]
        assert all(plan == other for other in plans)
        for step in range(plan.start, plan.stop):
            took = [speed * share / 3200 for speed, share in zip(self.speeds, plan.shares, strict=True)]
            for rank, seconds in enumerate(took):
                self.see(report(rank, step, plan.shares[rank], seconds, slowest=max(took)))
        return plan

    def logged(self, kind: type) -> list[Logged]:
        return [event for event in self.log if isinstance(event, kind)]


# --- a run of plans ------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), min_size=1, max_size=40))
def test_every_rank_gets_the_same_plan_for_a_step_whenever_it_asks(asked: list[tuple[int, int]]) -> None:
    """Whichever rank asks first and in whatever order, a step has one plan, and the plans are numbered without gaps."""
    job = Job(Settings(window=3, scripted=[[1, 2, 3], [3, 2, 1]]), (1.0, 1.0, 1.0))
    given_for: dict[int, Plan] = {}
    for rank, step in asked:
        plan = job.plan(rank, step)
        assert plan.start <= step < plan.stop
        assert given_for.setdefault(step, plan) == plan
    plans = job.planner.state.plans
    assert [plan.number for plan in plans] == list(range(len(plans)))
    assert [plan.stop for plan in plans[:-1]] == [plan.start for plan in plans[1:]]
    assert plans[0].start == 0
    assert {sum(plan.shares) for plan in plans} == {BATCH}
    assert plans == job.logged(Plan)


def test_a_plan_is_never_changed() -> None:
    """A plan that was given out is given again, whatever was measured or frozen since."""
    job = Job()
    first, second = job.window(), job.window()
    assert not second.even
    job.see(Notice(key="late", text="something that freezes", freezes=True, rank=0))
    assert job.plan(1, first.start) == first
    assert job.plan(0, second.start) == second
    with pytest.raises(AttributeError):
        second.start = 0  # type: ignore[misc]


def test_the_first_plan_is_even() -> None:
    """Nothing is known of the workers before their first window, so all have the same share."""
    assert Job().plan(0, 0).shares == [32, 32]


def test_a_gpus_memory_bounds_the_share_of_its_worker() -> None:
    """A worker whose GPU is 70 % full gets no share for which more than 90 % is foreseen."""
    job = Job()
    first = job.window()
    gigabyte = 1 << 30
    job.see(Resources(0, 1.0, gigabyte, 0.0, 0.9, 7 * gigabyte, 10 * gigabyte))
    allowed = int(first.shares[0] * 9 / 7)
    assert [allowed] * 3 == [job.window().shares[0] for _ in range(3)]


def test_the_slow_worker_is_given_less_after_its_first_window() -> None:
    """The second plan relieves a worker at half the speed, the decision says why, and both are logged."""
    job = Job()
    job.window()
    plan = job.window()
    assert plan.shares[1] < 25
    decision = job.logged(Decision)[0]
    assert isinstance(decision, Decision)
    assert (decision.before, decision.chosen, decision.reason) == ([32, 32], plan.shares, plan.reason)
    kinds = [type(event) for event in job.log if isinstance(event, Plan | Window | Decision)]
    assert kinds == [Plan, Window, Decision, Plan]


def test_window_sets_the_length_of_all_plans() -> None:
    """With --window 7 every plan covers seven steps."""
    job = Job(Settings(window=7))
    assert [(plan.start, plan.stop) for plan in (job.window() for _ in range(4))] == [
        (0, 7),
        (7, 14),
        (14, 21),
        (21, 28),
    ]


def test_plans_last_two_seconds_by_default() -> None:
    """Once the length of a step is known a plan covers at least two seconds of steps, and never fewer than 20."""
    job = Job(speeds=(1.0, 1.0))
    assert [plan.stop - plan.start for plan in (job.window(), job.window())] == [20, 200]


def test_given_splits_come_in_turn() -> None:
    """With --shares each plan takes the next split, from the first plan on that all ranks have asked for."""
    job = Job(Settings(window=7, scripted=[[3, 1], [1, 3]]))
    assert [job.window().shares for _ in range(4)] == [[32, 32], [48, 16], [16, 48], [48, 16]]


def test_the_end_of_a_run_closes_its_window() -> None:
    """What was measured in the last, unfinished window is logged too."""
    job = Job()
    job.window()
    assert [type(event) for event in job.planner.finish()] == [Window]
    assert job.planner.finish() == []


# --- reasons to stay even ------------------------------------------------------------------------------------------------


def test_no_plan_is_uneven_before_every_rank_asked_for_one() -> None:
    """A rank that never asks would not follow an uneven plan, so there is none, and the reason names it."""
    job = Job(speeds=(1.0, 2.0, 1.0, 1.0))
    for number in range(3):
        start = job.planner.state.plans[-1].stop if job.planner.state.plans else 0
        plan = job.plan(0, start)
        assert [job.plan(1, start), job.plan(3, start)] == [plan, plan]
        assert plan.even
        assert number == 0 or "rank 2 has not asked for a plan" in plan.reason
        for step in range(plan.start, plan.stop):
            for rank in range(4):
                job.see(report(rank, step, plan.shares[rank], job.speeds[rank], slowest=2.0))
    assert job.plan(2, plan.start) == plan
    assert not job.plan(0, plan.stop).even


@pytest.mark.parametrize("rank", [0, 1])
def test_a_reason_from_any_rank_makes_the_next_plan_even(rank: int) -> None:
    """Whichever rank says that it must not be re-split, the next plan is even and says so, until the reason is gone."""
    job = Job()
    job.window()
    uneven = job.window()
    assert not uneven.even
    assert job.plan(rank, uneven.start, frozen="batchnorm") == uneven
    plan = job.plan(1 - rank, uneven.stop)
    assert plan.even
    assert "batchnorm" in plan.reason
    job.plan(rank, uneven.stop)
    job.window()
    assert not job.window().even


def test_a_reason_that_comes_with_the_request_counts_for_its_plan() -> None:
    """The rank that makes the hub decide a plan is heard in it."""
    job = Job()
    job.window()
    plan = job.plan(0, 20, frozen="batchnorm")
    assert plan.even
    assert "batchnorm" in plan.reason


def test_a_notice_that_freezes_keeps_the_split_even() -> None:
    """After a notice that freezes no plan is uneven, and its text is the reason."""
    job = Job()
    job.see(Notice(key="k", text="the loader has no DistributedSampler", freezes=True, rank=1))
    assert [job.window().even for _ in range(4)] == [True] * 4
    assert job.planner.why_even() == "the loader has no DistributedSampler"


def test_a_notice_that_does_not_freeze_leaves_the_split_free() -> None:
    """A notice for the user's eyes only keeps no plan even."""
    job = Job()
    job.see(Notice(key="k", text="by the way", rank=1))
    job.window()
    assert not job.window().even


@pytest.mark.parametrize("other", [{"global_batch": 128}, {"dataset_size": 999}, {"loop": 1}, {"loop_start": 3}])
def test_facts_that_differ_freeze_an_even_split(other: dict[str, int]) -> None:
    """Ranks that draw different batches at one step are noticed while that does no harm, and the split stays even for good."""
    job = Job()
    first = job.ask(0, request(0))
    assert job.ask(1, request(0, **other)) == first
    notices = job.logged(Notice)
    assert [(notice.key, notice.freezes, notice.rank) for notice in notices if isinstance(notice, Notice)] == [
        ("disagree", True, 1)
    ]
    assert "rank 1" in job.planner.why_even()
    assert [job.window().even for _ in range(3)] == [True] * 3


def test_facts_that_differ_again_are_not_noticed_again() -> None:
    """Something the user should know is said once per job."""
    job = Job(Settings(window=5))
    for step in (0, 5, 10):
        job.ask(0, request(step))
        job.ask(1, request(step, dataset_size=999))
    assert len(job.logged(Notice)) == 1


@pytest.mark.parametrize("other", [{"global_batch": 128}, {"dataset_size": 999}, {"loop": 1}, {"loop_start": 3}])
def test_facts_that_differ_are_refused_once_the_split_is_uneven(other: dict[str, int]) -> None:
    """When the ranks have had parts of a batch that was not the same, the worker is told to start anew, and how."""
    job = Job()
    job.window()
    assert not job.window().even
    step = job.planner.state.plans[-1].stop
    assert isinstance(job.ask(0, request(step)), Plan)
    refusal = job.ask(1, request(step, **other))
    assert isinstance(refusal, Refusal)
    assert refusal.reason.endswith("start the job with --adapt observe")


def test_several_nodes_stay_even() -> None:
    """A job on more than one node is measured and left alone."""
    job = Job()
    job.see(started(num_nodes=2))
    plans = [job.window() for _ in range(3)]
    assert [plan.even for plan in plans] == [True] * 3
    assert "several nodes" in plans[-1].reason


def test_observing_decides_and_changes_nothing() -> None:
    """With --adapt observe every window's decision is logged with what it would have chosen, and all plans are even."""
    job = Job(Settings(adapt="observe"))
    assert [job.window().even for _ in range(4)] == [True] * 4
    decisions = [event for event in job.logged(Decision) if isinstance(event, Decision)]
    assert len(decisions) == 3
    for decision in decisions:
        assert decision.chosen == [32, 32]
        assert decision.proposed[1] < 25
        assert decision.reason.startswith("even: --adapt observe")


def test_observing_ignores_given_splits() -> None:
    """With --adapt observe even the user's own splits are not run."""
    job = Job(Settings(adapt="observe", scripted=[[3, 1]]))
    assert [job.window().even for _ in range(3)] == [True] * 3


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_a_step_far_ahead_is_refused_and_harms_nothing() -> None:
    """A worker that asks for a step far beyond the last plan is broken: it gets no plan, and the others get theirs."""
    job = Job()
    job.plan(0, 0)
    refusal = job.ask(1, request(1_000_000))
    assert isinstance(refusal, Refusal)
    assert "rank 1 asks for step" in refusal.reason
    assert len(job.planner.state.plans) == 1
    assert job.plan(1, 0) == job.plan(0, 0)


def test_a_batch_too_small_to_share_is_refused() -> None:
    """A global batch with fewer samples than workers cannot be cut, and the refusal says so."""
    refusal = Job(speeds=(1.0, 1.0, 1.0)).ask(0, request(0, global_batch=2))
    assert refusal == Refusal("a global batch of 2 cannot be shared by 3 workers")


def test_nothing_is_planned_before_the_workers_started() -> None:
    """A request that comes before the worker group is known is refused."""
    answer, events = Planner(Settings()).answer(0, request(0))
    assert (type(answer), events) == (Refusal, [])


# --- a new attempt -------------------------------------------------------------------------------------------------------


def test_a_new_attempt_starts_at_step_0_with_an_even_plan() -> None:
    """Restarted workers count their steps anew; their plans' numbers go on, since they are one run's."""
    job = Job()
    last = [job.window() for _ in range(3)][-1]
    job.see(started(attempt=1))
    plan = job.window()
    assert (plan.start, plan.even, plan.attempt, plan.number) == (0, True, 1, last.number + 1)


def test_a_new_attempt_asks_every_rank_again() -> None:
    """A rank that followed plans before the restart may not follow them after it."""
    job = Job()
    job.window()
    assert not job.window().even
    job.see(started(attempt=1))
    plan = job.plan(0, 0)
    for step in range(plan.stop):
        for rank, speed in enumerate(job.speeds):
            job.see(report(rank, step, plan.shares[rank], speed, slowest=2.0))
    assert "rank 1 has not asked" in job.plan(0, plan.stop).reason


def test_a_new_attempt_keeps_what_was_learned_of_as_many_workers() -> None:
    """The cost model survives a restart, unless the number of workers changed."""
    job = Job()
    for _ in range(3):
        job.window()
    before = job.planner.controller
    assert before is not None
    fixed = list(before.model.fixed)
    job.see(started(attempt=1))
    assert job.planner.controller is before
    assert list(before.model.fixed) == fixed
    job.see(started(3, attempt=2))
    assert job.planner.controller is not before


def test_a_new_attempt_forgets_reasons_and_steps_of_the_old_one() -> None:
    """Notices and reports of workers that are gone do not keep the new ones even, nor enter their window."""
    job = Job()
    job.see(Notice(key="k", text="frozen", freezes=True, rank=0))
    job.window()
    job.see(started(attempt=1))
    assert job.planner.finish() == []
    job.window()
    assert not job.window().even


# --- windows -------------------------------------------------------------------------------------------------------------


def fresh_state(*plans: Plan, world_size: int = 2) -> State:
    state = fold(State(), started(world_size))
    for plan in plans:
        fold(state, plan)
    return state


def even_plan(start: int = 0, stop: int = 100) -> Plan:
    return Plan(number=0, start=start, stop=stop, shares=[32, 32])


def test_the_first_steps_of_a_group_and_of_new_shares_are_not_counted() -> None:
    """A window leaves out five steps of warm-up and the first step after a change of shares."""
    state = fresh_state(even_plan(0, 20), Plan(number=1, start=20, stop=40, shares=[40, 24]))
    for step in range(40):
        for rank, share in enumerate([32, 32] if step < 20 else [40, 24]):
            fold(state, report(rank, step, share, 9.0 if step < 5 or step == 20 else 1.0, slowest=9.0))
    assert [len(rows) for rows in state.fresh.values()] == [15 + 19, 15 + 19]
    window = close_window(state)
    assert window is not None
    assert window.busy_seconds == [1.0, 1.0]


def test_a_step_with_other_work_in_it_is_not_counted() -> None:
    """A step in which an evaluation was seen does not enter the window."""
    state = fresh_state(even_plan())
    for step in range(5, 15):
        for rank in range(2):
            fold(state, report(rank, step, 32, 5.0 if step == 7 else 1.0, slowest=5.0, counted=step != 7))
    window = close_window(state)
    assert window is not None
    assert (window.steps, window.busy_seconds) == (9, [1.0, 1.0])


def test_an_outlier_counts_at_the_limit_that_makes_it_one() -> None:
    """One step with a checkpoint in it, a thousand times as long as the others, counts as ten of them."""
    state = fresh_state(even_plan())
    for step in range(5, 25):
        for rank in range(2):
            fold(state, report(rank, step, 32, 1000.0 if (step, rank) == (9, 1) else 1.0, slowest=1000.0))
    window = close_window(state)
    assert window is not None
    assert window.busy_seconds == [1.0, pytest.approx((19 + 10) / 20)]


def test_a_stall_of_short_steps_counts_in_full() -> None:
    """Steps of a millisecond that a CPU quota stalls for a tenth of a second are what the worker takes, not outliers."""
    state = fresh_state(even_plan())
    for step in range(5, 25):
        for rank in range(2):
            fold(state, report(rank, step, 32, 0.101 if (step, rank) == (9, 1) else 0.001, slowest=0.101))
    window = close_window(state)
    assert window is not None
    assert OUTLIER_SECONDS > 0.101
    assert window.busy_seconds[1] == pytest.approx((19 * 0.001 + 0.101) / 20)


@pytest.mark.parametrize("num_steps", [0, 4])
def test_a_window_needs_five_steps_of_every_worker(num_steps: int) -> None:
    """A worker of which too little was seen keeps the window open."""
    state = fresh_state(even_plan())
    for step in range(5, 15):
        fold(state, report(0, step, 32, 1.0, slowest=1.0))
        if step < 5 + num_steps:
            fold(state, report(1, step, 32, 1.0, slowest=1.0))
    assert close_window(state) is None


def test_the_short_last_batch_of_an_epoch_does_not_enter_the_mean() -> None:
    """Times are means over the steps with the whole share."""
    state = fresh_state(even_plan())
    for step in range(5, 25):
        samples = 4 if step % 10 == 9 else 32
        for rank in range(2):
            fold(state, report(rank, step, samples, samples / 32, slowest=1.0))
    window = close_window(state)
    assert window is not None
    assert (window.samples, window.busy_seconds) == ([32.0, 32.0], [1.0, 1.0])


@pytest.mark.parametrize("newest", [28, 34])
def test_a_window_speaks_of_one_split(newest: int) -> None:
    """When reports of the old and the new shares meet in one window, all ranks are measured under the new ones."""
    state = fresh_state(even_plan(0, 20), Plan(number=1, start=20, stop=40, shares=[40, 24]))
    # Rank 1's reports arrive later than rank 0's: more of the old shares and fewer of the new ones are new to the hub.
    for rank, first, last in ((0, newest - 20, 36), (1, 8, newest)):
        for step in range(first, last):
            share = 32 if step < 20 else [40, 24][rank]
            fold(state, report(rank, step, share, share / 32, slowest=2.0))
    window = close_window(state)
    assert window is not None
    assert window.samples == [40.0, 24.0]


def test_a_closed_window_is_not_measured_again() -> None:
    """Steps that were summed up in one window are not in the next one."""
    job = Job()
    job.window()
    plan = job.plan(0, 20)
    assert [event.plan for event in job.logged(Window) if isinstance(event, Window)] == [0]
    assert job.planner.state.fresh == {}
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan

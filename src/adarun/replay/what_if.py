"""What the same run would have taken under other shares, another policy, other knobs or other workers.

Every recorded step is taken again: its busy times, noise and all, are scaled by what the fitted cost model says of another
share, and the slowest worker makes the step. Where adarun is to decide, the very planner of a live run sees those steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from adarun.control.controller import Controller
from adarun.control.planner import Planner, Settings
from adarun.control.split import Floats, Ints
from adarun.errors import AdarunError, UsageError
from adarun.events import Asked, Logged, Notice, Plan, PlanRequest, Resources, Step, WorkersStarted, apportion
from adarun.replay.steps import COUNTED, DATA, STEP, UPDATE, WAIT, samples_of
from adarun.replay.story import Story, Teller, require_events
from adarun.runlog import Skipped, read_about, read_batches
from adarun.simulate.job import measured
from adarun.state import OUTLIER_RATIO, OUTLIER_SECONDS

Shares = npt.NDArray[Any]
BASES = ("recorded", "even", "adapt", "static", "oracle")
# Error bars: so many draws of the fixed parts, over so many steps at most, and blocks of so many steps for what is left.
NUM_DRAWS, MAX_DRAWN_STEPS, BLOCK_STEPS = 100, 20_000, 20
# A run in which nothing was decided is cut into windows of so many steps, to fit the costs.
FIT_STEPS = 20
# The best fixed split is searched with ever sharper maxima, in so many steps each.
SHARPNESS, SEARCH_STEPS, MAX_SEARCHED_STEPS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0), 400, 5000


class Prediction(msgspec.Struct, frozen=True):
    """What a run would have taken."""

    name: str
    seconds: float  # the whole run; what is not a step stays as it was
    step_seconds: float
    speed: float  # of the steps: 1.1 is 1.1 times as fast as recorded
    error: float  # of `seconds`' steps and `speed`, relative: a standard deviation
    shares: list[int]  # the last ones; empty where every step has its own
    num_changes: int
    note: str = ""


class Estimate(msgspec.Struct, frozen=True):
    """What the log says of a policy that did not choose, in samples per second; None where it says too little."""

    name: str
    num_decisions: int
    effective: float  # the effective sample size
    snips: float | None = None
    snips_error: float | None = None
    doubly_robust: float | None = None
    doubly_robust_error: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Question:
    """One what-if: how the split is made, and what else is other than it was."""

    name: str
    base: str = ""
    shares: tuple[int, ...] = ()
    policy: str = ""
    sync_period: int = 1
    dropped: frozenset[int] = frozenset()
    speeds: tuple[tuple[int, float], ...] = ()


@dataclass
class Recorded:
    """The steps of one worker group; arrays of shape (steps, workers) or, with an s, (steps,)."""

    samples: Ints
    # What of a busy time goes with the share, and what does not: evaluations, checkpoints, stalls.
    busy: Floats
    extra: Floats
    # What of a step is not the slowest worker's busy time.
    rest_s: Floats
    counted: Floats
    batch_s: Ints  # of all workers together
    fixed: Floats  # each worker's fixed part, 0 to 1, at the share that it had; shape (workers,)
    fixed_error: Floats
    started: WorkersStarted
    # What the planner saw besides steps, and before which step.
    heard: list[tuple[int, Logged]] = field(default_factory=list)

    @property
    def seconds_s(self) -> Floats:
        """How long each step took."""
        seconds: Floats = (self.busy + self.extra).max(axis=1) + self.rest_s
        return seconds

    def scale(self, shares: Shares, fixed: Floats | None = None) -> Floats:
        """The busy times under other shares, shape (steps, workers)."""
        part = self.fixed if fixed is None else fixed
        scaled: Floats = self.busy * (part + (1.0 - part) * shares / self.samples) + self.extra
        return scaled

    def rows(self, rows: slice | Ints) -> Recorded:
        """Some of the steps."""
        return replace(
            self,
            samples=self.samples[rows],
            busy=self.busy[rows],
            extra=self.extra[rows],
            rest_s=self.rest_s[rows],
            counted=self.counted[rows],
            batch_s=self.batch_s[rows],
        )


class Recorder(Teller):
    """Keeps all steps, and what else the planner saw."""

    def __init__(self) -> None:
        super().__init__(keep_steps=True)
        self.heard: list[list[tuple[int, Logged]]] = []
        self.workers_started: list[WorkersStarted] = []

    def _begin(self, attempt: int, ranks: list[int], at: float) -> None:
        super()._begin(attempt, ranks, at)
        self.heard.append([])

    def _see(self, event: Logged) -> None:
        super()._see(event)
        if isinstance(event, WorkersStarted):
            self.workers_started.append(event)
        elif isinstance(event, Asked | Notice | Resources) and self.heard:
            self.heard[-1].append((self.num_reports // max(1, len(self.groups[-1].ranks)), event))


@dataclass
class Run:
    """A whole run, ready for questions."""

    about: dict[str, Any]
    story: Story
    groups: list[Recorded]

    @property
    def step_seconds(self) -> float:
        """How long all steps took together."""
        return float(sum(group.seconds_s.sum() for group in self.groups))


def load_run(directory: Path) -> Run:
    """Read a run with all its steps.

    Raises:
        AdarunError: it cannot be read, or holds no steps of all workers.
    """
    recorder, skipped = Recorder(), Skipped()
    for batch in read_batches(directory, skipped):
        recorder.see(batch)
    require_events(directory, recorder.num_events, skipped)
    return ready(recorder, read_about(directory), skipped)


def ready(recorder: Recorder, about: dict[str, Any], skipped: Skipped) -> Run:
    """The run that a recorder has seen.

    Raises:
        AdarunError: it holds no steps of all workers.
    """
    story = recorder.story(about, skipped)
    if story.num_nodes > 1:
        raise AdarunError("the log of one node among several does not say what other workers would have done")
    groups = [recorded_group(recorder, number) for number, group in enumerate(recorder.groups) if group.kept]
    if not groups:
        raise AdarunError("the log has no step that all workers have reported, so nothing can be predicted")
    return Run(about, story, groups)


def recorded_group(recorder: Recorder, number: int) -> Recorded:
    """One worker group's steps, with what the log lets fit."""
    group = recorder.groups[number]
    steps = group.steps()
    steps = steps[np.argsort(steps[:, 0, STEP], kind="stable")]
    samples = np.maximum(1, samples_of(steps))
    whole = steps[:, :, DATA : UPDATE + 1].sum(axis=2) - steps[:, :, WAIT]
    # The optimizer, and what the script does between two steps, takes no longer for a larger share.
    regular = whole - steps[:, :, UPDATE]
    # As in a window: what is longer than this holds something else than training.
    busy = np.minimum(regular, np.maximum(OUTLIER_SECONDS, OUTLIER_RATIO * np.median(regular, axis=0)))
    seconds_s = (whole + steps[:, :, WAIT]).mean(axis=1)
    controller = recorder.fitted()
    if controller is None or len(controller.model.fixed) != len(group.ranks):
        controller = fitted(busy, samples, seconds_s)
    part, error = controller.model.fixed_part()
    update = 1.0 - float(np.median(regular.sum(axis=1) / whole.sum(axis=1)))
    started = recorder.workers_started[number] if number < len(recorder.workers_started) else begun(group.ranks)
    return Recorded(
        samples=samples,
        busy=busy,
        extra=whole - busy,
        rest_s=seconds_s - whole.max(axis=1),
        counted=steps[:, :, COUNTED],
        batch_s=samples.sum(axis=1),
        fixed=np.clip((part - update) / (1.0 - update), 0.0, 0.95),
        fixed_error=error / (1.0 - update),
        started=started,
        heard=recorder.heard[number],
    )


def begun(ranks: Sequence[int]) -> WorkersStarted:
    """The beginning of a worker group, where the log has none."""
    return WorkersStarted(attempt=0, ranks=list(ranks), world_size=len(ranks), num_nodes=1, group_rank=0, at=0.0)


def fitted(busy: Floats, samples: Ints, seconds_s: Floats) -> Controller:
    """The costs of a run in which nothing was decided, from pieces of it in which the shares did not change."""
    controller = Controller(busy.shape[1])
    for start in range(0, max(1, len(busy) - FIT_STEPS + 1), FIT_STEPS):
        piece = slice(start, start + FIT_STEPS)
        steps = np.repeat(seconds_s[piece, None], busy.shape[1], axis=1).mean(axis=0)
        if len(busy[piece]) > 1 and (samples[piece] == samples[start]).all():
            controller.learn(measured(busy[piece], steps, samples[start]))
    if not controller.actual_seconds:
        raise AdarunError("the run is too short to fit what a sample costs, so nothing can be predicted")
    return controller


# --- questions -------------------------------------------------------------------------------------------------------


def parse(text: str) -> list[Question]:
    """`even,adapt+sync_period=8,rank1.speed=2` as questions.

    Raises:
        UsageError: a term means nothing.
    """
    questions = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        question = Question(name)
        for term in name.split("+"):
            question = with_term(question, term)
        questions.append(question)
    return questions


def with_term(question: Question, term: str) -> Question:
    """A question with one more term.

    Raises:
        UsageError: it means nothing.
    """
    try:
        if term in BASES:
            return replace(question, base=term)
        if match := re.fullmatch(r"shares=([\d:]+)", term):
            return replace(question, base="shares", shares=tuple(int(share) for share in match[1].split(":")))
        if match := re.fullmatch(r"sync_period=(\d+)", term):
            return replace(question, sync_period=max(1, int(match[1])))
        if match := re.fullmatch(r"drop=(?:rank)?(\d+)", term):
            return replace(question, dropped=question.dropped | {int(match[1])})
        if match := re.fullmatch(r"rank(\d+)\.speed=([\d.]+)", term):
            speed = float(match[2])
            if speed > 0.0:
                return replace(question, speeds=(*question.speeds, (int(match[1]), speed)))
    except ValueError:
        pass
    if re.fullmatch(r"[a-z_]\w*(:.+)?", term):
        return replace(question, base="policy", policy=term)
    if "=" in term and not re.match(r"(shares|sync_period|drop|rank\d+\.\w+)=", term):
        return replace(question, base="policy", policy=term)
    raise UsageError(
        f"--what-if {term} means nothing; there are {', '.join(BASES)}, shares=K:K, sync_period=H, drop=rankN, "
        "rankN.speed=X, a policy, or one of the run's settings, and several of them joined by +"
    )


def answer(run: Run, question: Question) -> Prediction:
    """What the run would have taken.

    Raises:
        UsageError: the question names workers that the run does not have, or shares of another number of them.
    """
    base = question.base or ("adapt" if run.about.get("adapt") == "on" else "even")
    if not question.base and not question.dropped and not question.speeds:
        base = "recorded"
    if question.dropped and base == "recorded":
        raise UsageError("without a worker its share must go to others: even+drop=rankN, or adapt+drop=rankN")
    rng = np.random.default_rng(0)
    seconds, squares, num_changes = 0.0, 0.0, 0
    last: list[int] = []
    for group in run.groups:
        changed = altered(group, question)
        shares, last, changes = SPLITS[base](changed, question, run.about)
        num_changes += changes
        taken = step_times(changed.scale(shares), changed.rest_s, question.sync_period)
        seconds += float(taken.sum())
        squares += (error_of(changed, shares, question.sync_period, taken, rng) * float(taken.sum())) ** 2
    recorded, num_steps = run.step_seconds, sum(len(group.busy) for group in run.groups)
    return Prediction(
        name=question.name,
        seconds=run.story.seconds - recorded + seconds,
        step_seconds=seconds / num_steps,
        speed=recorded / seconds,
        error=float(np.sqrt(squares)) / seconds if base != "recorded" or question.name != "recorded" else 0.0,
        shares=last,
        num_changes=num_changes,
    )


def altered(group: Recorded, question: Question) -> Recorded:
    """The same steps with other workers.

    Raises:
        UsageError: there is no such worker, or none would be left.
    """
    ranks = group.started.ranks
    for rank in [*question.dropped, *(rank for rank, _ in question.speeds)]:
        if rank not in ranks:
            raise UsageError(f"--what-if {question.name}: the run has no rank {rank}")
    left = [column for column, rank in enumerate(ranks) if rank not in question.dropped]
    if not left:
        raise UsageError(f"--what-if {question.name}: no worker would be left")
    factor = np.ones(len(ranks))
    for rank, speed in question.speeds:
        factor[ranks.index(rank)] /= speed
    if len(left) == len(ranks):
        return replace(group, busy=group.busy * factor)
    return replace(
        group,
        samples=group.samples[:, left],
        busy=(group.busy * factor)[:, left],
        extra=group.extra[:, left],
        counted=group.counted[:, left],
        fixed=group.fixed[left],
        fixed_error=group.fixed_error[left],
        started=begun(range(len(left))),
        # What was heard of ranks whose numbers have changed says nothing.
        heard=[(at, event) for at, event in group.heard if isinstance(event, Notice)],
    )


def step_times(busy: Floats, rest_s: Floats, sync_period: int) -> Floats:
    """How long each step takes; with a longer period workers wait for one another, and communicate, only at its end."""
    if sync_period == 1:
        times: Floats = busy.max(axis=1) + rest_s
        return times
    starts = np.arange(0, len(busy), sync_period)
    lengths = np.diff(np.append(starts, len(busy)))
    blocks = np.add.reduceat(busy, starts, axis=0).max(axis=1) + np.add.reduceat(rest_s, starts) / lengths
    return np.repeat(blocks / lengths, lengths)


def error_of(group: Recorded, shares: Shares, sync_period: int, taken: Floats, rng: np.random.Generator) -> float:
    """How far off the steps' time may be, relative: the fixed parts are not known, and other steps have other noise."""
    rows = np.arange(0, len(taken), max(1, len(taken) // MAX_DRAWN_STEPS))
    few, few_shares = group.rows(rows), np.broadcast_to(shares, group.samples.shape)[rows]
    point = step_times(few.scale(few_shares), few.rest_s, sync_period).sum()
    draws = group.fixed + group.fixed_error * rng.standard_normal((NUM_DRAWS, len(group.fixed)))
    drawn = [
        step_times(few.scale(few_shares, np.clip(draw, 0.0, 0.95)), few.rest_s, sync_period).sum() for draw in draws
    ]
    unknown = float(np.sqrt(np.mean((np.array(drawn) / point - 1.0) ** 2)))
    blocks = taken[: len(taken) // BLOCK_STEPS * BLOCK_STEPS].reshape(-1, BLOCK_STEPS).mean(axis=1)
    noise = float(blocks.std(ddof=1) / blocks.mean() / np.sqrt(len(blocks))) if len(blocks) > 1 else 0.0
    return float(np.hypot(unknown, noise))


# --- how the split is made -------------------------------------------------------------------------------------------

Split = tuple[Any, list[int], int]


def as_recorded(group: Recorded, _question: Question, _about: dict[str, Any]) -> Split:
    """The shares that there were."""
    usual = usual_rows(group, group.samples)
    changes = int((np.diff(usual, axis=0) != 0).any(axis=1).sum())
    return group.samples, usual[-1].tolist(), changes


def usual_rows(group: Recorded, shares: Ints) -> Ints:
    """The shares of the steps with the usual batch: the last one of an epoch may be smaller."""
    rows: Ints = shares[group.batch_s == np.bincount(group.batch_s).argmax()]
    return rows


def in_proportion(group: Recorded, weights: Sequence[int]) -> Ints:
    """Each step's batch cut in proportion to some weights."""
    sizes, which = np.unique(group.batch_s, return_inverse=True)
    table: Ints = np.array([apportion(weights, max(int(size), len(weights))) for size in sizes])
    rows: Ints = table[which]
    return rows


def evenly(group: Recorded, _question: Question, _about: dict[str, Any]) -> Split:
    """Equal shares."""
    shares = in_proportion(group, [1] * group.samples.shape[1])
    return shares, usual_rows(group, shares)[-1].tolist(), 0


def as_given(group: Recorded, question: Question, _about: dict[str, Any]) -> Split:
    """The shares of the question."""
    if len(question.shares) != group.samples.shape[1] or min(question.shares) < 1:
        raise UsageError(
            f"--what-if {question.name}: give a positive number for each of the {group.samples.shape[1]} workers"
        )
    shares = in_proportion(group, question.shares)
    return shares, usual_rows(group, shares)[-1].tolist(), 0


def lines(group: Recorded) -> tuple[Floats, Floats]:
    """Each worker's time in each step as a straight line over its share: what it takes for none, and per sample."""
    return group.busy * group.fixed + group.extra, group.busy * (1.0 - group.fixed) / group.samples


def clairvoyant(group: Recorded, _question: Question, _about: dict[str, Any]) -> Split:
    """For each step the split that is best for it, as if it were known beforehand: a bound, so shares need not be whole."""
    none, per_sample = lines(group)
    batch = group.batch_s.astype(np.float64)
    active = np.ones(none.shape, dtype=np.bool_)
    for _ in range(none.shape[1]):
        rate = np.where(active, 1.0 / np.maximum(per_sample, 1e-15), 0.0)
        level = (batch + (none * rate).sum(axis=1)) / rate.sum(axis=1)
        shares = (level[:, None] - none) * rate
        if (shares >= 0.0).all():
            break
        active &= shares > 0.0
    return shares, [], 0


def best_static(group: Recorded, _question: Question, _about: dict[str, Any]) -> Split:
    """The fixed split that is best in hindsight."""
    few = group.rows(np.arange(0, len(group.busy), max(1, len(group.busy) // MAX_SEARCHED_STEPS)))
    batch = float(np.median(group.batch_s))
    weights = search_static(*lines(few), batch)
    sizes = group.batch_s.astype(np.float64)
    shares = sizes[:, None] * weights
    whole = apportion([max(1, round(weight * 1e6)) for weight in weights.tolist()], max(int(batch), len(weights)))
    # Small batches cannot be cut so finely; large ones nearly can.
    return shares, whole, 0


def search_static(none: Floats, per_sample: Floats, batch: float) -> Floats:
    """The proportions for which the steps' longest times are shortest together.

    The maximum is smoothed, ever less; where it is minimal, a sample more costs the same in every worker.
    """
    weights = 1.0 / (per_sample.mean(axis=0) + none.mean(axis=0) / batch)
    weights /= weights.sum()
    best: Floats = weights
    best_time = np.inf
    scale = float((none + per_sample * weights * batch).max(axis=1).mean())
    for sharpness in SHARPNESS:
        for turn in range(SEARCH_STEPS):
            times = none + per_sample * weights * batch
            longest = times.max(axis=1)
            if longest.sum() < best_time:
                best, best_time = weights, longest.sum()
            pull = np.exp(sharpness * (times - longest[:, None]) / scale)
            pull /= pull.sum(axis=1, keepdims=True)
            cost = (pull * per_sample).mean(axis=0) + 1e-300
            change = np.log(cost / (cost @ weights)) * (1.0 / (1.0 + 0.1 * turn)) * min(1.0, 3.0 / sharpness)
            weights = weights * np.exp(-np.clip(change, -0.2, 0.2))
            weights /= weights.sum()
        weights = best
    return best


def adapted(group: Recorded, question: Question, about: dict[str, Any]) -> Split:
    """What adarun would have decided: a live planner sees the steps as they would have been."""
    num_steps, num_workers = group.samples.shape
    batches = group.batch_s
    usual = int(np.bincount(batches).argmax())
    settings = Settings(adapt="on", window=about.get("window", 0), max_share=about.get("max_share", 0))
    planner, heard = Planner(settings), list(group.heard)
    planner.see(replace_world(group.started, num_workers))
    shares = np.empty((num_steps, num_workers), dtype=np.int64)
    at, changes = 0, 0
    last: list[int] = []
    for rank in range(num_workers):
        planner.answer(rank, PlanRequest(step=0, global_batch=usual, dataset_size=0))
    while at < num_steps:
        while heard and heard[0][0] <= at:
            planner.see(heard.pop(0)[1])
        plan = ask(planner, at, usual)
        stop = min(plan.stop, num_steps)
        for size in np.unique(batches[at:stop]).tolist():
            shares[at:stop][batches[at:stop] == size] = plan.shares_for(max(size, num_workers))
        changes += bool(last) and plan.shares != last
        last = plan.shares
        report(planner, group, slice(at, stop), shares[at:stop], question.sync_period)
        at = stop
    return shares, last, changes


def ask(planner: Planner, step: int, global_batch: int) -> Plan:
    """The plan for a step, as the worker of rank 0 asks for it."""
    frozen = planner.frozen(0)
    plan, _ = planner.answer(0, PlanRequest(step=step, global_batch=global_batch, dataset_size=0, frozen=frozen))
    if not isinstance(plan, Plan):
        raise AdarunError(f"no plan can be made for this run: {plan.reason}")
    return plan


def report(planner: Planner, group: Recorded, rows: slice, shares: Ints, sync_period: int) -> None:
    """Let the planner see some steps as they would have been."""
    some = group.rows(rows)
    busy = some.scale(shares)
    wait = step_times(busy, some.rest_s, sync_period)[:, None] - busy
    first = rows.start
    table = zip(busy.tolist(), wait.tolist(), shares.tolist(), some.counted.tolist(), strict=True)
    for number, (busy_row, wait_row, share_row, counted_row) in enumerate(table):
        for rank, seconds in enumerate(busy_row):
            planner.see(
                Step(
                    rank=rank,
                    step=first + number,
                    samples=share_row[rank],
                    data=0.0,
                    forward=0.0,
                    backward=seconds,
                    wait=max(0.0, wait_row[rank]),
                    update=0.0,
                    ended=0.0,
                    counted=counted_row[rank] > 0.0,
                )
            )


def replace_world(started: WorkersStarted, num_workers: int) -> WorkersStarted:
    """The beginning of a worker group of so many workers."""
    return msgspec.structs.replace(started, ranks=list(range(num_workers)), world_size=num_workers)


SPLITS: dict[str, Callable[[Recorded, Question, dict[str, Any]], Split]] = {
    "recorded": as_recorded,
    "even": evenly,
    "shares": as_given,
    "adapt": adapted,
    "static": best_static,
    "oracle": clairvoyant,
}

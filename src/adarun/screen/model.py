"""A job as its viewers see it: takes in events, live or from a log, and gives snapshots.

Knows no socket, clock or file. Taking in an event costs about a microsecond, since it happens whether anybody looks or not;
what needs arithmetic is worked out for a snapshot.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import msgspec

from adarun.events import (
    SNAPSHOT_VERSION,
    Attached,
    Decision,
    Hello,
    Logged,
    Loop,
    Lost,
    Notice,
    Paced,
    Plan,
    Refused,
    Resources,
    RunEnded,
    RunStarted,
    Said,
    Snapshot,
    Step,
    Tuned,
    Window,
    WorkerNow,
    WorkersEnded,
    WorkersStarted,
)
from adarun.screen.straggler import straggler

# Steps that a worker's chart shows, and those of which its row is the mean.
RECENT_STEPS = 120
MEAN_STEPS = 30
HISTORY_SECONDS = 2.0
HISTORY_LENGTH = 60
DECISIONS_KEPT = 50
WARNINGS_KEPT = 20
# A worker is silent if its last step is longer ago than both: reports come 2.5 times a second.
SILENT_SECONDS = 10.0
SILENT_STEPS = 5.0


class About(msgspec.Struct, frozen=True):
    """What run.json says of a run, as far as it is shown."""

    run: str = ""
    command: list[str] = []
    host: str = ""
    folder: str = ""
    pid: int = 0
    started: float = 0.0
    log: str = ""


@dataclass
class Worker:
    """What was seen of one worker."""

    hello: Hello | None = None
    gone: bool = False
    recent: deque[Step] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    used: Resources | None = None
    samples: int = 0
    num_steps: int = 0
    total_samples: int = 0
    busy: float = 0.0
    wait: float = 0.0
    data: float = 0.0
    lost: int = 0


class Model:
    """Everything that was seen of one job."""

    def __init__(self, about: About) -> None:
        self.about = about
        self.workers: dict[int, Worker] = {}
        self._group: WorkersStarted | None = None
        self._ended: WorkersEnded | RunEnded | None = None
        self._plan: Plan | None = None
        self._shares_since = 0
        self._window: Window | None = None
        self._decided: Decision | None = None
        self._said: deque[Said] = deque(maxlen=DECISIONS_KEPT)
        self._num_changes = 0
        self._setting = ""
        self._notices: dict[str, Notice] = {}
        self._refused: deque[Refused] = deque(maxlen=3)
        self._num_refused = 0
        self._actual_seconds = self._even_seconds = 0.0
        # Of the lowest rank, whose steps tell the job's time.
        self._lead = 0
        self._loops: deque[Loop] = deque(maxlen=2)
        self._num_loops = 0
        self._batch = 0.0
        # The global batch by the lead's samples, where a plan tells; until every worker has reported nothing else does.
        self._scale = 0.0
        self._history: deque[tuple[float, float, float]] = deque(maxlen=HISTORY_LENGTH + 1)

    def see(self, event: Logged) -> None:
        """Take in one event."""
        take = self._TAKES.get(type(event))
        if take is not None:
            take(self, event)

    def _take_step(self, step: Step) -> None:
        worker = self.workers.get(step.rank)
        if worker is None:
            worker = self.workers[step.rank] = Worker()
        worker.recent.append(step)
        self._batch += step.samples - worker.samples
        worker.samples = step.samples
        worker.num_steps += 1
        worker.total_samples += step.samples
        worker.busy += step.busy_seconds
        worker.wait += step.wait
        worker.data += step.data
        if step.rank == self._lead:
            self._take_rate(step)

    def _take_rate(self, step: Step) -> None:
        """Whole steps of one rank make the history: long ones do not fall between two of its points."""
        began = step.ended // HISTORY_SECONDS * HISTORY_SECONDS
        samples, seconds = self._batch if self._scale == 0.0 else step.samples * self._scale, step.seconds
        if self._history and self._history[-1][0] == began:
            _, before, spent = self._history.pop()
            samples, seconds = samples + before, seconds + spent
        self._history.append((began, samples, seconds))

    def _take_group(self, event: WorkersStarted) -> None:
        self._group, self._ended, self._plan = event, None, None
        self._shares_since = self._num_loops = 0
        self._batch = self._scale = 0.0
        self._lead = min(event.ranks, default=0)
        self._loops.clear()
        self._notices = {}
        for worker in self.workers.values():
            worker.hello, worker.samples, worker.gone = None, 0, False
            worker.recent.clear()
        self.workers = {rank: self.workers.get(rank, Worker()) for rank in event.ranks}

    def _take_attached(self, event: Attached) -> None:
        worker = self.workers.setdefault(event.hello.rank, Worker())
        worker.hello, worker.gone = event.hello, False

    def _take_ended(self, event: WorkersEnded | RunEnded) -> None:
        self._ended = event
        for worker in self.workers.values():
            worker.gone = True

    def _take_plan(self, plan: Plan) -> None:
        if self._plan is None or self._plan.shares != plan.shares:
            self._shares_since = plan.start
            self._scale = sum(plan.shares) / plan.shares[self._lead]
        self._plan = plan

    def _take_window(self, window: Window) -> None:
        self._window = window

    def _take_decision(self, event: Decision) -> None:
        self._say(event.at, event.reason, changed=event.chosen != event.before)
        self._decided = event
        window, self._window = self._window, None
        if window is None:
            return
        # As the controller reckons it: the same steps, but for their longest busy time.
        even = [sum(window.samples) / len(window.samples)] * len(window.samples)
        saved = _longest(event, even) - _longest(event, window.samples)
        self._actual_seconds += window.steps * window.step_seconds
        self._even_seconds += window.steps * (window.step_seconds + saved)

    def _take_tuned(self, event: Tuned) -> None:
        self._setting = event.chosen
        self._say(event.at, event.reason, changed=event.chosen != event.before)

    def _take_paced(self, event: Paced) -> None:
        self._say(event.at, event.reason, changed=event.chosen != event.before)

    def _say(self, at: float, text: str, *, changed: bool) -> None:
        self._said.append(Said(at=at, text=text, changed=changed))
        self._num_changes += changed

    def _take_notice(self, event: Notice) -> None:
        self._notices.setdefault(event.key, event)

    def _take_loop(self, event: Loop) -> None:
        if event.rank == self._lead:
            self._loops.append(event)
            self._num_loops += 1

    def _take_resources(self, event: Resources) -> None:
        self.workers.setdefault(event.rank, Worker()).used = event

    def _take_lost(self, event: Lost) -> None:
        self.workers.setdefault(event.rank, Worker()).lost += event.reports

    def _take_refused(self, event: Refused) -> None:
        self._refused.append(event)
        self._num_refused += 1

    def _take_run(self, event: RunStarted) -> None:
        if not self.about.run:
            self.about = About(run=event.run, command=event.command, started=event.at)

    _TAKES: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        Step: _take_step,
        WorkersStarted: _take_group,
        Attached: _take_attached,
        WorkersEnded: _take_ended,
        RunEnded: _take_ended,
        Plan: _take_plan,
        Window: _take_window,
        Decision: _take_decision,
        Tuned: _take_tuned,
        Paced: _take_paced,
        Notice: _take_notice,
        Loop: _take_loop,
        Resources: _take_resources,
        Lost: _take_lost,
        Refused: _take_refused,
        RunStarted: _take_run,
    }

    # --- what is shown ---

    def snapshot(self, now: float, ranks: Iterable[int] = ()) -> Snapshot:
        """The job at the moment `now`, with the recent steps of `ranks`."""
        about, group = self.about, self._group
        workers = [self._row(rank, worker, now) for rank, worker in sorted(self.workers.items())]
        slowest, cause, text = straggler(workers)
        epoch, num_epochs, left = self._progress(now)
        steps = [row.step for row in workers if row.step is not None]
        return Snapshot(
            version=SNAPSHOT_VERSION,
            run=about.run,
            command=about.command,
            script=script_of(about),
            host=about.host,
            folder=about.folder,
            log=about.log,
            pid=about.pid,
            started=about.started,
            at=now,
            state=self._state(workers),
            attempt=group.attempt if group else 0,
            world_size=group.world_size if group else 0,
            num_nodes=group.num_nodes if group else 1,
            workers=workers,
            exit_code=self._ended.exit_code if isinstance(self._ended, RunEnded) else None,
            epoch=epoch,
            num_epochs=num_epochs,
            step=max(steps, default=None),
            left_seconds=left,
            samples_per_second=sum(row.samples_per_second for row in workers),
            history=[samples / max(seconds, 1e-9) for _, samples, seconds in islice(self._history, HISTORY_LENGTH)],
            history_seconds=HISTORY_SECONDS,
            gain=self._gain(),
            gain_error=self._decided.gain_error if self._decided and self._actual_seconds else None,
            straggler=slowest,
            cause=cause,
            cause_text=text,
            plan=self._plan,
            setting=self._setting,
            guard=self._guard(),
            decisions=list(self._said),
            num_changes=self._num_changes,
            warnings=self._warnings(workers)[:WARNINGS_KEPT],
            recent={rank: list(self.workers[rank].recent) for rank in ranks if rank in self.workers},
        )

    def _row(self, rank: int, worker: Worker, now: float) -> WorkerNow:
        steps = self._steps_for_means(worker)
        count = max(1, len(steps))
        seconds = sum(step.seconds for step in steps)
        hello, used = worker.hello, worker.used
        return WorkerNow(
            rank=rank,
            node=hello.host if hello else "",
            device=hello.device if hello else "",
            pid=hello.pid if hello else 0,
            state=_state_of(worker, now, seconds / count),
            share=self._share(rank, worker),
            step=worker.recent[-1].step if worker.recent else None,
            samples_per_second=sum(step.samples for step in steps) / seconds if seconds else 0.0,
            busy_seconds=sum(step.busy_seconds for step in steps) / count,
            wait_seconds=sum(step.wait for step in steps) / count,
            data_seconds=sum(step.data for step in steps) / count,
            cpu_fraction=used.cpu_fraction if used else None,
            memory_bytes=used.memory_bytes if used else None,
            gpu_fraction=used.gpu_fraction if used else None,
            gpu_memory_bytes=used.gpu_memory_bytes if used else None,
            gpu_capacity_bytes=used.gpu_capacity_bytes if used else None,
            total_steps=worker.num_steps,
            total_samples=worker.total_samples,
            total_busy_seconds=worker.busy,
            total_wait_seconds=worker.wait,
            total_data_seconds=worker.data,
            lost_reports=worker.lost,
        )

    def _steps_for_means(self, worker: Worker) -> list[Step]:
        """The last steps that tell of now: counted ones, under the present shares if there are some."""
        last = list(islice(reversed(worker.recent), MEAN_STEPS))
        counted = [step for step in last if step.counted] or last
        return [step for step in counted if step.step >= self._shares_since] or counted

    def _share(self, rank: int, worker: Worker) -> int | None:
        if self._plan is not None and rank < len(self._plan.shares):
            return self._plan.shares[rank]
        return worker.samples or None

    def _state(self, workers: Sequence[WorkerNow]) -> str:
        if isinstance(self._ended, RunEnded):
            return "ended"
        if self._ended is not None:
            return "restarting" if self._ended.state == "RETUNED" else "ending"
        states = {row.state for row in workers}
        return next((state for state in ("training", "silent") if state in states), "starting")

    def _progress(self, now: float) -> tuple[int | None, int | None, float | None]:
        """The epoch, counted from 1, the number of epochs, and the seconds that are left."""
        if not self._loops:
            return None, epochs_of(self.about.command), None
        last, num_epochs = self._loops[-1], epochs_of(self.about.command)
        epoch = (last.epoch if last.epoch >= 0 else self._num_loops - 1) + 1
        if num_epochs is None or len(self._loops) < 2 or epoch > num_epochs or self._ended is not None:
            return epoch, num_epochs, None
        lap = last.at - self._loops[0].at
        return epoch, num_epochs, max(0.0, lap * (num_epochs - epoch + 1) - (now - last.at))

    def _gain(self) -> float | None:
        return self._even_seconds / self._actual_seconds - 1.0 if self._actual_seconds else None

    def _guard(self) -> str:
        """What holds the split back, or takes it back, in words."""
        for notice in self._notices.values():
            if notice.freezes:
                return f"the split stays even: {notice.text}"
        reason = self._decided.reason if self._decided else ""
        if reason.startswith(("rolled back", "kept: the last change made it worse")):
            return "a change was taken back; waiting before another"
        if reason.startswith("even: "):
            return f"the split stays even: {reason[6:].partition(' (')[0]}"
        return "nothing taken back" if self._decided else ""

    def _warnings(self, workers: Sequence[WorkerNow]) -> list[str]:
        texts = [notice.text for notice in self._notices.values()]
        if self._ended is None:
            texts += [f"rank {row.rank} has not reported for a while" for row in workers if row.state == "silent"]
        if lost := sum(row.lost_reports for row in workers):
            texts.append(f"{lost} reports were lost, since the hub read too slowly")
        if self._refused:
            last = self._refused[-1]
            texts.append(f"clients turned away: {self._num_refused}; the last one, process {last.pid}: {last.reason}")
        return texts


def _state_of(worker: Worker, now: float, step_seconds: float) -> str:
    if worker.gone:
        return "gone"
    if not worker.recent:
        return "starting"
    silent = now - worker.recent[-1].ended > max(SILENT_SECONDS, SILENT_STEPS * step_seconds)
    return "silent" if silent else "training"


def _longest(decision: Decision, samples: Sequence[float]) -> float:
    costs = zip(decision.fixed_seconds, decision.sample_seconds, samples, strict=True)
    return max(fixed + each * share for fixed, each, share in costs)


def epochs_of(command: Sequence[str]) -> int | None:
    """How many epochs a script trains, by its own `--epochs`."""
    found = re.search(r"(?:^| )--(?:num[-_]|max[-_])?epochs[= ](\d+)", " ".join(command))
    return int(found[1]) if found else None


def script_of(about: About) -> str:
    """The script's name: the run's id holds it without its ending."""
    stem = "-".join(about.run.split("-")[2:-1])
    return next((word.rpartition("/")[2] for word in about.command if word.endswith(f"{stem}.py")), stem or about.run)

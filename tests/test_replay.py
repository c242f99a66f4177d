"""`adarun replay`: what it tells of a log is what the log says, decisions repeat word for word, predictions follow the costs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest

from adarun.cli import app
from adarun.control.planner import Planner, Settings
from adarun.control.tuner import Tuner
from adarun.errors import AdarunError, Diverged
from adarun.events import (
    SCHEMA_VERSION,
    Decision,
    Logged,
    Loop,
    Lost,
    Notice,
    Paced,
    Plan,
    PlanRequest,
    Refused,
    RunEnded,
    RunStarted,
    Step,
    Tuned,
    WorkersEnded,
    WorkersStarted,
)
from adarun.policies import Tuning, load
from adarun.replay import settings, steps, story, what_if
from adarun.replay.check import check
from adarun.replay.foreign import import_csv
from adarun.replay.story import tell
from adarun.runlog import RunLog, read
from conftest import Job

DATA = Path(__file__).parent / "data"
GOLDEN = sorted(path.parent for path in DATA.glob("logs/*/events.jsonl"))
SPLIT, TUNED = DATA / "logs" / "split", DATA / "logs" / "tuned"
TRACES = DATA / "traces"
ABOUT: dict[str, Any] = {"run": "a-run", "adapt": "on", "window": 0, "shares": [], "max_share": 0}


def log(folder: Path, events: Sequence[Logged], **about: Any) -> Path:
    """A run's folder with these events."""
    written = RunLog(folder, {**ABOUT, "run": folder.name, **about})
    for event in events:
        written.append(event)
    written.close()
    return folder


class Workers:
    """Workers with a cost per sample each, under a real planner, with all that a hub would log."""

    def __init__(self, costs: Sequence[float], adapt: str = "on", batch: int = 96) -> None:
        self.costs, self.batch = list(costs), batch
        self.planner = Planner(Settings(adapt=adapt, window=20))
        self.now = 1000.0
        self.events: list[Logged] = []
        self.communication, self.noise = 0.002, 0.02
        self._rng = np.random.default_rng(0)
        self.see(RunStarted(schema=SCHEMA_VERSION, run="a-run", command=["train.py"], at=self.now))
        self.start(0)

    def see(self, event: Logged) -> None:
        self.planner.see(event)
        self.events.append(event)

    def start(self, attempt: int) -> None:
        num = len(self.costs)
        self.now += 2.0
        self.see(
            WorkersStarted(
                attempt=attempt, ranks=list(range(num)), world_size=num, num_nodes=1, group_rank=0, at=self.now - 2.0
            )
        )
        self.step = 0

    def ask(self, rank: int) -> Plan:
        answer, events = self.planner.answer(
            rank, PlanRequest(step=self.step, global_batch=self.batch, dataset_size=1000)
        )
        stamped = [msgspec.structs.replace(e, at=self.now) if isinstance(e, Decision) else e for e in events]
        self.events += stamped
        assert isinstance(answer, Plan)
        return answer

    def run(self, num_steps: int) -> Workers:
        for _ in range(num_steps):
            shares = [self.ask(rank).shares[rank] for rank in range(len(self.costs))]
            factors = np.exp(self.noise * self._rng.standard_normal(len(self.costs)))
            busy = [cost * share * f for cost, share, f in zip(self.costs, shares, factors.tolist(), strict=True)]
            took = max(busy) + self.communication
            self.now += took
            for rank, seconds in enumerate(busy):
                self.see(report(rank, self.step, shares[rank], seconds, took - seconds, self.now))
            self.step += 1
        return self

    def end(self, code: int = 0, state: str = "SUCCEEDED") -> list[Logged]:
        self.events.append(WorkersEnded(attempt=0, state=state, at=self.now))
        self.events += self.planner.finish()
        self.events.append(RunEnded(exit_code=code, at=self.now + 1.0))
        return self.events


def report(rank: int, step: int, samples: int, busy: float, wait: float, ended: float, *, counted: bool = True) -> Step:
    """A step in which two parts of a hundred of the busy time went for data."""
    return Step(
        rank=rank,
        step=step,
        samples=samples,
        data=0.02 * busy,
        forward=0.38 * busy,
        backward=0.6 * busy,
        wait=wait,
        update=0.0,
        ended=ended,
        counted=counted,
    )


def adarun(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `adarun replay ...`."""
    with (
        mock.patch.object(sys, "argv", ["adarun", "replay", *map(str, arguments)]),
        pytest.raises(SystemExit) as end,
    ):
        app.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def answers(run: what_if.Run, text: str) -> list[what_if.Prediction]:
    return [what_if.answer(run, question) for question in what_if.parse(text)]


# --- the story -----------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_workers_time_add_up_to_the_run(tmp_path: Path) -> None:
    """Start, data, compute, waiting, communication and the rest are, together, how long the run took."""
    told = tell(log(tmp_path / "run", Workers([1e-3, 2e-3]).run(100).end()))
    assert told.seconds == pytest.approx(told.workers[0].parts.whole)
    assert told.seconds == pytest.approx(told.workers[1].parts.whole)
    assert told.parts.starting == pytest.approx(3.0, abs=0.01)
    assert told.parts.communication == pytest.approx(100 * 0.002)


def test_each_part_is_what_the_reports_say(tmp_path: Path) -> None:
    """Data, compute, waiting and communication are the sums over the steps; an evaluation inside a step is other work."""
    events: list[Logged] = [WorkersStarted(attempt=0, ranks=[0, 1], world_size=2, num_nodes=1, group_rank=0, at=0.0)]
    for step in range(10):
        events += [report(0, step, 8, 0.1, 0.25, step + 1.0), report(1, step, 8, 0.3, 0.05, step + 1.0)]
    long = report(0, 10, 8, 0.1, 0.0, 12.0, counted=False)
    events += [msgspec.structs.replace(long, update=0.5), msgspec.structs.replace(long, rank=1, update=0.5)]
    parts = tell(log(tmp_path / "run", events)).workers[0].parts
    assert parts.data == pytest.approx(11 * 0.002)
    assert parts.compute == pytest.approx(11 * 0.098)
    assert parts.waiting == pytest.approx(10 * 0.2)
    assert parts.communication == pytest.approx(10 * 0.05)
    assert parts.other >= 0.5


def test_the_straggler_is_named_since_it_was_one(tmp_path: Path) -> None:
    """The worker that became slower than the others, by how much, and the first window in which it was."""
    job = Workers([1e-3, 1e-3, 1e-3], adapt="observe").run(100)
    slow_since = job.now
    job.costs[2] = 1.8e-3
    told = tell(log(tmp_path / "run", job.run(100).end()))
    assert told.straggler is not None
    assert told.straggler.rank == 2
    assert told.straggler.slow == pytest.approx(1.8, rel=0.03)
    assert told.straggler.since == pytest.approx(slow_since - 1000.0, abs=0.01)
    assert told.straggler.since_step == 100
    assert told.straggler.until is None


def test_a_straggler_that_recovered_is_told_until_then(tmp_path: Path) -> None:
    """A worker that was slow for a while has a beginning and an end."""
    job = Workers([1e-3, 1e-3], adapt="observe").run(60)
    job.costs[0] = 2e-3
    job.run(60)
    recovered = job.now
    job.costs[0] = 1e-3
    told = tell(log(tmp_path / "run", job.run(80).end()))
    assert told.straggler is not None
    assert (told.straggler.rank, told.straggler.since_step) == (0, 60)
    assert told.straggler.until == pytest.approx(recovered - 1000.0, abs=0.01)


def test_equal_workers_have_no_straggler(tmp_path: Path) -> None:
    """Noise names nobody."""
    job = Workers([1e-3] * 4, adapt="observe")
    job.noise = 0.05
    assert tell(log(tmp_path / "run", job.run(200).end())).straggler is None


def test_a_change_is_told_with_what_was_expected_and_what_it_brought(tmp_path: Path) -> None:
    """A re-split that was to gain a third did, and its error holds the truth."""
    told = tell(log(tmp_path / "run", Workers([1e-3, 2e-3]).run(200).end()))
    change = told.changes[0]
    # Of 96 samples at 1 and 2 ms: 48 x 2 ms before, 65 x 1 ms after, and 2 ms of communication in both.
    truth = (96.0 + 2.0) / (65.0 + 2.0) - 1.0
    assert (change.kind, change.step, change.before, change.after) == ("re-split", 20, "48,48", "65,31")
    assert change.expected == pytest.approx(truth, abs=0.05)
    assert change.brought == pytest.approx(truth, abs=0.03)
    # The first 20 of the 200 steps were even.
    assert told.gain == pytest.approx(200 * 98.0 / (20 * 98.0 + 180 * 67.0) - 1.0, abs=0.03)
    assert told.gain_error is not None


def test_a_roll_back_is_told(tmp_path: Path) -> None:
    """A change that was taken back stands in the story with its reason."""
    job = Workers([1e-3, 2e-3]).run(20)
    job.ask(0)
    job.communication = 0.2
    told = tell(log(tmp_path / "run", job.run(60).end()))
    assert [change.kind for change in told.changes][:2] == ["re-split", "rolled back"]


def test_restarts_failures_and_messages_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker group that failed, a notice, a refused client and lost reports are all said."""
    job = Workers([1e-3, 1e-3]).run(30)
    job.events.append(WorkersEnded(attempt=0, state="FAILED", at=job.now))
    job.start(1)
    job.see(Notice(key="k", text="something to know", freezes=True))
    job.events += [Refused(reason="it said nothing", pid=1, at=job.now), Lost(rank=0, reports=7)]
    directory = log(tmp_path / "run", job.run(30).end(code=1, state="FAILED"))
    code, out, _ = adarun(capsys, directory)
    said = " ".join(out.split())
    assert code == 0
    for text in (
        "ended with exit code 1",
        "attempt 0 ended FAILED",
        "workers were started 2 times",
        "note: something to know",
        "refused: it said nothing",
        "7 reports never reached the log",
    ):
        assert text in said


def test_the_story_fits_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """Each golden run is told in 30 lines of at most 120 characters."""
    for directory in GOLDEN:
        code, out, _ = adarun(capsys, directory)
        assert code == 0
        assert len(out.splitlines()) <= 30
        assert max(map(len, out.splitlines())) <= 120


def test_many_workers_and_changes_fit_on_one_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of forty workers and forty changes those that matter are shown."""
    job = Workers([1e-3] * 39 + [2e-3], batch=400)
    plans = [Plan(number=n, start=20 * n, stop=20 * n + 20, shares=[10] * 39 + [10 + n % 2]) for n in range(40)]
    for plan in (msgspec.structs.replace(plan, reason="given by --shares") for plan in plans):
        job.events.append(plan)
        for step in range(plan.start, plan.stop):
            job.now += 0.02
            job.events += [report(r, step, s, 0.01, 0.01, job.now) for r, s in enumerate(plan.shares)]
    _, out, _ = adarun(capsys, log(tmp_path / "run", job.events))
    assert len(out.splitlines()) <= 60
    assert "40 workers: the slowest and the fastest are shown" in out
    assert "more" in out


def test_what_is_kept_grows_with_the_windows_and_not_with_the_steps(tmp_path: Path) -> None:
    """After thousands of reports a group holds sums, and the few reports that wait for another worker's."""
    group = steps.Group(0, [0, 1], 0.0)
    group.plan(0, 0, [8, 8])
    group.plan(1, 500, [8, 8])
    for start in range(0, 5000, 500):
        rows = [report(rank, step, 8, 0.1, 0.0, 1.0) for step in range(start, start + 500) for rank in (0, 1)]
        group.add(steps.table(rows[: -1 if start == 4500 else None]))
    assert [window.num_steps for window in group.windows] == [500, 4499]
    assert group.windows[1].first_data is not None
    assert group.windows[1].first_data.base is None
    assert sum(len(rows) for rows in group._pending) == 1
    assert group.steps().shape[0] == 0


def test_reports_in_any_order_give_the_same_sums() -> None:
    """Workers report at different times; a step counts when all have, wherever its reports stand."""
    rng = np.random.default_rng(0)
    rows = [
        report(rank, step, 8, 0.1 * (rank + 1), 0.2 - 0.1 * rank, step + 1.0) for step in range(100) for rank in (0, 1)
    ]
    whole = steps.Group(0, [0, 1], 0.0)
    whole.add(steps.table(rows))
    pieces = steps.Group(0, [0, 1], 0.0)
    shuffled = [rows[number] for number in rng.permutation(len(rows))]
    for start in range(0, len(rows), 7):
        pieces.add(steps.table(shuffled[start : start + 7]))
    for one, other in ((whole, pieces), (pieces, whole)):
        sums = {window.plan: window.sums for window in other.windows}
        assert {window.plan for window in one.windows} == set(sums)
        for window in one.windows:
            np.testing.assert_allclose(window.sums, sums[window.plan])


# --- decisions repeat ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", GOLDEN, ids=lambda directory: directory.name)
def test_golden_logs_decide_the_same_again(directory: Path) -> None:
    """Every decision of a kept log of a real run comes out as it did then."""
    assert check(directory) >= 5


def test_a_log_that_this_version_writes_can_be_repeated(start: Callable[..., Job], scripts: Path) -> None:
    """A real run under the installed command is checked by the installed command."""
    job = start("adarun", "--standalone", "--nproc-per-node", "2", "--window", "4", scripts / "exact.py").wait()
    (directory,) = (job.folder / "runs").iterdir()
    assert start("adarun", "replay", "--check", directory).succeed().stdout.endswith(" all the same when repeated\n")


def altered(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A golden log in which something is other than it was."""
    shutil.copytree(source, target)
    path = target / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        change(event)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return target


def test_the_first_decision_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that the control would not have made now is an error that says which, what it was and what it is."""

    def change(event: dict[str, Any]) -> None:
        if event["type"] == "plan" and event["number"] == 4:
            event["shares"] = [60, 36]

    code, out, err = adarun(capsys, "--check", altered(SPLIT, tmp_path / "run", change))
    assert (code, out) == (1, "")
    assert err == (
        "adarun: the decision after plan 4 (steps 40 to 49) comes out otherwise: "
        "shares of the plan was [60, 36] and is now [65, 31]\n"
    )


def test_a_step_that_was_otherwise_is_seen(tmp_path: Path) -> None:
    """The decisions follow from the steps: where one of them was faster, the next window is another."""

    def change(event: dict[str, Any]) -> None:
        if event["type"] == "step" and event["step"] == 15:
            event["backward"] *= 0.9

    with pytest.raises(Diverged, match="of the window was"):
        check(altered(SPLIT, tmp_path / "run", change))


def test_a_choice_of_settings_that_differs_is_seen(tmp_path: Path) -> None:
    """What the policy draws is repeated too, propensities included."""

    def change(event: dict[str, Any]) -> None:
        if event["type"] == "tuned" and event["lap"] == 2:
            event["propensities"][0] += 0.01

    with pytest.raises(Diverged, match="propensities of the tuned was"):
        check(altered(TUNED, tmp_path / "run", change))


def test_settings_are_repeated_through_restarts(tmp_path: Path) -> None:
    """A job that tried several settings, with restarts, decides the same again."""
    directory = tuned_log(tmp_path / "run", "thompson", num_laps=40)
    assert any(event.restart for event in read(directory) if isinstance(event, Tuned))
    assert check(directory) >= 35


def test_what_qlearning_began_with_is_in_the_log(tmp_path: Path) -> None:
    """A policy that goes on from other runs is repeated from what run.json says it began with."""
    rows = [[3, 0, "a=2", 1.4, 5]]
    directory = tuned_log(tmp_path / "run", "qlearning", num_laps=20, learned=rows)
    assert check(directory) >= 15
    about = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps({**about, "learned": []}))
    with pytest.raises(Diverged):
        check(directory)


def test_a_log_without_its_run_json_is_not_checked(tmp_path: Path) -> None:
    """What the user asked for is part of every decision."""
    directory = log(tmp_path / "run", Workers([1e-3, 2e-3]).run(50).end())
    (directory / "run.json").unlink()
    with pytest.raises(AdarunError, match=r"run\.json is missing"):
        check(directory)


# --- what if -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "ratio"), [("AR", "oracle", 1.944), ("ST", "oracle", 1.004), ("AR", "static", 1.934)]
)
def test_the_traces_ratios_are_known(name: str, asked: str, ratio: float) -> None:
    """On recorded production jobs the bounds are those that are known, to three digits."""
    run = import_csv(TRACES / f"bytedance-{name}.csv")
    assert round(answers(run, asked)[0].speed, 3) == ratio


def test_an_even_run_foretells_the_adapted_one(tmp_path: Path) -> None:
    """Asked what adarun would have done with a run it only observed, the answer is what it then does."""
    even = what_if.load_run(
        log(tmp_path / "even", Workers([1e-3, 2e-3], adapt="observe").run(300).end(), adapt="observe")
    )
    adapted = what_if.load_run(log(tmp_path / "adapted", Workers([1e-3, 2e-3]).run(300).end()))
    (foreseen,) = answers(even, "adapt")
    assert foreseen.step_seconds == pytest.approx(adapted.step_seconds / 300, rel=0.02)
    assert foreseen.shares == adapted.groups[0].samples[-1].tolist()


def test_an_adapted_run_knows_what_the_even_split_would_have_taken(tmp_path: Path) -> None:
    """And the other way round, within its own error."""
    even = what_if.load_run(
        log(tmp_path / "even", Workers([1e-3, 2e-3], adapt="observe").run(300).end(), adapt="observe")
    )
    adapted = what_if.load_run(log(tmp_path / "adapted", Workers([1e-3, 2e-3]).run(300).end()))
    (foreseen,) = answers(adapted, "even")
    assert foreseen.step_seconds == pytest.approx(even.step_seconds / 300, rel=0.03)
    assert foreseen.error < 0.1


def test_the_run_as_it_was_takes_what_it_took(tmp_path: Path) -> None:
    """The first row is the run itself, to the last digit, and its error is none."""
    directory = log(tmp_path / "run", Workers([1e-3, 2e-3]).run(100).end())
    (recorded,) = answers(what_if.load_run(directory), "recorded")
    assert recorded.seconds == pytest.approx(tell(directory).seconds)
    assert (recorded.speed, recorded.error) == (pytest.approx(1.0), 0.0)


def test_no_split_beats_the_oracle_and_no_fixed_one_the_static(tmp_path: Path) -> None:
    """The bounds are bounds."""
    run = what_if.load_run(log(tmp_path / "run", Workers([1e-3, 2e-3, 1.3e-3]).run(200).end()))
    oracle, static, *others = answers(run, "oracle,static,even,shares=5:3:4,shares=40:20:36")
    assert oracle.step_seconds <= static.step_seconds
    assert all(static.step_seconds <= other.step_seconds * 1.001 for other in others)


def test_other_workers_and_periods_take_what_they_must(tmp_path: Path) -> None:
    """A worker at twice the speed, one that is gone and a longer period change the steps by what they should."""
    job = Workers([1e-3, 2e-3], adapt="observe")
    job.noise = 0.0
    run = what_if.load_run(log(tmp_path / "run", job.run(96).end(), adapt="observe"))
    equal, alone, rare = answers(run, "even+rank1.speed=2,even+drop=rank1,even+sync_period=8")
    assert equal.step_seconds == pytest.approx(0.048 + 0.002, rel=1e-3)
    assert alone.step_seconds == pytest.approx(0.096 * 0.98 + 0.048 * 0.02 + 0.002, rel=1e-2)
    assert rare.step_seconds == pytest.approx(0.096 + 0.002 / 8, rel=1e-3)


def test_a_longer_period_lets_luck_even_out(tmp_path: Path) -> None:
    """With noise, workers that wait for one another more rarely wait less."""
    job = Workers([1e-3] * 4, adapt="observe")
    job.noise, job.communication = 0.2, 0.0
    run = what_if.load_run(log(tmp_path / "run", job.run(160).end(), adapt="observe"))
    speeds = [answer.speed for answer in answers(run, "recorded,sync_period=2,sync_period=8,sync_period=32")]
    assert speeds == sorted(speeds)
    assert speeds[-1] > 1.1


def test_what_keeps_the_split_even_keeps_it_so_in_an_answer(tmp_path: Path) -> None:
    """A script that adarun may not adapt is not promised a gain."""
    job = Workers([1e-3, 2e-3])
    job.see(Notice(key="batchnorm", text="BatchNorm", freezes=True))
    run = what_if.load_run(log(tmp_path / "run", job.run(100).end()))
    (adapted,) = answers(run, "adapt")
    assert (adapted.shares, adapted.num_changes) == ([48, 48], 0)


def test_an_unadapted_run_can_be_asked(tmp_path: Path) -> None:
    """A run with --adapt off has no plans and no windows; its steps are enough."""
    events = [
        e
        for e in Workers([1e-3, 2e-3], adapt="observe").run(100).end()
        if isinstance(e, Step | WorkersStarted | RunEnded)
    ]
    run = what_if.load_run(log(tmp_path / "run", events, adapt="off"))
    assert answers(run, "adapt")[0].shares == [65, 31]


NOT_ASKED = ["shares=3", "nothing at all", "rank1.speed=0", "rank9.speed=2", "even+drop=rank7", "shares=0:96"]


@pytest.mark.parametrize("text", NOT_ASKED)
def test_a_question_that_means_nothing_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence, with exit code 2."""
    code, _, err = adarun(capsys, SPLIT, "--what-if", text)
    assert code == 2
    assert err.startswith("adarun: --what-if ")
    assert err.count("\n") == 1


def test_what_if_is_a_table_with_error_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """Each question has its row: the run's time, the step's, the speed, and how far off that may be."""
    code, out, _ = adarun(capsys, SPLIT, "--what-if", "even,oracle,adapt+sync_period=8,qlearning")
    lines = out[out.index("what if") :].splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines[1:6]] == [
        "recorded",
        "even",
        "oracle",
        "adapt+sync_period=8",
        "qlearning",
    ]
    assert "the run had no settings to choose among" in lines[5]


# --- settings: off-policy estimates ---------------------------------------------------------------------------------------


NAMES = ["a=1", "a=2", "a=3"]
RATES = [1000.0, 1400.0, 700.0]


def tuned_log(folder: Path, policy: str, num_laps: int, learned: list[Any] | None = None) -> Path:
    """The log of a job with three settings, decided by a live tuner as a hub would have it."""
    about = {"settings": NAMES, "policy": policy, "seed": 3, "epochs": num_laps, "learned": learned}
    if policy == "qlearning":
        from adarun.replay.check import policy as policy_of

        chosen = policy_of(about, policy)
    else:
        chosen = load(Tuning(NAMES, policy, 3, num_laps))
    tuner, rng = Tuner(NAMES, chosen, num_laps), np.random.default_rng(1)
    events: list[Logged] = []
    now, attempt, step, done, samples = 0.0, 0, 0, 0, 40_000

    def see(event: Logged) -> bool:
        events.append(event)
        tuned = tuner.see(event)
        if tuned is not None:
            events.append(msgspec.structs.replace(tuned, at=now))
        return tuned is not None and tuned.restart

    def begin() -> None:
        see(WorkersStarted(attempt=attempt, ranks=[0], world_size=1, num_nodes=1, group_rank=0, at=now))
        see(Loop(step=0, at=now, epoch=done, rank=0))

    begin()
    while done < num_laps:
        seconds = samples / RATES[tuner.current] * float(np.exp(0.02 * rng.standard_normal()))
        restart = False
        for _ in range(10):
            now += seconds / 10
            restart = see(report(0, step, samples // 10, seconds / 10, 0.0, now))
            step += 1
            if restart:
                break
        else:
            done += 1
            restart = see(Loop(step=step, at=now, epoch=done, saved=True, rank=0))
        if restart:
            events.append(WorkersEnded(attempt=attempt, state="RETUNED", at=now))
            now += 1.0
            attempt, step = attempt + 1, 0
            begin()
    events.append(RunEnded(exit_code=0, at=now))
    return log(folder, events, **about)


def test_the_policy_itself_is_estimated_at_what_it_got(tmp_path: Path) -> None:
    """Asked about the policy that did choose, every decision counts in full, and the estimate is their mean."""
    directory = tuned_log(tmp_path / "run", "thompson", num_laps=60)
    about = json.loads((directory / "run.json").read_text())
    (estimate,) = settings.estimates(directory, about, ["thompson"])
    followed = settings.follow(directory, about, settings.target(about, "thompson"))
    rewards = [one.reward for one in followed.decisions if one.reward == one.reward]
    assert estimate.effective == pytest.approx(len(rewards), rel=1e-3)
    assert estimate.snips == pytest.approx(np.mean(rewards), rel=1e-3)


def test_estimates_hit_the_truth() -> None:
    """From choices at random both estimators find what another policy would get, within three of their errors."""
    rng = np.random.default_rng(0)
    rewards, logged, target = np.array([100.0, 140.0, 70.0]), [0.5, 0.3, 0.2], [0.1, 0.8, 0.1]
    decisions = []
    for _ in range(2000):
        chosen = int(rng.choice(3, p=logged))
        decisions.append(settings.Chosen(chosen, logged, target, float(rewards[chosen] + 5.0 * rng.standard_normal())))
    made, truth = settings.estimate("x", decisions), float(rewards @ target)
    for value, error in ((made.snips, made.snips_error), (made.doubly_robust, made.doubly_robust_error)):
        assert value is not None
        assert error is not None
        assert abs(value - truth) < 3.0 * error
        assert error < 2.0


def test_an_estimate_from_hardly_any_evidence_is_refused() -> None:
    """Under ten decisions' worth of evidence nothing is said, and how much there was."""
    chances = {"chances": [0.99, 0.01], "target": [0.01, 0.99]}
    decisions = [settings.Chosen(chosen, **chances, reward=100.0) for chosen in [0] * 50 + [1] * 5]
    made = settings.estimate("x", decisions)
    assert made.effective < 10.0
    assert (made.snips, made.doubly_robust) == (None, None)
    assert made.refused.startswith("refused: 5.0 decisions' worth of evidence")


def test_how_workers_synchronise_is_estimated_too(tmp_path: Path) -> None:
    """Choices of the sync period with their propensities are evidence, each with the windows that followed."""
    rng, options = np.random.default_rng(0), ["sync_period=1", "sync_period=8"]
    job = Workers([1e-3, 1e-3], adapt="observe")
    for _ in range(60):
        chosen = int(rng.integers(2))
        job.ask(0)  # which closes the window under the setting before
        job.events.append(
            Paced(
                plan=0,
                before=options[0],
                chosen=options[chosen],
                communication=0.3,
                reason="drawn",
                options=options,
                propensities=[0.5, 0.5],
            )
        )
        job.communication = 0.04 if chosen == 0 else 0.005
        job.run(20)
    directory = log(tmp_path / "run", job.end())
    one, other = settings.estimates(directory, ABOUT, options)
    assert one.snips is not None
    assert other.snips is not None
    assert one.snips == pytest.approx(96 / 0.088, rel=0.1)
    assert other.snips == pytest.approx(96 / 0.053, rel=0.1)


def test_another_policy_is_predicted_by_the_live_tuner(tmp_path: Path) -> None:
    """The job under `off` takes what the first setting takes, and under the best setting what that takes."""
    directory = tuned_log(tmp_path / "run", "thompson", num_laps=60)
    run = what_if.load_run(directory)
    off = settings.predict(directory, run, "off")
    assert off.step_seconds > 0.0
    # 60 laps of 40,000 samples at 1,000 samples a second.
    assert off.seconds == pytest.approx(60 * 40.0, rel=0.05)
    assert settings.predict(directory, run, "thompson").seconds == pytest.approx(tell(directory).seconds, rel=0.1)


# --- foreign logs --------------------------------------------------------------------------------------------------------


def test_a_table_of_step_times_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """People can ask what adarun would do before they use it."""
    code, out, _ = adarun(capsys, "--import", "csv", TRACES / "bytedance-AR.csv")
    assert code == 0
    assert "straggler: rank 0" in out
    assert re.search(r"oracle .* 1\.944x|oracle .* 1\.943x", out)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column step"),
        ("step,worker\n0,0\n", "has no column compute_seconds"),
        ("step,worker,compute_seconds\n0,0,1.0\n", "fewer than two steps"),
        ("step,worker,compute_seconds\n0,0,x\n1,0,nan\n", "fewer than two steps"),
    ],
)
def test_a_table_that_is_none_is_refused(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence that says what is missing."""
    (tmp_path / "a.csv").write_text(text)
    code, out, err = adarun(capsys, "--import", "csv", tmp_path / "a.csv")
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


def test_rows_that_are_no_numbers_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest is used, and what was skipped is said."""
    rows = [f"{step},{worker},{0.1 + 0.1 * worker}" for step in range(60) for worker in (0, 1)]
    (tmp_path / "a.csv").write_text("\n".join(["step,worker,compute_seconds", *rows, "60,0,0.1", "x,0,1", "61,1,-3"]))
    _, out, _ = adarun(capsys, "--import", "csv", tmp_path / "a.csv")
    assert "3 lines of the log could not be read and were skipped" in out


# --- bad logs ------------------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, content: bytes) -> Path:
    directory = tmp_path / "bad"
    directory.mkdir()
    (directory / "events.jsonl").write_bytes(content)
    return directory


WHOLE = (SPLIT / "events.jsonl").read_bytes()
BAD = {
    "empty": (b"", "is empty: nothing has happened in that run yet"),
    "of another kind": (b'{"a":1}\n{"b":2}\n', "is no run log of adarun: none of its 2 lines is an event"),
    "no text": (bytes(range(256)) * 100, "is no run log of adarun"),
    "newer": (WHOLE.replace(b'"schema":1', b'"schema":2', 1), "was written by a newer adarun (schema 2)"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("option", [(), ("--what-if", "even"), ("--check",), ("--json",)], ids=" ".join)
def test_a_bad_log_is_one_clear_sentence(
    case: str, option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is asked of it."""
    content, said = BAD[case]
    directory = broken(tmp_path, content)
    shutil.copy(SPLIT / "run.json", directory)
    code, out, err = adarun(capsys, directory, *option)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_torn_log_is_told_as_far_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever a log is cut, and whatever stands between its lines, the rest is told and what was skipped is counted."""
    for number, end in enumerate(range(len(WHOLE) // 7, len(WHOLE), len(WHOLE) // 7)):
        content = WHOLE[:end].replace(b'{"type":"step"', b'{"type":"st', 1) + b"\n\x00\xff{]\n"
        (tmp_path / str(number)).mkdir()
        directory = broken(tmp_path / str(number), content)
        code, out, _ = adarun(capsys, directory, "--what-if", "even")
        assert code == 0 or end < len(WHOLE) // 3
        assert "no end in the log" in out
        assert re.search(r"[23] lines of the log could not be read and were skipped", out)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no line of a log is passed over piece by piece."""
    monkeypatch.setattr("adarun.runlog.READ_BYTES", 1000)
    monkeypatch.setattr("adarun.runlog.LONGEST_LINE", 5000)
    directory = broken(tmp_path, b"x" * 100_000)
    with pytest.raises(AdarunError, match="none of its 1 lines is an event"):
        tell(directory)


def test_a_running_jobs_log_can_be_told(start: Callable[..., Job], scripts: Path) -> None:
    """While it runs its story ends with the newest step, and it is the latest without being named."""
    job = start("adarun", "--standalone", "--nproc-per-node", "2", scripts / "children.py")
    job.until(lambda: any(isinstance(event, WorkersStarted) for event in job.events()))
    (runs,) = job.folder.glob("runs")
    out = start("adarun", "replay", "--runs-dir", runs).succeed().stdout
    job.wait()
    assert "runs still" in out or "exit code" in out


def test_the_latest_run_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names begin with the time, so the last name is the latest run; others are found by name or path."""
    for name in ("20260101-000000-a", "20260102-000000-b"):
        log(tmp_path / name, Workers([1e-3, 1e-3]).run(30).end())
    assert adarun(capsys, "--runs-dir", tmp_path)[1].startswith("20260102-000000-b: ")
    assert adarun(capsys, "--runs-dir", tmp_path, "20260101-000000-a")[1].startswith("20260101-000000-a: ")
    assert adarun(capsys, tmp_path / "20260101-000000-a" / "events.jsonl")[1].startswith("20260101-000000-a: ")
    code, _, err = adarun(capsys, "--runs-dir", tmp_path / "none")
    said = f"there is no run in {tmp_path / 'none'}; name one, or the folder of the runs with --runs-dir"
    assert (code, err) == (1, f"adarun: {said}\n")


# --- other outputs -------------------------------------------------------------------------------------------------------


def test_json_is_the_documented_document(capsys: pytest.CaptureFixture[str]) -> None:
    """Every field of the document stands in docs/replay.md, and no other does."""
    _, out, _ = adarun(capsys, SPLIT, "--json", "--what-if", "even")
    document = json.loads(out)
    assert set(document) == {"story", "what_if", "off_policy"}
    text = (Path(__file__).parents[1] / "docs" / "replay.md").read_text()
    kinds = {"Story": story.Story, "Parts": story.Parts, "Worker": story.WorkerStory, "Window": story.WindowStory}
    kinds |= {"Change": story.Change, "Attempt": story.Attempt, "Straggler": story.Straggler}
    kinds |= {"Prediction": what_if.Prediction, "Estimate": what_if.Estimate}
    for name, kind in kinds.items():
        part = re.split(rf"^### {name}$", text, flags=re.MULTILINE)[1].split("\n#")[0]
        described = re.findall(r"^\| `(\w+)` \|", part, flags=re.MULTILINE)
        assert described == list(kind.__struct_fields__), name


def test_csv_has_a_row_for_each_worker_in_each_window(capsys: pytest.CaptureFixture[str]) -> None:
    """Any spreadsheet reads it."""
    _, out, _ = adarun(capsys, SPLIT, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 2 * 7
    assert [(row["plan"], row["rank"], row["share"]) for row in rows[:4]] == [
        ("0", "0", "48"),
        ("0", "1", "48"),
        ("1", "0", "65"),
        ("1", "1", "31"),
    ]


def test_a_trace_has_a_track_per_worker_with_every_phase_in_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace is in Chrome's format: named tracks, slices inside their steps, decisions as instants, shares as counters."""
    path = tmp_path / "trace.json"
    assert adarun(capsys, SPLIT, "--trace", path)[0] == 0
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "decisions", (1, 0): "rank 0", (1, 1): "rank 1"}
    for rank in (0, 1):
        slices = [e for e in events if e["ph"] == "X" and e["tid"] == rank]
        whole = [e for e in slices if e["cat"] == "step"]
        assert len(whole) == 70
        assert all(e["ts"] >= 0.0 for e in slices)
        at = 0
        for phase in (e for e in slices if e["cat"] == "phase"):
            while phase["ts"] >= whole[at]["ts"] + whole[at]["dur"] - 0.01:
                at += 1
            assert whole[at]["ts"] - 0.01 <= phase["ts"]
            assert phase["ts"] + phase["dur"] <= whole[at]["ts"] + whole[at]["dur"] + 0.01
    reasons = [event.reason for event in read(SPLIT) if isinstance(event, Decision)]
    assert [e["name"] for e in events if e["ph"] == "i" and e["name"] in reasons] == reasons
    assert [e["args"] for e in events if e["ph"] == "C" and e["name"] == "shares"][1] == {"rank 0": 65, "rank 1": 31}


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each figure of both, and the second's over the first's."""
    one = log(tmp_path / "one", Workers([1e-3, 2e-3], adapt="observe").run(200).end())
    other = log(tmp_path / "two", Workers([1e-3, 2e-3]).run(200).end())
    code, out, _ = adarun(capsys, "--compare", one, other)
    assert code == 0
    step = next(line for line in out.splitlines() if line.startswith("  step "))
    assert 0.6 < float(step.split()[-1]) < 0.8
    assert re.search(r"last shares +48,48 +6\d,3\d", out)


def test_options_that_cannot_be_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence, with exit code 2."""
    for given in (["--compare", SPLIT], [SPLIT, TUNED], ["--import", "csv"], ["--import", "csv", SPLIT, "--check"]):
        code, out, err = adarun(capsys, *given)
        assert (code, out, err.count("\n")) == (2, "", 1)


# --- the page ------------------------------------------------------------------------------------------------------------


EVIL = '<script>console.error("evil")</script>"\'&'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with eight workers, whose command, notices and workers have names that would like to be markup."""
    folder = tmp_path_factory.mktemp("page")
    job = Workers([1e-3] * 7 + [2e-3], batch=512)
    job.events[0] = RunStarted(schema=SCHEMA_VERSION, run="a-run", command=["train.py", EVIL], at=1000.0)
    job.see(Notice(key="k", text=EVIL))
    directory = log(folder / "run", job.run(600).end())
    path = folder / "page.html"
    with (
        mock.patch.object(sys, "argv", ["adarun", "replay", str(directory), "--html", str(path)]),
        pytest.raises(SystemExit),
    ):
        app.main()
    return path


def test_the_page_needs_nothing_else_and_is_small(page: Path) -> None:
    """One file under 300 kB that names no other; what the script calls itself is text."""
    text = page.read_text()
    assert len(text) < 300_000
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|https?:", text)
    assert "<script>console" not in text
    assert text.count("&lt;script&gt;console.error(&quot;evil&quot;)&lt;/script&gt;&quot;&#x27;&amp;") == 2


def test_the_page_of_a_long_run_is_small_too(tmp_path: Path) -> None:
    """With thousands of windows and forty workers neighbours are drawn together."""
    from adarun.report.html import page

    window = story.WindowStory(0, 0, 0, 20, 0.0, 1.0, 0.05, [10] * 40, [0.04] * 40, [0.001] * 40, 0.002)
    windows = [
        msgspec.structs.replace(window, plan=n, start=20 * n, began=float(n), ended=n + 1.0) for n in range(5000)
    ]
    worker = story.WorkerStory(0, 100, 1000, 10, story.Parts(compute=1.0), 1.0)
    workers = [msgspec.structs.replace(worker, rank=rank) for rank in range(40)]
    whole = msgspec.structs.replace(tell(SPLIT), windows=windows, workers=workers)
    assert len(page(whole, [], [])) < 300_000


def browser(page: Path, folder: Path, *options: str) -> tuple[str, str]:
    """The page as headless Chromium has it after its scripts have run, and what it said."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium to open the page in")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    run = subprocess.run(
        [program, *flags, f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


HOVER = """<script>
const over = document.querySelector('svg rect[data-t]'), at = over.getBoundingClientRect();
over.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: at.x + 1, clientY: at.y + 1}));
document.title = 'wide ' + (document.documentElement.scrollWidth <= innerWidth);
</script></body>"""


def test_the_page_opens_in_a_browser_without_a_complaint(page: Path, tmp_path: Path) -> None:
    """Headless Chromium shows every section, says nothing on its console, and names what the pointer is over."""
    hovered = tmp_path / "hovered.html"
    hovered.write_text(page.read_text().replace("</body>", HOVER))
    dom, console = browser(hovered, tmp_path, "--window-size=1200,900")
    assert console == ""
    assert re.search(r'<div id="tip" style="[^"]*">rank 0, steps 0 to \d+', dom)
    headings = [
        "Where the time went",
        "Workers over time",
        "Throughput and shares over time",
        "What was changed",
        "What if",
    ]
    assert [heading for heading in headings if f"<h2>{heading}</h2>" not in dom] == []


def test_the_page_fits_a_phone(page: Path, tmp_path: Path) -> None:
    """At a phone's width nothing makes the page wider than the screen."""
    hovered = tmp_path / "hovered.html"
    hovered.write_text(page.read_text().replace("</body>", HOVER))
    dom, _ = browser(hovered, tmp_path, "--window-size=500,900")
    assert "<title>wide true</title>" in dom


def test_a_complaint_would_be_seen(tmp_path: Path) -> None:
    """The test above can fail: an error on the console is found."""
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><title>x</title><script>console.error('a complaint')</script>")
    assert "a complaint" in browser(page, tmp_path)[1]


# --- speed ---------------------------------------------------------------------------------------------------------------


def test_replay_never_imports_torch() -> None:
    """Neither the story nor a what-if, a check or a page loads torch."""
    program = (
        "import sys, contextlib\nfrom adarun.cli import app\n"
        "for more in ([], ['--check'], ['--what-if', 'even,thompson', '--html', sys.argv[2], '--trace', sys.argv[2]]):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        app.app(['replay', sys.argv[1], *more])\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(SPLIT), os.devnull], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "False"

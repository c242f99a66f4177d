"""The summary at a run's end: where the time went, who had which share, what it brought, and what to know."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from adarun.control.planner import Planner, Settings
from adarun.events import Attached, Hello, Notice, Plan, PlanRequest, Resources, Step, WorkersStarted
from adarun.summary import summary

LOG = Path("runs") / "20260101-demo"


class Job:
    """Two workers, the second of `slow` times the first one's time per sample, under a real planner."""

    def __init__(self, settings: Settings | None = None, slow: float = 2.0) -> None:
        self.planner = Planner(settings or Settings())
        self.slow = slow
        self.now = 1000.0
        self.start()

    def start(self, *, num_nodes: int = 1, attempt: int = 0) -> None:
        self.planner.see(
            WorkersStarted(attempt=attempt, ranks=[0, 1], world_size=2, num_nodes=num_nodes, group_rank=0, at=self.now)
        )
        for rank in range(2):
            hello = Hello(
                rank=rank,
                local_rank=rank,
                world_size=2,
                num_nodes=num_nodes,
                attempt=attempt,
                pid=1,
                host="",
                device="cpu",
                torch="",
            )
            self.planner.see(Attached(hello=hello, at=self.now))

    def ask(self, rank: int, step: int, frozen: str = "") -> Plan:
        answer, _ = self.planner.answer(rank, PlanRequest(step=step, global_batch=64, dataset_size=1000, frozen=frozen))
        assert isinstance(answer, Plan)
        return answer

    def run(self, num_steps: int, first: int = 0, *, plans: bool = True, frozen: str = "") -> Job:
        """Train for some steps; without plans every share is 32."""
        for step in range(first, first + num_steps):
            shares = [self.ask(rank, step, frozen).shares[rank] for rank in range(2)] if plans else [32, 32]
            took = [0.1 * shares[0] / 32, 0.1 * self.slow * shares[1] / 32]
            self.now += max(took)
            for rank in range(2):
                self.planner.see(
                    Step(
                        rank=rank,
                        step=step,
                        samples=shares[rank],
                        data=0.01 * took[rank],
                        forward=0.0,
                        backward=0.99 * took[rank],
                        wait=max(took) - took[rank],
                        update=0.0,
                        ended=self.now,
                    )
                )
        return self

    def text(self) -> str:
        """The summary as a wide terminal shows it, after the run has ended as the launcher ends it."""
        self.planner.finish()
        console = Console(file=io.StringIO(), width=200, color_system=None)
        console.print(summary(self.planner, None, 12.34, LOG))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()


def rows(text: str) -> list[list[str]]:
    """The cells of the workers' table, without its head."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines() if re.match(r"\s*\d+  ", line)]


def test_the_time_the_steps_and_the_throughput_come_first() -> None:
    """The first line says how long it took, how many steps were made, and how many samples a second that was."""
    job = Job().run(10)
    assert job.text().splitlines()[0] == "adarun: 12.3 s, 10 steps, 320 samples/s"


def test_every_worker_has_its_row() -> None:
    """Share, busy and waiting time per step, the part that is waiting, and the time for data: one row a worker."""
    text = Job().run(10).text()
    assert rows(text) == [
        ["0", "32", "100.0 ms", "100.0 ms", "50%", "1.0 ms", "-", "-"],
        ["1", "32", "200.0 ms", "0.0 ms", "0%", "2.0 ms", "-", "-"],
    ]
    assert text.splitlines()[1].split() == [
        "rank",
        "share",
        "busy/step",
        "wait/step",
        "waiting",
        "data",
        "cpu",
        "memory",
    ]


def test_the_use_of_the_machine_is_shown_where_it_is_known() -> None:
    """A worker whose CPU and memory were read has them in its row, the other has dashes."""
    job = Job().run(10)
    job.planner.see(Resources(rank=1, cpu_fraction=0.5, memory_bytes=300 << 20, at=0.0))
    assert [row[-2:] for row in rows(job.text())] == [["-", "-"], ["50%", "300 MiB"]]


def test_the_last_shares_are_shown_with_what_they_brought() -> None:
    """After a re-split the rows have the new shares, and the gain over the even split is the true one to within 3 points."""
    job = Job().run(200)
    text = job.text()
    plan = job.planner.state.plan
    assert plan is not None
    assert not plan.even
    assert [row[1] for row in rows(text)] == [str(share) for share in plan.shares]
    found = re.search(r"^  estimated gain over the even split: \+(\d+)% \(give or take \d+%\)$", text, re.MULTILINE)
    assert found is not None
    true = 200 * 0.2 / (job.now - 1000.0) - 1.0
    assert abs(int(found[1]) - 100 * true) <= 3


def test_given_shares_claim_no_gain() -> None:
    """With --shares the summary says whose shares they were, and praises nobody."""
    text = Job(Settings(scripted=[[3, 1]], window=10)).run(50).text()
    assert "  shares as given by --shares\n" in text
    assert "gain" not in text


def test_a_run_that_was_restarted_says_what_was_gained_before() -> None:
    """A restart shortly before the end, after which plans are even again, does not hide what re-splitting brought."""
    job = Job().run(200)
    job.start(attempt=1)
    assert "  estimated gain over the even split: +" in job.run(10).text()


def test_shares_that_stayed_even_have_their_reason() -> None:
    """Where there was nothing to gain the summary says so in the words of the last decision."""
    text = Job(slow=1.0).run(100).text()
    assert "  shares stayed even: kept: this split is the best one\n" in text


def test_a_frozen_split_has_its_reason() -> None:
    """Where a re-split was not allowed, the notice that forbade it is the reason, and it is not said twice."""
    job = Job()
    job.planner.see(Notice(key="batchnorm", text="BatchNorm depends on the local batch", freezes=True, rank=0))
    text = job.run(100, frozen="batchnorm").text()
    assert "  shares stayed even: BatchNorm depends on the local batch\n" in text
    assert text.count("BatchNorm") == 1


def test_several_nodes_have_their_reason() -> None:
    """A job on several nodes is told that it was only measured."""
    job = Job()
    job.start(num_nodes=2)
    assert "shares stayed even: the job spans several nodes, which this version only measures\n" in job.run(100).text()


def test_observing_is_named_as_the_reason() -> None:
    """With --adapt observe the shares stayed even because the user said so."""
    assert "shares stayed even: --adapt observe\n" in Job(Settings(adapt="observe")).run(100).text()


def test_a_script_without_plans_is_measured_and_told_why_it_was_not_adapted() -> None:
    """A loader that cannot be cut has its notice as the reason; without one the summary names what is missing."""
    job = Job().run(50, plans=False)
    job.planner.see(Notice(key="loader", text="the loader has no DistributedSampler", freezes=True, rank=0))
    assert "  not adapted: the loader has no DistributedSampler\n" in job.text()
    assert "  not adapted: --adapt off\n" in Job(Settings(adapt="off")).run(50, plans=False).text()


def test_a_run_too_short_to_measure_says_so() -> None:
    """With fewer steps than a window needs nothing is claimed."""
    assert "  not adapted: the run was too short to measure\n" in Job().run(8).text()


def test_notes_are_printed() -> None:
    """What the user should know is said again at the end, once each."""
    job = Job(slow=1.0).run(50)
    for _ in range(2):
        job.planner.see(Notice(key="a", text="the first thing to know", rank=0))
        job.planner.see(Notice(key="b", text="the [bold]second[/bold] thing", rank=1))
    text = job.text()
    assert text.count("  note: the first thing to know\n") == 1
    assert text.count("  note: the [bold]second[/bold] thing\n") == 1


def test_the_log_is_named() -> None:
    """The last line says where the events are."""
    assert Job().run(10).text().splitlines()[-1] == f"  log: {LOG}"


def test_a_run_in_which_nothing_was_seen_says_so() -> None:
    """A script that never trained is told that nothing was measured: no table, no gain."""
    assert Job().text().splitlines() == [
        "adarun: 12.3 s; no training step was seen, so nothing was measured",
        f"  log: {LOG}",
    ]


def test_a_run_without_workers_has_a_summary_too() -> None:
    """If the workers never came up, the summary is one line and the log."""
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(summary(Planner(Settings()), None, 1.0, LOG))
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 2

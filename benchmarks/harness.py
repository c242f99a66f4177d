"""What the benchmarks share: start torchrun and adarun on the same work, slow a worker down, keep and print figures."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
WORKERS = 2
GLOBAL_BATCH, SMOKE_BATCH = 96, 24
STEPS_PER_EPOCH = 1920 // GLOBAL_BATCH  # as train.py makes them
QUOTA_PERIOD_US = 10_000  # well below a step, so that the slow worker is slow evenly


class UnavailableError(Exception):
    """This machine cannot run the benchmark."""


def run_or_skip(main: Callable[[], None]) -> None:
    """Run a benchmark, or say in one line why it cannot run here."""
    # Unasked, SIGTERM ends Python on the spot: the cgroup and the training run would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if len(os.sched_getaffinity(0)) < WORKERS:
            raise UnavailableError(f"needs {WORKERS} cores")
        main()
    except UnavailableError as error:
        print(f"skipped: {error}")


# --- a slow worker ---


@dataclass(frozen=True)
class SlowGroup:
    """A cgroup whose processes together get a part of one core."""

    folder: Path

    @property
    def members(self) -> Path:
        """The file through which a process joins."""
        return self.folder / "cgroup.procs"

    def throttled(self) -> int:
        """Return in how many periods the kernel has held the members back so far."""
        stat = dict(line.split() for line in (self.folder / "cpu.stat").read_text().splitlines())
        return int(stat["nr_throttled"])


@contextlib.contextmanager
def slow_group(percent: int) -> Iterator[SlowGroup]:
    """Make a cgroup with a CPU quota (version 1 or 2) for as long as it is needed."""
    root = Path("/sys/fs/cgroup")
    version_2 = (root / "cgroup.controllers").exists()
    folder = (root if version_2 else root / "cpu") / f"adarun-bench-{os.getpid()}"
    quota = QUOTA_PERIOD_US * percent // 100
    try:
        folder.mkdir()
        if version_2:
            (folder / "cpu.max").write_text(f"{quota} {QUOTA_PERIOD_US}")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(QUOTA_PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        raise UnavailableError(f"no CPU quota can be set here ({error})") from error
    try:
        yield SlowGroup(folder)
    finally:
        folder.rmdir()


# --- one run ---


@dataclass(frozen=True)
class Plan:
    """From which step on which worker takes how many samples."""

    start: int
    shares: list[int]


@dataclass(frozen=True)
class Run:
    """What one run left behind."""

    seconds: list[float]  # of each step, on rank 0
    loss: float
    parameters: dict[str, npt.NDArray[np.float32]]
    plans: list[Plan]  # empty under torchrun

    def third_window(self) -> int:
        """Return the step from which on the figures count."""
        if len(self.plans) < 3:
            raise RuntimeError(f"the run has only {len(self.plans)} windows: nothing to count after the third")
        return self.plans[2].start

    def mean(self, start: int, stop: int | None = None) -> float:
        """Return the mean seconds of the steps [start, stop)."""
        return statistics.fmean(self.seconds[start:stop])


def read_plans(runs: Path) -> list[Plan]:
    """Return the plans of the only run in a runs folder, in order."""
    log = next(runs.glob("*/events.jsonl"))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    plans = {event["number"]: Plan(event["start"], event["shares"]) for event in events if event["type"] == "plan"}
    return [plans[number] for number in sorted(plans)]


@dataclass
class Training:
    """A training run under way."""

    process: subprocess.Popen[bytes]
    folder: Path

    def steps_done(self) -> int:
        """Return how many steps the run has done."""
        times = self.folder / "times"
        return max(times.read_bytes().count(b"\n") - 1, 0) if times.exists() else 0

    def wait_for(self, step: int) -> None:
        """Wait until so many steps are done, or the run has ended."""
        while self.steps_done() < step and self.process.poll() is None:
            time.sleep(0.01)

    def finish(self) -> Run:
        """Wait for the end; return what the run left."""
        # torch can abort a worker in its tear-down, after all was trained and written.
        if self.process.wait() and not (self.folder / "result").exists():
            output = (self.folder / "output").read_text(errors="replace")
            raise RuntimeError(f"the training run failed with code {self.process.returncode}:\n{output[-4000:]}")
        clock = [float(line) for line in (self.folder / "times").read_text().split()]
        parameters = dict(np.load(self.folder / "result"))
        runs = self.folder / "runs"
        return Run(
            seconds=[after - before for before, after in itertools.pairwise(clock)],
            loss=float(parameters.pop("loss")),
            parameters=parameters,
            plans=read_plans(runs) if runs.exists() else [],
        )


@dataclass(frozen=True)
class Work:
    """The training job, the same under each launcher."""

    steps: int
    model: str = "cnn"
    global_batch: int = GLOBAL_BATCH
    slow: SlowGroup | None = None


@contextlib.contextmanager
def training(work: Work, adarun: Sequence[str] | None = None) -> Iterator[Training]:
    """Start the work under torchrun, or under adarun with these options; make sure that it ends."""
    with tempfile.TemporaryDirectory(prefix="adarun-bench-") as name:
        folder = Path(name)
        script = [str(HERE / "train.py"), "--steps", str(work.steps), "--global-batch", str(work.global_batch)]
        script += ["--model", work.model, "--times", str(folder / "times"), "--result", str(folder / "result")]
        command = [*launcher(adarun, folder / "runs"), "--standalone", "--nproc-per-node", str(WORKERS), *script]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(command, env=environment(work.slow), stdout=output, stderr=subprocess.STDOUT)
        try:
            yield Training(process, folder)
        finally:
            process.terminate()
            process.wait()


def launcher(adarun: Sequence[str] | None, runs: Path) -> list[str]:
    """Return the start of a command line: torchrun, or adarun with these options."""
    command = ["torchrun"] if adarun is None else ["adarun", "--runs-dir", str(runs), *adarun]
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


def environment(slow: SlowGroup | None = None) -> dict[str, str]:
    """Return the environment of a run: one thread per worker, and none of the user's own adarun settings."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("ADARUN_")}
    variables["OMP_NUM_THREADS"] = "1"
    # By default glibc gives large blocks back to the kernel and takes them anew in each step, but only above some batch
    # size: a sample then costs a fifth more in a large batch than in a small one, whoever launched it.
    variables |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}
    if slow:
        variables |= {"BENCH_CGROUP": str(slow.members), "BENCH_SLOW_RANK": "1"}
    return variables


def run(work: Work, adarun: Sequence[str] | None = None) -> Run:
    """Run the work from start to end, and check that the slow worker was slow."""
    before = work.slow.throttled() if work.slow else 0
    with training(work, adarun) as started:
        finished = started.finish()
    if work.slow and work.slow.throttled() == before:
        raise RuntimeError("the quota did not hold the slow worker back: the figures would mean nothing")
    return finished


def parameter_difference(one: Run, other: Run) -> float:
    """Return the largest difference between two runs' parameters, relative to the largest value in its tensor."""
    return max(
        float(np.abs(values - other.parameters[name]).max() / np.abs(values).max())
        for name, values in one.parameters.items()
    )


def share_changes(plans: Sequence[Plan]) -> int:
    """Return how often the shares changed from one plan to the next."""
    return sum(before.shares != after.shares for before, after in itertools.pairwise(plans))


# --- what is kept and what is printed ---


@dataclass
class Record:
    """The raw figures of a benchmark: one JSON line about the machine, then one per run."""

    name: str
    smoke: bool
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        """Start with the machine."""
        file = HERE / "results" / f"{self.name}-{datetime.date.today():%Y-%m-%d}.jsonl"
        self.path = Path(os.devnull) if self.smoke else file
        if not self.smoke:
            file.parent.mkdir(exist_ok=True)
        self.write(
            type="machine",
            time=datetime.datetime.now().isoformat(timespec="seconds"),
            command=[Path(sys.argv[0]).name, *sys.argv[1:]],
            processor=processor(),
            cores=len(os.sched_getaffinity(0)),
            system=platform.platform(),
            python=platform.python_version(),
            torch=importlib.metadata.version("torch"),
        )

    def add(self, label: str, result: Run, **more: Any) -> None:
        """Keep one run."""
        self.write(
            type="run",
            label=label,
            **more,
            loss=result.loss,
            plans=[[plan.start, plan.shares] for plan in result.plans],
            step_us=[round(seconds * 1e6) for seconds in result.seconds],
        )

    def write(self, **row: Any) -> None:
        """Keep a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Figure:
    """A figure to be judged: what was measured, and what it should be."""

    name: str
    measured: float
    target: str  # "<= 1.03" or ">= 1.40"
    digits: int = 3

    def met(self) -> bool:
        """Return whether the target was met."""
        sign, bound = self.target.split()
        return self.measured <= float(bound) if sign == "<=" else self.measured >= float(bound)


def show_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, smoke: bool) -> None:
    """Print a table."""
    heading = f"{title} (smoke: the figures mean nothing)" if smoke else title
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    # Wide enough for every column where the output is not a terminal: rich would cut them to 80 characters.
    console = Console(width=max(shutil.get_terminal_size().columns, 120))
    console.print(heading)
    console.print(table)


def show_figures(figures: Sequence[Figure], *, smoke: bool) -> None:
    """Print the figures with their targets beside them."""
    rows = []
    for figure in figures:
        verdict = "not judged" if smoke else "met" if figure.met() else "MISSED"
        rows.append([figure.name, f"{figure.measured:.{figure.digits}f}", figure.target, verdict])
    show_rows("against the targets", ["figure", "measured", "target", ""], rows, smoke=smoke)

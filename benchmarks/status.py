"""What watching a job costs: the job, the viewer, and the time until the first screen.

A job is pretended: a real hub on its real socket, and workers' clients that report steps as training would.

Usage: python benchmarks/status.py
"""

from __future__ import annotations

import argparse
import os
import pty
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import harness
from harness import Figure, Record, Work

from adarun.control.planner import Planner, Settings
from adarun.events import Hello, PlanRequest, Step, Steps, WorkersStarted
from adarun.hub import Hub
from adarun.registry import Entry, announce, running
from adarun.screen.connection import Connection
from adarun.screen.model import About
from adarun.worker.client import Client

WORKERS, STEP_SECONDS = 64, 0.1
VIEWERS = 20
ADARUN = str(Path(sys.executable).with_name("adarun"))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of a job with and without viewers")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    return parser.parse_args()


@contextmanager
def pretended_job() -> Iterator[str]:
    """A hub in this process, with workers that report a step every tenth of a second."""
    about = About(run=f"pretended-{os.getpid()}", command=["train.py"], pid=os.getpid(), started=time.time())
    hub = Hub(Planner(Settings()), lambda _: None, None, about)
    hub.start()
    hub.workers_started(WorkersStarted(0, list(range(WORKERS)), WORKERS, 1, 0, time.time()))
    steps: list[list[Step]] = [[] for _ in range(WORKERS)]

    def drain(rank: int) -> Steps | None:
        reports, steps[rank] = steps[rank], []
        return Steps(reports=reports) if reports else None

    clients = [
        Client(str(hub.path), Hello(r, r, WORKERS, 1, 0, os.getpid(), "here", "cpu", "0"), lambda r=r: drain(r))  # type: ignore[misc]
        for r in range(WORKERS)
    ]
    over = threading.Event()

    def train() -> None:
        number = 0
        while not over.wait(STEP_SECONDS):
            for rank, client in enumerate(clients):
                plan = client.plan(PlanRequest(step=number, global_batch=32 * WORKERS, dataset_size=1 << 20))
                phases = (0.002, 0.03, 0.05 + 0.0001 * rank, 0.01, 0.008)
                steps[rank].append(Step(rank, number, plan.shares[rank], *phases, time.time()))
            number += 1

    thread = threading.Thread(target=train)
    thread.start()
    announced = announce(Entry(about.run, os.getpid(), str(hub.path), "", about.started))
    try:
        yield about.run
    finally:
        over.set()
        thread.join()
        for client in clients:
            client.close()
        if announced is not None:
            announced.unlink()
        hub.stop()


def first_screen(run: str, runs: int) -> float:
    """Return the median seconds from the command to the end of a plain snapshot."""
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run([ADARUN, "status", run], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def viewers_cpu(run: str, seconds: float) -> float:
    """Return the part of a core that a live screen of 200 columns and 70 lines takes once it has started."""
    parent, child = pty.openpty()
    os.set_inheritable(child, True)
    command = f"stty rows 70 cols 200; exec {ADARUN} status {run}"
    env = {**os.environ, "TERM": "xterm-256color"}
    viewer = subprocess.Popen(["sh", "-c", command], stdin=child, stdout=child, stderr=child, env=env)
    drawn = threading.Event()
    threading.Thread(target=read_all, args=(parent, drawn), daemon=True).start()
    drawn.wait(30)
    time.sleep(2.0)
    before = cpu_seconds(viewer.pid)
    time.sleep(seconds)
    used = cpu_seconds(viewer.pid) - before
    viewer.terminate()
    viewer.wait()
    os.close(child)
    return used / seconds


def read_all(file: int, drawn: threading.Event) -> None:
    """Be the terminal."""
    try:
        while os.read(file, 1 << 16):
            drawn.set()
    except OSError:
        return


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watch_all(pid: int, stop: threading.Event) -> None:
    """Be twenty viewers of the job of a launcher, in a process of their own."""
    connections: list[Connection] = []
    while not stop.wait(0.25):
        if not connections:
            connections = [Connection(e.socket) for e in running() if e.pid == pid for _ in range(VIEWERS)]
        for connection in connections:
            try:
                connection.take()
            except (EOFError, OSError):
                return


@contextmanager
def watched_by_twenty(pid: int) -> Iterator[None]:
    """Let twenty viewers watch, in one process that only reads."""
    watcher = os.fork()
    if not watcher:
        try:
            stop = threading.Event()
            os.nice(19)  # as viewers do
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            watch_all(pid, stop)
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(watcher, signal.SIGTERM)
        os.waitpid(watcher, 0)


def one_run(work: Work, *, watched: bool) -> harness.Run:
    """Run the job, with twenty viewers or none."""
    with harness.training(work, []) as started:
        if not watched:
            return started.finish()
        with watched_by_twenty(started.process.pid):
            return started.finish()


def main() -> None:
    """Measure, keep, print."""
    arguments = parse_arguments()
    smoke = arguments.smoke
    record = Record("status", smoke)
    with pretended_job() as run:
        start = first_screen(run, 3 if smoke else 21)
        cpu = viewers_cpu(run, 3.0 if smoke else 30.0)
    record.write(type="viewer", start_seconds=start, cpu=cpu, workers=WORKERS)
    work = Work(steps=60 if smoke else 250, global_batch=harness.SMOKE_BATCH if smoke else harness.GLOBAL_BATCH)
    ratios = []
    for number in range(1 if smoke else arguments.pairs):
        pair = {watched: one_run(work, watched=watched) for watched in ((False, True) if number % 2 else (True, False))}
        for watched, result in pair.items():
            record.add("watched" if watched else "alone", result, pair=number)
        first = 20 if smoke else 80
        ratios.append(statistics.median(pair[False].seconds[first:]) / statistics.median(pair[True].seconds[first:]))
    shown = ", ".join(f"{ratio:.4f}" for ratio in ratios)
    harness.show_rows(f"{VIEWERS} viewers", ["throughput watched / alone, per pair"], [[shown]], smoke=smoke)
    harness.show_figures(
        [
            Figure("seconds to a snapshot, median", start, "<= 0.5"),
            Figure(f"part of a core, live at 2 Hz, {WORKERS} workers", cpu, "<= 0.03"),
            Figure(f"throughput with {VIEWERS} viewers / alone", statistics.median(ratios), ">= 0.99", digits=4),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    harness.run_or_skip(main)

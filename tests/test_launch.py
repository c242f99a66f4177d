"""`adarun` starts, restarts and stops workers as torchrun does, and leaves a log of it whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from adarun.events import Attached, Plan, RunEnded, RunStarted, Step, Tuned, WorkersEnded, WorkersStarted
from conftest import Job

# Their values are drawn anew for each job.
RANDOM = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")
TWO = ("--standalone", "--nproc_per_node", "2")


def dumps(folder: Path) -> list[dict]:
    """What dump.py left, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir()) if path.suffix != ".new"]


def comparable(env: dict[str, str]) -> dict[str, str]:
    """An environment without adarun's own variables and without the values that differ between two jobs."""
    values = {name: "" if name in (*RANDOM, "DUMPS") else value for name, value in env.items()}
    return {name: value for name, value in values.items() if not name.startswith("ADARUN_")}


def is_gone(pid: int) -> bool:
    """Whether no such process runs any more."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_workers_find_what_torchrun_gives_them(start: Callable[..., Job], scripts: Path, tmp_path: Path) -> None:
    """A worker's environment and arguments are those that it has under torchrun."""
    jobs = {}
    for launcher in ("torchrun", "adarun run"):
        folder = tmp_path / launcher
        folder.mkdir()
        arguments = ("--nnodes", "x", "--", "-m")
        jobs[launcher] = start(*launcher.split(), *TWO, scripts / "dump.py", *arguments, DUMPS=str(folder))
    found = {}
    for launcher, job in jobs.items():
        job.succeed()
        found[launcher] = [(dump["argv"], dump["name"], comparable(dump["env"])) for dump in dumps(tmp_path / launcher)]
    assert [env["RANK"] for _, _, env in found["torchrun"]] == ["0", "1"]
    assert found["torchrun"] == found["adarun run"]


def test_module_and_pet_variables(start: Callable[..., Job], scripts: Path, tmp_path: Path) -> None:
    """`python -m adarun -m MODULE` takes the number of workers from PET_NPROC_PER_NODE, as torchrun does."""
    env = {"PET_NPROC_PER_NODE": "2", "PET_STANDALONE": "1", "PYTHONPATH": str(scripts), "DUMPS": str(tmp_path)}
    start("python", "-m", "adarun", "-m", "dump", "one", "two", **env).succeed()
    expected = [("__main__", [str(scripts / "dump.py"), "one", "two"], rank, "2") for rank in ("0", "1")]
    actual = [(d["name"], d["argv"], d["env"]["RANK"], d["env"]["WORLD_SIZE"]) for d in dumps(tmp_path)]
    assert expected == actual


def test_run_path_attaches_too(start: Callable[..., Job], scripts: Path, tmp_path: Path) -> None:
    """With --run-path, where torch is imported before a process knows its rank, the workers attach all the same."""
    job = start("adarun", *TWO, "--run-path", scripts / "dump.py", "one", DUMPS=str(tmp_path)).succeed()
    assert [[str(scripts / "dump.py"), "one"]] * 2 == [dump["argv"] for dump in dumps(tmp_path)]
    assert sorted(event.hello.rank for event in job.events(Attached)) == [0, 1]


def test_failing_workers_are_restarted_and_reported(start: Callable[..., Job], scripts: Path) -> None:
    """A script that fails is restarted as often as allowed; then torch's report shows its exit code, and adarun's is 1."""
    job = start("adarun", *TWO, "--max-restarts", 1, scripts / "fail.py").wait()
    assert job.process.returncode == 1
    assert "fail.py FAILED" in job.said
    assert "exitcode : 7" in job.said
    assert "Traceback (most recent call last)" not in job.stderr
    assert [event.attempt for event in job.events(WorkersStarted)] == [0, 1]
    assert [(event.attempt, event.state) for event in job.events(WorkersEnded)] == [(0, "FAILED"), (1, "FAILED")]
    assert [event.exit_code for event in job.events(RunEnded)] == [1]


def test_restarted_workers_meet_in_a_store_of_their_own(start: Callable[..., Job], scripts: Path) -> None:
    """Each attempt's workers get a new store, in which no address of workers that are gone can be found."""
    job = start("adarun", *TWO, "--max-restarts", 2, scripts / "fail.py").wait()
    ports = re.findall(r"attempt (\d) port (\d+)", job.stdout)
    assert {attempt for attempt, _ in ports} == {"0", "1", "2"}
    assert len({port for _, port in ports}) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_job(
    number: signal.Signals, start: Callable[..., Job], scripts: Path, tmp_path: Path
) -> None:
    """SIGTERM and SIGINT to the launcher end the workers, close the log, and give a shell's exit code."""
    job = start("adarun", *TWO, scripts / "dump.py", "wait", DUMPS=str(tmp_path))
    job.until(lambda: len(dumps(tmp_path)) == 2)
    job.process.send_signal(number)
    assert 128 + number == job.wait().process.returncode
    assert [is_gone(dump["pid"]) for dump in dumps(tmp_path)] == [True, True]
    assert 128 + number == job.events()[-1].exit_code
    assert "Traceback (most recent call last)" not in job.stderr


def test_a_killed_launcher(start: Callable[..., Job], scripts: Path, tmp_path: Path) -> None:
    """After SIGKILL of the launcher's process group its log is readable, and its workers end at their next plan, saying why."""
    # Nobody is left to remove the hub's folder.
    job = start("adarun", *TWO, scripts / "exact.py", tmp_path, "--epochs 1000000", XDG_RUNTIME_DIR=str(tmp_path))
    job.until(lambda: {step.rank for step in job.events(Step)} == {0, 1})
    pids = [event.hello.pid for event in job.events(Attached)]
    os.killpg(job.process.pid, signal.SIGKILL)
    try:
        job.until(lambda: all(map(is_gone, pids)))
    finally:
        for pid in pids:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
    assert job.wait().process.returncode == -signal.SIGKILL
    assert "HubLost: adarun's launcher is gone" in job.said
    assert isinstance(job.events()[0], RunStarted)
    assert {step.rank for step in job.events(Step)} == {0, 1}
    assert job.events(RunEnded) == []
    assert {0, 1} == {step.rank for step in job.events(Step)}


def test_a_rank_that_cannot_attach(start: Callable[..., Job], scripts: Path, tmp_path: Path) -> None:
    """Where a wrapper, started with --no-python, hides adarun from a rank, the job ends well and even, and a line says why."""
    command = ("--no-python", "bash", scripts / "hide_hub.sh", sys.executable, scripts / "exact.py", tmp_path, "--clip")
    job = start("adarun", *TWO, "--window", 3, "--shares", "3,1", *command).succeed()
    results = [torch.load(tmp_path / f"0.{rank}") for rank in (0, 1)]
    assert [len(step) for step in results[0]["drawn"]] == [len(step) for step in results[1]["drawn"]]
    assert {(8, 8)} == {tuple(plan.shares) for plan in job.events(Plan)}
    assert job.said.count("rank 1 has not asked for a plan") == 1


TURNS = """
from adarun.control.policy import certain


class Turns:
    def __init__(self, rng):
        self.tried = set()

    def choose(self, situation, options):
        left = [index for index in range(len(options)) if index not in self.tried]
        return certain(left[0] if left else situation.incumbent, options, "its turn")

    def learn(self, situation, choice, reward):
        self.tried.add(choice)
"""


@pytest.fixture
def turns(tmp_path: Path) -> str:
    """A folder in which another package brings a policy that tries each setting once."""
    (tmp_path / "turns.py").write_text(TURNS)
    about = tmp_path / "turns-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: turns\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[adarun.policies]\nturns = turns:Turns\n")
    return str(tmp_path)


def test_settings_are_tried_by_restarts_after_a_checkpoint(
    start: Callable[..., Job], scripts: Path, turns: str
) -> None:
    """Under --tune a script is restarted with other arguments and variables, goes on from its checkpoint, and ends well."""
    tuned = ("--tune", "batch_size=8,16", "--tune", "VARIABLE=a,b", "--tune-epochs", 10**7, "--policy", "turns")
    script = (scripts / "resume.py", "--settings", 4, "--batch-size", "{batch_size}")
    job = start("adarun", *TWO, *tuned, "--log-dir", "logs", "--tee", 1, *script, PYTHONPATH=turns).succeed()
    trained = [line.split("epoch ")[1].split() for line in job.stdout.splitlines() if "epoch " in line]
    epochs = [int(epoch) for epoch, *_ in trained]
    # An epoch whose checkpoint was not yet whole when the workers were stopped is trained once more.
    assert sorted(set(epochs)) == list(range(1, epochs[-1] + 1))
    assert {tuple(setting) for _, *setting in trained} == {("8", "a"), ("8", "b"), ("16", "a"), ("16", "b")}
    restarts = [event for event in job.events(Tuned) if event.restart]
    assert len(restarts) >= 3
    assert [event.attempt for event in job.events(WorkersStarted)] == list(range(len(restarts) + 1))
    assert [event.state for event in job.events(WorkersEnded)] == ["RETUNED"] * len(restarts) + ["SUCCEEDED"]
    assert f"{len(restarts)} restarts took" in job.said
    assert len(list((job.folder / "logs").glob("*/attempt_*"))) == len(restarts) + 1


def test_a_script_without_checkpoints_is_not_restarted(start: Callable[..., Job], scripts: Path) -> None:
    """Without a checkpoint nothing is tried, and the summary says why."""
    job = start("adarun", *TWO, "--tune", "VARIABLE=a,b", scripts / "resume.py", "--no-checkpoint").succeed()
    assert len(job.events(WorkersStarted)) == 1
    assert job.said.count("no checkpoint was seen") == 1

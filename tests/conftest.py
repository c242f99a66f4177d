"""Starts real jobs: the installed `adarun` and `torchrun`, each in a folder of its own and with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from adarun.runlog import read

BIN = Path(sys.executable).parent
TIMEOUT = 180.0


# What a worker says when torch 2.13 aborts it in its tear-down, after all is done: a gloo thread wants Python's lock while
# Python shuts down. adarun's workers give it a moment; torchrun's do not.
ABORTED = "terminate called without an active exception"


class Job:
    """A command that runs in `folder`, so that adarun's run log is below it too."""

    def __init__(self, folder: Path, command: list[str], env: dict[str, str]) -> None:
        self.folder, self._command, self._env = folder, command, env
        self._begin()

    def _begin(self) -> None:
        folder, command, env = self.folder, self._command, self._env
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def said(self) -> str:
        """What is on stderr, without its line breaks, since a summary is wrapped."""
        return " ".join(self.stderr.split())

    def wait(self) -> Job:
        """To the end of the command; one that torch's tear-down has failed may try again, once."""
        if self._ended().process.returncode == 1 and ABORTED in self.stderr:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            self._begin()
            self._ended()
        return self

    def _ended(self) -> Job:
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.stop()
            pytest.fail(f"{self.process.args} did not end\n{self.stdout}\n{self.stderr}")
        return self

    def succeed(self) -> Job:
        """To the end of the command, which must be a good one."""
        assert self.wait().process.returncode == 0, f"{self.process.args}\n{self.stdout}\n{self.stderr}"
        return self

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a condition, however long it takes within reason."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"never happened\n{self.stdout}\n{self.stderr}"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it with all it started: the workers are in sessions of their own."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            for process in (*family, psutil.Process(self.process.pid)):
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            self.process.wait()

    def events(self, kind: type | None = None) -> list[Any]:
        """The run log's events so far, or those of one kind."""
        logs = self.folder.glob("runs/*/events.jsonl")
        return [event for log in logs for event in read(log.parent) if kind is None or isinstance(event, kind)]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Job]]:
    """Starts a command that is installed beside this Python, in an environment without traces of another job."""
    jobs: list[Job] = []
    # pytest's own numbered folders are not for threads.
    base = tmp_path_factory.mktemp("jobs")

    def start(*command: object, **env: str) -> Job:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ADARUN_", "PET_"))}
        job = Job(
            Path(tempfile.mkdtemp(dir=base)),
            [str(BIN / str(command[0])), *map(str, command[1:])],
            {**clean, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
        )
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        job.stop()


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The folder of the scripts that workers run."""
    return Path(__file__).parent / "scripts"

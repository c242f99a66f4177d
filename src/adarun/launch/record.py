"""One run's hub and log, from before the first worker to the summary."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import platformdirs
import torch
from rich.console import Console

from adarun import __version__
from adarun.control.planner import Planner, Settings
from adarun.control.tuner import Tuner
from adarun.errors import AdarunError
from adarun.events import SCHEMA_VERSION, Logged, RunEnded, RunStarted
from adarun.hub import Hub
from adarun.launch.views import Views
from adarun.policies import Tuning, keep, load, read_table, table_path
from adarun.runlog import RunLog
from adarun.screen.model import About
from adarun.summary import summary


class Recording:
    """Open while the job runs; on leaving, closes the log and prints the summary to stderr."""

    def __init__(
        self,
        runs_dir: Path,
        name: str,
        command: list[str],
        settings: Settings,
        tuning: Tuning,
        views: Views | None = None,
    ) -> None:
        self.exit_code = 0
        self._began = time.monotonic()
        about: dict[str, Any] = {
            "run": name,
            "command": command,
            "adapt": settings.adapt,
            "window": settings.window,
            "shares": settings.scripted,
            "max_share": settings.max_share,
            "sync_periods": settings.allowed.periods,
            "compressions": settings.allowed.compressions,
            "topologies": settings.allowed.topologies,
            "outer": settings.allowed.outer,
            "adarun": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "host": platform.node(),
            "folder": str(Path.cwd()),
            "pid": os.getpid(),
            "settings": tuning.names,
            "policy": tuning.policy,
            "seed": tuning.seed,
            "epochs": tuning.num_epochs,
            "learned": read_table(table_path()) if tuning.policy == "qlearning" else None,
            "started": time.time(),
        }
        self._runlog = open_log(runs_dir, name, about)
        self.log(RunStarted(schema=SCHEMA_VERSION, run=name, command=command, at=time.time()))
        self.planner = Planner(settings, lambda values: load(dataclasses.replace(tuning, names=list(values))))
        self._policy = load(tuning) if tuning.names else None
        tuner = Tuner(tuning.names, self._policy, tuning.num_epochs) if self._policy else None
        self._about = msgspec.convert({**about, "log": str(self._runlog.directory.resolve())}, About)
        self.hub = Hub(self.planner, self.log, tuner, self._about)
        self._views = views or Views()

    def log(self, event: Logged) -> None:
        """Append an event to the run log."""
        self._runlog.append(event)

    def __enter__(self) -> Recording:  # noqa: PYI034 - Self needs Python 3.11
        self.hub.start()
        try:
            self._views.open(self.hub, self._about)
        except AdarunError:
            self._views.close()
            self.hub.stop()
            self._runlog.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.exit_code = getattr(error, "exit_code", 1)
        self._views.close()
        self.hub.stop()
        if self._policy is not None:
            try:
                keep(self._policy)
            except OSError as failed:
                sys.stderr.write(f"adarun: what the policy has learned cannot be kept ({failed})\n")
        self.log(RunEnded(exit_code=self.exit_code, at=time.time()))
        self._runlog.close()
        console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 120)
        console.print(summary(self.planner, self.hub.tuner, time.monotonic() - self._began, self._runlog.directory))
        if self._runlog.num_lost:
            sys.stderr.write(f"adarun: {self._runlog.num_lost} events could not be written to the run log\n")


def open_log(runs_dir: Path, name: str, about: dict[str, Any]) -> RunLog:
    """A log in `runs_dir`, or in the user's state folder where that cannot be written.

    Raises:
        AdarunError: neither can be.
    """
    try:
        return RunLog(runs_dir / name, about)
    except OSError as error:
        fallback = Path(platformdirs.user_state_dir("adarun")) / "runs"
        sys.stderr.write(f"adarun: cannot write to {runs_dir} ({error.strerror}); the run log goes to {fallback}\n")
        try:
            return RunLog(fallback / name, about)
        except OSError as second:
            raise AdarunError(
                f"cannot write a run log to {fallback} ({second.strerror}); name a folder with --runs-dir"
            ) from None

"""What shows a job while it runs: the registry's entry, the panel of `--live`, the port for Prometheus."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adarun.hub import Hub
    from adarun.screen.model import About

PANEL_SECONDS = 3.0


@dataclass
class Views:
    """Opened when the hub listens, closed before it stops."""

    live: bool = False
    metrics_port: int = 0
    _announced: Path | None = field(default=None, compare=False)
    _panel: subprocess.Popen[bytes] | None = field(default=None, compare=False)
    _stop_serving: Callable[[], None] | None = field(default=None, compare=False)

    def open(self, hub: Hub, about: About) -> None:
        """Let the job be seen.

        Raises:
            AdarunError: its metrics cannot be served.
        """
        from adarun.registry import Entry, announce  # noqa: PLC0415 - the command line's help does without

        self._announced = announce(Entry(about.run, about.pid, str(hub.path), about.folder, about.started))
        if self.metrics_port:
            from adarun.report import openmetrics  # noqa: PLC0415 - only where it was asked for

            self._stop_serving = openmetrics.serve(self.metrics_port, hub.snapshot)
        if self.live and sys.stdout.isatty():
            self._panel = subprocess.Popen([sys.executable, "-m", "adarun.screen.panel", str(hub.path)])
        elif self.live:
            sys.stderr.write("adarun: --live needs a terminal; look at the job with adarun status\n")

    def close(self) -> None:
        """Stop showing it; afterwards the terminal is as it was."""
        if self._announced is not None:
            self._announced.unlink(missing_ok=True)
        if self._stop_serving is not None:
            self._stop_serving()
        if self._panel is not None:
            self._panel.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._panel.wait(PANEL_SECONDS)

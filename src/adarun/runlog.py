"""A run's events on disk: `events.jsonl`, one event a line, and `run.json`, what the run was."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from adarun.errors import AdarunError
from adarun.events import SCHEMA_VERSION, Logged, RunStarted

WRITE_SECONDS = 0.2


class RunLog:
    """Appends events from any thread; a thread of its own writes them, so a slow disk keeps nobody waiting.

    Every write reaches the kernel at once: after a SIGKILL of everything at most the last second is missing.
    """

    def __init__(self, directory: Path, about: dict[str, Any]) -> None:
        """Create `directory` with `run.json` in it.

        Raises:
            OSError: it cannot be created.
        """
        directory.mkdir(parents=True, exist_ok=False)
        self.directory = directory
        self.num_lost = 0
        document = {"schema": SCHEMA_VERSION, **about}
        (directory / "run.json").write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")
        self._file = os.open(directory / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._queue: queue.SimpleQueue[Logged | None] = queue.SimpleQueue()
        self._encoder = msgspec.json.Encoder()
        # A torn line must be ended before the next one is begun.
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="adarun-log", daemon=True)
        self._thread.start()

    def append(self, event: Logged) -> None:
        """Write `event` soon."""
        self._queue.put(event)

    def close(self) -> None:
        """Write what is left."""
        if self._file >= 0:
            self._queue.put(None)
            self._thread.join()
            os.close(self._file)
            self._file = -1

    def _run(self) -> None:
        open_ = True
        while open_:
            lines = []
            event = self._queue.get()
            while True:
                if event is None:
                    open_ = False
                    break
                lines.append(self._encoder.encode(event))
                if len(lines) >= 1000:
                    break
                try:
                    event = self._queue.get_nowait()
                except queue.Empty:
                    break
            if lines:
                self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        lead = b"\n" if self._torn else b""
        data = lead + b"\n".join(lines) + b"\n"
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            self._torn = False
        except OSError as error:
            self._torn = self._torn if written == 0 else not data[:written].endswith(b"\n")
            if self.num_lost == 0:
                sys.stderr.write(f"adarun: the run log cannot be written ({error}); training goes on without it\n")
            self.num_lost += sum(end > written for end in ends_of(lines, lead))


def ends_of(lines: list[bytes], lead: bytes) -> Iterator[int]:
    """Where in the written bytes each line is whole, its newline not counted."""
    end = len(lead) - 1
    for line in lines:
        end += 1 + len(line)
        yield end


def read(directory: Path) -> Iterator[Logged]:
    """The events of a run, oldest first; a torn line (the last, or one at which the disk was full) is passed over.

    Raises:
        AdarunError: there is no log, or it is of a newer schema.
    """
    decoder = msgspec.json.Decoder(Logged)
    path = directory / "events.jsonl"
    try:
        file = path.open("rb")
    except OSError as error:
        raise AdarunError(f"there is no run log at {path} ({error.strerror})") from None
    with file:
        for line in file:
            try:
                event = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if isinstance(event, RunStarted) and event.schema > SCHEMA_VERSION:
                raise AdarunError(
                    f"{path} was written by a newer adarun (schema {event.schema}); update adarun to read it"
                )
            yield event

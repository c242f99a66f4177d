"""A run's events on disk: `events.jsonl`, one event a line, and `run.json`, what the run was."""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from adarun.errors import AdarunError
from adarun.events import SCHEMA_VERSION, Logged, RunStarted

WRITE_SECONDS = 0.2
READ_BYTES = 2 << 20
# An event may have a number for each of thousands of workers, but is never as long as this.
LONGEST_LINE = 64 << 20


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


@dataclass
class Skipped:
    """What of a log could not be read."""

    lines: int = 0


def read(directory: Path) -> Iterator[Logged]:
    """The events of a run, oldest first; a torn line (the last, or one at which the disk was full) is passed over.

    Raises:
        AdarunError: there is no log, or it is of a newer schema.
    """
    for batch in read_batches(directory, Skipped()):
        yield from batch


def read_batches(directory: Path, skipped: Skipped) -> Iterator[list[Logged]]:
    """The same in batches, some thousand events each, which takes half the time; `skipped` counts what is passed over.

    Raises:
        AdarunError: as `read`.
    """
    path = directory / "events.jsonl"
    try:
        file = path.open("rb")
    except OSError as error:
        raise AdarunError(f"there is no run log at {path} ({error.strerror})") from None
    decoder = msgspec.json.Decoder(Logged)
    with file:
        for lines in whole_lines(file, skipped):
            batch = decode(decoder, lines, skipped)
            # It is the first line; should that be torn, there is no other.
            for event in batch[:1]:
                if type(event) is RunStarted and event.schema > SCHEMA_VERSION:
                    raise AdarunError(
                        f"{path} was written by a newer adarun (schema {event.schema}); update adarun to read it"
                    )
            yield batch


def whole_lines(file: BinaryIO, skipped: Skipped) -> Iterator[bytes]:
    """A file cut into pieces at the ends of lines; a line longer than any event is passed over."""
    rest = b""
    while piece := file.read(READ_BYTES):
        end = piece.rfind(b"\n") + 1
        if end:
            yield rest + piece[:end]
            rest = piece[end:]
        elif len(rest) < LONGEST_LINE:
            rest += piece
    if len(rest) >= LONGEST_LINE:
        skipped.lines += 1
    elif rest:
        yield rest


def decode(decoder: msgspec.json.Decoder[Logged], lines: bytes, skipped: Skipped) -> list[Logged]:
    """The events of some lines: all at once or, where one of them is no event, line by line."""
    # Many small objects that live on: the collector would look through them again and again, and find nothing.
    collects = gc.isenabled()
    gc.disable()
    try:
        return decoder.decode_lines(lines)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return [event for line in lines.split(b"\n") for event in decode_line(decoder, line, skipped)]
    finally:
        if collects:
            gc.enable()


def decode_line(decoder: msgspec.json.Decoder[Logged], line: bytes, skipped: Skipped) -> Iterator[Logged]:
    """The event of a line, if it is one."""
    try:
        yield decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        skipped.lines += bool(line.strip())


def read_about(directory: Path) -> dict[str, Any]:
    """What `run.json` says of a run; empty where it says nothing that can be read."""
    try:
        about = msgspec.json.decode((directory / "run.json").read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return about if isinstance(about, dict) else {}


def find(run: str, runs_dir: Path) -> Path:
    """The folder of a run, by its name in `runs_dir`, its path, or its log's path; the latest one for an empty `run`.

    Raises:
        AdarunError: there is none.
    """
    if not run:
        found = sorted((path.parent for path in runs_dir.glob("*/events.jsonl")), key=lambda path: path.name)
        if not found:
            raise AdarunError(f"there is no run in {runs_dir}; name one, or the folder of the runs with --runs-dir")
        return found[-1]
    for directory in (runs_dir / run, Path(run), Path(run).parent if run.endswith("events.jsonl") else Path(run)):
        if (directory / "events.jsonl").is_file():
            return directory
    raise AdarunError(f"there is no run {run}, neither in {runs_dir} nor as a folder with an events.jsonl")

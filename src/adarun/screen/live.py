"""The live screen: snapshots and keys in, drawings out; returns when the job ends or the viewer has seen enough."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from adarun.errors import AdarunError
from adarun.events import Snapshot
from adarun.registry import Entry, listens
from adarun.screen.connection import Connection
from adarun.screen.rows import Looking, press
from adarun.screen.view import Drawing, Line, fit, glyphs_for, jobs_lines, room_for_rows, screen

# A paused screen still follows resizes.
TICK_SECONDS = 0.5
ESCAPES = {"[A": "up", "[B": "down", "OA": "up", "OB": "down"}
SINGLE = {"\r": "enter", "\n": "enter", "\x03": "ctrl-c", "k": "up", "j": "down"}


@contextmanager
def single_keys() -> Iterator[None]:
    """Keys come one by one and are not echoed; on leaving the terminal is as it was."""
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file)
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def keys_of(typed: str) -> list[str]:
    """The names of the keys that were typed."""
    keys = []
    while typed:
        if typed[0] == "\x1b" and (name := ESCAPES.get(typed[1:3])):
            keys.append(name)
            typed = typed[3:]
        elif typed[0] == "\x1b":
            # A sequence that is not known here comes in one piece, and is no Escape.
            keys += ["escape"] if len(typed) == 1 else []
            break
        else:
            keys.append(SINGLE.get(typed[0], typed[0]))
            typed = typed[1:]
    return keys


def give_way() -> None:
    """From the first picture on, the job's processes go first on the CPU."""
    os.nice(19)


class Screen:
    """The terminal while a viewer looks at it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.glyphs = glyphs_for(console.encoding)
        self._live = Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Screen:  # noqa: PYI034 - Self needs Python 3.11
        self._begin()
        signal.signal(signal.SIGTSTP, self._suspend)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._end()

    def _begin(self) -> None:
        self._keys = single_keys()
        self._keys.__enter__()
        self._live.start()

    def _end(self) -> None:
        self._live.stop()
        self._keys.__exit__(None, None, None)

    def _suspend(self, *_: object) -> None:
        """Ctrl-Z: give the shell its terminal, and take it back when it goes on."""
        self._end()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._begin()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        return self.console.size.width, self.console.size.height

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these lines."""
        self._live.update(Drawing(lines), refresh=True)

    def wait(self, connections: Sequence[Connection]) -> tuple[list[Connection], list[str]]:
        """Wait for news, keys, or a while; which connections have something to read, and the keys."""
        ready, _, _ = select.select([*connections, sys.stdin], [], [], TICK_SECONDS)
        keys = []
        if sys.stdin in ready:
            typed = os.read(sys.stdin.fileno(), 1024)
            keys = keys_of(typed.decode(errors="ignore")) if typed else ["q"]
        return [one for one in connections if one in ready], keys


def watch(console: Console, entry: Entry) -> Snapshot | None:
    """Show a job until it ends: then its last snapshot is returned. None if the viewer left before.

    Raises:
        AdarunError: the hub refuses us, or does not answer.
    """
    connection, looking = Connection(entry.socket), Looking()
    try:
        shown = connection.first()
        if shown is None:
            raise AdarunError(f"the launcher of {entry.run} (process {entry.pid}) does not answer; is it stopped?")
        with Screen(console) as terminal:
            size = (0, 0)
            new = True
            while not looking.done:
                if new or terminal.size != size:
                    first, size = not any(size), terminal.size
                    terminal.draw(screen(shown, looking, *size, terminal.glyphs))
                    if first:
                        give_way()
                ready, keys = terminal.wait([connection])
                for key in keys:
                    looking = press(looking, key, shown, room_for_rows(shown, *size))
                connection.ask_for(looking.rank if looking.page == "worker" else -1)
                new = bool(keys)
                if ready:
                    connection, arrived = _take(connection, entry)
                    if arrived and not looking.paused:
                        shown, new = connection.newest or shown, True
        return None
    except (EOFError, ConnectionError):
        return connection.newest
    finally:
        connection.close()


def _take(connection: Connection, entry: Entry) -> tuple[Connection, bool]:
    """What has arrived; a viewer that was stopped for a while was dropped, and comes back."""
    try:
        return connection, connection.take()
    except EOFError:
        if not listens(entry.socket):
            raise
        connection.close()
        return Connection(entry.socket), False


def choose(console: Console, entries: Sequence[Entry]) -> Entry | None:
    """Let the viewer choose one of several jobs; None if it wants none."""
    connections: list[Connection | None] = []
    for entry in entries:
        try:
            connections.append(Connection(entry.socket))
        except OSError:
            connections.append(None)
    picked = 0
    with Screen(console) as terminal:
        while True:
            width, height = terminal.size
            rows = [(entry.run, one.newest if one else None) for entry, one in zip(entries, connections, strict=True)]
            lines = [*jobs_lines(rows, picked, width, time.time())[: height - 1]]
            lines += [[] for _ in range(height - 1 - len(lines))]
            terminal.draw([*lines, fit([("arrows: choose  Enter: watch  q: quit", "dim")], width)])
            ready, keys = terminal.wait([one for one in connections if one is not None])
            for one in ready:
                try:
                    one.take()
                except (EOFError, AdarunError):
                    one.close()
                    connections[connections.index(one)] = None
            for key in keys:
                if key in {"q", "escape", "ctrl-c"}:
                    picked = -1
                picked = (
                    max(0, min(len(entries) - 1, picked + {"up": -1, "down": 1}.get(key, 0))) if picked >= 0 else -1
                )
                if key == "enter" or picked < 0:
                    for each in connections:
                        if each is not None:
                            each.close()
                    return entries[picked] if picked >= 0 else None

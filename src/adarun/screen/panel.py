"""The screen of `adarun run --live`: the lower lines of the terminal, under the script's own output.

A process of its own, `python -m adarun.screen.panel SOCKET`: to the hub it is a viewer like any other, so it cannot hold the job
up. The terminal is told to scroll only the lines above. Each drawing is one write, which the kernel does not mix with
what the workers write meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import sys
import termios
from io import StringIO
from types import FrameType

from rich.console import Console

from adarun.errors import AdarunError
from adarun.screen.connection import Connection
from adarun.screen.rows import Looking
from adarun.screen.view import Drawing, Line, glyphs_for, screen

PART = 0.5
FEWEST, MOST = 8, 24
TICK_SECONDS = 0.5


class Panel:
    """The lower part of a terminal."""

    def __init__(self, file: int, encoding: str) -> None:
        self._file = file
        self._glyphs = glyphs_for(encoding)
        self._size = (0, 0)
        self._colours = Console(file=StringIO(), force_terminal=True)
        self.connection: Connection | None = None

    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal, as they are now."""
        raw = fcntl.ioctl(self._file, termios.TIOCGWINSZ, b"\0" * 8)
        lines, columns, _, _ = struct.unpack("4H", raw)
        return columns or 80, lines or 24

    def draw(self) -> None:
        """Show the newest snapshot; after a resize, set the terminal up anew."""
        snapshot = self.connection.newest if self.connection else None
        columns, lines = self.size()
        height = max(FEWEST, min(MOST, int(lines * PART)))
        if snapshot is None or lines < 2 * FEWEST:
            return
        drawing = "" if (columns, lines) == self._size else self._set_up(lines, height)
        self._size = (columns, lines)
        drawn = screen(snapshot, Looking(), columns, height, self._glyphs)[:-1]
        drawing += "\x1b7"
        for number, text in enumerate(self._styled(["-" * columns, *drawn])):
            drawing += f"\x1b[{lines - height + number + 1};1H\x1b[K{text}"
        self._write(drawing + "\x1b8")

    def _set_up(self, lines: int, height: int) -> str:
        """Scroll what is there out of the way, and from now on only above the panel."""
        above = lines - height
        if not self._size[0]:
            return "\n" * height + f"\x1b[{height}A\x1b7\x1b[1;{above}r\x1b8"
        return f"\x1b7\x1b[r\x1b[{max(1, above - 1)};1H\x1b[J\x1b[1;{above}r\x1b8\x1b[{above};1H"

    def _styled(self, lines: list[str | Line]) -> list[str]:
        with self._colours.capture() as capture:
            for line in lines:
                self._colours.print(Drawing([[(line, "dim")] if isinstance(line, str) else line]), soft_wrap=True)
        return capture.get().splitlines()

    def close(self) -> None:
        """Give the terminal back: the panel goes, the script's output stays."""
        if self._size[0]:
            _, lines = self.size()
            above = max(1, lines - max(FEWEST, min(MOST, int(lines * PART))))
            self._write(f"\x1b7\x1b[r\x1b[{above + 1};1H\x1b[J\x1b8")

    def _write(self, text: str) -> None:
        os.write(self._file, text.encode(errors="replace"))


def ended(number: int, _: FrameType | None) -> None:
    """Told to stop: leave as if the job had ended."""
    raise EOFError(f"signal {number}")


def main() -> None:
    """Draw until the hub hangs up."""
    # Ctrl-C and the like are for the job; when it ends, so does this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ended)
    os.nice(19)  # the job's processes go first
    panel = Panel(sys.stdout.fileno(), sys.stdout.encoding)
    try:
        panel.connection = Connection(sys.argv[1])
        while True:
            if select.select([panel.connection], [], [], TICK_SECONDS)[0]:
                panel.connection.take()
            panel.draw()
    except (EOFError, OSError, AdarunError):
        panel.close()


if __name__ == "__main__":
    main()

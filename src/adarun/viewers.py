"""The hub's side of `adarun status`: one snapshot for all who watch, none while nobody does, and no patience with the slow."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass

from adarun.events import Logged, Refused, Snapshot, Watch, frame
from adarun.screen.model import About, Model

SNAPSHOT_SECONDS = 0.5
# Who has left a snapshot unread for so long is dropped.
PATIENCE_SECONDS = 5.0
MAX_VIEWERS = 64
# A viewer has little to say: one that says more waits for its turn.
TURN_SECONDS = 0.05


@dataclass(eq=False)
class Viewer:
    """One who watches, and the worker whose recent steps it wants, if any."""

    writer: asyncio.StreamWriter
    pid: int
    rank: int
    # When it had read everything, or was sent something after that.
    read_at: float

    def unread_bytes(self) -> int:
        """What was sent to it and is still on the way: in our buffer or, by the kernel's account, in the socket's."""
        raw = fcntl.ioctl(self.writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        return self.writer.transport.get_write_buffer_size() + int(struct.unpack("i", raw)[0])


class Viewers:
    """All who watch this job. Lives in the hub's thread."""

    def __init__(self, about: About, log: Callable[[Logged], None]) -> None:
        self.model = Model(about)
        self._log = log
        self._viewers: list[Viewer] = []
        self._showing: asyncio.Task[None] | None = None
        self._newest = b""
        self._made_at = 0.0

    @property
    def full(self) -> bool:
        """Whether no more may come."""
        return len(self._viewers) >= MAX_VIEWERS

    def snapshot(self) -> Snapshot:
        """The job now, with what the viewers want to know in particular."""
        return self.model.snapshot(time.time(), {viewer.rank for viewer in self._viewers if viewer.rank >= 0})

    def join(self, watch: Watch, writer: asyncio.StreamWriter, pid: int) -> Viewer:
        """Take on a viewer; it gets its first snapshot at once."""
        viewer = Viewer(writer, pid, watch.rank, time.monotonic())
        self._viewers.append(viewer)
        if self._showing is None:
            self._showing = asyncio.get_running_loop().create_task(self._show())
        writer.write(self._frame())
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Forget a viewer; without any, nothing is worked out."""
        if viewer in self._viewers:
            self._viewers.remove(viewer)
        if not self._viewers and self._showing is not None:
            self._showing.cancel()
            self._showing = None

    def _frame(self) -> bytes:
        """The newest snapshot's bytes, the same for all."""
        now = time.monotonic()
        if now - self._made_at >= 0.9 * SNAPSHOT_SECONDS:
            self._newest, self._made_at = frame(self.snapshot()), now
        return self._newest

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_SECONDS)
            newest, now = self._frame(), time.monotonic()
            for viewer in list(self._viewers):
                self._send(viewer, newest, now)

    def _send(self, viewer: Viewer, newest: bytes, now: float) -> None:
        """Give a viewer the newest snapshot if it has read the one before: snapshots never pile up."""
        if viewer.writer.is_closing():
            return
        if not viewer.unread_bytes():
            viewer.read_at = now
            viewer.writer.write(newest)
        elif now - viewer.read_at > PATIENCE_SECONDS:
            self._log(
                Refused(reason=f"a viewer read nothing for {PATIENCE_SECONDS:.0f} s", pid=viewer.pid, at=time.time())
            )
            viewer.writer.transport.abort()

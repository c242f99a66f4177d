"""A viewer's end of the hub's socket."""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress

import msgspec

from adarun.errors import AdarunError
from adarun.events import MAX_SNAPSHOT_BYTES, Snapshot, ToViewer, Watch, frame

ANSWER_SECONDS = 5.0


class Connection:
    """Watches one job: `newest` is the last snapshot that came."""

    def __init__(self, path: str) -> None:
        """Connect to the hub at `path`.

        Raises:
            OSError: nobody listens there.
        """
        self.newest: Snapshot | None = None
        self._rank = -1
        self._bytes = bytearray()
        self._decoder = msgspec.msgpack.Decoder(ToViewer)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_SECONDS)
        self._socket.connect(path)
        self._socket.sendall(frame(Watch()))
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def ask_for(self, rank: int) -> None:
        """Have the recent steps of one worker in the next snapshots, or of none: -1."""
        if rank != self._rank:
            self._rank = rank
            with suppress(OSError):  # `take` finds out that the hub has hung up
                self._socket.send(frame(Watch(rank)))

    def take(self) -> bool:
        """Take in what has arrived, without waiting; whether there is a new snapshot.

        Raises:
            AdarunError: the hub refuses us.
            EOFError: it has hung up.
        """
        try:
            while chunk := self._socket.recv(1 << 18):
                self._bytes += chunk
            ended = True
        except BlockingIOError:
            ended = False
        except ConnectionError:
            ended = True
        new = self._decode()
        if ended and not new:
            raise EOFError("the hub has hung up")
        return new

    def first(self) -> Snapshot | None:
        """Wait for a snapshot; None if the launcher does not answer, say because it is stopped.

        Raises:
            AdarunError: the hub refuses us.
            EOFError: it has hung up.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while self.newest is None and (left := deadline - time.monotonic()) > 0.0:
            if select.select([self], [], [], left)[0]:
                self.take()
        return self.newest

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _decode(self) -> bool:
        """Decode the newest whole snapshot: of several, nobody wants the older ones."""
        bodies = []
        while len(self._bytes) >= 4:
            size = int.from_bytes(self._bytes[:4], "big")
            if size > MAX_SNAPSHOT_BYTES:
                raise AdarunError(f"a snapshot of {size} bytes is over the limit of {MAX_SNAPSHOT_BYTES}")
            if len(self._bytes) < 4 + size:
                break
            bodies.append(bytes(self._bytes[4 : 4 + size]))
            del self._bytes[: 4 + size]
        if not bodies:
            return False
        try:
            message = self._decoder.decode(bodies[-1])
        except msgspec.DecodeError as error:
            raise AdarunError(f"the job runs under another version of adarun ({error}); use its own") from None
        if not isinstance(message, Snapshot):
            raise AdarunError(f"the job's launcher refuses to be watched: {message.reason}")
        self.newest = message
        return True

"""The launcher's socket server: reports in, plans out, everything to the log."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from adarun.control.planner import Planner
from adarun.control.tuner import Tuner
from adarun.errors import AdarunError
from adarun.events import (
    MAX_MESSAGE_BYTES,
    Attached,
    Averaged,
    Decision,
    Hello,
    Learned,
    Logged,
    Loop,
    Lost,
    Meeting,
    Met,
    Notice,
    Paced,
    PlanRequest,
    Refusal,
    Refused,
    Snapshot,
    Steps,
    ToHub,
    ToWorker,
    Watch,
    WorkersEnded,
    WorkersStarted,
    frame,
)
from adarun.resources import Sampler
from adarun.screen.model import About
from adarun.viewers import TURN_SECONDS, Viewers

T = TypeVar("T")

HELLO_SECONDS = 10.0
SAMPLE_SECONDS = 1.0
MEETING_SECONDS = 2.0
# Far above what 1,000 steps a second bring; who sends more for this long is broken or hostile.
FLOOD_BYTES_PER_SECOND = 4 << 20
FLOOD_BURST_BYTES = 32 << 20
# sun_path holds 108 bytes on Linux and 104 elsewhere, the closing zero included.
MAX_PATH_BYTES = 100


class RefusedClient(Exception):
    """Raised inside the hub to turn a client away; its text is the reason."""


class Hub:
    """Serves the workers of this node, and those who watch them, from a thread of its own."""

    def __init__(
        self,
        planner: Planner,
        log: Callable[[Logged], None],
        tuner: Tuner | None = None,
        about: About | None = None,
    ) -> None:
        self.planner = planner
        self.tuner = tuner
        self._write = log
        self._viewers = Viewers(about or About(), self._log)
        self._restart = False
        self._directory = private_directory()
        self.path = self._directory / "hub"
        self._loop = asyncio.new_event_loop()
        self._decoder = msgspec.msgpack.Decoder(ToHub)
        self._workers: dict[int, Hello] = {}
        self._group: WorkersStarted | None = None
        # By step: which ranks want to evaluate or to save, and what they are told.
        self._meetings: dict[int, tuple[set[int], asyncio.Future[bool]]] = {}
        self._thread = threading.Thread(target=self._run, name="adarun-hub", daemon=True)

    def start(self) -> None:
        """Listen; afterwards `path` accepts connections.

        Raises:
            AdarunError: the socket cannot be created.
        """
        self._thread.start()
        try:
            self._call(self._listen())
        except OSError as error:
            raise AdarunError(
                f"cannot listen on {self.path} ({error.strerror}); set XDG_RUNTIME_DIR or TMPDIR to a folder of yours"
            ) from None

    def workers_started(self, event: WorkersStarted) -> None:
        """A new worker group: only its ranks may connect from now on."""

        async def renew() -> None:
            self._workers = {}
            self._meetings = {}
            self._group = event
            self._see(event)

        self._call(renew())

    def workers_ended(self, event: WorkersEnded) -> None:
        """The worker group is gone."""

        async def note() -> None:
            self._log(event)

        self._call(note())

    def snapshot(self) -> Snapshot:
        """The job now, for whoever shows it; from any thread."""

        async def look() -> Snapshot:
            return self._viewers.snapshot()

        return self._call(look())

    def stop(self) -> None:
        """Close the window that is open, hang up, and remove the socket."""

        async def finish() -> None:
            # What the workers sent last is still in their sockets.
            deadline = time.monotonic() + 1.0
            while self._workers and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            for event in self.planner.finish():
                self._log(event)

        if self._thread.is_alive():
            self._call(finish())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        self.path.chmod(0o600)
        await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_MESSAGE_BYTES)
        self._sampling = self._loop.create_task(self._sample())

    def take_restart(self) -> bool:
        """Whether the workers are to be restarted now, under the setting that `tuner` names; said once."""
        restart, self._restart = self._restart, False
        return restart

    def _log(self, event: Logged) -> None:
        self._write(event)
        self._viewers.model.see(event)

    def _see(self, event: Logged) -> None:
        self.planner.see(event)
        self._log(event)
        if self.tuner is not None:
            self._tune(self.tuner, event)

    def _tune(self, tuner: Tuner, event: Logged) -> None:
        stopped = tuner.stopped
        if (tuned := tuner.see(event)) is not None:
            self._log(msgspec.structs.replace(tuned, at=time.time()))
            self._restart = self._restart or tuned.restart
        if tuner.stopped != stopped:
            self._see(Notice(key="tune", text=tuner.stopped))

    async def _sample(self) -> None:
        sampler = Sampler()
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            for rank, hello in list(self._workers.items()):
                if (resources := sampler.sample(rank, hello.pid)) is not None:
                    self._see(resources)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = peer(writer)
        hello: Hello | None = None
        try:
            if uid != os.getuid():
                raise RefusedClient(f"it runs as user {uid}, not {os.getuid()}")
            first, _ = await asyncio.wait_for(self._receive(reader), HELLO_SECONDS)
            if isinstance(first, Watch):
                await self._show(first, pid, reader, writer)
            hello = self._greet(first)
            await self._converse(hello, reader, writer)
        # Before Python 3.11 asyncio has a TimeoutError of its own.
        except (
            RefusedClient,
            msgspec.DecodeError,
            UnicodeDecodeError,
            RecursionError,
            TimeoutError,
            asyncio.TimeoutError,
        ) as error:
            reason = str(error) or "it said nothing"
            self._log(Refused(reason=reason, pid=pid, at=time.time()))
            writer.write(frame(Refusal(reason=reason[:2000])))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it hung up
        finally:
            if hello is not None and self._workers.get(hello.rank) is hello:
                del self._workers[hello.rank]
            writer.close()

    def _greet(self, hello: ToHub) -> Hello:
        if not isinstance(hello, Hello):
            raise RefusedClient(f"its first message is {type(hello).__name__}, not Hello")
        group = self._group
        if group is None or hello.attempt != group.attempt or hello.rank not in group.ranks:
            raise RefusedClient(f"rank {hello.rank} of attempt {hello.attempt} is not a worker of this node")
        if hello.rank in self._workers:
            raise RefusedClient(f"rank {hello.rank} is connected already, from process {self._workers[hello.rank].pid}")
        self._workers[hello.rank] = hello
        self._see(Attached(hello=hello, at=time.time()))
        return hello

    async def _show(
        self, watch: Watch, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> NoReturn:
        """Let a viewer watch until it hangs up or is refused."""
        if self._viewers.full:
            raise RefusedClient("too many watch this job already")
        viewer = self._viewers.join(watch, writer, pid)
        try:
            while True:
                message, _ = await self._receive(reader)
                if not isinstance(message, Watch):
                    raise RefusedClient(f"a viewer says {type(message).__name__}")
                viewer.rank = message.rank
                await asyncio.sleep(TURN_SECONDS)
        finally:
            self._viewers.leave(viewer)

    async def _converse(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = hello.rank
        budget, since = float(FLOOD_BURST_BYTES), time.monotonic()
        while True:
            message, num_bytes = await self._receive(reader)
            if self._workers.get(rank) is not hello:
                raise RefusedClient(f"rank {rank} is of attempt {hello.attempt}, which is over")
            now = time.monotonic()
            budget = min(FLOOD_BURST_BYTES, budget + (now - since) * FLOOD_BYTES_PER_SECOND) - num_bytes
            since = now
            if budget < 0:
                raise RefusedClient(f"rank {rank} floods the hub")
            if isinstance(message, Steps):
                self._reports(rank, message)
            elif isinstance(message, PlanRequest):
                await self._send(writer, self._answer(rank, message))
            elif isinstance(message, Meeting):
                await self._send(writer, Met(all=await self._meet(rank, message.step)))
            elif isinstance(message, Loop | Averaged | Learned):
                self._see(msgspec.structs.replace(message, rank=rank))
            elif isinstance(message, Notice):
                if message.key not in self.planner.state.notices:
                    self._see(msgspec.structs.replace(message, rank=rank))
            else:
                raise RefusedClient(f"rank {rank} says hello twice")
            # A client whose messages are all there already would otherwise never let the others have their turn.
            await asyncio.sleep(0)

    async def _meet(self, rank: int, step: int) -> bool:
        """Whether all ranks ask after this step; the answer is the same for all, however late they ask."""
        if step not in self._meetings:
            self._meetings[step] = (set(), self._loop.create_future())
        asked, answer = self._meetings[step]
        asked.add(rank)
        if self._group is not None and len(asked) == self._group.world_size and not answer.done():
            answer.set_result(True)
        # Who comes alone is not kept waiting for long.
        await asyncio.wait([answer], timeout=MEETING_SECONDS)
        if not answer.done():
            answer.set_result(False)
        return answer.result()

    def _reports(self, rank: int, message: Steps) -> None:
        for step in message.reports:
            if step.rank != rank:
                raise RefusedClient(f"rank {rank} reports a step of rank {step.rank}")
            self._see(step)
        if message.lost:
            self._see(Lost(rank=rank, reports=message.lost))

    def _answer(self, rank: int, request: PlanRequest) -> ToWorker:
        answer, events = self.planner.answer(rank, request)
        for event in events:
            # The planner knows no clock.
            self._log(msgspec.structs.replace(event, at=time.time()) if isinstance(event, Decision | Paced) else event)
        if isinstance(answer, Refusal):
            self._log(Refused(reason=answer.reason, pid=self._workers[rank].pid, at=time.time()))
        return answer

    async def _send(self, writer: asyncio.StreamWriter, message: ToWorker) -> None:
        writer.write(frame(message))
        await writer.drain()

    async def _receive(self, reader: asyncio.StreamReader) -> tuple[ToHub, int]:
        """The next message and its size in bytes."""
        try:
            num_bytes = int.from_bytes(await reader.readexactly(4), "big")
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                raise  # between two messages anyone may leave
            raise RefusedClient("it hung up inside a message") from None
        if num_bytes > MAX_MESSAGE_BYTES:
            raise RefusedClient(f"a message of {num_bytes} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        try:
            body = await reader.readexactly(num_bytes)
        except asyncio.IncompleteReadError:
            raise RefusedClient("it hung up inside a message") from None
        return self._decoder.decode(body), num_bytes + 4


def peer(writer: asyncio.StreamWriter) -> tuple[int, int]:
    """Process and user id at the other end, from the kernel."""
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


def private_directory() -> Path:
    """A new folder that only this user can enter, with a path short enough for a socket's."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and runtime.is_dir() and os.access(runtime, os.W_OK):
        parent = runtime / "adarun"
        parent.mkdir(mode=0o700, exist_ok=True)
        directory = tempfile.mkdtemp(dir=parent, prefix="")
        if len(os.fsencode(directory)) + 5 <= MAX_PATH_BYTES:
            return Path(directory)
        os.rmdir(directory)  # noqa: PTH106
    directory = tempfile.mkdtemp(prefix="adarun-")
    if len(os.fsencode(directory)) + 5 > MAX_PATH_BYTES:
        os.rmdir(directory)  # noqa: PTH106
        directory = tempfile.mkdtemp(prefix="adarun-", dir="/tmp")  # mkdtemp makes it private
    return Path(directory)

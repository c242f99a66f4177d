"""A worker's end of the hub's socket.

The training thread only appends to a deque; a daemon thread sends. The one exchange that the training thread waits for is
a plan, once a window.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec

from adarun.errors import HubLost
from adarun.events import MAX_REPORTS, FromWorker, Hello, Meeting, Met, Plan, PlanRequest, Steps, ToWorker, frame

FLUSH_SECONDS = 0.4
# How long a plan may take. The hub answers in well under a millisecond; a launcher that was stopped for a while may come
# back, and failing is final.
PLAN_TIMEOUT_SECONDS = 300.0


class Client:
    """Connects, says hello, and from then on carries reports out and plans in."""

    def __init__(self, path: str, hello: Hello, drain: Callable[[], Steps | None]) -> None:
        """Connect to the hub at `path`. `drain` gives the reports not yet sent; it runs in the sending thread.

        Raises:
            OSError: nobody listens there.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PLAN_TIMEOUT_SECONDS)
        self._socket.connect(path)
        self._drain = drain
        self._lock = threading.Lock()
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._outbox: deque[FromWorker | Callable[[], FromWorker]] = deque(maxlen=1024)
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._plans: deque[Plan] = deque(maxlen=8)
        self._socket.sendall(frame(hello))
        self._thread = threading.Thread(target=self._run, name="adarun-reports", daemon=True)
        self._thread.start()

    def post(self, message: FromWorker | Callable[[], FromWorker]) -> None:
        """Send `message` soon, in order, without waiting; one that has to wait for a GPU is made in the sending thread."""
        self._outbox.append(message)

    def known_plan(self, step: int) -> Plan | None:
        """The plan that covers `step` if it is one of the last few that the hub gave."""
        for plan in reversed(self._plans):
            if plan.start <= step < plan.stop:
                return plan
        return None

    def plan(self, request: PlanRequest) -> Plan:
        """The plan that covers `request.step`; asks the hub unless it is known.

        Raises:
            HubLost: the hub is gone, refused us or did not answer.
        """
        if known := self.known_plan(request.step):
            return known
        answer = self._ask(request, f"the plan for step {request.step}")
        if not isinstance(answer, Plan):
            raise HubLost(f"adarun's launcher refuses this worker: {getattr(answer, 'reason', answer)}")
        self._plans.append(answer)
        return answer

    def meet(self, step: int) -> bool:
        """Whether all ranks ask this after the same step.

        Raises:
            HubLost: the hub is gone or did not answer.
        """
        answer = self._ask(Meeting(step=step), f"whether to average after step {step}")
        return isinstance(answer, Met) and answer.all

    def _ask(self, request: PlanRequest | Meeting, unknown: str) -> ToWorker:
        try:
            with self._lock:
                # If the hub hung up, what it said before explains why.
                with suppress(BrokenPipeError, ConnectionResetError):
                    self._send_pending()
                    self._socket.sendall(frame(request))
                answer: ToWorker = self._decoder.decode(self._receive())
                return answer
        except TimeoutError:
            raise HubLost(
                f"adarun's launcher did not answer for {PLAN_TIMEOUT_SECONDS:.0f} s, so {unknown} is unknown; look at the "
                "launcher's host and start the job again from its last checkpoint"
            ) from None
        except (OSError, EOFError) as error:
            raise HubLost(
                f"adarun's launcher is gone ({error}), so {unknown} is unknown; start the job again from its last checkpoint"
            ) from None

    def close(self) -> None:
        """Send what is left and hang up; safe to call twice, and in a forked child, where it does nothing."""
        if self._closing.is_set() or os.getpid() != self._pid:
            return
        self._closing.set()
        self._thread.join(timeout=2.0)
        self._socket.close()

    def _run(self) -> None:
        while True:
            last = self._closing.wait(FLUSH_SECONDS)
            try:
                with self._lock:
                    self._send_pending()
            except OSError:
                # Without its hub a worker may train on to the end of its plan; `plan` is where it learns of the loss.
                return
            if last:
                return

    def _send_pending(self) -> None:
        while self._outbox:
            message = self._outbox.popleft()
            self._socket.sendall(frame(message() if callable(message) else message))
        while (steps := self._drain()) is not None:
            self._socket.sendall(frame(steps))
            if len(steps.reports) < MAX_REPORTS:
                return

    def _receive(self) -> bytes:
        return self._receive_exactly(int.from_bytes(self._receive_exactly(4), "big"))

    def _receive_exactly(self, num_bytes: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < num_bytes:
            chunk = self._socket.recv(num_bytes - len(chunks))
            if not chunk:
                raise EOFError("it closed the connection")
            chunks += chunk
        return bytes(chunks)

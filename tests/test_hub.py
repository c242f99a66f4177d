"""The hub on its real socket: it serves this user's workers, turns others away with a reason, and lets nobody block it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adarun import hub as hub_module
from adarun.control.planner import Planner, Settings
from adarun.errors import AdarunError, HubLost
from adarun.events import (
    MAX_MESSAGE_BYTES,
    Attached,
    FromWorker,
    Hello,
    Logged,
    Lost,
    Notice,
    Plan,
    PlanRequest,
    Refusal,
    Refused,
    Step,
    Steps,
    ToWorker,
    WorkersStarted,
    frame,
)
from adarun.hub import MAX_PATH_BYTES, Hub, private_directory
from adarun.worker.client import Client

# Only a defect makes anything here take so long.
PATIENCE_SECONDS = 30.0


class Log:
    """What the hub logged, for a test to wait on."""

    def __init__(self) -> None:
        self._events: list[Logged] = []
        self._changed = threading.Condition()
        # What else to do in the hub's thread when it logs something.
        self.then: Callable[[Logged], None] = lambda _: None

    def __call__(self, event: Logged) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        self.then(event)

    def of(self, kind: Any, at_least: int = 0) -> list[Logged]:
        """All events of a kind so far, once there are as many."""

        def found() -> list[Logged]:
            return [event for event in self._events if isinstance(event, kind)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= at_least, PATIENCE_SECONDS), found()
            return found()

    def reasons(self, at_least: int = 0) -> list[str]:
        return [event.reason for event in self.of(Refused, at_least) if isinstance(event, Refused)]


def hello(rank: int, *, attempt: int = 0, world_size: int = 2) -> Hello:
    return Hello(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        num_nodes=1,
        attempt=attempt,
        pid=os.getpid(),
        host="here",
        device="cpu",
        torch="2.11",
    )


def started(world_size: int = 2, attempt: int = 0) -> WorkersStarted:
    return WorkersStarted(
        attempt=attempt, ranks=list(range(world_size)), world_size=world_size, num_nodes=1, group_rank=0, at=0.0
    )


def request(step: int = 0, global_batch: int = 64) -> PlanRequest:
    return PlanRequest(step=step, global_batch=global_batch, dataset_size=1000)


def a_step(rank: int, step: int) -> Step:
    return Step(
        rank=rank, step=step, samples=32, data=0.0, forward=0.1, backward=0.2, wait=0.0, update=0.0, ended=float(step)
    )


class Raw:
    """A client without manners: sends what it is told, reads until it is hung up on."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect(str(path))

    def send(self, *messages: FromWorker | bytes) -> Raw:
        # The hub may have hung up before it has read everything.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(b"".join(m if isinstance(m, bytes) else frame(m) for m in messages))
        return self

    def shut(self) -> Raw:
        """Say that nothing more will come."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        return self

    def receive(self) -> ToWorker:
        return msgspec.msgpack.decode(self._exactly(int.from_bytes(self._exactly(4), "big")), type=ToWorker)

    def until_hung_up(self) -> bytes:
        received = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while chunk := self.socket.recv(1 << 16):
                received += chunk
        return bytes(received)

    def refusal(self) -> str:
        """The reason with which the hub hangs up."""
        received = self.until_hung_up()
        assert received, "hung up without a word"
        answer = msgspec.msgpack.decode(received[4:], type=ToWorker)
        assert isinstance(answer, Refusal)
        return answer.reason

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, num_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            chunk = self.socket.recv(num_bytes - len(received))
            assert chunk, "hung up"
            received += chunk
        return bytes(received)


class Served:
    """A running hub, its log, and clients that are closed at the end."""

    def __init__(self, world_size: int = 2, settings_: Settings | None = None) -> None:
        self.log = Log()
        self.hub = Hub(Planner(settings_ or Settings()), self.log)
        self.hub.start()
        self.hub.workers_started(started(world_size))
        self._stack = contextlib.ExitStack()

    def raw(self, *messages: FromWorker | bytes) -> Raw:
        client = Raw(self.hub.path)
        self._stack.callback(client.close)
        return client.send(*messages)

    def client(self, rank: int, drain: Callable[[], Steps | None] = lambda: None, world_size: int = 2) -> Client:
        client = Client(str(self.hub.path), hello(rank, world_size=world_size), drain)
        self._stack.callback(client.close)
        return client

    def assert_serves_others(self) -> None:
        """A well-behaved worker, on rank 1, gets its plan."""
        client = self.client(1)
        assert client.plan(request()).shares == [32, 32]
        client.close()

    def stop(self) -> None:
        self._stack.close()
        self.hub.stop()


@contextlib.contextmanager
def serving(world_size: int = 2, settings_: Settings | None = None) -> Iterator[Served]:
    served = Served(world_size, settings_)
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


# --- the socket ----------------------------------------------------------------------------------------------------------


def test_only_the_owner_can_reach_the_socket(served: Served) -> None:
    """The socket is the owner's, in a directory of the owner's."""
    assert stat.S_IMODE(served.hub.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(served.hub.path.stat().st_mode) == 0o600


def test_the_socket_lies_in_the_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With XDG_RUNTIME_DIR set the socket is in a private folder under it."""
    with tempfile.TemporaryDirectory() as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        with serving() as served:
            assert served.hub.path.parents[1] == Path(runtime) / "adarun"
            assert stat.S_IMODE(served.hub.path.parents[1].stat().st_mode) == 0o700
            served.assert_serves_others()


@pytest.mark.parametrize("runtime", ["", "not/absolute", "/nowhere/at/all"])
def test_an_unusable_runtime_directory_is_passed_over(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XDG_RUNTIME_DIR is no folder the socket is in a private temporary one."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    directory = private_directory()
    assert directory.parent == Path(tempfile.gettempdir())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.rmdir()


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_the_path_is_short_enough_for_a_socket(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep the user's folders are, the socket's path has at most 100 bytes, and nothing is left behind in them."""
    deep = tmp_path / ("ü" * 60) / ("x" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setenv(variable, str(deep))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with serving() as served:
        assert len(os.fsencode(served.hub.path)) <= MAX_PATH_BYTES
        served.assert_serves_others()
    assert [path for path in deep.rglob("*") if path.name != "adarun"] == []


def test_a_stopped_hub_leaves_nothing_behind() -> None:
    """When the hub has stopped its socket and its directory are gone."""
    with serving() as served:
        path = served.hub.path
        assert path.exists()
    assert not path.parent.exists()


def test_a_socket_that_cannot_be_made_is_an_error_with_a_next_step() -> None:
    """If the directory vanished before the hub could listen, the error names the path and what to set."""
    hub = Hub(Planner(Settings()), Log())
    hub.path.parent.rmdir()
    with pytest.raises(AdarunError, match=r"cannot listen on .*; set XDG_RUNTIME_DIR or TMPDIR"):
        hub.start()
    hub.stop()


# --- workers -------------------------------------------------------------------------------------------------------------


def test_a_worker_says_hello_and_gets_its_plan(served: Served) -> None:
    """After its hello a worker is attached, and its request is answered with the plan, which is logged."""
    client = served.client(0)
    plan = client.plan(request())
    assert (plan.number, plan.start, plan.shares) == (0, 0, [32, 32])
    (attached,) = served.log.of(Attached, 1)
    assert isinstance(attached, Attached)
    assert attached.hello == hello(0)
    assert served.log.of(Plan) == [plan]


def test_all_workers_get_the_same_plan(served: Served) -> None:
    """Two workers that ask over their own connections get one plan."""
    assert served.client(0).plan(request()) == served.client(1).plan(request())
    assert len(served.log.of(Plan)) == 1


def test_a_plan_is_asked_for_once_a_window(served: Served) -> None:
    """Within its plan a worker asks nobody: its requests for the plan's steps need no hub."""
    client = served.client(0)
    plan = client.plan(request())
    served.hub.stop()
    assert all(client.plan(request(step)) == plan for step in range(plan.start, plan.stop))
    with pytest.raises(HubLost, match=r"launcher is gone .* the plan for step 20 is unknown"):
        client.plan(request(plan.stop))


def test_reports_and_notices_reach_the_log_in_order(served: Served) -> None:
    """What a worker measured and said is logged as it was sent, before the plan that it asks for afterwards."""
    reports = [Steps(reports=[a_step(0, step) for step in range(3)], lost=7)]
    client = served.client(0, lambda: reports.pop() if reports else None)
    client.post(Notice(key="k", text="something to know"))
    plan = client.plan(request())
    (attached,) = served.log.of(Attached)
    notice = Notice(key="k", text="something to know", rank=0)
    said = {type(event): event for event in served.log.of(Notice | Lost)}
    assert said == {Notice: notice, Lost: Lost(rank=0, reports=7)}
    assert served.log.of(Attached | Step | Plan) == [attached, *[a_step(0, step) for step in range(3)], plan]


def test_closing_sends_what_is_left(served: Served) -> None:
    """The steps that ended since the last sending are reported when the script ends."""
    reports = [Steps(reports=[a_step(0, 5)])]
    served.client(0, lambda: reports.pop() if reports else None).close()
    assert served.log.of(Step, 1) == [a_step(0, 5)]


def test_a_hub_that_stops_takes_in_what_was_sent(served: Served) -> None:
    """What a worker sent before it ended is logged, though the hub is stopped right after."""
    reports = [Steps(reports=[a_step(0, step) for step in range(1000)])]
    client = served.client(0, lambda: reports.pop() if reports else None)
    client.plan(request())
    reports.append(Steps(reports=[a_step(0, step) for step in range(1000, 2000)]))
    served.stop()
    assert served.log.of(Step) == [a_step(0, step) for step in range(2000)]


def test_a_notice_is_logged_once_per_job(served: Served) -> None:
    """What every rank says is logged with the first one's rank, however often it is said."""
    served.raw(hello(0), Notice(key="k", text="the same"), Notice(key="k", text="the same"), request()).receive()
    served.raw(hello(1), Notice(key="k", text="the same"), request()).receive()
    assert served.log.of(Notice) == [Notice(key="k", text="the same", rank=0)]


def test_a_rank_can_connect_again_after_it_hung_up(served: Served) -> None:
    """A worker that closed its connection leaves its rank free."""
    first = served.raw(hello(0), request())
    first.receive()
    first.shut().until_hung_up()
    assert isinstance(served.raw(hello(0), request()).receive(), Plan)


def test_a_new_attempt_serves_the_new_workers(served: Served) -> None:
    """After a restart the same ranks connect anew, and their plans belong to the new attempt."""
    served.raw(hello(0), request()).receive()
    served.hub.workers_started(started(attempt=1))
    plan = served.raw(hello(0, attempt=1), request()).receive()
    assert isinstance(plan, Plan)
    assert (plan.attempt, plan.start, plan.number) == (1, 0, 1)


def test_a_hub_that_stops_hangs_up(served: Served) -> None:
    """A worker that is still connected when the hub stops is hung up on, so it learns of it."""
    client = served.raw(hello(0), request())
    client.receive()
    served.hub.stop()
    assert client.until_hung_up() == b""


# --- clients that are turned away ----------------------------------------------------------------------------------------


TOO_LONG = (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big")
BAD_TEXT = frame(Notice(key="k", text="tttt")).replace(b"tttt", b"\xff\xfe\xfd\xfc")
DEEP_BODY = b"\x83\xa4type\xa6notice\xa3key\xa1k\xa3pad" + b"\x91" * 100_000
DEEP = len(DEEP_BODY).to_bytes(4, "big") + DEEP_BODY


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([request()], "its first message is PlanRequest, not Hello"),
        ([Steps(reports=[])], "its first message is Steps, not Hello"),
        ([hello(2)], "rank 2 of attempt 0 is not a worker of this node"),
        ([hello(0, attempt=1)], "rank 0 of attempt 1 is not a worker of this node"),
        ([hello(0), hello(0)], "rank 0 says hello twice"),
        ([hello(0), Steps(reports=[a_step(0, 0), a_step(1, 1)])], "rank 0 reports a step of rank 1"),
        ([TOO_LONG], f"a message of {MAX_MESSAGE_BYTES + 1} bytes is over the limit of {MAX_MESSAGE_BYTES}"),
        ([b"\xff\xff\xff\xff"], f"a message of 4294967295 bytes is over the limit of {MAX_MESSAGE_BYTES}"),
        ([hello(0), TOO_LONG], f"a message of {MAX_MESSAGE_BYTES + 1} bytes is over the limit of {MAX_MESSAGE_BYTES}"),
        ([b"\x00\x00\x00\x00"], "Input data was truncated"),
        ([b"\x00\x00\x00\x03abc"], "Expected `object`, got `int`"),
        ([hello(0), BAD_TEXT], ""),
        ([hello(0), DEEP], ""),
    ],
    ids=[
        "request first",
        "reports first",
        "wrong rank",
        "wrong attempt",
        "second hello",
        "another's report",
        "oversized",
        "huge",
        "oversized later",
        "empty frame",
        "not a message",
        "invalid text",
        "deep nesting",
    ],
)
def test_a_client_that_breaks_the_rules_is_refused(
    sent: list[FromWorker | bytes], reason: str, served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told why, the reason and its process are logged, and the others are served as before."""
    client = served.raw(*sent)
    told = client.refusal()
    (refused,) = served.log.of(Refused, 1)
    assert isinstance(refused, Refused)
    assert (told, refused.pid) == (refused.reason, os.getpid())
    assert told == reason if reason else told
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    served.assert_serves_others()


def test_a_second_client_with_the_same_rank_is_refused(served: Served) -> None:
    """A rank that is taken stays with the worker that has it."""
    first = served.raw(hello(0), request())
    first.receive()
    reason = f"rank 0 is connected already, from process {os.getpid()}"
    assert served.raw(hello(0)).refusal() == reason
    assert served.log.reasons(1) == [reason]
    assert isinstance(first.send(request()).receive(), Plan)


@pytest.mark.parametrize("sent", [Steps(reports=[a_step(0, 7)]), request(), Notice(key="k", text="x", freezes=True)])
def test_a_worker_of_an_earlier_attempt_is_refused(sent: FromWorker, served: Served) -> None:
    """A worker that outlived its group gets no plan of the new one, and what it reports is not the new one's."""
    old = served.raw(hello(0), request())
    old.receive()
    served.hub.workers_started(started(attempt=1))
    old.send(sent).shut()
    assert "attempt" in old.refusal()
    assert len(served.log.reasons()) == 1
    assert served.log.of(Step | Notice) == []
    assert isinstance(served.raw(hello(0, attempt=1), request()).receive(), Plan)


def test_a_worker_before_the_first_group_is_refused() -> None:
    """Until the workers were started nobody is one."""
    log = Log()
    hub = Hub(Planner(Settings()), log)
    hub.start()
    client = Raw(hub.path).send(hello(0))
    assert client.refusal() == "rank 0 of attempt 0 is not a worker of this node"
    client.close()
    hub.stop()


def test_another_users_process_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub asks the kernel whose process it talks to, whatever the socket's permissions are."""
    monkeypatch.setattr(hub_module, "peer", lambda _: (4242, os.getuid() + 1))
    reason = f"it runs as user {os.getuid() + 1}, not {os.getuid()}"
    assert served.raw(hello(0)).refusal() == reason
    monkeypatch.undo()
    assert [(event.reason, event.pid) for event in served.log.of(Refused, 1) if isinstance(event, Refused)] == [
        (reason, 4242)
    ]
    served.assert_serves_others()


def test_the_peer_is_who_the_kernel_says(served: Served) -> None:
    """A refused client is logged with its own process id, not with one that it claims."""
    served.raw(request()).refusal()
    assert [event.pid for event in served.log.of(Refused, 1) if isinstance(event, Refused)] == [os.getpid()]


def test_a_plan_that_is_refused_is_logged_with_its_reason(served: Served) -> None:
    """A worker that asks for what cannot be planned is told why, and the log says it too."""
    client = served.raw(hello(0), request(global_batch=1))
    told = client.receive()
    assert isinstance(told, Refusal)
    assert told.reason == "a global batch of 1 cannot be shared by 2 workers"
    assert served.log.reasons(1) == [told.reason]


@pytest.mark.parametrize("ended", [math.nan, math.inf, -1.0])
def test_a_moment_that_no_log_can_hold_is_refused(ended: float, served: Served) -> None:
    """A step that ended at no time at all does not reach the log, whose line nobody could read."""
    client = served.raw(hello(0), Steps(reports=[msgspec.structs.replace(a_step(0, 7), ended=ended)]))
    assert "ended" in client.refusal()
    assert served.log.of(Step) == []


@pytest.mark.parametrize(
    "sent", [[b"\x00\x00"], [frame(hello(0))[:-3]], [hello(0), frame(request())[:-1]], [hello(0), b"\x00"]]
)
def test_a_torn_message_is_refused(sent: list[FromWorker | bytes], served: Served) -> None:
    """A client that hangs up inside a message is logged as one, and the others are served as before."""
    served.raw(*sent).shut().until_hung_up()
    assert len(served.log.reasons()) == 1
    served.assert_serves_others()


def test_a_client_that_hangs_up_between_messages_is_not_refused(served: Served) -> None:
    """A worker that ends is nothing to report."""
    served.raw().shut().until_hung_up()
    served.raw(hello(0), request()).shut().until_hung_up()
    served.assert_serves_others()
    assert served.log.reasons() == []


def test_a_flood_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that sends more than any training can bring is turned away, and the others are served as before."""
    monkeypatch.setattr(hub_module, "FLOOD_BURST_BYTES", 10_000)
    monkeypatch.setattr(hub_module, "FLOOD_BYTES_PER_SECOND", 0)
    reports = [Steps(reports=[a_step(0, step)]) for step in range(1000)]
    assert sum(len(frame(message)) for message in reports) > 10_000
    assert served.raw(hello(0), *reports).refusal() == "rank 0 floods the hub"
    assert served.log.reasons(1) == ["rank 0 floods the hub"]
    assert len(served.log.of(Step)) < 1000
    served.assert_serves_others()


def test_what_training_brings_is_no_flood() -> None:
    """A minute of a thousand steps a second, sent at once because the hub was held up, is taken in."""
    reports = [Steps(reports=[a_step(0, 1000 * n + i) for i in range(1000)]) for n in range(60)]
    with serving() as served:
        assert isinstance(served.raw(hello(0), *reports, request(60_000)).receive(), Plan)
        assert len(served.log.of(Step)) == 60_000
        assert served.log.reasons() == []


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(body=st.binary(max_size=300), greeted=st.booleans())
def random_messages_are_refused(served: Served, body: bytes, greeted: bool) -> None:
    before = len(served.log.reasons())
    messages = [hello(0)] if greeted else []
    assert served.raw(*messages, len(body).to_bytes(4, "big") + body).refusal()
    assert len(served.log.reasons(before + 1)) == before + 1


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(sent=st.binary(min_size=1, max_size=300), greeted=st.booleans())
def random_streams_are_hung_up_on(served: Served, sent: bytes, greeted: bool) -> None:
    served.raw(*([hello(0)] if greeted else []), sent).shut().until_hung_up()


@pytest.mark.parametrize("attack", [random_messages_are_refused, random_streams_are_hung_up_on])
def test_random_bytes_harm_nobody(attack: Callable[[Served], None], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever bytes come, the client is hung up on, nothing is raised in the hub, and the others are served as before."""
    with serving() as served:
        attack(served)
        served.assert_serves_others()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_refused_worker_learns_the_reason(served: Served) -> None:
    """The error in a worker that was turned away says why, even if the hub hung up before it asked for anything."""
    client = served.client(2)
    assert served.log.reasons(1) == ["rank 2 of attempt 0 is not a worker of this node"]
    # Two answers later the hub has long hung up on the first client.
    served.assert_serves_others()
    served.assert_serves_others()
    with pytest.raises(HubLost, match="refuses this worker: rank 2 of attempt 0 is not a worker of this node"):
        client.plan(request())


# --- clients that do nothing ---------------------------------------------------------------------------------------------


def test_a_client_that_says_nothing_keeps_nobody_waiting(served: Served) -> None:
    """While some clients have not said hello, and one not even all of it, the others are served."""
    for _ in range(20):
        served.raw()
    served.raw(frame(hello(0))[:7])
    served.assert_serves_others()


def test_a_client_that_says_nothing_is_refused_in_the_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects has to say hello within some seconds."""
    monkeypatch.setattr(hub_module, "HELLO_SECONDS", 0.01)
    silent = served.raw()
    assert silent.refusal() == "it said nothing"
    monkeypatch.undo()
    assert served.log.reasons(1) == ["it said nothing"]
    served.assert_serves_others()


def test_a_client_that_stops_reading_keeps_nobody_waiting() -> None:
    """A worker that asks and does not read its answers waits for itself alone, however many answers pile up."""
    # Plans for 2000 workers are long, so that a few hundred of them fill every buffer on the way.
    with serving(2000) as served:
        served.raw(hello(0, world_size=2000), *[request(global_batch=2_000_000)] * 2000)
        other = served.raw(hello(1, world_size=2000))
        for _ in range(200):
            assert isinstance(other.send(request(global_batch=2_000_000)).receive(), Plan)


def test_a_client_that_has_sent_much_leaves_others_their_turn(served: Served) -> None:
    """A worker whose messages are all there already is not served to the end before another's turn."""
    held, go_on = threading.Event(), threading.Event()

    def hold(event: Logged) -> None:
        if isinstance(event, Attached) and event.hello.rank == 0:
            held.set()
            assert go_on.wait(PATIENCE_SECONDS)

    served.log.then = hold
    first = served.raw(hello(0))
    assert held.wait(PATIENCE_SECONDS)
    # While the hub is held, all of this arrives in its sockets.
    first.send(*[Steps(reports=[a_step(0, step)]) for step in range(500)])
    other = served.raw(hello(1), request())
    go_on.set()
    assert isinstance(other.receive(), Plan)
    first.shut().until_hung_up()
    events = served.log.of(Step | Plan)
    assert len(events) == 501
    assert isinstance(events[-1], Step)

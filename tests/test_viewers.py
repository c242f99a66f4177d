"""Those who watch a job: they see it, whoever they are they hold nothing up, and they find it by its announcement."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from adarun import hub as hub_module
from adarun import registry, viewers
from adarun.errors import AdarunError
from adarun.events import (
    MAX_MESSAGE_BYTES,
    SNAPSHOT_VERSION,
    Attached,
    Notice,
    Plan,
    Refusal,
    Refused,
    Snapshot,
    Steps,
    ToViewer,
    Watch,
    WorkersEnded,
    frame,
)
from adarun.registry import Entry, announce, listens, running
from adarun.screen.connection import Connection
from test_hub import PATIENCE_SECONDS, Raw, Served, a_step, hello, request, serving


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as running_hub:
        yield running_hub


def snapshot(raw: Raw) -> Snapshot:
    body = raw._exactly(int.from_bytes(raw._exactly(4), "big"))
    answer = msgspec.msgpack.decode(body, type=ToViewer)
    assert isinstance(answer, Snapshot), answer
    return answer


def until(connection: Connection, condition: Callable[[Snapshot], bool]) -> Snapshot:
    """The first snapshot of which the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        assert time.monotonic() < deadline, connection.newest
        connection.newest = None
        seen = connection.first()
        if seen is not None and condition(seen):
            return seen


# --- what they see -------------------------------------------------------------------------------------------------------


def test_a_viewer_sees_the_job_as_it_goes_on(served: Served) -> None:
    """The first snapshot comes at once, and the next ones follow what the workers do."""
    connection = Connection(str(served.hub.path))
    seen = connection.first()
    assert seen is not None
    assert (seen.version, seen.world_size, seen.state) == (SNAPSHOT_VERSION, 2, "starting")
    worker = served.raw(hello(0), Steps(reports=[a_step(0, step) for step in range(3)]), request())
    assert isinstance(worker.receive(), Plan)
    seen = until(connection, lambda seen: seen.workers[0].total_steps == 3)
    assert (seen.workers[0].node, seen.workers[0].share) == ("here", 32)
    served.hub.workers_ended(WorkersEnded(0, "FAILED", 1.0))
    assert until(connection, lambda seen: seen.state == "ending").workers[1].state == "gone"
    connection.close()


def test_a_viewer_sees_the_steps_of_the_worker_it_asks_for(served: Served) -> None:
    """Recent steps come of the worker that a viewer asks for, and no longer when it asks for none."""
    served.raw(hello(1), Steps(reports=[a_step(1, step) for step in range(3)]))
    connection = Connection(str(served.hub.path))
    connection.ask_for(1)
    assert until(connection, lambda seen: bool(seen.recent)).recent == {1: [a_step(1, step) for step in range(3)]}
    connection.ask_for(-1)
    until(connection, lambda seen: not seen.recent)
    connection.close()


def test_a_snapshot_from_any_thread(served: Served) -> None:
    """The launcher itself gets a snapshot without a socket."""
    assert served.hub.snapshot().world_size == 2


def test_what_viewers_say_is_no_work_for_the_log(served: Served) -> None:
    """Who watches and leaves is not logged."""
    for _ in range(3):
        raw = served.raw(Watch())
        snapshot(raw)
        raw.shut().until_hung_up()
    served.assert_serves_others()
    assert served.log.reasons() == []


# --- what they cannot do -------------------------------------------------------------------------------------------------


def test_snapshots_are_made_once_for_all_and_for_nobody_not_at_all(served: Served) -> None:
    """Twenty viewers get the very same snapshots, at most two a second; without viewers none is made."""
    made, original = [], viewers.Viewers.snapshot

    def counted(self: viewers.Viewers) -> Snapshot:
        made.append(time.monotonic())
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewers.Viewers, "snapshot", counted)
        raws = [served.raw(Watch()) for _ in range(20)]
        seen = [[snapshot(raw).at for raw in raws] for _ in range(4)]
        # Who came later may be one behind.
        assert len({at for times in seen for at in times}) <= 5
        between = [after - before for before, after in itertools.pairwise(made)]
        assert min(between) >= 0.8 * viewers.SNAPSHOT_SECONDS
        for raw in raws:
            raw.shut().until_hung_up()
        served.assert_serves_others()
        assert served.hub._viewers._showing is None
        count = len(made)
        served.raw(hello(0), request()).receive()
    assert len(made) == count


def test_a_viewer_that_reads_nothing_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A viewer that leaves its snapshot unread is hung up on, with the reason in the log, and the others are served."""
    monkeypatch.setattr(viewers, "SNAPSHOT_SECONDS", 0.01)
    monkeypatch.setattr(viewers, "PATIENCE_SECONDS", 0.05)
    served.raw(Watch())
    assert served.log.reasons(1) == ["a viewer read nothing for 0 s"]
    served.assert_serves_others()


def test_a_stopped_viewer_is_dropped_and_the_others_see_on(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    """A viewer's process that gets SIGSTOP is dropped, while another's snapshots keep coming."""
    monkeypatch.setattr(viewers, "SNAPSHOT_SECONDS", 0.05)
    monkeypatch.setattr(viewers, "PATIENCE_SECONDS", 1.0)
    program = (
        "import select, sys; from adarun.screen.connection import Connection\n"
        "connection = Connection(sys.argv[1])\n"
        "print(connection.first() is not None, flush=True)\n"
        "while select.select([connection], [], []): connection.take()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(served.hub.path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True\n"
        process.send_signal(signal.SIGSTOP)
        other = Connection(str(served.hub.path))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not served.log.of(Refused):
            assert time.monotonic() < deadline
            until(other, lambda _: True)
        assert [event.pid for event in served.log.of(Refused) if isinstance(event, Refused)] == [process.pid]
        until(other, lambda _: True)
        other.close()
        served.assert_serves_others()
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_viewer_that_does_not_read_has_one_snapshot_at_most(served: Served) -> None:
    """Snapshots do not pile up: while one is unread the next ones are left out."""
    raw = served.raw(Watch())
    other = served.raw(Watch())
    times = [snapshot(other).at for _ in range(4)]
    first, second = snapshot(raw).at, snapshot(raw).at
    assert first <= times[0]
    assert second > times[-1]


def test_too_many_viewers_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit a viewer is told so, and those who watch go on."""
    monkeypatch.setattr(viewers, "MAX_VIEWERS", 1)
    first = served.raw(Watch())
    snapshot(first)
    assert served.raw(Watch()).refusal() == "too many watch this job already"
    snapshot(first)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (hello(0), "a viewer says Hello"),
        (Steps(reports=[a_step(0, 0)]), "a viewer says Steps"),
        (Notice(key="k", text="x", freezes=True), "a viewer says Notice"),
        ((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"), "over the limit"),
        (b"\x00\x00\x00\x03abc", "Expected `object`"),
    ],
    ids=["hello", "steps", "notice", "oversized", "garbage"],
)
def test_a_viewer_can_only_watch(sent: object, reason: str, served: Served) -> None:
    """Whatever else a viewer says, it is refused, and nothing of it reaches the job."""
    raw = served.raw(Watch())
    snapshot(raw)
    raw.send(sent)  # type: ignore[arg-type]
    assert reason in served.log.reasons(1)[0]
    assert served.log.of(Attached | Notice) == []
    served.assert_serves_others()


def test_a_worker_cannot_watch(served: Served) -> None:
    """A worker's connection stays a worker's."""
    worker = served.raw(hello(0), Watch())
    assert worker.refusal() == "rank 0 says hello twice"


def test_another_user_cannot_watch(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says who the viewer is; only the job's own user may watch."""
    monkeypatch.setattr(hub_module, "peer", lambda _: (4242, os.getuid() + 1))
    assert "it runs as user" in served.raw(Watch()).refusal()


def test_a_viewer_that_says_much_waits_for_its_turn(served: Served) -> None:
    """A flood of messages from a viewer leaves the workers served."""
    served.raw(Watch(), *[Watch(1)] * 10_000)
    served.assert_serves_others()


def test_a_refused_connection_says_why(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub says to a viewer that it turns away is the error's text."""
    monkeypatch.setattr(viewers, "MAX_VIEWERS", 0)
    connection = Connection(str(served.hub.path))
    with pytest.raises(AdarunError, match="refuses to be watched: too many watch this job already"):
        connection.first()
    connection.close()
    assert frame(Refusal("x"))


def test_a_connection_learns_that_the_hub_has_stopped(served: Served) -> None:
    """When the job ends its viewers are hung up on."""
    connection = Connection(str(served.hub.path))
    connection.first()
    served.hub.stop()
    connection.newest = None
    with pytest.raises(EOFError):
        while connection.first():
            connection.newest = None
    connection.close()


# --- how they find it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where jobs are announced in this test."""
    folder = tmp_path / "adarun"
    monkeypatch.setattr(registry, "folders", lambda: [folder])
    return folder


def entry(path: Path | str, run: str = "a-run", pid: int = 0) -> Entry:
    return Entry(run=run, pid=pid or os.getpid(), socket=str(path), folder="/x", started=1.0)


def a_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_announced_job_is_found(folder: Path, served: Served) -> None:
    """A job is found by its announcement, in a folder that is the user's own, until that is taken back."""
    path = announce(entry(served.hub.path))
    assert path is not None
    assert path.parent.stat().st_mode & 0o077 == 0
    assert running() == [entry(served.hub.path)]
    path.unlink()
    assert running() == []


def test_what_a_dead_job_left_behind_is_removed(folder: Path, tmp_path: Path) -> None:
    """An entry whose hub does not listen is passed over; if its process is gone too, it is removed."""
    dead = announce(entry(tmp_path / "gone", "dead", a_dead_process()))
    alive = announce(entry(tmp_path / "gone", "alive"))
    assert dead is not None
    assert alive is not None
    assert running() == []
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_file_that_is_no_entry_is_passed_over(folder: Path, served: Served) -> None:
    """Whatever else lies there does no harm."""
    announce(entry(served.hub.path))
    (folder / "x.json").write_text("{")
    (folder / "y.json").write_text(json.dumps({"run": 3}))
    (folder / "z.json").mkdir()
    assert running() == [entry(served.hub.path)]


def test_a_folder_of_others_is_not_trusted(folder: Path, served: Served) -> None:
    """Where others could have put something nothing is read, and nothing announced."""
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "x.json").write_bytes(msgspec.json.encode(entry(served.hub.path)))
    assert running() == []
    assert announce(entry(served.hub.path)) is None


def test_jobs_are_announced_in_the_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_RUNTIME_DIR goes first; a relative or missing one is passed over."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert registry.folders()[0] == tmp_path / "adarun"
    for unusable in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", unusable)
        assert tmp_path / "adarun" not in registry.folders()


def test_a_hub_that_does_not_listen(tmp_path: Path) -> None:
    """No socket, or one that nobody serves any more, is no running job."""
    assert not listens(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    assert not listens(str(tmp_path / "file"))

"""The run log: what is written is read again, and neither a crash nor a full disk harms more than what they hit."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from adarun.errors import AdarunError
from adarun.events import (
    SCHEMA_VERSION,
    Asked,
    Attached,
    Averaged,
    Decision,
    Hello,
    Learned,
    Logged,
    Loop,
    Lost,
    Notice,
    Paced,
    Plan,
    Refused,
    Resources,
    RunEnded,
    RunStarted,
    Step,
    Tuned,
    Window,
    WorkersEnded,
    WorkersStarted,
)
from adarun.runlog import RunLog, read

HELLO = Hello(
    rank=1, local_rank=1, world_size=2, num_nodes=1, attempt=0, pid=4242, host="knöten", device="cuda", torch="2.11"
)
# One of each, with fields that are not the defaults.
EVENTS: list[Logged] = [
    RunStarted(schema=SCHEMA_VERSION, run="20260101-demo", command=["--flag", "train.py", "größe=3"], at=1.7e9 + 0.25),
    WorkersStarted(attempt=2, ranks=[0, 1], world_size=4, num_nodes=2, group_rank=1, at=1.5),
    Attached(hello=HELLO, at=2.5),
    Asked(rank=1, step=40, frozen="BatchNorm"),
    Step(
        rank=1,
        step=7,
        samples=32,
        data=0.1,
        forward=1 / 3,
        backward=1e-7,
        wait=0.0,
        update=2.0,
        ended=1.7e9 + 1 / 3,
        counted=False,
    ),
    Window(
        plan=3,
        steps=20,
        step_seconds=0.1,
        samples=[32.0, 31.0],
        busy_seconds=[1 / 3, 0.2],
        wait_seconds=[0.0, 1e-9],
        noise=[0.01, 0.02],
    ),
    Decision(
        plan=3,
        before=[32, 32],
        proposed=[40, 24],
        chosen=[32, 32],
        fixed_seconds=[0.1, 0.2],
        sample_seconds=[1e-12, 3e-3],
        gain=0.5,
        gain_error=0.01,
        reason="kept: → 日本",
        at=3.5,
    ),
    Plan(number=4, start=80, stop=100, shares=[40, 24], attempt=2, reason='a "quoted" reason\nin two lines'),
    Notice(key="loader", text="the loader has no DistributedSampler", freezes=True, rank=1),
    Resources(rank=1, cpu_fraction=1.5, memory_bytes=1 << 33, at=4.5, gpu_fraction=0.5, gpu_memory_bytes=1 << 34),
    Refused(reason="it said nothing", pid=4243, at=5.5),
    Lost(rank=1, reports=12),
    Loop(step=40, at=1.7e9 + 0.5, epoch=2, saved=True, rank=1),
    Averaged(step=47, steps=8, seconds=0.25, distance=1e-3, norm=12.5, checksum=-(1 << 40), rank=1),
    Learned(step=47, steps=8, loss=2.5, spread=0.5, lr=1e-3, rank=1),
    Paced(plan=3, before="sync_period=1", chosen="sync_period=8", communication=0.75, reason="grown", at=3.25),
    Tuned(
        lap=3,
        before="batch_size=8",
        chosen="batch_size=16",
        rates=[100.5, 0.0],
        propensities=[0.25, 0.75],
        restart=True,
        cost_seconds=2.5,
        reason="its turn",
        at=3.75,
    ),
    WorkersEnded(attempt=2, state="FAILED", at=6.5),
    RunEnded(exit_code=1, at=7.5),
]


def written(directory: Path, events: list[Logged]) -> Path:
    """The log's folder, with these events in it."""
    log = RunLog(directory, {"run": directory.name})
    for event in events:
        log.append(event)
    log.close()
    return directory


def notice(number: int) -> Notice:
    return Notice(key=f"{number}", text=f"größe {number}")


# --- what is written is read again ---------------------------------------------------------------------------------------


def test_every_kind_of_event_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Each type that may be in a log comes back equal, in order."""
    assert {type(event) for event in EVENTS} == set(get_args(Logged))
    assert list(read(written(tmp_path / "run", EVENTS))) == EVENTS


def test_an_event_is_one_line_of_json(tmp_path: Path) -> None:
    """Any tool can read a log: each line is a JSON object with its type."""
    lines = (written(tmp_path / "run", EVENTS) / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines] == [
        "run_started",
        "workers_started",
        "attached",
        "asked",
        "step",
        "window",
        "decision",
        "plan",
        "notice",
        "resources",
        "refused",
        "lost",
        "loop",
        "averaged",
        "learned",
        "paced",
        "tuned",
        "workers_ended",
        "run_ended",
    ]


def test_the_run_is_described_beside_its_events(tmp_path: Path) -> None:
    """run.json holds the schema and what the run was."""
    directory = written(tmp_path / "run", [])
    assert json.loads((directory / "run.json").read_text()) == {"schema": SCHEMA_VERSION, "run": "run"}


def test_a_folder_that_is_there_already_is_not_written_into(tmp_path: Path) -> None:
    """Two runs never share a log."""
    with pytest.raises(FileExistsError):
        RunLog(tmp_path, {})


def test_events_come_in_any_number_and_from_any_thread(tmp_path: Path) -> None:
    """Several threads append thousands of events, and none is lost or torn, each thread's in its order."""
    log = RunLog(tmp_path / "run", {})

    def append(rank: int) -> None:
        for number in range(2500):
            log.append(Lost(rank=rank, reports=number))

    threads = [threading.Thread(target=append, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = list(read(log.directory))
    for rank in range(4):
        mine = [event.reports for event in events if isinstance(event, Lost) and event.rank == rank]
        assert mine == list(range(2500))
    assert len(events) == 10_000


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    """A log that is closed again stays as it is."""
    log = RunLog(tmp_path / "run", {})
    log.append(notice(0))
    log.close()
    log.close()
    assert list(read(log.directory)) == [notice(0)]


# --- logs that are damaged, newer or not there ---------------------------------------------------------------------------


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    """Wherever a crash cut the last line, in the middle of a character too, all lines before it are read."""
    directory = written(tmp_path / "run", [*EVENTS, notice(1)])
    path = directory / "events.jsonl"
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert list(read(directory)) == EVENTS


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b"\x00\x00\x00",
        b'{"type":"martian"}',
        b'{"type":"lost"}',
        b'{"type":"refused","reason":"\xff","pid":1,"at":0}',
    ],
)
def test_a_line_that_is_no_event_is_passed_over(line: bytes, tmp_path: Path) -> None:
    """Garbage between two events costs neither of them."""
    directory = written(tmp_path / "run", [notice(0), notice(1)])
    path = directory / "events.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second]) + b"\n")
    assert list(read(directory)) == [notice(0), notice(1)]


def test_a_field_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    """Fields are only ever added: an event with one that this version does not know is read without it."""
    directory = written(tmp_path / "run", [])
    (directory / "events.jsonl").write_text('{"type":"lost","rank":1,"reports":2,"since":"later"}\n')
    assert list(read(directory)) == [Lost(rank=1, reports=2)]


def test_a_field_that_an_older_version_did_not_write_has_its_default(tmp_path: Path) -> None:
    """A log that was written before a field was added stays readable."""
    directory = written(tmp_path / "run", [])
    (directory / "events.jsonl").write_text('{"type":"plan","number":0,"start":0,"stop":20,"shares":[1,1]}\n')
    assert list(read(directory)) == [Plan(number=0, start=0, stop=20, shares=[1, 1])]


def test_a_log_of_a_newer_schema_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    """A log that this version cannot read is refused in one sentence."""
    newer = RunStarted(schema=SCHEMA_VERSION + 1, run="r", command=[], at=0.0)
    directory = written(tmp_path / "run", [newer, notice(1)])
    with pytest.raises(AdarunError) as error:
        list(read(directory))
    assert str(error.value) == (
        f"{directory / 'events.jsonl'} was written by a newer adarun (schema {SCHEMA_VERSION + 1}); "
        "update adarun to read it"
    )


def test_a_log_that_is_not_there_is_an_error_that_says_where(tmp_path: Path) -> None:
    """A folder without a log is told from an empty log."""
    with pytest.raises(AdarunError, match=f"there is no run log at {tmp_path / 'events.jsonl'} "):
        list(read(tmp_path))
    assert list(read(written(tmp_path / "run", []))) == []


# --- a disk that is full -------------------------------------------------------------------------------------------------


class FullDisk:
    """In place of os.write: for the log's file, does what it is told, write by write, and from then on what is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script: list[Callable[[int, bytes], int]] = []
        self.began, self.go_on = threading.Event(), threading.Event()
        self._write = os.write
        monkeypatch.setattr("adarun.runlog.os.write", self)

    def __call__(self, file: int, data: bytes) -> int:
        if self.script and Path(f"/proc/self/fd/{file}").readlink().name == "events.jsonl":
            return self.script.pop(0)(file, data)
        return self._write(file, data)

    def fail(self, _file: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def up_to(self, num_bytes: int) -> Callable[[int, bytes], int]:
        """Write so much and no more."""
        return lambda file, data: self._write(file, data[:num_bytes])

    def wait_then(self, then: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
        """Wait for the test, so that what it appends meanwhile is written at once."""

        def write(file: int, data: bytes) -> int:
            self.began.set()
            self.go_on.wait()
            return then(file, data)

        return write


def run_on_a_full_disk(
    tmp_path: Path, disk: FullDisk, first: Callable[[int, bytes], int], *rest: Callable[[int, bytes], int]
) -> RunLog:
    """Append event 0, and events 1 to 3 while it is being written, so that they are the next write."""
    disk.script = [disk.wait_then(first), *rest]
    log = RunLog(tmp_path / "run", {})
    log.append(notice(0))
    disk.began.wait()
    for number in (1, 2, 3):
        log.append(notice(number))
    disk.go_on.set()
    log.close()
    assert disk.script == []
    return log


def test_events_that_could_not_be_written_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails loses its own events, which are counted; the next one succeeds."""
    disk = FullDisk(monkeypatch)
    log = run_on_a_full_disk(tmp_path, disk, disk.fail)
    assert list(read(log.directory)) == [notice(1), notice(2), notice(3)]
    assert log.num_lost == 1


def test_a_failing_write_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However often the log cannot be written, the user is told once, with the reason, and the job goes on."""
    disk = FullDisk(monkeypatch)
    log = run_on_a_full_disk(tmp_path, disk, disk.fail, disk.fail)
    assert capsys.readouterr().err == (
        "adarun: the run log cannot be written ([Errno 28] No space left on device); training goes on without it\n"
    )
    assert log.num_lost == 4


def test_a_line_that_the_full_disk_tore_costs_no_later_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a line that was written in part, the next event begins on a line of its own."""
    disk = FullDisk(monkeypatch)
    log = run_on_a_full_disk(tmp_path, disk, disk.up_to(10), disk.fail)
    assert list(read(log.directory)) == [notice(1), notice(2), notice(3)]
    assert log.num_lost == 1


def test_a_write_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes a few bytes at a time loses nothing."""
    disk = FullDisk(monkeypatch)
    log = run_on_a_full_disk(tmp_path, disk, disk.up_to(10), disk.up_to(1), disk.up_to(20))
    assert list(read(log.directory)) == [notice(number) for number in range(4)]
    assert log.num_lost == 0


# Three lines have 219 bytes; none of these ends a line but for its newline, which would make it lost and readable.
@pytest.mark.parametrize("num_bytes", range(0, 217, 21))
@pytest.mark.parametrize("torn_before", [False, True])
def test_what_is_not_read_again_is_counted_as_lost(
    num_bytes: int, torn_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the disk fills up, in a line or between two, after a torn line or not: what is missing is what is counted."""
    disk = FullDisk(monkeypatch)
    first = [disk.up_to(10), disk.fail] if torn_before else [disk.fail]
    log = run_on_a_full_disk(tmp_path, disk, *first, disk.up_to(num_bytes), disk.fail)
    events = list(read(log.directory))
    assert events == [notice(number) for number in range(1, 1 + len(events))]
    assert log.num_lost == 4 - len(events)

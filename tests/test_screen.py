"""What the screen shows, as data and as lines: from events to rows to exactly as many characters as there are."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from adarun.events import (
    Attached,
    Decision,
    Hello,
    Loop,
    Lost,
    Notice,
    Plan,
    Refused,
    Resources,
    RunEnded,
    Snapshot,
    Step,
    Window,
    WorkerNow,
    WorkersEnded,
    WorkersStarted,
)
from adarun.screen.model import HISTORY_SECONDS, About, Model, epochs_of
from adarun.screen.rows import Looking, MoreRow, NodeRow, press, table, window
from adarun.screen.straggler import straggler
from adarun.screen.view import ASCII, UNICODE, Drawing, chart, glyphs_for, plain, screen, wrapped

ABOUT = About(run="20260101-101010-train-1a2b", command=["train.py", "--epochs", "3"], host="here", started=1000.0)


def hello(rank: int, host: str = "here") -> Hello:
    return Hello(
        rank=rank,
        local_rank=rank,
        world_size=2,
        num_nodes=1,
        attempt=0,
        pid=100 + rank,
        host=host,
        device="cpu",
        torch="2.11",
    )


def a_step(rank: int, step: int, *, busy: float = 0.06, wait: float = 0.04, samples: int = 32, **more: Any) -> Step:
    phases = {"data": 0.01, "forward": 0.02, "backward": busy - 0.03, "wait": wait, "update": 0.0, **more}
    return Step(rank=rank, step=step, samples=samples, ended=1000.0 + (step + 1) * (busy + wait), **phases)


def started(num_workers: int = 2, attempt: int = 0) -> WorkersStarted:
    return WorkersStarted(attempt, list(range(num_workers)), num_workers, 1, 0, 1000.0)


def trained(num_steps: int = 40) -> Model:
    """Two workers, of which rank 1 is busy for 0.1 s a step and rank 0 waits for it."""
    model = Model(ABOUT)
    model.see(started())
    for rank in range(2):
        model.see(Attached(hello=hello(rank), at=1000.0))
    model.see(Plan(0, 0, 100, [32, 32]))
    for step in range(num_steps):
        model.see(a_step(0, step))
        model.see(a_step(1, step, busy=0.1, wait=0.0))
    return model


def worker(rank: int, **more: Any) -> WorkerNow:
    usual = {"share": 32, "busy_seconds": 0.05, "wait_seconds": 0.05, "cpu_fraction": 0.6, "state": "training"}
    return WorkerNow(**{"rank": rank, "node": "here", "device": "cpu", "pid": 1, **usual, **more})


def snapshot_of(workers: list[WorkerNow], **more: Any) -> Snapshot:
    return msgspec.structs.replace(Model(ABOUT).snapshot(1010.0), workers=workers, **more)


def text_of(lines: list[list[tuple[str, str]]]) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


# --- the model -----------------------------------------------------------------------------------------------------------


def test_a_snapshot_says_what_each_worker_does() -> None:
    """Phases are means of the last steps, rates samples per second, totals of the whole run."""
    seen = trained().snapshot(1004.0)
    first, second = seen.workers
    assert (first.rank, first.node, first.pid, first.state, first.share, first.step) == (
        0,
        "here",
        100,
        "training",
        32,
        39,
    )
    assert (first.busy_seconds, first.wait_seconds, first.data_seconds) == pytest.approx((0.06, 0.04, 0.01))
    assert first.samples_per_second == pytest.approx(320.0)
    assert seen.samples_per_second == pytest.approx(640.0)
    assert (second.total_steps, second.total_samples) == (40, 40 * 32)
    assert second.total_busy_seconds == pytest.approx(4.0)
    assert (seen.step, seen.state, seen.script) == (39, "training", "train.py")
    assert (seen.straggler, seen.cause) == (1, "compute")


def test_means_are_of_the_present_shares() -> None:
    """Once steps under new shares are there, those under the old ones no longer count."""
    model = trained()
    model.see(Plan(1, 40, 100, [44, 20]))
    model.see(a_step(0, 40, busy=0.08, samples=44))
    first = model.snapshot(1004.0).workers[0]
    assert (first.share, first.busy_seconds) == (44, pytest.approx(0.08))


def test_uncounted_steps_are_left_out() -> None:
    """A step that holds an evaluation does not move the means."""
    model = trained()
    model.see(msgspec.structs.replace(a_step(0, 40, busy=9.0), counted=False))
    assert model.snapshot(1004.0).workers[0].busy_seconds == pytest.approx(0.06)


def test_the_history_is_of_whole_steps() -> None:
    """Each point of the history is samples per second over the lead's own steps, however long these are."""
    assert trained(400).snapshot(1040.0).history == pytest.approx([640.0] * int(40 / HISTORY_SECONDS + 1), rel=0.06)


def test_the_gain_is_what_the_windows_say() -> None:
    """Gain over the even split: what the same steps would have taken with even shares, by the fitted costs."""
    model = trained()
    assert model.snapshot(1004.0).gain is None
    model.see(Window(0, 20, 0.10, [48.0, 16.0], [0.1, 0.1], [0.0, 0.0], [0.01, 0.01]))
    costs = ([0.0, 0.0], [0.1 / 48, 0.1 / 16])
    model.see(Decision(0, [48, 16], [48, 16], [48, 16], *costs, 0.0, 0.02, "kept: it is good", at=5.0))
    seen = model.snapshot(1004.0)
    assert (seen.gain, seen.gain_error) == (pytest.approx(1.0), 0.02)
    assert [(said.text, said.changed) for said in seen.decisions] == [("kept: it is good", False)]


def test_time_left_comes_from_the_script_s_own_epochs() -> None:
    """After one epoch the rest is foreseen, from --epochs and the length of the last one."""
    model = trained()
    for epoch in range(2):
        model.see(Loop(step=20 * epoch, at=1000.0 + 60 * epoch, epoch=epoch, rank=0))
    seen = model.snapshot(1080.0)
    assert (seen.epoch, seen.num_epochs, seen.left_seconds) == (2, 3, pytest.approx(100.0))
    model.about = msgspec.structs.replace(ABOUT, command=["train.py"])
    assert model.snapshot(1080.0).left_seconds is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.py --epochs 7", 7),
        ("a.py --num_epochs=8", 8),
        ("a.py --max-epochs 9", 9),
        ("a.py", None),
        ("a.py --x-epochs 3", None),
    ],
)
def test_epochs_of_a_command_line(words: str, expected: int | None) -> None:
    """How long the job is, is read from the usual options."""
    assert epochs_of(words.split()) == expected


def test_states_of_workers_and_job() -> None:
    """A worker starts, trains, falls silent, and is gone; the job's state follows."""
    model = Model(ABOUT)
    assert model.snapshot(1000.0).state == "starting"
    model.see(started())
    assert [row.state for row in model.snapshot(1000.0).workers] == ["starting", "starting"]
    model.see(a_step(0, 0))
    assert [row.state for row in model.snapshot(1001.0).workers] == ["training", "starting"]
    seen = model.snapshot(1100.0)
    assert (seen.state, seen.workers[0].state) == ("silent", "silent")
    assert seen.warnings == ["rank 0 has not reported for a while"]
    model.see(WorkersEnded(0, "RETUNED", 1.0))
    assert model.snapshot(1100.0).state == "restarting"
    model.see(started(attempt=1))
    assert [row.state for row in model.snapshot(1100.0).workers] == ["starting", "starting"]
    model.see(RunEnded(3, 1.0))
    ended = model.snapshot(1100.0)
    assert (ended.state, ended.exit_code, ended.attempt) == ("ended", 3, 1)


def test_warnings_name_what_the_user_should_know() -> None:
    """Notices, lost reports and refused clients are warnings; what freezes the split is the guard's word too."""
    model = trained()
    model.see(Notice(key="k", text="BatchNorm is local", freezes=True))
    model.see(Lost(rank=0, reports=3))
    model.see(Refused("it floods", 77, 1.0))
    seen = model.snapshot(1004.0)
    assert seen.guard == "the split stays even: BatchNorm is local"
    assert seen.warnings == [
        "BatchNorm is local",
        "3 reports were lost, since the hub read too slowly",
        "clients turned away: 1; the last one, process 77: it floods",
    ]


def test_recent_steps_are_sent_only_if_asked_for() -> None:
    """A snapshot holds single steps only of the ranks that somebody looks at."""
    model = trained()
    assert model.snapshot(1004.0).recent == {}
    recent = model.snapshot(1004.0, [1, 9]).recent
    assert (list(recent), [step.step for step in recent[1]]) == ([1], list(range(40)))


def test_a_snapshot_survives_the_socket_and_json() -> None:
    """What a viewer decodes is what the hub has encoded."""
    model = trained()
    model.see(Resources(0, 0.9, 1 << 28, 1.0))
    seen = model.snapshot(1004.0, [0])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(seen), type=Snapshot) == seen
    assert msgspec.json.decode(msgspec.json.encode(seen), type=Snapshot) == seen


# --- who holds the others back -------------------------------------------------------------------------------------------

SLOW = {"busy_seconds": 0.1, "wait_seconds": 0.0}


@pytest.mark.parametrize(
    ("slow", "cause", "words"),
    [
        ({**SLOW}, "compute", "3.12 ms a sample, the others 1.56 ms"),
        ({**SLOW, "data_seconds": 0.05}, "data", "waits 50.0 ms for its data"),
        ({**SLOW, "cpu_fraction": 0.5}, "cpu", "gets 50% of a core, throttled or shared"),
        ({**SLOW, "gpu_fraction": 1.0, "gpu_memory_bytes": 95, "gpu_capacity_bytes": 100}, "memory", "95% full"),
        ({**SLOW, "share": 64}, "share", "its share of 64 samples is large for it"),
        ({**SLOW, "share": None}, "compute", "computes for longer"),
    ],
    ids=["compute", "data", "cpu", "memory", "share", "unknown share"],
)
def test_the_cause_is_named(slow: dict[str, Any], cause: str, words: str) -> None:
    """Who holds the others back is named with the one cause that explains it."""
    others = [worker(rank, cpu_fraction=1.0 if "cpu_fraction" in slow else 0.3) for rank in (0, 2)]
    rank, found, text = straggler([others[0], worker(1, **slow), others[1]])
    assert (rank, found) == (1, cause)
    assert words in text
    assert text.startswith("rank 1 holds the others back by 50.0 ms: ")


@pytest.mark.parametrize("workers", [[], [worker(0)], [worker(0), worker(1, busy_seconds=0.053)]], ids=len)
def test_equal_workers_hold_nobody_back(workers: list[WorkerNow]) -> None:
    """With one worker, or with equal ones, none is marked."""
    assert straggler(workers) == (None, "", "")


# --- rows and keys -------------------------------------------------------------------------------------------------------


def many(num_workers: int = 1000, num_nodes: int = 8) -> Snapshot:
    """A thousand workers on eight nodes; rank 777 is the slowest."""
    rows = [
        worker(rank, node=f"node{rank % num_nodes}", busy_seconds=0.09 if rank == 777 else 0.05 + rank * 1e-6)
        for rank in range(num_workers)
    ]
    return snapshot_of(rows, world_size=num_workers, straggler=777)


def test_a_thousand_workers_are_grouped_by_node_the_worst_first() -> None:
    """The node of the slowest worker comes first, and of each node its three slowest, with how many there are besides."""
    rows = table(many(), Looking(), 20)
    assert isinstance(rows[0], NodeRow)
    assert (rows[0].node, rows[0].num_workers) == ("node1", 125)
    assert [row.rank for row in rows[1:4] if isinstance(row, WorkerNow)] == [777, 993, 985]
    assert rows[4] == MoreRow(122)
    assert len(rows) == 8 * 5
    assert len(table(many(), Looking(everything=True), 20)) == 1008


@pytest.mark.parametrize(
    ("sort", "expected"), [("slowest", [2, 0, 1]), ("rank", [0, 1, 2]), ("memory", [1, 0, 2]), ("rate", [0, 2, 1])]
)
def test_workers_are_sorted(sort: str, expected: list[int]) -> None:
    """Each order has first what is most by its name; whoever is in trouble is first by default."""
    rows = [
        worker(0, busy_seconds=0.3, memory_bytes=2, samples_per_second=9.0),
        worker(1, busy_seconds=0.2, memory_bytes=3, samples_per_second=7.0),
        worker(2, busy_seconds=0.1, memory_bytes=1, samples_per_second=8.0, state="silent"),
    ]
    shown = table(snapshot_of(rows), Looking(sort=sort), None)
    assert [row.rank for row in shown if isinstance(row, WorkerNow)] == expected


def test_keys_change_what_is_looked_at() -> None:
    """Each key does what the help says, and Esc leads back."""
    seen = snapshot_of([worker(0, busy_seconds=0.3), worker(1), worker(2)])

    def after(*keys: str) -> Looking:
        looking = Looking()
        for key in keys:
            looking = press(looking, key, seen, 10)
        return looking

    assert after("s").sort == "waiting"
    assert after(*["s"] * 6).sort == "slowest"
    assert after("p").paused
    assert not after("p", "p").paused
    assert [after(*keys).rank for keys in (["down"], ["down"] * 2, ["down"] * 9, ["down", "down", "up"])] == [
        0,
        1,
        2,
        0,
    ]
    assert (after("enter").page, after("enter").rank) == ("worker", 0)
    assert [after(*keys).page for keys in ("d", "h", "?", "dd", ["d", "escape"])] == [
        "decisions",
        "help",
        "help",
        "workers",
        "workers",
    ]
    assert [after(*keys).done for keys in ("q", ["escape"], ["d", "escape"], "x")] == [True, True, False, False]


def test_the_picked_worker_stays_in_sight() -> None:
    """Wherever the picked worker is in a long table, it is among the rows that are shown."""
    seen = many(100, 1)
    rows = table(seen, Looking(), 10)
    for rank in range(100):
        shown = window(rows, Looking(rank=rank), 10)
        assert len(shown) == 10
        assert any(isinstance(row, WorkerNow) and row.rank == rank for row in shown)
    assert window(rows, Looking(), 10)[-1] == MoreRow(92)


# --- lines ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    width=st.integers(1, 250),
    height=st.integers(1, 80),
    num_workers=st.sampled_from([0, 1, 2, 64, 1000]),
    page=st.sampled_from(["workers", "worker", "decisions", "help"]),
    name=st.sampled_from(["node", "知識", "\x1b[31mred\x07", "a" * 300]),
)
def test_a_screen_is_as_large_as_the_terminal(width: int, height: int, num_workers: int, page: str, name: str) -> None:
    """Whatever terminal and job are, no line is too many or too wide, or holds what a terminal takes for a command."""
    rows = [worker(rank, node=f"{name}{rank % 3}") for rank in range(num_workers)]
    told = trained().snapshot(1004.0, [0])
    seen = msgspec.structs.replace(told, workers=rows, warnings=[f"{name} is odd"] * 9, cause_text=name)
    drawn = text_of(screen(seen, Looking(page=page, rank=0), width, height, UNICODE))
    assert len(drawn) <= height
    assert max(cell_len(line) for line in drawn) <= width
    assert all(line.isprintable() for line in drawn)


def test_the_straggler_is_marked_without_colour() -> None:
    """The mark, the words and the signs of the bars are in the text, so nothing is lost without colours."""
    drawn = text_of(screen(trained().snapshot(1004.0), Looking(), 80, 24, UNICODE))
    assert drawn[3].startswith("▶ rank 1 holds the others back by 40.0 ms: 2.81 ms a sample, the others 1.56 ms")
    (row,) = [line for line in drawn if line.startswith("▶    1 ")]
    assert "█" in row
    assert "▒" in row


def test_a_terminal_without_unicode_gets_ascii() -> None:
    """Where the encoding has no blocks the screen is plain ASCII."""
    assert (glyphs_for("utf-8"), glyphs_for("UTF8"), glyphs_for("ascii")) == (UNICODE, UNICODE, ASCII)
    assert all(line.isascii() for line in text_of(plain(trained().snapshot(1004.0), 120, ASCII)))


@pytest.mark.parametrize(("variable", "coloured"), [("NO_COLOR", False), ("NOTHING", True)])
def test_no_color_is_respected(variable: str, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR set no colour is sent to the terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=80).print(
        Drawing(screen(trained().snapshot(1004.0), Looking(), 80, 24, UNICODE))
    )
    assert ("\x1b[32m" in out.getvalue()) is coloured


def test_a_plan_with_knobs_names_them() -> None:
    """What is not as under torchrun stands in the plan's line."""
    model = trained()
    model.see(Plan(1, 40, 80, [32, 32], sync_period=8, compression="bf16", topology="gossip", outer="nesterov"))
    drawn = " ".join(text_of(plain(model.snapshot(1004.0), 120, UNICODE)))
    assert "synchronised every 8 steps, compression bf16, gossip, outer nesterov" in drawn


def test_the_chart_stacks_the_phases() -> None:
    """A column is a step: computing below, data on it, waiting on top, and the longest step reaches the top."""
    steps = [a_step(0, 0, busy=0.05, wait=0.05), a_step(0, 1, busy=0.05, wait=0.0)]
    drawn = text_of(chart(steps, 40, 11, UNICODE))
    columns = ["".join(line[11 + at] if len(line) > 11 + at else " " for line in drawn[:-1]) for at in range(2)]
    assert columns == ["·····▒████", "     ▒████"]
    assert drawn[0].startswith("  100.0 ms")


@settings(deadline=None, derandomize=True, database=None)
@given(words=st.lists(st.text("abc", min_size=1, max_size=30), max_size=20), width=st.integers(10, 60))
def test_wrapped_texts_lose_nothing(words: list[str], width: int) -> None:
    """A text in lines has all its words, and a line is longer than the screen only for a word that is."""
    lines = wrapped(" ".join(words), width)
    assert " ".join(lines).split() == words
    assert all(len(line) <= max(width, max(map(len, words), default=0) + 2) for line in lines)

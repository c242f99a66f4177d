"""Draws what the model knows: lines of styled text, exactly as wide and as high as the screen.

Lines are made by hand: rich's tables would take most of the time that a viewer may use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from adarun.events import Plan, Snapshot, Step, WorkerNow
from adarun.screen.rows import Looking, MoreRow, NodeRow, Row, table, waiting, window

Line = list[tuple[str, str]]

KEYS = [
    ("s", "sort by the next of: slowest, waiting, data, memory, rate, rank"),
    ("up, down", "pick a worker"),
    ("Enter", "the picked worker: its recent steps as a chart"),
    ("a", "all workers of every node, or only the first few"),
    ("d", "the decisions"),
    ("p", "pause the screen; the job goes on"),
    ("h, ?", "this help"),
    ("Esc", "back"),
    ("q", "quit; the job goes on"),
]
FOOTER = "s sort ({sort})  p pause  arrows, Enter: a worker  d decisions  h help  q quit"


@dataclass(frozen=True)
class Glyphs:
    """What bars are made of: every part has its own sign, so that nothing rests on colour."""

    compute: str
    data: str
    wait: str
    share: str
    mark: str
    heights: str


UNICODE = Glyphs("█", "▒", "·", "■", "▶", " ▁▂▃▄▅▆▇█")
ASCII = Glyphs("#", "=", ".", "*", ">", " .:-=+*%#")


def glyphs_for(encoding: str) -> Glyphs:
    """What an output of this encoding can show."""
    return UNICODE if encoding.lower().replace("-", "").startswith("utf") else ASCII


class Drawing:
    """Lines, as something that rich can print."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Each line as it is: its width is right already."""
        for number, line in enumerate(self._lines):
            if number:
                yield Segment.line()
            for text, style in line:
                yield Segment(text, STYLES[style])


STYLES = {
    name: Style.parse(name)
    for name in ("none", "bold", "dim", "green", "yellow", "cyan", "magenta", "red", "bold red", "reverse")
}


def fit(line: Line, width: int) -> Line:
    """Cut a line where the screen ends; what a terminal would take for a command becomes a question mark."""
    fitted: Line = []
    for text, style in line:
        clean = text if text.isprintable() else "".join(sign if sign.isprintable() else "?" for sign in text)
        size = len(clean) if clean.isascii() else cell_len(clean)
        if size > width:
            fitted.append((set_cell_size(clean, width), style))
            return fitted
        fitted.append((clean, style))
        width -= size
    return fitted


def wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """A text in lines, all but the first indented."""
    lines, line = [], ""
    for word in text.split():
        if line.strip() and cell_len(line) + 1 + cell_len(word) > width:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line.strip() else line + word
    return [*lines, line]


def clock(seconds: float) -> str:
    """12:31, or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory(num_bytes: int | None) -> str:
    """416 MiB, or 12.3 GiB."""
    if num_bytes is None:
        return "-"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 10000 * 2**20 else f"{num_bytes / 2**30:.1f} GiB"


def milliseconds(seconds: float) -> str:
    """54.8 ms; without decimals from a second on."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 1.0 else f"{seconds * 1e3:.0f} ms"


def spark(values: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """The last values as a row of heights from zero to the largest."""
    last = values[-width:] if width > 0 else []
    top = max(last, default=0.0) or 1.0
    steps = len(glyphs.heights) - 1
    return "".join(glyphs.heights[max(1, round(value / top * steps))] for value in last)


# --- the screen ------------------------------------------------------------------------------------------------------


def screen(snapshot: Snapshot, looking: Looking, width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """The whole screen of a running job."""
    head = head_lines(snapshot, width, glyphs)
    footer: Line = [(FOOTER.format(sort=looking.sort), "dim")]
    if looking.paused:
        footer = [("PAUSED ", "reverse"), *footer]
    room = max(1, height - len(head) - 1)
    if looking.page == "decisions":
        body = decision_lines(snapshot, width)[:room]
    elif looking.page == "help":
        body = help_lines(glyphs)[:room]
    elif looking.page == "worker":
        body = worker_lines(snapshot, looking.rank, width, room, glyphs)[:room]
    else:
        body = workers_page(snapshot, looking, width, room, glyphs)
    body += [[] for _ in range(room - len(body))]
    return [fit(line, width) for line in [*head, *body, footer]][:height]


def room_for_rows(snapshot: Snapshot, width: int, height: int) -> int:
    """How many rows of the table the screen has."""
    head = head_lines(snapshot, width, ASCII)
    return max(1, height - len(head) - 1 - 1 - len(foot_lines(snapshot, width, height - len(head) - 1)))


def plain(snapshot: Snapshot, width: int, glyphs: Glyphs) -> list[Line]:
    """Everything at once, for what is no terminal."""
    rows = table(snapshot, Looking(), None)
    columns = columns_for(width)
    lines = [*head_lines(snapshot, width, glyphs), [], heading(columns, glyphs)]
    lines += [row_line(row, snapshot, columns, Looking(), glyphs) for row in rows]
    return [fit(line, width) for line in [*lines, *foot_lines(snapshot, width, 1000)]]


def head_lines(snapshot: Snapshot, width: int, glyphs: Glyphs) -> list[Line]:
    """What the job is, how far it is, how fast it is, who holds it back."""
    title = f"{snapshot.script}  {snapshot.state}"
    if snapshot.exit_code is not None:
        title += f" with exit code {snapshot.exit_code}"
    facts = [f"elapsed {clock(max(0.0, snapshot.at - snapshot.started))}"]
    if snapshot.epoch is not None:
        facts.append(f"epoch {snapshot.epoch}" + (f" of {snapshot.num_epochs}" if snapshot.num_epochs else ""))
    if snapshot.step is not None:
        facts.append(f"step {snapshot.step}")
    if snapshot.left_seconds is not None:
        facts.append(f"ETA {clock(snapshot.left_seconds)}")
    facts.append(f"{snapshot.world_size} workers")
    if snapshot.attempt:
        facts.append(f"restart {snapshot.attempt}")
    gain = ""
    if snapshot.gain is not None:
        gain = f"  {snapshot.gain:+.0%} over the even split"
        gain += f" (give or take {snapshot.gain_error:.0%})" if snapshot.gain_error is not None else ""
    rate = f"{snapshot.samples_per_second:.0f} samples/s "
    history = spark(snapshot.history, min(60, max(0, width - len(rate) - len(gain))), glyphs)
    return [
        [
            (title, "bold"),
            (" " * max(2, width - cell_len(title) - cell_len(snapshot.run)), "none"),
            (snapshot.run, "dim"),
        ],
        [("   ".join(facts), "none")],
        [(rate, "bold"), (history, "cyan"), (gain, "none")],
        straggler_line(snapshot, glyphs),
    ]


def straggler_line(snapshot: Snapshot, glyphs: Glyphs) -> Line:
    """Who holds the others back."""
    if snapshot.straggler is not None:
        return [(f"{glyphs.mark} {snapshot.cause_text}", "bold red")]
    if any(row.busy_seconds for row in snapshot.workers):
        return [("no worker holds the others back", "none")]
    return [("no step was measured yet", "none")]


@dataclass(frozen=True)
class Columns:
    """How wide the table's columns are; 0 is left out."""

    phases: int
    share: int = 6
    numbers: bool = False
    pid: bool = False


def columns_for(width: int) -> Columns:
    """Columns that fill a screen of this width."""
    numbers, pid = width >= 110, width >= 130
    share = 6 if width < 110 else 16
    taken = 55 + share + (31 if numbers else 0) + (17 if pid else 0)
    return Columns(max(8, min(100, width - taken)), share, numbers, pid)


def heading(columns: Columns, glyphs: Glyphs) -> Line:
    """The names of the columns."""
    phases = f"{glyphs.compute}busy {glyphs.data}data {glyphs.wait}wait"
    if columns.phases < len(phases):
        phases = f"{glyphs.compute}b {glyphs.data}d {glyphs.wait}w"
    text = f"  rank device share {'':<{columns.share}} {set_cell_size(phases, columns.phases)}"
    if columns.numbers:
        text += f" {'busy':>9} {'data':>9} {'wait':>10}"
    text += f" {'samples/s':>9} {'memory':>9} {'use':>4} {'state':<8}"
    if columns.pid:
        text += f" {'step':>8} {'process':>7}"
    return [(text, "dim")]


def row_line(row: Row, snapshot: Snapshot, columns: Columns, looking: Looking, glyphs: Glyphs) -> Line:
    """One row of the table."""
    if isinstance(row, MoreRow):
        return [(f"  ... {row.num_workers} more", "dim")]
    if isinstance(row, NodeRow):
        workers = "worker" if row.num_workers == 1 else "workers"
        text = f"{row.node or 'not attached'}: {row.num_workers} {workers}, {row.samples_per_second:.0f} samples/s"
        if row.slowest_seconds:
            text += f", slowest busy {milliseconds(row.slowest_seconds)}, waiting {row.waiting:.0%}"
        return [(text, "magenta")]
    return worker_line(row, snapshot, columns, looking, glyphs)


def worker_line(row: WorkerNow, snapshot: Snapshot, columns: Columns, looking: Looking, glyphs: Glyphs) -> Line:
    """A worker's row."""
    slow = row.rank == snapshot.straggler
    signs = (glyphs.mark if slow else " ") + (">" if row.rank == looking.rank else " ")
    style = "reverse" if row.rank == looking.rank else "bold red" if slow else "none"
    largest = max(other.share or 0 for other in snapshot.workers) or 1
    bar = glyphs.share * round((row.share or 0) / largest * columns.share)
    share = "-" if row.share is None else str(row.share)
    use = row.gpu_fraction if row.gpu_fraction is not None else row.cpu_fraction
    used = row.gpu_memory_bytes if row.gpu_memory_bytes is not None else row.memory_bytes
    line: Line = [
        (f"{signs}{row.rank:>4} {row.device or '-':<6.6} {share:>5} ", style),
        (f"{bar:<{columns.share}} ", "cyan"),
        *phases_bar(row, columns.phases, glyphs),
    ]
    if columns.numbers:
        line.append(
            (
                f" {milliseconds(row.busy_seconds):>9} {milliseconds(row.data_seconds):>9}"
                f" {milliseconds(row.wait_seconds):>10}",
                "none",
            )
        )
    line.append(
        (
            f" {row.samples_per_second:>9.0f} {memory(used):>9} {'-' if use is None else f'{use:.0%}':>4} {row.state:<8}",
            style,
        )
    )
    if columns.pid:
        line.append((f" {'-' if row.step is None else row.step:>8} {row.pid or '-':>7}", "none"))
    return line


def phases_bar(row: WorkerNow, width: int, glyphs: Glyphs) -> Line:
    """A step as one bar: computing, waiting for data, waiting for the others."""
    total = row.busy_seconds + row.wait_seconds
    if not total:
        return [(" " * width, "none")]
    wait = round(row.wait_seconds / total * width)
    data = min(width - wait, round(row.data_seconds / total * width))
    compute = width - wait - data
    return [(glyphs.compute * compute, "green"), (glyphs.data * data, "yellow"), (glyphs.wait * wait, "red")]


def workers_page(snapshot: Snapshot, looking: Looking, width: int, room: int, glyphs: Glyphs) -> list[Line]:
    """The table, and below it the plan, the last decisions and the warnings."""
    foot = foot_lines(snapshot, width, room)
    free = max(1, room - 1 - len(foot))
    columns = columns_for(width)
    rows = window(table(snapshot, looking, free), looking, free)
    lines = [heading(columns, glyphs)]
    lines += [row_line(row, snapshot, columns, looking, glyphs) for row in rows]
    lines += [[] for _ in range(free - len(rows))]
    return [*lines, *foot]


def foot_lines(snapshot: Snapshot, width: int, room: int) -> list[Line]:
    """Plan, guard, decisions, warnings: as much of it as there is room for."""
    lines: list[Line] = [[(plan_text(snapshot.plan), "bold")]] if snapshot.plan else []
    if snapshot.setting:
        lines.append([(f"setting: {snapshot.setting}", "none")])
    knobs = [knobs_text(snapshot.plan)] if snapshot.plan else []
    guard = [f"guard: {snapshot.guard}"] if snapshot.guard else []
    both = "; ".join([*knobs, *guard])
    lines += [[(text, "none")] for text in ([both] if cell_len(both) <= width else [*knobs, *guard]) if text]
    few = 3 if room < 30 else 8
    for said in snapshot.decisions[-few:]:
        sign = "* " if said.changed else "  "
        lines.append([(f"{time.strftime('%H:%M:%S', time.localtime(said.at))} {sign}", "dim"), (said.text, "none")])
    for warning in snapshot.warnings[: few - 1]:
        texts = wrapped(f"! {warning}", width)
        lines += [[(text, "yellow")] for text in texts[: 1 if room < 30 else 3]]
    return lines


def plan_text(plan: Plan) -> str:
    """The steps of the plan and its shares."""
    shares = ",".join(map(str, plan.shares[:8])) + (",..." if len(plan.shares) > 8 else "")
    return f"plan {plan.number}: steps {plan.start} to {plan.stop - 1}, shares {shares}"


def knobs_text(plan: Plan) -> str:
    """How the plan has the workers synchronise; what is not as under torchrun is named."""
    period = "every step" if plan.sync_period == 1 else f"every {plan.sync_period} steps"
    text = f"synchronised {period}, compression {plan.compression}"
    if plan.topology != "allreduce":
        text += f", {plan.topology}"
    if plan.outer != "none":
        text += f", outer {plan.outer}"
    return text


def decision_lines(snapshot: Snapshot, width: int) -> list[Line]:
    """All decisions that are known, the newest first."""
    lines: list[Line] = [[(f"decisions, newest first; * changed something ({snapshot.num_changes} so far)", "dim")]]
    for said in reversed(snapshot.decisions):
        when = time.strftime("%H:%M:%S", time.localtime(said.at))
        texts = wrapped(f"{when} {'*' if said.changed else ' '} {said.text}", width, " " * 11)
        lines += [[(text, "bold" if said.changed else "none")] for text in texts]
    return lines


def help_lines(glyphs: Glyphs) -> list[Line]:
    """The keys, and what the bars are made of."""
    lines: list[Line] = [[(f"{key:>10}  ", "bold"), (text, "none")] for key, text in KEYS]
    signs = [
        (glyphs.compute, "green", "busy: forward, backward, update"),
        (glyphs.data, "yellow", "waiting for its data; part of busy"),
        (glyphs.wait, "red", "waiting for the other workers"),
        (glyphs.mark, "bold red", "holds the others back"),
    ]
    return [*lines, [], *([(f"{sign:>10}  ", style), (text, "none")] for sign, style, text in signs)]


def worker_lines(snapshot: Snapshot, rank: int, width: int, room: int, glyphs: Glyphs) -> list[Line]:
    """One worker: what is known of it, and its recent steps as a chart."""
    row = next((row for row in snapshot.workers if row.rank == rank), None)
    if row is None:
        return [[(f"there is no rank {rank} now", "none")]]
    lines: list[Line] = [
        [(f"rank {row.rank} on {row.node or '-'}, {row.device or '-'}, process {row.pid or '-'}, {row.state}", "bold")],
        [
            (
                f"busy {milliseconds(row.busy_seconds)} (data {milliseconds(row.data_seconds)}), "
                f"wait {milliseconds(row.wait_seconds)} ({waiting(row):.0%}), {row.samples_per_second:.0f} samples/s, "
                f"memory {memory(row.memory_bytes)}",
                "none",
            )
        ],
    ]
    return [*lines, *chart(snapshot.recent.get(rank, []), width, room - len(lines), glyphs)]


def chart(steps: Sequence[Step], width: int, height: int, glyphs: Glyphs) -> list[Line]:
    """Step times as columns from the left, the newest last: computing below, data on it, waiting on top."""
    if not steps or height < 4:
        return [[("its steps come with the next snapshot", "dim")]]
    last, label = steps[-max(1, width - 11) :], 10
    top = max(step.seconds for step in last) or 1.0
    lines = []
    for level in range(height - 1, 0, -1):
        at = (level - 0.5) / (height - 1) * top
        scale = milliseconds(top) if level == height - 1 else "0" if level == 1 else ""
        lines.append([(f"{scale:>{label}} ", "dim"), *merged(_cell(step, at, glyphs) for step in last)])
    return [*lines, [(f"{'':>{label}} steps {last[0].step} to {last[-1].step}", "dim")]]


def _cell(step: Step, at: float, glyphs: Glyphs) -> tuple[str, str]:
    if at <= step.busy_seconds - step.data:
        return glyphs.compute, "green"
    if at <= step.busy_seconds:
        return glyphs.data, "yellow"
    return (glyphs.wait, "red") if at <= step.seconds else (" ", "none")


def merged(cells: Iterator[tuple[str, str]]) -> Line:
    """Neighbours of one style as one piece."""
    line: Line = []
    for text, style in cells:
        if line and line[-1][1] == style:
            line[-1] = (line[-1][0] + text, style)
        else:
            line.append((text, style))
    return line


# --- several jobs ----------------------------------------------------------------------------------------------------


def jobs_lines(snapshots: Sequence[tuple[str, Snapshot | None]], picked: int, width: int, now: float) -> list[Line]:
    """A row a job: name, age, workers, throughput, gain so far."""
    name = max(20, min(60, width - 46))
    lines: list[Line] = [[(f"  {'run':<{name}} {'age':>8} {'workers':>7} {'samples/s':>9} {'gain':>6}  state", "dim")]]
    for number, (run, snapshot) in enumerate(snapshots):
        sign = ">" if number == picked else " "
        if snapshot is None:
            text = f"{sign} {run:<{name}.{name}} {'-':>8} {'-':>7} {'-':>9} {'-':>6}  no answer"
        else:
            gain = "-" if snapshot.gain is None else f"{snapshot.gain:+.0%}"
            text = (
                f"{sign} {run:<{name}.{name}} {clock(max(0.0, now - snapshot.started)):>8} {snapshot.world_size:>7} "
                f"{snapshot.samples_per_second:>9.0f} {gain:>6}  {snapshot.state}"
            )
        lines.append([(text, "reverse" if number == picked else "none")])
    return [fit(line, width) for line in lines]

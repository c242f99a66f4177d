"""A story on one screen of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from adarun.replay.story import Change, Parts, Story, WindowStory
from adarun.replay.what_if import Estimate, Prediction

BARS = "▁▂▃▄▅▆▇█"
# How many moments are drawn.
COLUMNS = 60
# What is longer is told by its beginning and its end.
MOST_CHANGES, MOST_WORKERS, MOST_LINES = 12, 12, 5
PARTS = {
    "compute": "computing",
    "data": "loading data",
    "waiting": "waiting for slower workers",
    "communication": "communication",
    "other": "other work",
    "starting": "start and end",
    "adarun": "adarun itself",
}


def story_text(story: Story, log: str) -> Group:
    """The whole story."""
    title = printable(f"{story.run or log}: {' '.join(story.command)}")
    blocks: list[RenderableType] = [Text(title, style="bold", no_wrap=True, overflow="ellipsis")]
    blocks += [Text(line) for line in headlines(story)]
    if story.windows:
        blocks += [Text(), Text("where the time went, mean of the workers"), parts_line(story.parts)]
        blocks += [Text(), *over_time(story), Text(), workers_table(story)]
    blocks += [Text(line) for line in [*holding_up(story), *outcome(story)]]
    if story.changes:
        blocks += [Text(), Text(f"what was changed ({len(story.changes)} of {story.num_decisions} decisions)")]
        blocks += [Text(f"  {line}", overflow="fold") for line in shortened(changes_lines(story.changes), MOST_CHANGES)]
    blocks += [Text(f"  {line}") for line in trouble(story)]
    return Group(*blocks, Text(f"  log: {log}"))


def printable(text: str) -> str:
    """Text from a script without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def headlines(story: Story) -> list[str]:
    """How long it took, and how it ended."""
    if story.ended:
        end = f"ended with exit code {story.exit_code}"
    else:
        end = "no end in the log: it runs still, or its launcher was killed"
    adapt = f"--adapt {story.adapt}, " if story.adapt else ""
    lines = [f"  {seconds(story.seconds)}, {adapt}{end}"]
    if story.windows:
        lines[0] = f"  {seconds(story.seconds)}, {story.steps} steps, {story.rate:.0f} samples/s, {adapt}{end}"
    else:
        lines.append("  no training step was seen of all workers, so nothing was measured")
    if story.num_nodes > 1:
        lines.append(f"  one of {story.num_nodes} nodes: this log tells of its own workers only")
    return lines


def parts_line(parts: Parts) -> Text:
    """Each part in percent, the large ones first."""
    whole = max(parts.whole, 1e-12)
    shares = {name: getattr(parts, name) / whole for name in PARTS}
    named = [f"{PARTS[name]} {percent(part)}" for name, part in sorted(shares.items(), key=lambda item: -item[1])]
    return Text("  " + ", ".join(named))


def over_time(story: Story) -> list[Text]:
    """Throughput and shares from the first step to the last, as rows of bars."""
    rows = [("samples/s", [window.rate for window in story.windows])]
    if any(len(set(window.shares)) > 1 for window in story.windows):
        for column, worker in enumerate(story.workers[:4]):
            rows.append((f"share {worker.rank}", [share_at(window, column) for window in story.windows]))
    began, ended = story.windows[0].began, max(window.ended for window in story.windows)
    drawn = []
    for name, values in rows:
        line = sampled(story.windows, values, began, ended)
        low, high = min(values), max(values)
        scale = f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"
        drawn.append(Text(f"  {name:>9}  {bars(line)}  {scale}"))
    drawn.append(
        Text(f"  {'':>9}  {seconds(began)}{seconds(ended):>{max(1, COLUMNS - len(seconds(began)))}}", style="dim")
    )
    return drawn


def share_at(window: WindowStory, column: int) -> float:
    """A worker's share in a window, 0 where it is not there."""
    return float(window.shares[column]) if column < len(window.shares) else 0.0


def sampled(windows: Sequence[WindowStory], values: Sequence[float], began: float, ended: float) -> list[float]:
    """The values at moments that lie equally far apart."""
    moments = began + (np.arange(COLUMNS) + 0.5) / COLUMNS * (ended - began)
    at = np.searchsorted([window.ended for window in windows], moments)
    return [values[min(int(number), len(values) - 1)] for number in at]


def bars(values: Sequence[float]) -> str:
    """Numbers as a row of bars, from nothing to the largest."""
    top = max(values, default=0.0)
    if top <= 0.0:
        return BARS[0] * len(values)
    return "".join(BARS[min(7, max(0, round(value / top * 7)))] for value in values)


def workers_table(story: Story) -> Table:
    """A row a worker; of many, those that were slowest and those that waited most."""
    table = plain_table("  rank", "share", "busy/step", "waiting", "communication", "data", "slow", "cpu", "memory")
    shown = sorted(story.workers, key=lambda worker: -(worker.slow or 0.0))
    if len(shown) > MOST_WORKERS:
        shown = [*shown[: MOST_WORKERS - 2], *shown[-2:]]
    for worker in sorted(shown, key=lambda worker: worker.rank):
        parts, steps = worker.parts, max(1, worker.steps)
        whole = max(1e-12, parts.data + parts.compute + parts.waiting + parts.communication)
        table.add_row(
            str(worker.rank),
            str(worker.share),
            f"{(parts.data + parts.compute) / steps * 1e3:.1f} ms",
            percent(parts.waiting / whole),
            percent(parts.communication / whole),
            percent(parts.data / whole),
            f"{worker.slow:.2f}x" if worker.slow else "-",
            percent(worker.cpu_fraction) if worker.cpu_fraction is not None else "-",
            f"{worker.memory_bytes / 2**20:.0f} MiB" if worker.memory_bytes else "-",
        )
    if len(story.workers) > MOST_WORKERS:
        table.add_row("...", f"{len(story.workers)} workers: the slowest and the fastest are shown")
    return table


def holding_up(story: Story) -> list[str]:
    """The straggler, and since when."""
    straggler = story.straggler
    if straggler is None:
        return ["  no worker held the others up"] if story.windows and len(story.workers) > 1 else []
    until = f" until {seconds(straggler.until)}" if straggler.until is not None else ""
    return [
        f"  straggler: rank {straggler.rank} took {straggler.slow:.2f} times as long per sample as the others, "
        f"since {seconds(straggler.since)} (step {straggler.since_step}){until}"
    ]


def outcome(story: Story) -> list[str]:
    """What the shares brought over the even split, or why they stayed even."""
    if story.gain is not None and story.gain_error is not None:
        return [
            f"  estimated gain over the even split: {signed(story.gain)} (give or take {percent(story.gain_error)})"
        ]
    return [f"  shares stayed even: {story.why_even}"] if story.windows else []


def changes_lines(changes: Sequence[Change]) -> list[str]:
    """Each change with its reason, what was expected of it and what it brought."""
    return [change_line(change) for change in changes]


def change_line(change: Change) -> str:
    """One change."""
    where = f"{seconds(change.at)}" + (f" (step {change.step})" if change.step >= 0 else "")
    line = printable(f"{where}: {before_and_after(change)}; {change.reason}")
    if change.expected is not None:
        line += f"; expected {signed(change.expected)}{give_or_take(change.expected_error)}"
    if change.brought is not None:
        line += f"; brought {signed(change.brought)}{give_or_take(change.brought_error)}"
    return line


def before_and_after(change: Change) -> str:
    """What was changed; of the shares of many workers, those that were."""
    before, after = change.before.split(","), change.after.split(",")
    if len(before) <= MOST_WORKERS or len(before) != len(after):
        return f"{change.before} -> {change.after}"
    moved = [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    moved.sort(key=lambda rank: -abs(int(after[rank]) - int(before[rank])))
    named = ", ".join(f"rank {rank}: {before[rank]} -> {after[rank]}" for rank in moved[:2])
    return named + (f", {len(moved) - 2} more shares" if len(moved) > 2 else "")


def trouble(story: Story) -> list[str]:
    """Restarts, messages, and what is missing in the log."""
    lines = [
        f"attempt {attempt.attempt} ended {attempt.state} at {seconds(attempt.ended or 0.0)} after {attempt.steps} steps"
        for attempt in story.attempts
        if attempt.state not in ("", "SUCCEEDED")
    ]
    if len(story.attempts) > 1:
        lines.append(f"workers were started {len(story.attempts)} times")
    lines = shortened(lines, MOST_LINES)
    lines += shortened([f"note: {printable(text)}" for text in story.notices], MOST_LINES)
    lines += shortened([f"refused: {printable(text)}" for text in story.refused], MOST_LINES)
    for count, what in (
        (story.lost_reports, "reports never reached the log"),
        (story.incomplete_reports, "reports are of steps that not all workers reported"),
        (story.skipped_lines, "lines of the log could not be read and were skipped"),
    ):
        if count:
            lines.append(f"{count} {what}")
    return lines


def shortened(lines: list[str], most: int) -> list[str]:
    """The first and the last lines of many."""
    if len(lines) <= most:
        return lines
    half = most // 2
    return [*lines[:half], f"... {len(lines) - 2 * half} more", *lines[-half:]]


# --- what if ---------------------------------------------------------------------------------------------------------


def what_if_table(predictions: Sequence[Prediction]) -> Table:
    """A row for each question."""
    table = plain_table("  what if", "run", "step", "speed", "give or take", "changes", "")
    for made in predictions:
        table.add_row(
            f"  {made.name}",
            seconds(made.seconds),
            f"{made.step_seconds * 1e3:.1f} ms",
            f"{made.speed:.3f}x",
            percent(made.error),
            str(made.num_changes),
            made.note,
        )
    return table


def estimates_table(estimates: Sequence[Estimate]) -> Table:
    """A row for each policy that the log can speak of."""
    table = plain_table("  off-policy", "decisions", "effective", "SNIPS", "doubly robust", "")
    for made in estimates:
        table.add_row(
            f"  {made.name}",
            str(made.num_decisions),
            f"{made.effective:.1f}",
            f"{made.snips:.1f} +- {made.snips_error:.1f}" if made.snips is not None else "-",
            f"{made.doubly_robust:.1f} +- {made.doubly_robust_error:.1f}" if made.doubly_robust is not None else "-",
            made.refused or "samples/s",
        )
    return table


# --- two runs --------------------------------------------------------------------------------------------------------


def comparison(one: Story, other: Story) -> Table:
    """Two runs side by side."""
    table = plain_table("", one.run, other.run, "second / first")

    def row(name: str, first: float, second: float, unit: str = "", digits: int = 1) -> None:
        ratio = f"{second / first:.3f}" if first else "-"
        table.add_row(f"  {name}", f"{first:.{digits}f}{unit}", f"{second:.{digits}f}{unit}", ratio)

    row("seconds", one.seconds, other.seconds, " s")
    row("steps", one.steps, other.steps, digits=0)
    row("samples/s", one.rate, other.rate, digits=0)
    row("step", step_ms(one), step_ms(other), " ms")
    for name, words in PARTS.items():
        row(words, getattr(one.parts, name), getattr(other.parts, name), " s")
    row("changes", len(one.changes), len(other.changes), digits=0)
    table.add_row("  gain over even", *(signed(s.gain) if s.gain is not None else "-" for s in (one, other)), "")
    table.add_row(
        "  last shares", *(",".join(str(w.share) for w in s.workers[:MOST_WORKERS]) for s in (one, other)), ""
    )
    table.add_row("  straggler", *(f"rank {s.straggler.rank}" if s.straggler else "none" for s in (one, other)), "")
    return table


def step_ms(story: Story) -> float:
    """The mean step in milliseconds."""
    steps = sum(window.steps for window in story.windows)
    return 1e3 * sum(window.steps * window.step_seconds for window in story.windows) / max(1, steps)


# --- words -----------------------------------------------------------------------------------------------------------


def plain_table(*columns: str) -> Table:
    """A table without lines, as the summary's."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number or column == "  rank" else "left", overflow="fold")
    return table


def seconds(value: float) -> str:
    """A time in the unit that it is read in most easily."""
    if value < 600.0:
        return f"{value:.1f} s"
    minutes = round(value / 60.0)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def percent(part: float) -> str:
    """A part of the whole; a small one with a digit more."""
    return f"{part:.1%}" if 0.0 < abs(part) < 0.02 else f"{part:.0%}"


def signed(part: float) -> str:
    """A gain."""
    return f"{part:+.1%}" if abs(part) < 0.02 else f"{part:+.0%}"


def give_or_take(error: float | None) -> str:
    """An error behind a number."""
    return f" +- {percent(error)}" if error is not None else ""

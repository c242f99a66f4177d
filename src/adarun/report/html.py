"""A story as one page that needs nothing else: light, hoverable, and readable on paper and on a phone.

Text stands beside the drawings and not in them, so drawings may be stretched to any width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from adarun.replay.story import Change, Story, WindowStory
from adarun.replay.what_if import Estimate, Prediction
from adarun.report.text import PARTS, change_line, give_or_take, holding_up, outcome, percent, seconds, signed, trouble

# So many cells are drawn in all, in so many columns at most; workers beyond so many are left out.
MAX_CELLS, MAX_COLUMNS, MAX_ROWS = 800, 160, 16
MAX_MARKS, MAX_LINES = 60, 100
WIDTH, HEIGHT = 1000, 100
COLORS = {
    "compute": "#4477aa",
    "data": "#66ccee",
    "waiting": "#ee6677",
    "communication": "#ccbb44",
    "other": "#aa99bb",
    "starting": "#dddddd",
    "adarun": "#228833",
}
LINES = ("#4477aa", "#ee6677", "#228833", "#aa7700", "#66aacc", "#aa3377", "#777777", "#000000")

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 62rem; padding: 1rem }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem }
p { margin: .3rem 0 } code { overflow-wrap: anywhere; color: #555; font-size: .85rem }
.cards { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 }
.cards div { border: 1px solid #ddd; border-radius: 6px; padding: .4rem .8rem }
.cards b { display: block; font-size: 1.15rem } .cards span, .dim { color: #666; font-size: .85rem }
.row { display: grid; grid-template-columns: 5.5rem 1fr; gap: .5rem; align-items: center; margin: 2px 0 }
.row > span { text-align: right; font-size: .85rem; color: #444 }
.axis { display: flex; justify-content: space-between; font-size: .8rem; color: #666 }
.bar { display: flex; height: 1.3rem } .bar i { display: block; min-width: 0 }
svg { display: block; width: 100%; height: 1.3rem; background: #f4f4f4 } svg.tall { height: 7rem; margin: .15rem 0 }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .4rem 0 }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; vertical-align: top; white-space: nowrap }
td.left { white-space: normal; min-width: 8rem } th { color: #666; font-weight: normal }
td:first-child, th:first-child, td.left { text-align: left } li { margin: .25rem 0; overflow-wrap: anywhere }
[data-t] { cursor: default } [data-t]:hover { opacity: .75 }
#tip { position: fixed; z-index: 1; max-width: 22rem; padding: .35rem .6rem; border-radius: 5px; background: #222; color: #fff;
  font-size: .85rem; pointer-events: none; white-space: pre-line; overflow-wrap: anywhere }
@media (max-width: 34rem) { body { font-size: 14px; padding: .7rem } .row { grid-template-columns: 4.3rem 1fr } }
@media print { body { max-width: none; padding: 0 } #tip { display: none } section { break-inside: avoid }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""

SCRIPT = """
const tip = document.getElementById('tip');
function show(event) {
  const over = event.target.closest('[data-t]');
  tip.hidden = !over;
  if (!over) return;
  tip.textContent = over.dataset.t;
  const x = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(4, x) + 'px';
  tip.style.top = (below ? event.clientY + 16 : event.clientY - tip.offsetHeight - 10) + 'px';
}
for (const kind of ['pointermove', 'pointerdown']) document.addEventListener(kind, show);
"""


def page(story: Story, made: Sequence[Prediction], estimated: Sequence[Estimate]) -> str:
    """The whole page."""
    title = escape(story.run or "a run")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    sections = [
        cards(story),
        section("Where the time went", parts_bars(story)) if story.windows else "",
        section("Workers over time", timeline(story)) if story.windows else "",
        section("Throughput and shares over time", charts(story)) if story.windows else "",
        section("What was changed", changes_list(story)) if story.changes else "",
        section("What if", what_if_rows(made) + estimates_rows(estimated)) if made or estimated else "",
        section("To know", lines_list(trouble(story))) if trouble(story) else "",
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<code>{escape(' '.join(story.command))}</code>\n"
        f"{''.join(sections)}\n"
        f'<div id="tip" hidden></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def section(heading: str, body: str) -> str:
    """A part of the page under a heading."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>\n"


def tip(text: str) -> str:
    """What is shown where the pointer is."""
    return f'data-t="{escape(text)}"'


def cards(story: Story) -> str:
    """The most important numbers, and what they mean in a sentence or two."""
    end = f"exit code {story.exit_code}" if story.ended else "no end in the log"
    numbers = [(seconds(story.seconds), end), (f"{story.steps}", "steps"), (f"{story.rate:.0f}", "samples/s")]
    numbers.append((f"{len(story.workers)}", f"workers, --adapt {story.adapt}" if story.adapt else "workers"))
    if story.gain is not None:
        numbers.append((signed(story.gain), f"over the even split{give_or_take(story.gain_error)}".replace("+-", "±")))
    boxes = "".join(f"<div><b>{escape(number)}</b><span>{escape(what)}</span></div>" for number, what in numbers)
    lines = [*holding_up(story), *outcome(story)]
    return f'<div class="cards">{boxes}</div>\n' + "".join(f"<p>{escape(line.strip())}</p>\n" for line in lines)


def parts_bars(story: Story) -> str:
    """A bar per worker, cut into the parts of its time."""
    rows = []
    for worker in story.workers[:MAX_ROWS]:
        whole = max(worker.parts.whole, 1e-12)
        pieces = []
        for name, words in PARTS.items():
            value: float = getattr(worker.parts, name)
            if value > 0.0:
                text = tip(f"rank {worker.rank}, {words}: {seconds(value)}, {percent(value / whole)}")
                pieces.append(f'<i style="width:{value / whole:.3%};background:{COLORS[name]}" {text}></i>')
        rows.append(row(f"rank {worker.rank}", f'<div class="bar">{"".join(pieces)}</div>'))
    return key({words: COLORS[name] for name, words in PARTS.items()}) + "".join(rows) + left_out(story)


def row(label: str, body: str) -> str:
    """A drawing with its label."""
    return f'<div class="row"><span>{escape(label)}</span>{body}</div>\n'


def key(colors: dict[str, str]) -> str:
    """What the colors stand for."""
    entries = "".join(
        f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in colors.items()
    )
    return f'<div class="key">{entries}</div>\n'


def left_out(story: Story) -> str:
    """How many workers are not drawn."""
    more = len(story.workers) - MAX_ROWS
    return f'<p class="dim">and {more} more workers</p>' if more > 0 else ""


class Scale:
    """From moments to places in a drawing."""

    def __init__(self, story: Story) -> None:
        self.began = min(window.began for window in story.windows)
        self.ended = max(*(window.ended for window in story.windows), self.began + 1e-9)

    def x(self, moment: float) -> float:
        """The place of a moment."""
        place = (moment - self.began) / (self.ended - self.began)
        return round(min(1.0, max(0.0, place)) * WIDTH, 1)

    def axis(self) -> str:
        """The first and the last moment, under a drawing."""
        middle = (self.began + self.ended) / 2
        labels = "".join(f"<span>{escape(seconds(at))}</span>" for at in (self.began, middle, self.ended))
        return row("", f'<div class="axis">{labels}</div>')


def merged(windows: Sequence[WindowStory], most: int) -> list[WindowStory]:
    """At most so many windows, neighbours taken together; the shares are the last ones of each."""
    size = math.ceil(len(windows) / most)
    return [together(windows[start : start + size]) for start in range(0, len(windows), max(1, size))]


def together(windows: Sequence[WindowStory]) -> WindowStory:
    """Some windows as one; those of other workers than the last one's are left out."""
    last = windows[-1]
    same = [window for window in windows if len(window.busy) == len(last.busy) and window.steps]
    if len(same) < 2:
        return last
    weights = [window.steps for window in same]

    def mean(of: Callable[[WindowStory], object]) -> list[float]:
        values: list[float] = np.atleast_1d(
            np.average([of(window) for window in same], axis=0, weights=weights)
        ).tolist()
        return values

    return WindowStory(
        plan=last.plan,
        attempt=last.attempt,
        start=same[0].start,
        steps=sum(weights),
        began=same[0].began,
        ended=last.ended,
        step_seconds=mean(lambda window: window.step_seconds)[0],
        shares=last.shares,
        busy=mean(lambda window: window.busy),
        waiting=mean(lambda window: window.waiting),
        communication=mean(lambda window: window.communication)[0],
    )


def columns_of(story: Story) -> list[WindowStory]:
    """The windows as they are drawn."""
    rows = min(MAX_ROWS, max(1, len(story.workers)))
    return merged(story.windows, max(10, min(MAX_COLUMNS, MAX_CELLS // rows)))


def timeline(story: Story) -> str:
    """A row per worker: the redder a window, the more of it the worker waited for slower ones."""
    scale, columns = Scale(story), columns_of(story)
    rows = []
    for number, worker in enumerate(story.workers[:MAX_ROWS]):
        cells = []
        for window in columns:
            if number >= len(window.busy):
                continue
            waited = window.waiting[number] / max(window.step_seconds, 1e-12)
            x, wide = scale.x(window.began), max(0.5, scale.x(window.ended) - scale.x(window.began))
            text = tip(
                f"rank {worker.rank}, steps {window.start} to {window.start + window.steps - 1}\n"
                f"{window.shares[number]} samples, {window.busy[number] * 1e3:.1f} ms busy, waiting {percent(waited)}"
            )
            cells.append(f'<rect x="{x}" width="{wide:.1f}" height="{HEIGHT}" fill="{shade(waited)}" {text}/>')
        rows.append(row(f"rank {worker.rank}", drawing(cells)))
    note = key({"busy": shade(0.0), "waiting a quarter of the time": shade(0.25), "half": shade(0.5)})
    return note + "".join(rows) + scale.axis() + left_out(story)


def shade(waited: float) -> str:
    """From blue for a worker that never waits to red for one that waits half of the time and more."""
    part = min(1.0, max(0.0, waited) * 2.0)
    low, high = (0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True))


def drawing(shapes: Sequence[str], kind: str = "") -> str:
    """Shapes, stretched to the page's width."""
    name = f' class="{kind}"' if kind else ""
    return f'<svg{name} viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{"".join(shapes)}</svg>'


def charts(story: Story) -> str:
    """Throughput, and the share of each worker, with the decisions as lines across."""
    scale, columns = Scale(story), columns_of(story)
    rate = [window.rate for window in columns]
    body = row(scale_words("samples/s", rate), chart(scale, columns, [(LINES[0], rate)], story.changes))
    shown = [worker.rank for worker in story.workers[: len(LINES)]]
    shares = [(LINES[number], [share(window, number) for window in columns]) for number in range(len(shown))]
    every = [value for _, values in shares for value in values]
    body += row(scale_words("share", every), chart(scale, columns, shares, story.changes))
    return body + scale.axis() + key({f"share of rank {rank}": LINES[number] for number, rank in enumerate(shown)})


def share(window: WindowStory, number: int) -> float:
    """A worker's share, 0 where it is not there."""
    return float(window.shares[number]) if number < len(window.shares) else 0.0


def scale_words(name: str, values: Sequence[float]) -> str:
    """A chart's name with its height."""
    return f"{name} 0 to {max(values, default=0.0):.0f}"


def chart(
    scale: Scale,
    columns: Sequence[WindowStory],
    series: Sequence[tuple[str, Sequence[float]]],
    changes: Sequence[Change],
) -> str:
    """Lines over time, from nothing to a little over the highest value."""
    top = max((value for _, values in series for value in values), default=0.0) * 1.05 or 1.0
    shapes = []
    for color, values in series:
        points = []
        for window, value in zip(columns, values, strict=True):
            y = round(HEIGHT * (1.0 - value / top), 1)
            points += [f"{scale.x(window.began)},{y}", f"{scale.x(window.ended)},{y}"]
        line = 'fill="none" stroke-width="2" vector-effect="non-scaling-stroke"'
        shapes.append(f'<polyline points="{" ".join(points)}" stroke="{color}" {line}/>')
    for window in columns:
        x, wide = scale.x(window.began), max(0.5, scale.x(window.ended) - scale.x(window.began))
        shown = ",".join(map(str, window.shares[:MAX_ROWS]))
        text = tip(f"{seconds(window.began)} to {seconds(window.ended)}\n{window.rate:.0f} samples/s\nshares {shown}")
        shapes.append(f'<rect x="{x}" width="{wide:.1f}" height="{HEIGHT}" fill="transparent" {text}/>')
    for change in changes[:MAX_MARKS]:
        place = f'x="{scale.x(change.at) - 2:.1f}" width="4" height="{HEIGHT}"'
        shapes.append(f'<rect {place} fill="#222" fill-opacity=".55" {tip(change_line(change))}/>')
    return drawing(shapes, "tall")


def changes_list(story: Story) -> str:
    """Each change in words."""
    lines = [change_line(change).replace("+- ", "± ") for change in story.changes]
    return lines_list(lines)


def lines_list(lines: Sequence[str]) -> str:
    """Sentences, one below the other."""
    more = f"<li>and {len(lines) - MAX_LINES} more</li>" if len(lines) > MAX_LINES else ""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines[:MAX_LINES]) + more + "</ul>"


def what_if_rows(made: Sequence[Prediction]) -> str:
    """A table of predictions, each with a bar and its error."""
    if not made:
        return ""
    longest = max(prediction.step_seconds * (1.0 + prediction.error) for prediction in made)
    rows = []
    for one in made:
        wide, spread = one.step_seconds / longest, one.step_seconds * one.error / longest
        text = tip(f"{one.name}: {one.step_seconds * 1e3:.1f} ms a step, {one.speed:.3f} times as fast as recorded")
        bar = drawing(
            [
                f'<rect y="15" width="{wide * WIDTH:.1f}" height="70" fill="#4477aa" {text}/>',
                f'<rect x="{max(0.0, wide - spread) * WIDTH:.1f}" y="42" width="{2 * spread * WIDTH:.1f}" height="16"/>',
            ]
        )
        cells = [one.name, seconds(one.seconds), f"{one.step_seconds * 1e3:.1f} ms", f"{one.speed:.3f}x"]
        cells += [f"± {percent(one.error)}", str(one.num_changes)]
        filled = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr>{filled}<td style="min-width:9rem">{bar}</td><td class="left">{escape(one.note)}</td></tr>')
    return table(["what if", "run", "step", "speed", "give or take", "changes", "", ""], rows)


def estimates_rows(estimated: Sequence[Estimate]) -> str:
    """A table of off-policy estimates."""
    if not estimated:
        return ""
    rows = []
    for one in estimated:
        cells = [one.name, str(one.num_decisions), f"{one.effective:.1f}"]
        for value, error in ((one.snips, one.snips_error), (one.doubly_robust, one.doubly_robust_error)):
            cells.append(f"{value:.1f} ± {error:.1f}" if value is not None and error is not None else "")
        filled = "".join(f"<td>{escape(cell)}</td>" for cell in [*cells, one.refused])
        rows.append(f"<tr>{filled}</tr>")
    head = ["off-policy, samples/s", "decisions", "effective", "SNIPS", "doubly robust", ""]
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls where it does not fit."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'

"""Which rows the table of workers has, and what a key press changes; plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adarun.events import Snapshot, WorkerNow

# Of a node whose workers do not all fit, so many are shown.
WORST = 3

SORTS: dict[str, Callable[[WorkerNow], float]] = {
    "slowest": lambda row: -row.busy_seconds,
    "waiting": lambda row: -waiting(row),
    "data": lambda row: -row.data_seconds,
    "memory": lambda row: -float(row.gpu_memory_bytes or row.memory_bytes or 0),
    "rate": lambda row: -row.samples_per_second,
    "rank": lambda row: float(row.rank),
}
PAGES = {"d": "decisions", "h": "help", "?": "help"}


@dataclass(frozen=True)
class NodeRow:
    """Stands above the workers of a node."""

    node: str
    num_workers: int
    samples_per_second: float
    slowest_seconds: float
    waiting: float


@dataclass(frozen=True)
class MoreRow:
    """Stands for workers that are not shown."""

    num_workers: int


Row = NodeRow | WorkerNow | MoreRow


@dataclass(frozen=True)
class Looking:
    """What a viewer looks at: which page, sorted how, which worker is picked."""

    page: str = "workers"
    sort: str = "slowest"
    rank: int = -1
    everything: bool = False
    paused: bool = False
    done: bool = False


def waiting(row: WorkerNow) -> float:
    """The part of a step in which a worker waits for the others."""
    return row.wait_seconds / max(1e-12, row.busy_seconds + row.wait_seconds)


def table(snapshot: Snapshot, looking: Looking, room: int | None) -> list[Row]:
    """The rows, grouped by node, the first ones first; where there is not room for all, the first few of each node."""
    # Who does not train (silent, gone) is what matters most.
    key = SORTS[looking.sort]
    troubled = looking.sort == "slowest"
    ordered = sorted(snapshot.workers, key=lambda row: (troubled and row.state == "training", key(row), row.rank))
    nodes: dict[str, list[WorkerNow]] = {}
    for row in ordered:
        nodes.setdefault(row.node, []).append(row)
    fits = room is None or len(ordered) + len(nodes) <= room
    shown: list[Row] = []
    for node, members in nodes.items():
        few = len(members) if fits or looking.everything or len(nodes) == 1 else WORST
        shown += [_node_row(node, members), *members[:few]]
        if few < len(members):
            shown.append(MoreRow(len(members) - few))
    return shown


def _node_row(node: str, members: Sequence[WorkerNow]) -> NodeRow:
    return NodeRow(
        node=node,
        num_workers=len(members),
        samples_per_second=sum(row.samples_per_second for row in members),
        slowest_seconds=max(row.busy_seconds for row in members),
        waiting=sum(waiting(row) for row in members) / len(members),
    )


def window(rows: Sequence[Row], looking: Looking, room: int) -> list[Row]:
    """As many rows as there is room for, the picked worker among them, and what is left out named at the end."""
    if len(rows) <= room:
        return list(rows)
    picked = next((at for at, row in enumerate(rows) if isinstance(row, WorkerNow) and row.rank == looking.rank), 0)
    first = max(0, min(picked - (room - 1) // 2, len(rows) - room)) if picked >= room - 1 else 0
    shown = list(rows[first : first + room])
    left = sum(
        row.num_workers if isinstance(row, MoreRow) else isinstance(row, WorkerNow) for row in rows[first + room - 1 :]
    )
    return [*shown[:-1], MoreRow(left)] if first + room < len(rows) else shown


def press(looking: Looking, key: str, snapshot: Snapshot, room: int) -> Looking:
    """What is looked at after a key was pressed."""
    if key in {"q", "ctrl-c"}:
        return replace(looking, done=True)
    if key == "escape":
        return replace(looking, done=looking.page == "workers", page="workers")
    if key == "p":
        return replace(looking, paused=not looking.paused)
    if key in PAGES:
        return replace(looking, page="workers" if looking.page == PAGES[key] else PAGES[key])
    if key == "s":
        names = list(SORTS)
        return replace(looking, page="workers", sort=names[(names.index(looking.sort) + 1) % len(names)])
    if key == "a":
        return replace(looking, everything=not looking.everything)
    if key in {"up", "down", "enter"}:
        return _pick(looking, key, snapshot, room)
    return looking


def _pick(looking: Looking, key: str, snapshot: Snapshot, room: int) -> Looking:
    ranks = [row.rank for row in table(snapshot, looking, room) if isinstance(row, WorkerNow)]
    if not ranks:
        return looking
    if looking.rank not in ranks:
        looking = replace(looking, rank=ranks[0])
    elif key != "enter":
        step = 1 if key == "down" else -1
        looking = replace(looking, rank=ranks[max(0, min(len(ranks) - 1, ranks.index(looking.rank) + step))])
    if key == "enter":
        return replace(looking, page="workers" if looking.page == "worker" else "worker")
    return looking

"""Draw docs/status.svg from a running job: `make screen`. Two workers of the demo, one of them slowed."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path

from rich.console import Console

from adarun.events import Snapshot
from adarun.registry import running
from adarun.screen.connection import Connection
from adarun.screen.rows import Looking
from adarun.screen.view import UNICODE, Drawing, screen

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "status.svg"
WIDTH, HEIGHT = 100, 18
# By then the split has followed the slow worker.
EPOCH = 12


def watched(pid: int) -> Snapshot:
    """The job that this process's child runs, once it has come to the epoch."""
    while not (entries := [entry for entry in running() if os.getpgid(entry.pid) == os.getpgid(pid)]):
        threading.Event().wait(0.2)
    connection = Connection(entries[-1].socket)
    while (seen := connection.first()) is None or (seen.epoch or 0) < EPOCH or not seen.num_changes:
        connection.newest = None
    connection.close()
    return seen


def main() -> None:
    """Run the demo's job under adarun, look at it, draw."""
    sys.path.insert(0, str(ROOT / "examples"))
    import demo  # noqa: PLC0415 - a script of the examples

    try:
        group = demo.make_group()
    except OSError:
        group = None
    job = threading.Thread(target=demo.train, args=("adarun", group))
    job.start()
    seen = watched(os.getpid())
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Drawing(screen(seen, Looking(), WIDTH, HEIGHT, UNICODE)), soft_wrap=True)
    PICTURE.write_text(console.export_svg(title="adarun status", unique_id="status"))
    print(PICTURE)
    job.join()
    if group is not None:
        demo.remove_group(group)


if __name__ == "__main__":
    main()

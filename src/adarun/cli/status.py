"""Show a running job live: which worker holds it back, and what adarun does about it.

Finds the jobs of this user on this machine. Of several, choose one, or name it: its id, or a part of it. Where none runs, shows
how the last one in the runs folder ended. What is not a terminal gets one plain snapshot.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from adarun.cli.output import console
from adarun.errors import AdarunError, UsageError

if TYPE_CHECKING:
    from adarun.events import Snapshot
    from adarun.registry import Entry

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
END_SECONDS = 3.0
HOW_TO_START = "nothing of yours is running here; start a job with adarun train.py, and look again"


def status(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run's id or a part of it, or the folder of its log.", show_default=False),
    ] = "",
    json: Annotated[
        bool, typer.Option("--json", help="Print a snapshot as JSON; docs/status.md lists its fields.")
    ] = False,
    watch: Annotated[
        float,
        typer.Option(
            "--watch", metavar="SECONDS", help="Print a snapshot every so many seconds until the job ends; 0: one."
        ),
    ] = 0.0,
    runs_dir: Annotated[
        Path,
        typer.Option(
            "--runs-dir", help="Folder with the logs of finished runs.", envvar="ADARUN_RUNS_DIR", show_envvar=False
        ),
    ] = Path("runs"),
) -> None:
    """Find the job, and show it in the way that was asked for."""
    if watch and not 0.1 <= watch <= 86400:
        raise UsageError(f"--watch {watch:g} is not between 0.1 and 86400 seconds")
    from adarun.registry import running  # noqa: PLC0415 - the rest of adarun's commands do without

    name = Path(run).name
    entries = [entry for entry in running() if name in entry.run]
    exact = [entry for entry in entries if entry.run == name]
    live = sys.stdout.isatty() and sys.stdin.isatty() and not json and not watch
    if not entries:
        show_finished(run, runs_dir, json=json)
    elif live:
        show_live(exact or entries, runs_dir)
    elif len(exact or entries) == 1:
        print_snapshots((exact or entries)[0], watch, json=json)
    elif json or watch:
        names = ", ".join(entry.run for entry in entries)
        raise UsageError(f"{len(entries)} runs are meant; name one of {names}")
    else:
        print_jobs(entries)


def show_live(entries: list[Entry], runs_dir: Path) -> None:
    """The screen, and after the job's end its summary."""
    from adarun.registry import lives  # noqa: PLC0415 - as above
    from adarun.screen import live  # noqa: PLC0415 - only here is it needed

    out = console()
    try:
        entry = entries[0] if len(entries) == 1 else live.choose(out, entries)
        last = live.watch(out, entry) if entry is not None else None
    except KeyboardInterrupt:
        return
    except OSError as error:
        raise AdarunError(f"the job ended just now ({error.strerror})") from None
    if last is not None:
        # The launcher hangs up before it has written its log to the end.
        deadline = time.monotonic() + END_SECONDS
        while lives(last.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        show_finished(last.log, runs_dir, json=False)


def snapshot_of_running(entry: Entry) -> Snapshot:
    """One snapshot of a running job.

    Raises:
        AdarunError: its launcher does not answer.
    """
    from adarun.screen.connection import Connection  # noqa: PLC0415 - only here is it needed

    try:
        connection = Connection(entry.socket)
        found = connection.first()
        connection.close()
    except (OSError, EOFError):
        raise AdarunError(f"{entry.run} ended just now") from None
    if found is None:
        raise AdarunError(f"the launcher of {entry.run} (process {entry.pid}) does not answer; is it stopped?")
    return found


def print_snapshots(entry: Entry, watch: float, *, json: bool) -> None:
    """One snapshot, or one every `watch` seconds to the job's end."""
    print_snapshot(snapshot_of_running(entry), json=json, line=bool(watch))
    while watch:
        time.sleep(watch)
        try:
            newest = snapshot_of_running(entry)
        except AdarunError:
            return
        print_snapshot(newest, json=json, line=True)


def print_snapshot(snapshot: Snapshot, *, json: bool, line: bool = False) -> None:
    """As a screen without keys, or as JSON: in one line where others follow."""
    if json:
        document = msgspec.json.encode(snapshot)
        sys.stdout.write((document if line else msgspec.json.format(document)).decode() + "\n")
        sys.stdout.flush()
        return
    from adarun.screen.view import Drawing, glyphs_for, plain  # noqa: PLC0415 - --json does without

    out = console()
    out.print(Drawing(plain(snapshot, out.width, glyphs_for(out.encoding))), soft_wrap=True)


def print_jobs(entries: list[Entry]) -> None:
    """A row a job, and how to see one of them."""
    from adarun.screen.view import Drawing, jobs_lines  # noqa: PLC0415 - --json does without

    found: list[tuple[str, Snapshot | None]] = []
    for entry in entries:
        try:
            found.append((entry.run, snapshot_of_running(entry)))
        except AdarunError:
            found.append((entry.run, None))
    out = console()
    out.print(Drawing(jobs_lines(found, -1, out.width, time.time())), soft_wrap=True)
    out.print("adarun status RUN shows one of them; a part of its name will do")


def show_finished(run: str, runs_dir: Path, *, json: bool) -> None:
    """How a run ended, the last one unless `run` names another.

    Raises:
        AdarunError: there is none.
    """
    from adarun.screen.finished import last_run, snapshot_of  # noqa: PLC0415 - only here is it needed

    named = [folder for folder in (Path(run), runs_dir / run) if run and (folder / "run.json").is_file()]
    if run and not named:
        raise AdarunError(f"no run of yours here is called {run}; adarun status lists those that run")
    folder = named[0] if named else last_run(runs_dir)
    if folder is None:
        raise AdarunError(f"{HOW_TO_START} (and {runs_dir} holds no finished run)")
    if json:
        print_snapshot(snapshot_of(folder), json=True)
        return
    from adarun.summary import of_log  # noqa: PLC0415 - numpy takes a tenth of a second

    out = console()
    if not run:
        out.print(f"{HOW_TO_START}; the last run was:")
    out.print(of_log(folder))

"""Runs that are over: the newest one, and what its log says as a snapshot."""

from __future__ import annotations

from pathlib import Path

import msgspec
import platformdirs

from adarun.errors import AdarunError
from adarun.events import RunEnded, Snapshot
from adarun.runlog import read
from adarun.screen.model import About, Model


def last_run(runs_dir: Path) -> Path | None:
    """The folder of the newest run; adarun writes to the user's state folder where it cannot write here."""
    fallback = Path(platformdirs.user_state_dir("adarun")) / "runs"
    found = [path.parent for folder in (runs_dir, fallback) for path in folder.glob("*/run.json")]
    return max(found, key=lambda folder: (folder / "run.json").stat().st_mtime, default=None)


def snapshot_of(folder: Path) -> Snapshot:
    """The job at the end of its log.

    Raises:
        AdarunError: there is no such log.
    """
    try:
        about = msgspec.json.decode((folder / "run.json").read_bytes(), type=About)
    except (OSError, msgspec.DecodeError) as error:
        raise AdarunError(f"{folder} holds no run ({error}); name a folder that has a run.json") from None
    model = Model(msgspec.structs.replace(about, log=str(folder.resolve())))
    at = about.started
    for event in read(folder):
        model.see(event)
        at = max(at, getattr(event, "at", 0.0), getattr(event, "ended", 0.0))
        if isinstance(event, RunEnded):
            at = event.at
    return model.snapshot(at)

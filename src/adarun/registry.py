"""Where this user's running jobs are announced, so that viewers find their hubs: a file a job, in the runtime folder."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

import msgspec

CONNECT_SECONDS = 1.0


class Entry(msgspec.Struct, frozen=True):
    """A running job and the socket of its hub."""

    run: str
    pid: int
    socket: str
    folder: str
    started: float


def folders() -> list[Path]:
    """Where jobs may be announced: two shells of a user need not have the same XDG_RUNTIME_DIR."""
    candidates = [Path(os.environ.get("XDG_RUNTIME_DIR", "")), Path(f"/run/user/{os.getuid()}")]
    parents = [parent for parent in dict.fromkeys(candidates) if parent.is_absolute() and parent.is_dir()]
    return [*(parent / "adarun" for parent in parents), Path(f"/tmp/adarun-{os.getuid()}")]  # noqa: S108 - held to be private


def is_private(folder: Path) -> bool:
    """Whether only this user can have put something there."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def announce(entry: Entry) -> Path | None:
    """Let viewers find a job; returns the file to remove at its end, or None where there is no place for it."""
    for folder in folders():
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if not is_private(folder):
                continue
            path = folder / f"{entry.run}.json"
            draft = path.with_suffix(".new")
            draft.write_bytes(msgspec.json.encode(entry))
            return draft.replace(path)
    return None


def running() -> list[Entry]:
    """The jobs whose hub answers, oldest first; what a dead one left behind is removed."""
    found: dict[str, Entry] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.json")) if is_private(folder) else ():
            try:
                entry = msgspec.json.decode(path.read_bytes(), type=Entry)
            except (OSError, msgspec.DecodeError):
                continue
            if listens(entry.socket):
                found[entry.run] = entry
            elif not lives(entry.pid):
                path.unlink(missing_ok=True)
    return sorted(found.values(), key=lambda entry: (entry.started, entry.run))


def listens(path: str) -> bool:
    """Whether a hub can be reached there; a stopped one can, for as long as its queue has room."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(CONNECT_SECONDS)
        try:
            client.connect(path)
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            return False
    return True


def lives(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

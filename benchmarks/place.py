"""Where a worker runs: its core, its CPU quota and its network, as the benchmark asks by the environment.

The training scripts call this; apart from it they know of no benchmark.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNET = 0x40000000


def enter_network() -> None:
    """Move worker 1 into the network namespace BENCH_NETWORK, if there is one.

    Only the calling thread moves, so call it before torch is imported, which starts others.
    """
    path = os.environ.get("BENCH_NETWORK")
    if not path or os.environ["LOCAL_RANK"] != "1":
        return
    descriptor = os.open(path, os.O_RDONLY)
    # os.setns is there from Python 3.12 on only.
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {path}")
    os.close(descriptor)


def take_place() -> None:
    """Pin this worker to a core of its own; the slow one also joins the group with the CPU quota."""
    rank = int(os.environ["RANK"])
    core = sorted(os.sched_getaffinity(0))[rank]
    # Thread by thread: torch and gloo have started some. A cgroup takes the whole process. New threads inherit both.
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})
    if os.environ.get("BENCH_SLOW_RANK") == str(rank):
        Path(os.environ["BENCH_CGROUP"]).write_text(str(os.getpid()))

"""Train examples/digits.py on two workers, one of which loses half its speed: under torchrun, then under adarun.

    python examples/demo.py

After the first epoch, worker 1 is slowed for real: a cgroup gives it half a CPU core, or, where this process may not make a
cgroup, another process competes with it for its core. The training script knows nothing of it. Takes about a minute.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SCRIPT = Path(__file__).with_name("digits.py")
ARGUMENTS = ["--epochs", "24", "--batch-size", "64", "--width", "64"]
SLOW_RANK = "1"
# Half a core. A short period spreads the pauses over the steps.
PERIOD_MICROSECONDS, QUOTA_MICROSECONDS = 10_000, 5_000
EPOCH = re.compile(r"epoch \d+: loss (\S+), accuracy \S+, (\S+) s")


def make_group() -> Path:
    """Make a cgroup (version 1 or 2) whose processes get half a core, and try it; raise OSError where we may not."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        group = Path(mount, f"adarun-demo-{os.getpid()}")
        if kind == "cgroup" and "cpu" in options.split(","):
            limits = {"cpu.cfs_period_us": f"{PERIOD_MICROSECONDS}", "cpu.cfs_quota_us": f"{QUOTA_MICROSECONDS}"}
        elif kind == "cgroup2" and "cpu" in Path(mount, "cgroup.subtree_control").read_text().split():
            limits = {"cpu.max": f"{QUOTA_MICROSECONDS} {PERIOD_MICROSECONDS}"}
        else:
            continue
        group.mkdir()
        try:
            for name, value in limits.items():
                (group / name).write_text(value)
            with subprocess.Popen(["sleep", "60"]) as probe:
                try:
                    (group / "cgroup.procs").write_text(str(probe.pid))
                finally:
                    probe.kill()
        except OSError:
            remove_group(group)
            raise
        return group
    raise OSError("no cgroup hierarchy here limits CPU time")


def remove_group(group: Path) -> None:
    """Remove a cgroup; the kernel needs a moment to forget processes that have just ended."""
    for _ in range(50):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)
    print(f"demo: could not remove {group}", file=sys.stderr)


@contextmanager
def busy_process(core: int) -> Iterator[None]:
    """Keep a core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            os.sched_setaffinity(process.pid, {core})
            yield
        finally:
            process.kill()


def become_worker(pid_file: str, core: str) -> None:
    """Turn this process into the training script; the worker to be slowed says who it is and, given a core, moves there."""
    slow = os.environ["LOCAL_RANK"] == SLOW_RANK
    if slow:
        Path(pid_file).write_text(str(os.getpid()))
    if core:
        os.sched_setaffinity(0, {int(core)} if slow else os.sched_getaffinity(0) - {int(core)})
    os.execv(sys.executable, [sys.executable, "-u", str(SCRIPT), *ARGUMENTS])


def train(launcher: str, group: Path | None) -> tuple[float, float, str]:
    """Run the training; return all its seconds, those of its last five epochs, and its last loss."""
    module = {"torchrun": "torch.distributed.run", "adarun": "adarun"}[launcher]
    core = max(os.sched_getaffinity(0))
    # Two workers and one GPU would not do, and less CPU time would not slow a GPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    epochs = []
    started = time.perf_counter()
    print(f"\n{launcher} trains with {SCRIPT.name} {' '.join(ARGUMENTS)}:", flush=True)
    with ExitStack() as stack:
        pid_file = Path(stack.enter_context(tempfile.TemporaryDirectory()), "pid")
        own = [__file__, str(pid_file), "" if group else str(core)]
        command = [sys.executable, "-m", module, "--standalone", "--nproc-per-node", "2", *own]
        job = stack.enter_context(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        for line in job.stdout or ():
            print(line, end="", flush=True)
            if match := EPOCH.match(line):
                epochs.append(match)
            if match and len(epochs) == 1:
                print(f"  from here on worker {SLOW_RANK} has half a core", flush=True)
                if group:
                    (group / "cgroup.procs").write_text(pid_file.read_text())
                else:
                    stack.enter_context(busy_process(core))
    if job.returncode:
        sys.exit(f"demo: {launcher} ended with exit code {job.returncode}")
    return time.perf_counter() - started, sum(float(epoch[2]) for epoch in epochs[-5:]), epochs[-1][1]


def main() -> None:
    """Train twice and compare; as a worker, train."""
    if "LOCAL_RANK" in os.environ:
        become_worker(*sys.argv[1:])
    if len(os.sched_getaffinity(0)) == 1:
        sys.exit("demo: two workers need two CPU cores, and this machine has one.")
    try:
        group = make_group()
        print(f"Worker {SLOW_RANK} will be slowed by a cgroup: {group}.")
    except OSError as error:
        group = None
        print(
            f"No cgroup may be made here ({error}): worker {SLOW_RANK} will share its core with a busy process instead."
        )
    try:
        results = {launcher: train(launcher, group) for launcher in ("torchrun", "adarun")}
    finally:
        if group:
            remove_group(group)
    print("\n            whole run   last five epochs   last loss")
    for launcher, (seconds, last_seconds, loss) in results.items():
        print(f"{launcher:<10} {seconds:>8.1f} s {last_seconds:>16.2f} s {loss:>11}")


if __name__ == "__main__":
    main()

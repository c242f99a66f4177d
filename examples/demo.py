"""Train examples/digits.py on two workers, one of them at half speed: under torchrun, then under adarun.

    python examples/demo.py

The slow worker is slowed for real: a cgroup gives it half a CPU core, or, where this process may not make a cgroup,
another process competes with it for its core. The training script knows nothing of it. Takes about a minute.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).with_name("digits.py")
ARGUMENTS = ["--epochs", "24", "--batch-size", "64", "--width", "64"]
SLOW_RANK = "1"
# A short period spreads the pauses over the steps. Half of it is half a core.
PERIOD_MICROSECONDS, QUOTA_MICROSECONDS = 10_000, 5_000
EPOCH = re.compile(r"epoch (\d+): loss (\S+), accuracy (\S+), (\S+) s")


def limit_cpu() -> Path:
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
            remove(group)
            raise
        return group
    raise OSError("no cgroup hierarchy here limits CPU time")


def remove(group: Path) -> None:
    """Remove a cgroup; the kernel needs a moment to forget processes that have just ended."""
    for _ in range(50):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)
    print(f"demo: could not remove {group}", file=sys.stderr)


@contextmanager
def slowed() -> Iterator[list[str]]:
    """Prepare the slow-down, say which one it is, and yield the arguments by which a worker finds it."""
    try:
        group = limit_cpu()
    except OSError as error:
        core = max(os.sched_getaffinity(0))
        print(f"No cgroup may be made here ({error}).")
        print(f"Worker {SLOW_RANK} instead shares core {core} with a process that is always busy.")
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as rival:
            try:
                os.sched_setaffinity(rival.pid, {core})
                yield ["core", str(core)]
            finally:
                rival.kill()
        return
    print(f"Worker {SLOW_RANK} gets half a CPU core: {group}.")
    try:
        yield ["cgroup", str(group)]
    finally:
        remove(group)


def become_worker(kind: str, where: str) -> None:
    """Slow this process if it is the chosen worker, then turn it into the training script."""
    slow = os.environ["LOCAL_RANK"] == SLOW_RANK
    if kind == "core":
        os.sched_setaffinity(0, {int(where)} if slow else os.sched_getaffinity(0) - {int(where)})
    elif slow:
        Path(where, "cgroup.procs").write_text(str(os.getpid()))
    os.execv(sys.executable, [sys.executable, "-u", str(SCRIPT), *ARGUMENTS])


def train(launcher: str, slow_down: list[str]) -> tuple[float, float, str]:
    """Run the training; return all its seconds, those of its last five epochs, and its last loss."""
    module = {"torchrun": "torch.distributed.run", "adarun": "adarun"}[launcher]
    command = [sys.executable, "-m", module, "--standalone", "--nproc-per-node", "2", __file__, *slow_down]
    # Two workers and one GPU would not do, and a quota on CPU time would not slow a GPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(f"\n$ {launcher} --standalone --nproc-per-node 2 {SCRIPT.name} {' '.join(ARGUMENTS)}", flush=True)
    started = time.perf_counter()
    epochs = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            print(line, end="", flush=True)
            if match := EPOCH.match(line):
                epochs.append(match)
    if job.returncode:
        sys.exit(f"demo: {launcher} ended with exit code {job.returncode}")
    return time.perf_counter() - started, sum(float(epoch[4]) for epoch in epochs[-5:]), epochs[-1][2]


def main() -> None:
    """Train twice and compare; as a worker, train."""
    if "LOCAL_RANK" in os.environ:
        become_worker(*sys.argv[1:])
    if len(os.sched_getaffinity(0)) == 1:
        sys.exit("demo: two workers need two CPU cores, and this machine has one.")
    with slowed() as slow_down:
        results = {launcher: train(launcher, slow_down) for launcher in ("torchrun", "adarun")}
    print("\n            whole run   last five epochs   last loss")
    for launcher, (seconds, last_seconds, loss) in results.items():
        print(f"{launcher:<10} {seconds:>8.1f} s {last_seconds:>16.2f} s {loss:>11}")


if __name__ == "__main__":
    main()

"""What one average of two workers' parameters costs: bytes on the wire, bytes copied, and time beside a bare all-reduce.

Usage: python benchmarks/averaging.py

A model of 100 MB: large matrices and, as in real ones, many small vectors. The wire is the loopback device of this machine, so
whoever else uses it counts too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import harness
import psutil
from harness import Figure, Record

MEGABYTES, SMOKE_MEGABYTES = 100, 10
CONTENDERS = {
    "bare": "one all-reduce of all in one piece",
    "ours": "whole parameters (gossip's averages)",
    "moves": "moves from the last average",
}
COPIES = ("clone", "copy_", "cat", "_to_copy", "stack")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="averages, and all-reduces, in turn")
    parser.add_argument("--result", type=Path, help="where a worker writes what it measured; makes this a worker")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    return parser.parse_args()


# --- a worker ---


def work(result: Path, rounds: int, megabytes: int) -> None:
    """Average and all-reduce the same tensors in turn, and write down what each took."""
    import torch  # noqa: PLC0415 - only the workers need it
    import torch.distributed as dist  # noqa: PLC0415
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415

    from adarun.worker.averaging import average, average_moves  # noqa: PLC0415

    class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts the bytes that copying operations write."""

        num_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            done = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in COPIES:
                self.num_bytes += done.numel() * done.element_size()
            return done

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    width = 1024
    num_layers = max(1, megabytes * 1_000_000 // (4 * (width * width + 3 * width)))
    layers = [[torch.randn(width, width), *(torch.randn(width) for _ in range(3))] for _ in range(num_layers)]
    tensors = [tensor for layer in layers for tensor in layer]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    flat = torch.randn(num_bytes // 4)

    def bare() -> None:
        dist.all_reduce(flat)

    anchors = [tensor.clone() for tensor in tensors]

    def ours() -> None:
        average(tensors, 0.5)

    def moves() -> None:
        average_moves(tensors, anchors, 0.5)

    def measured(run: Callable[[], None]) -> tuple[float, int]:
        dist.barrier()
        before, began = sent(), time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        dist.barrier()
        return seconds, sent() - before

    rows = []
    for _ in range(rounds):
        rows.append({"bare": measured(bare), "ours": measured(ours), "moves": measured(moves)})
    copied = {}
    for name, run in (("ours", ours), ("moves", moves)):
        with Copies() as copies:  # type: ignore[no-untyped-call]
            run()
        copied[name] = copies.num_bytes
    if dist.get_rank() == 0:
        result.write_text(json.dumps({"rows": rows, "bytes": num_bytes, "copied": copied}))
    dist.barrier()
    dist.destroy_process_group()


def sent() -> int:
    """Bytes that the loopback device has sent so far."""
    counters = psutil.net_io_counters(pernic=True)
    return int(counters["lo"].bytes_sent)


# --- the benchmark ---


def main() -> None:
    """Start two workers, report."""
    arguments = parse_arguments()
    if arguments.result:
        work(arguments.result, arguments.rounds, SMOKE_MEGABYTES if arguments.smoke else MEGABYTES)
        return
    record = Record("averaging", arguments.smoke)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, __file__, "--result", str(result), "--rounds", str(arguments.rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *["--smoke"] * arguments.smoke], env=environment, check=True)
        measured = json.loads(result.read_text())
    record.write(type="average", **measured)
    # Both workers' bytes cross the same device.
    needed = 2 * measured["bytes"]
    runs = {name: [row[name] for row in measured["rows"]] for name in CONTENDERS}
    sent = {name: median(size for _, size in runs[name]) / needed for name in CONTENDERS}
    rows = [
        [title, f"{median(seconds for seconds, _ in runs[name]):.3f}", f"{sent[name]:.3f}"]
        for name, title in CONTENDERS.items()
    ]
    title = f"{measured['bytes'] / 1e6:.0f} MB on two workers"
    harness.show_rows(title, ["", "s", "bytes / what an all-reduce needs"], rows, smoke=arguments.smoke)
    figures = []
    for name in ("ours", "moves"):
        figures.append(Figure(f"{CONTENDERS[name]}: bytes sent / needed", sent[name], "<= 1.05"))
        copied = measured["copied"][name] / measured["bytes"]
        figures.append(Figure(f"{CONTENDERS[name]}: bytes copied / size of the model", copied, "<= 1.01"))
    harness.show_figures(figures, smoke=arguments.smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

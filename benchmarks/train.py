"""The work that the benchmarks time: a small network on scikit-learn's digits, enlarged so that a step costs something.

Started by `harness.py` under torchrun and under adarun; it knows neither. CPU only.
"""
# ruff: noqa: E402 -- the worker takes its place before torch is imported, so that torch's threads take it as well.

from __future__ import annotations

import os
from pathlib import Path


def take_place() -> None:
    """Pin this worker to a core of its own; the slow one also joins the group with the CPU quota."""
    rank = int(os.environ["LOCAL_RANK"])
    core = sorted(os.sched_getaffinity(0))[rank]
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})
    if os.environ.get("BENCH_SLOW_RANK") == str(rank):
        Path(os.environ["BENCH_CGROUP"]).write_text(str(os.getpid()))


take_place()

import argparse
import itertools
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SIDE = 24


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--global-batch", type=int, required=True)
    parser.add_argument("--model", choices=["cnn", "empty"], required=True)
    parser.add_argument(
        "--times", type=Path, required=True, help="rank 0 writes the clock here, first and after each step"
    )
    parser.add_argument("--result", type=Path, required=True, help="rank 0 writes final loss and parameters here")
    return parser.parse_args()


def load_data() -> TensorDataset:
    """Return the digits, 24 x 24 pixels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    return TensorDataset(nn.functional.interpolate(images, size=SIDE), labels)


def build_model(kind: str) -> nn.Module:
    """`cnn`: about 2 ms per sample on one core and few parameters to send; `empty`: next to nothing."""
    if kind == "empty":
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 10))
    width = 32
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (SIDE // 4) ** 2, 10),
    )


def batches(data: TensorDataset, batch_size: int) -> Iterator[list[Tensor]]:
    """Yield this worker's batches, epoch after epoch."""
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def train(model: nn.Module, data: TensorDataset, batch_size: int, steps: int) -> Iterator[float]:
    """Train; yield the clock before the first step and after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    yield time.monotonic()
    for images, labels in itertools.islice(batches(data, batch_size), steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield time.monotonic()


@torch.no_grad()
def save_result(path: Path, network: nn.Module, data: TensorDataset) -> None:
    """Write the loss over all the data, and the parameters."""
    images, labels = data.tensors
    network.eval()
    parts = zip(torch.split(images, 256), torch.split(labels, 256), strict=True)
    loss = sum(float(nn.functional.cross_entropy(network(x), y, reduction="sum")) for x, y in parts)
    torch.save({"loss": loss / len(labels), "parameters": network.state_dict()}, path)


def main() -> None:
    """Train and leave the two files."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    data = load_data()
    network = build_model(arguments.model)
    model = DistributedDataParallel(network)
    batch_size = arguments.global_batch // dist.get_world_size()
    # Line by line: the harness follows the run by the length of this file.
    with Path(arguments.times if first else os.devnull).open("w", buffering=1) as times:
        for clock in train(model, data, batch_size, arguments.steps):
            times.write(f"{clock:.6f}\n")
    if first:
        save_result(arguments.result, network, data)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

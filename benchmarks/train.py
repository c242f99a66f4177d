"""The work that the benchmarks time: a small convolutional network on made-up pictures.

Started by `harness.py` under torchrun and under adarun; it knows neither. CPU only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import place
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SAMPLES, SIDE = 1920, 24


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


def make_data() -> TensorDataset:
    """Return noisy pictures of ten random patterns: learnable, always the same, and there without a slow import."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(10, (SAMPLES,), generator=generator)
    return TensorDataset(patterns[labels] + torch.randn(SAMPLES, 1, SIDE, SIDE, generator=generator), labels)


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


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: TensorDataset, batch_size: int, steps: int
) -> Iterator[float]:
    """Train; yield the clock before the first step and after each."""
    yield time.monotonic()
    for images, labels in itertools.islice(batches(data, batch_size), steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield time.monotonic()


@torch.no_grad()
def save_result(path: Path, network: nn.Module, data: TensorDataset) -> None:
    """Write the loss over a part of the data, and the parameters."""
    images, labels = (tensor[:512] for tensor in data.tensors)
    network.eval()
    loss = float(nn.functional.cross_entropy(network(images), labels))
    parameters = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    with path.open("wb") as file:
        np.savez(file, loss=loss, **parameters)


def main() -> None:
    """Train and leave the two files."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    data = make_data()
    network = build_model(arguments.model)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch_size = arguments.global_batch // dist.get_world_size()
    place.take_place()  # only now: importing torch is not what is timed, and would take the slow worker long
    # Line by line: the harness follows the run by the length of this file.
    with Path(arguments.times if first else os.devnull).open("w", buffering=1) as times:
        for clock in train(model, optimizer, data, batch_size, arguments.steps):
            times.write(f"{clock:.6f}\n")
    if first:
        save_result(arguments.result, network, data)
    # All leave together: torch 2.13 can abort a worker whose Python shuts down right after its last collective.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

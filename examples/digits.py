"""Train a small convolutional network on scikit-learn's handwritten digits, with one process or with many.

    python examples/digits.py
    torchrun --nproc-per-node 2 examples/digits.py
    adarun --nproc-per-node 2 examples/digits.py --checkpoint digits.pt

The data come with scikit-learn, so nothing is downloaded. The script knows nothing of adarun.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

Batches = DataLoader[tuple[Tensor, ...]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=10, help="train until this many epochs are done")
    parser.add_argument("--batch-size", type=int, default=32, help="samples per worker and step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--width", type=int, default=32, help="channels of the first layer")
    parser.add_argument("--loader-workers", type=int, default=0, help="processes that load data, per worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written after each epoch; resumed from where it exists")
    return parser.parse_args()


def join_group() -> torch.device:
    """Join the other workers, or form a group of one where no launcher started us; return this worker's device."""
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test set: 8 x 8 pixels in [0, 1], and the digit."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def build_model(width: int) -> nn.Module:
    """Three convolutions and a linear layer; no batch statistics, so the split of a batch does not matter."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 4 * 4, 10),
    )


def sum_over_workers(first: float, second: float, device: torch.device) -> tuple[float, float]:
    """Add up two numbers over all workers."""
    both = torch.tensor([first, second], dtype=torch.float32, device=device)
    dist.all_reduce(both)
    return float(both[0]), float(both[1])


def train_epoch(model: nn.Module, batches: Batches, optimizer: Optimizer, device: torch.device) -> float:
    """Train for one epoch; return the mean loss over all workers' samples."""
    model.train()
    loss_sum, count = 0.0, 0
    for batch in batches:
        images, labels = (tensor.to(device) for tensor in batch)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        count += len(labels)
    total, samples = sum_over_workers(loss_sum, count, device)
    return total / samples


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, device: torch.device) -> float:
    """Return the accuracy over all workers' parts of the test set."""
    model.eval()
    correct, count = 0, 0
    for batch in batches:
        images, labels = (tensor.to(device) for tensor in batch)
        correct += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    right, samples = sum_over_workers(correct, count, device)
    return right / samples


def save(path: Path, epochs_done: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Write a checkpoint so that there is always a whole one: under another name first, then in place of the old."""
    state = {"epochs_done": epochs_done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    unfinished = path.with_name(path.name + ".part")
    torch.save(state, unfinished)
    unfinished.replace(path)


def resume(path: Path, model: nn.Module, optimizer: Optimizer, device: torch.device) -> int:
    """Load a checkpoint; return how many epochs it holds."""
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epochs_done"])


def main() -> None:
    """Train, and print one line per epoch."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    device = join_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()

    network = build_model(arguments.width).to(device)
    optimizer = SGD(network.parameters(), lr=arguments.lr, momentum=0.9)
    path: Path | None = arguments.checkpoint
    first_epoch = resume(path, network, optimizer, device) if path and path.exists() else 0
    model = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    train_set, test_set = load_data()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(train_set, seed=arguments.seed)
    train_batches: Batches = DataLoader(
        train_set, batch_size=arguments.batch_size, sampler=sampler, num_workers=arguments.loader_workers
    )
    test_part = Subset(test_set, range(rank, len(test_set), world_size))
    test_batches: Batches = DataLoader(test_part, batch_size=256)

    for epoch in range(first_epoch, arguments.epochs):
        started = time.perf_counter()
        sampler.set_epoch(epoch)
        loss = train_epoch(model, train_batches, optimizer, device)
        accuracy = evaluate(model, test_batches, device)
        if rank == 0:
            seconds = time.perf_counter() - started
            print(f"epoch {epoch + 1}: loss {loss:.4f}, accuracy {accuracy:.3f}, {seconds:.2f} s", flush=True)
            if path:
                save(path, epoch + 1, network, optimizer)
    # All leave together: torch 2.13 can abort a worker whose Python shuts down right after its last collective.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

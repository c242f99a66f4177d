"""The work of `slow_network.py`: a character model on the text of Python's own standard library.

Started under torchrun and under adarun; it knows neither. CPU only. Most of its parameters are an embedding of character
pairs, so there is much to send and little to compute: the kind of job that a slow network holds back most.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import time
from pathlib import Path

import place

if __name__ == "__main__":
    place.enter_network()

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

CHARACTERS = 128  # ASCII
CONTEXT, LENGTH = 16, 32  # a sample is a piece of text: a context, and so many characters to predict


class Model(nn.Module):
    """Predicts each character from the 16 before it, which it sees as 8 pairs."""

    def __init__(self, width: int = 72, hidden: int = 512) -> None:
        super().__init__()
        self.pairs = nn.Embedding(CHARACTERS**2, width)
        self.hidden = nn.Linear(width * CONTEXT // 2, hidden)
        self.out = nn.Linear(hidden, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """Return the scores of each character that may follow the first 16, the first 17 and so on."""
        pairs = self.pairs(text[:, :-1] * CHARACTERS + text[:, 1:])
        windows = pairs.unfold(1, CONTEXT - 1, 1)[..., ::2].flatten(2)
        scores: Tensor = self.out(nn.functional.gelu(self.hidden(windows)))
        return scores


def loss_of(network: nn.Module, text: Tensor) -> Tensor:
    """Return the mean loss over the characters after the context."""
    scores = network(text[:, :-1])
    return nn.functional.cross_entropy(scores.flatten(0, 1), text[:, CONTEXT:].flatten())


class Text(Dataset[Tensor]):
    """Pieces of the files' text from random places, in each epoch others, the same on every worker."""

    def __init__(self, files: list[Path], count: int, seed: int) -> None:
        text = "".join(file.read_text(errors="ignore") for file in files).encode("ascii", errors="ignore")
        self.characters = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.count, self.seed = count, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's places."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        self.starts = torch.randint(len(self.characters) - CONTEXT - LENGTH, (self.count,), generator=generator)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.characters[start : start + CONTEXT + LENGTH]


def make_data(train: int, held_out: int) -> tuple[Text, Text]:
    """Return text to train on, and that of other files (every tenth) to evaluate on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    trained = [file for number, file in enumerate(files) if number % 10]
    return Text(trained, train, seed=1), Text(files[::10], held_out, seed=0)


@torch.no_grad()
def evaluate(network: nn.Module, data: Text) -> float:
    """Return the loss on the held-out text; each worker computes a part of it."""
    network.eval()
    mine = range(dist.get_rank(), len(data), dist.get_world_size())
    loss = loss_of(network, torch.stack([data[index] for index in mine]))
    network.train()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loader: DataLoader[Tensor],
) -> float:
    """Train for an epoch; return this worker's mean loss."""
    total = 0.0
    for text in loader:
        optimizer.zero_grad()
        loss = loss_of(model, text)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / len(loader)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--steps-per-epoch", type=int, required=True)
    parser.add_argument("--global-batch", type=int, default=48, help="pieces of text per step, all workers together")
    parser.add_argument("--lr", type=float, default=12e-3)
    parser.add_argument("--held-out", type=int, default=512, help="pieces of text to evaluate on")
    parser.add_argument("--result", type=Path, required=True, help="rank 0 writes a JSON line per epoch here")
    return parser.parse_args()


def main() -> None:
    """Train; write a line before the first epoch and after each."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    data, held_out = make_data(arguments.steps_per_epoch * arguments.global_batch, arguments.held_out)
    network = Model()
    model = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    steps = arguments.epochs * arguments.steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sampler: DistributedSampler[Tensor] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, arguments.global_batch // dist.get_world_size(), sampler=sampler, drop_last=True)
    place.take_place()  # only now: importing torch is not what is timed, and would take a slow worker long
    with Path(arguments.result if first else os.devnull).open("w", buffering=1) as result:
        train_loss: float | None = None
        eval_loss = evaluate(network, held_out)
        began = time.monotonic()
        for epoch in range(arguments.epochs + 1):
            if epoch:
                sampler.set_epoch(epoch)
                data.set_epoch(epoch)
                train_loss = train_epoch(model, optimizer, schedule, loader)
                eval_loss = evaluate(network, held_out)
            seconds = time.monotonic() - began
            row = {"epoch": epoch, "seconds": seconds, "train_loss": train_loss, "eval_loss": eval_loss}
            result.write(json.dumps(row) + "\n")
            if first:
                print(f"epoch {epoch}: {seconds:.1f} s, held-out loss {eval_loss:.4f}", flush=True)
    # All leave together: torch 2.13 can abort a worker whose Python shuts down right after its last collective.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Train with batches drawn by hand, without a DataLoader: `adarun.split` gives each worker its piece of every batch.

    adarun --standalone --nproc-per-node 2 examples/custom_batches.py
    torchrun --standalone --nproc-per-node 2 examples/custom_batches.py
    python examples/custom_batches.py

All three draw the same batches and learn the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adarun

SAMPLES, GLOBAL_BATCH = 2000, 64


def main() -> None:
    """Fit a small network to a sine and print its loss after each epoch."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="file to save the parameters to")
    args = parser.parse_args()

    distributed = dist.is_torchelastic_launched()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x = torch.rand(SAMPLES, 1) * 6
    y = x.sin()
    network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    if distributed:
        dist.init_process_group("gloo")
    model = DistributedDataParallel(network) if distributed else network
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    for epoch in range(args.epochs):
        # The generator has the same seed on all ranks, so all of them draw the same batches.
        order: list[int] = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
        total = torch.zeros(())
        for start in range(0, SAMPLES - GLOBAL_BATCH + 1, GLOBAL_BATCH):
            piece = list(adarun.split(order[start : start + GLOBAL_BATCH]))
            loss = nn.functional.mse_loss(model(x[piece]), y[piece])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(piece)
        if distributed:
            with adarun.waiting():
                dist.all_reduce(total)
        if not distributed or dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {total / (SAMPLES // GLOBAL_BATCH * GLOBAL_BATCH):.6f}")

    if args.out and (not distributed or dist.get_rank() == 0):
        torch.save(network.state_dict(), args.out)
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

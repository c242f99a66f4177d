"""Trains epochs until it has run under so many settings, saves after each, and goes on from there; prints them."""

import argparse
import io
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--settings", type=int, default=1)
parser.add_argument("--no-checkpoint", action="store_true")
args = parser.parse_args()

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = TensorDataset(torch.randn(320, 4))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=args.batch_size, sampler=sampler)
path = Path("checkpoint.pt")
epoch, seen = torch.load(path) if path.exists() else (0, [])
setting = f"{args.batch_size} {os.environ.get('VARIABLE')}"
while len(seen) < args.settings or epoch < 4:
    sampler.set_epoch(epoch)
    for (x,) in loader:
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    epoch, seen = epoch + 1, sorted({*seen, setting})
    if dist.get_rank() == 0:
        print(f"epoch {epoch} {setting}", flush=True)
        if args.no_checkpoint:
            torch.save(seen, io.BytesIO())  # a copy in memory is none
        else:
            torch.save((epoch, seen), path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
dist.destroy_process_group()

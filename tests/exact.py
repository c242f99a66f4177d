"""A training script for the exactness tests: float64, and every feature of a real loop that could get the weights wrong."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
parser.add_argument("--clip", action="store_true")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--hook", action="store_true")
parser.add_argument("--sum", action="store_true")
parser.add_argument("--batchnorm", action="store_true")
parser.add_argument(
    "--auxiliary", action="store_true", help="a loss that the model keeps aside, as mixtures of experts do"
)
parser.add_argument("--checkpointing", action="store_true", help="re-entrant activation checkpointing")
parser.add_argument("--drop-last", action="store_true")
parser.add_argument("--break-at", type=int, default=0)
parser.add_argument("--num-workers", type=int, default=0)
parser.add_argument("--prefetch", action="store_true", help="draw a batch ahead of training, as CUDA prefetchers do")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--samples", type=int, default=203)
parser.add_argument("--batch-size", type=int, default=8)
args = parser.parse_args()


class Data(Dataset):
    def __len__(self) -> int:
        return args.samples

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, dtype=torch.float64, generator=generator)
        return x, (x.sum().sin() + 0.1 * index / args.samples).reshape(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 1)
        self.norm = nn.BatchNorm1d(16) if args.batchnorm else nn.Identity()
        self.auxiliary = torch.zeros(())

    def forward(self, x):
        hidden = (
            torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True)
            if args.checkpointing
            else self.first(x)
        )
        hidden = torch.tanh(self.norm(hidden))
        self.auxiliary = 0.1 * hidden.pow(2).mean()
        return self.second(hidden)


def batches(loader):
    if not args.prefetch:
        yield from loader
        return
    iterator = iter(loader)
    ahead = next(iterator, None)
    while ahead is not None:
        batch, ahead = ahead, next(iterator, None)
        yield batch


dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(Model().double())
if args.hook:

    def hook(state, bucket):
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
data = Data()
sampler = DistributedSampler(data)
loader = DataLoader(
    data, batch_size=args.batch_size, sampler=sampler, drop_last=args.drop_last, num_workers=args.num_workers
)
evaluation = DataLoader(data, batch_size=args.batch_size, sampler=DistributedSampler(data, shuffle=False))
if args.optimizer == "sgd":
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loss_of = nn.MSELoss(reduction="sum" if args.sum else "mean")
lengths = []
for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    model.train()
    for number, (x, y) in enumerate(batches(loader)):
        if args.break_at and number == args.break_at:
            break
        lengths.append(len(x))
        last = (number + 1) % args.accumulate == 0 or number + 1 == len(loader)
        model.require_backward_grad_sync = last
        out = model(x.requires_grad_(args.checkpointing))
        loss = loss_of(out, y)
        if args.auxiliary:
            loss = loss + model.module.auxiliary
        loss.backward()
        if last:
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert sum(len(x) for x, _ in evaluation) == len(evaluation.sampler)
torch.save({"parameters": model.module.state_dict(), "lengths": lengths}, f"{args.out}.{dist.get_rank()}")
dist.destroy_process_group()

"""Trains in float64, once for each case on its command line, with what in a real loop could get the weights wrong.

exact.py FOLDER 'OPTIONS OF THE FIRST CASE' 'OPTIONS OF THE SECOND' ... leaves FOLDER/<case>.<rank> for each.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--clip", action="store_true")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--hook", action="store_true", help="a communication hook of the script's own")
parser.add_argument("--sum", action="store_true", help="a loss summed over the samples")
parser.add_argument("--batchnorm", action="store_true")
parser.add_argument("--fsdp", action="store_true", help="a model sharded over the workers")
parser.add_argument(
    "--auxiliary", action="store_true", help="a loss that the model keeps aside, as mixtures of experts do"
)
parser.add_argument("--checkpointing", action="store_true", help="re-entrant activation checkpointing")
parser.add_argument("--drop-last", action="store_true")
parser.add_argument("--break-at", type=int, default=0)
parser.add_argument("--num-workers", type=int, default=0)
parser.add_argument("--prefetch", action="store_true", help="draw a batch ahead of training, as CUDA prefetchers do")
parser.add_argument("--fail-at", type=int, default=-1, help="the step at which the first worker group fails")
parser.add_argument("--until-decided", default="", help="train until a run log in this folder holds a decision")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--samples", type=int, default=203)
parser.add_argument("--batch-size", type=int, default=8)


class Data(Dataset):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, dtype=torch.float64, generator=generator)
        return index, x, (x.sum().sin() + 0.1 * index / self.samples).reshape(1)


class Model(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 1)
        self.norm = nn.BatchNorm1d(16) if args.batchnorm else nn.Identity()
        self.checkpointing = args.checkpointing
        self.auxiliary = torch.zeros(())

    def forward(self, x):
        first = functools.partial(checkpoint, self.first, use_reentrant=True) if self.checkpointing else self.first
        hidden = torch.tanh(self.norm(first(x)))
        self.auxiliary = 0.1 * hidden.pow(2).mean()
        return self.second(hidden)


def hook(state, bucket):
    future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def ahead(loader) -> Iterator:
    iterator = iter(loader)
    following = next(iterator, None)
    while following is not None:
        batch, following = following, next(iterator, None)
        yield batch


def decided(folder: str) -> bool:
    """Whether rank 0 finds a decision in the log."""
    logs = Path(folder).glob("*/events.jsonl") if dist.get_rank() == 0 else []
    found = torch.tensor(any('"type":"decision"' in log.read_text() for log in logs))
    dist.broadcast(found, 0)
    return bool(found)


def train(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    network = Model(args).double()
    model = fully_shard(network) if args.fsdp else DistributedDataParallel(network)
    if args.hook:
        model.register_comm_hook(None, hook)
    data = Data(args.samples)
    sampler = DistributedSampler(data)
    loader = DataLoader(
        data, batch_size=args.batch_size, sampler=sampler, drop_last=args.drop_last, num_workers=args.num_workers
    )
    evaluation = DataLoader(data, batch_size=args.batch_size, sampler=DistributedSampler(data, shuffle=False))
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=args.lr, **({"momentum": 0.9} if args.optimizer == "sgd" else {}))
    loss_of = nn.MSELoss(reduction="sum" if args.sum else "mean")
    # The samples of each step.
    drawn: list[list[int]] = []
    epoch = 0
    while epoch < args.epochs or (args.until_decided and not decided(args.until_decided)):
        sampler.set_epoch(epoch)
        model.train()
        for number, (indices, x, y) in enumerate(ahead(loader) if args.prefetch else loader):
            if args.break_at and number == args.break_at:
                break
            if len(drawn) == args.fail_at and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                sys.exit("exact.py: fails as it was told to")
            drawn.append(indices.tolist())
            last = (number + 1) % args.accumulate == 0 or number + 1 == len(loader)
            model.require_backward_grad_sync = last
            loss = loss_of(model(x.requires_grad_(args.checkpointing)), y)
            if args.auxiliary:
                loss = loss + network.auxiliary
            loss.backward()
            if last:
                if args.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            assert sum(len(x) for _, x, _ in evaluation) == len(evaluation.sampler)
        epoch += 1
    parameters = network.state_dict()
    if args.fsdp:
        parameters = {name: value.full_tensor() for name, value in parameters.items()}
    return {"parameters": parameters, "drawn": drawn}


if __name__ == "__main__":
    folder, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    for number, case in enumerate(cases):
        torch.save(train(parser.parse_args(shlex.split(case))), f"{folder}/{number}.{dist.get_rank()}")
    dist.destroy_process_group()

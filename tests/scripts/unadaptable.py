"""Trains in a way that adarun can only measure: its one argument says which."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

kind = sys.argv[1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(96, 4))


dist.init_process_group("gloo")
data = TensorDataset(torch.randn(96, 4))
loader = {
    "iterable": lambda: DataLoader(Stream(), batch_size=8),
    "sampler": lambda: DataLoader(data, batch_size=8, sampler=RandomSampler(data)),
    "batch_sampler": lambda: DataLoader(data, batch_sampler=list(BatchSampler(range(96), 8, False))),
    "no_ddp": lambda: DataLoader(data, batch_size=4, sampler=DistributedSampler(data)),
}[kind]()
model = torch.nn.Linear(4, 1)
if kind != "no_ddp":
    model = DistributedDataParallel(model)
for batch in loader:
    model(batch if kind == "iterable" else batch[0]).mean().backward()
    if kind == "no_ddp":
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
dist.destroy_process_group()

"""What a script may do between two averages of its parameters: one case a run, named on the command line.

local.py FOLDER CASE leaves FOLDER/<rank>, what this rank has seen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def average_hook(state, bucket):
    future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def main(folder: Path, case: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(240, 6)
    data = TensorDataset(x, x.sum(1, keepdim=True).sin())
    loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data))
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.BatchNorm1d(16) if case == "buffers" else nn.Identity())
    network.append(nn.Linear(16, 1))
    if case == "embedding":
        data = TensorDataset(torch.arange(240).remainder(30), x.sum(1, keepdim=True).sin())
        loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data))
        network = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 1))
    model = DistributedDataParallel(network, find_unused_parameters=case == "unused")
    if case == "hook":
        model.register_comm_hook(None, average_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if case == "embedding":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu") if case == "scaler" else None
    seen: list[float] = []
    for _ in range(3):
        model.train()
        for number, (inputs, targets) in enumerate(loader):
            if case == "break" and number == 17:
                break
            loss = nn.functional.mse_loss(model(inputs), targets)
            if case == "diverges" and number == 15:
                loss = loss * float("inf")
            (scaler.scale(loss) if scaler else loss).backward()
            if case == "late hook" and not seen:
                seen.append(0.0)
                model.register_comm_hook(None, average_hook)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
            if number == 17 and case in {"evaluates", "evaluates alone"} and (rank == 0 or case == "evaluates"):
                model.eval()
                with torch.no_grad():
                    seen.append(float((model.module if rank else model)(x[:50]).double().sum()))
                model.train()
            if number == 17 and case == "saves":
                seen.append(sum(float(value.double().sum()) for value in model.state_dict().values()))
            if number == 17 and case == "fails" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank == 1:
                os._exit(3)
        model.eval()
        if case == "break":
            with torch.no_grad():
                seen.append(float(model(x[:50]).double().sum()))
    if case == "buffers":
        seen.append(float(network[2].running_var.double().sum()))
    seen.append(sum(float(value.double().sum()) for value in network.parameters()))
    (folder / str(rank)).write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

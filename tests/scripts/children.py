"""Trains with data-loader processes of both kinds, and leaves in $DUMPS/<rank> what they and other children say of themselves."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import adarun

SAMPLES = 100
WAITING_SECONDS = 0.25


class Data(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        return index, int(adarun.active()), os.getpid(), torch.full((3,), index / SAMPLES)


def train(model, context: str) -> dict:
    data = Data()
    sampler = DistributedSampler(data)
    loader = DataLoader(
        data, batch_size=5, sampler=sampler, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    seen = {"drawn": [], "active": 0, "processes": set()}
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for number, (indices, active, processes, x) in enumerate(loader):
            seen["drawn"].append(indices.tolist())
            seen["active"] += int(active.sum())
            seen["processes"] |= set(processes.tolist())
            model(x).mean().backward()
            if (epoch, number) == (0, 0):
                with adarun.waiting():
                    time.sleep(WAITING_SECONDS)
    return {**seen, "processes": len(seen["processes"] - {os.getpid()})}


def main() -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(torch.nn.Linear(3, 1))
    dump = {context: train(model, context) for context in ("fork", "spawn")}
    if dist.get_rank() == 0:
        ask = "import sys, torch; print('adarun.worker.training' in sys.modules)"
        dump["program"] = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    with multiprocessing.get_context("fork").Pool(1) as pool:
        dump["forked"] = pool.apply(adarun.active)
    dump["worker"] = adarun.active()
    Path(os.environ["DUMPS"], os.environ["RANK"]).write_text(json.dumps(dump))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

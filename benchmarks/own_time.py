"""A worker that times the same nearly empty loop with adarun's patches and with torch's originals, in turn.

Started by `overhead.py` under adarun with one worker; prints the median difference per step in microseconds.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import adarun.worker.training as attached

STEPS = 500


def epoch(loader: DataLoader[Any], model: nn.Module) -> float:
    """CPU seconds per step of one epoch, all threads; each step draws, runs forward and backward."""
    started = time.process_time()
    for (x,) in loader:
        model(x).sum().backward()
    return (time.process_time() - started) / STEPS


def main() -> None:
    """Alternate, and print the median of the differences."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(4, 1))
    data = TensorDataset(torch.zeros(STEPS, 4))
    loader = DataLoader(data, batch_size=1, sampler=DistributedSampler(data))
    training, patched = attached.current, torch.autograd.backward
    original = patched.__wrapped__  # type: ignore[attr-defined]
    assert training is not None
    differences = []
    for number in range(int(sys.argv[1])):
        with_patches = epoch(loader, model)
        attached.current, torch.autograd.backward = None, original
        without = epoch(loader, model)
        attached.current, torch.autograd.backward = training, patched
        if number:  # the first pair warms up
            differences.append((with_patches - without) * 1e6)
    print(f"own_time {statistics.median(differences):.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

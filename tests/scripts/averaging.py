# ruff: noqa: B905
"""Averages and mixes tensors of many kinds on four workers; every one checks its own.

averaging.py leaves nothing and prints nothing if all is right.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from adarun.worker.averaging import CHUNK, SMALL, average, average_moves, exchange, mix, one_peer, ring

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
weights = [0.4, 0.3, 0.2, 0.1]


def tensors(of: int) -> list[torch.Tensor]:
    """Rank `of`'s: several chunks, some small ones, a number, other types and layouts."""
    generator = torch.Generator().manual_seed(of)
    values = [
        torch.randn(CHUNK + 5, generator=generator),
        torch.randn(SMALL + 1, generator=generator, dtype=torch.float64),
        torch.randn(3, 4, generator=generator),
        torch.randn((), generator=generator, dtype=torch.float64),
        torch.randn(5, generator=generator).bfloat16(),
        torch.zeros(0),
        torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        torch.randn(7, 3, generator=generator).t(),
    ]
    return [torch.nn.Parameter(value) for value in values]


def near(value: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 2e-2 if value.dtype is torch.bfloat16 else 1e-5
    return torch.allclose(value.detach(), expected.to(value.dtype), rtol=tolerance, atol=tolerance)


# --- the weighted average, and what is said of it ---
mine = tensors(rank)
before = [value.detach().clone() for value in mine]
spread = average(mine, weights[rank])
expected = [
    sum(w * v.detach().double() for w, v in zip(weights, values)) for values in zip(*map(tensors, range(world)))
]
assert all(near(value, mean) for value, mean in zip(mine, expected))
assert mine[6].is_contiguous(memory_format=torch.channels_last)
moved = sum(float((value - old).detach().double().norm()) ** 2 for value, old in zip(mine, before)) ** 0.5
length = sum(float(value.detach().double().norm()) ** 2 for value in mine) ** 0.5
assert abs(spread.distance() / moved - 1) < 1e-3, (spread.distance(), moved)
assert abs(spread.norm() / length - 1) < 1e-3
sums: list = [None] * world
dist.all_gather_object(sums, spread.checksum())
assert len(set(sums)) == 1, sums

# --- moves from where all began: to 1 in 256 of themselves in float32, exact in float64, the same bits everywhere ---
began = tensors(99)
anchors = [value.detach().clone() for value in began]
with torch.no_grad():
    for value, other in zip(began, tensors(rank)):
        value.add_(0.01 * other)
ways = [
    0.01 * sum(w * v.detach().double() for w, v in zip(weights, values)) for values in zip(*map(tensors, range(world)))
]
moves = average_moves(began, anchors, weights[rank])
for value, anchor, start, way in zip(began, anchors, tensors(99), ways):
    assert torch.equal(value, anchor)
    if value.numel() and value.dtype is not torch.bfloat16:
        error = (value.detach().double() - start.detach().double() - way).abs().max()
        limit = 1e-12 if value.dtype is torch.float64 else 2e-2 * float(way.abs().max())
        assert float(error) <= limit, (value.shape, float(error), limit)
dist.all_gather_object(sums, moves.checksum())
assert len(set(sums)) == 1, sums

# --- an average that silently does nothing leaves a replica that differs in one bit with another checksum ---
with torch.no_grad():
    mine[0][17] += torch.finfo(torch.float32).eps * mine[0][17].abs() if rank == 2 else 0.0
dist.all_gather_object(sums, exchange(mine, lambda chunk: lambda: None).checksum())
assert sums[0] == sums[1] == sums[3] != sums[2], sums

# --- gossip: the exact average after log2 n rounds, the mean kept in every one ---
mine = tensors(rank)
for number in range(2):
    mix(mine, one_peer(rank, world, number))
expected = [torch.stack([v.detach().double() for v in values]).mean(0) for values in zip(*map(tensors, range(world)))]
assert all(near(value, mean) for value, mean in zip(mine, expected))

# --- ring: a third from each neighbour ---
mine = tensors(rank)
mix(mine, ring(rank, world))
others = [tensors((rank + step) % world) for step in (-1, 0, 1)]
expected = [torch.stack([v.detach().double() for v in values]).mean(0) for values in zip(*others)]
assert all(near(value, mean) for value, mean in zip(mine, expected))
dist.barrier()
dist.destroy_process_group()

"""Averages what the workers hold, in place: by an all-reduce, or by one exchange with a neighbour (gossip).

A large tensor is never packed: it is cut into chunks, each of which is kept aside once, to tell how far this replica was from
the average, and reduced where it lies. Small tensors share messages, since each message has its latency.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Elements: up to so many a tensor travels with others, and no message has more.
SMALL = 1 << 14
CHUNK = 1 << 22
# Messages under way at a time: enough to keep a link busy, and what bounds the memory for the copies.
IN_FLIGHT = 3
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHECKSUM_FACTOR, CHECKSUM_MODULUS = 1_000_003, (1 << 61) - 1

# Starts the exchange of a chunk, which it may overwrite; what it returns waits for the end and leaves the result in the chunk.
Exchange = Callable[[Tensor], Callable[[], None]]


@dataclass
class Spread:
    """How far apart the replicas were, as tensors: a GPU is not waited for."""

    squares: list[Tensor]
    norms: list[Tensor]
    sums: list[Tensor]

    def add(self, became: Tensor, difference: Tensor) -> None:
        """Take in a chunk, and how far it was from what it became."""
        self.squares.append(difference.norm())
        self.norms.append(became.norm())
        self.sums.append(became.view(INTEGERS[became.element_size()]).sum(dtype=torch.int64))

    def distance(self) -> float:
        """Euclidean distance of this replica from what it became."""
        return math.sqrt(sum(float(norm) ** 2 for norm in self.squares))

    def norm(self) -> float:
        """Length of what it became."""
        return math.sqrt(sum(float(norm) ** 2 for norm in self.norms))

    def checksum(self) -> int:
        """The same for replicas with the same bits, on any device: sums of the bits as integers, which no order changes."""
        total = 0
        for part in self.sums:
            total = (total * CHECKSUM_FACTOR + int(part)) % CHECKSUM_MODULUS
        return total


def average(tensors: Sequence[Tensor], weight: float) -> Spread:
    """Replace `tensors` by the sum over all ranks of their values times each rank's `weight`; the weights sum to 1.

    Every rank must give tensors of the same shapes, types and order. One all-reduce moves each value; none is copied more
    than once, but for small tensors, which are packed.
    """

    def reduce(chunk: Tensor) -> Callable[[], None]:
        work = dist.all_reduce(chunk.mul_(weight), async_op=True)
        return lambda: work.wait() and None

    return exchange(tensors, reduce)


def average_moves(tensors: Sequence[Tensor], anchors: Sequence[Tensor], weight: float) -> Spread:
    """Move `anchors`, which all ranks share, by the weighted mean of the ranks' ways from there, and `tensors` with them.

    A way in float32 is sent as bfloat16: half the bytes, and wrong by 1 in 256 of itself, not of the parameter. All ranks end
    with the same bits, since they add the same to the same. `anchors` lie in memory as `tensors` do.
    """
    spread = Spread([], [], [])
    pairs = zip(chunks(tensors), chunks(anchors), strict=True)
    run(_moved(chunk, start, weight, spread) for chunk, start in pairs)
    return spread


def _moved(chunk: list[Tensor], start: list[Tensor], weight: float, spread: Spread) -> Callable[[], None]:
    anchor = packed(start)
    way = packed(chunk) - anchor
    sent = torch.empty_like(way, dtype=torch.bfloat16 if way.dtype is torch.float32 else way.dtype)
    work = dist.all_reduce(torch.mul(way, weight, out=sent), async_op=True)

    def finish() -> None:
        work.wait()
        spread.add(anchor.add_(sent), way.sub_(sent))
        unpack(anchor, start)
        unpack(anchor, chunk)

    return finish


def mix(tensors: Sequence[Tensor], neighbours: Neighbours) -> Spread:
    """Replace `tensors` by the mean of this rank's and those that `neighbours` send it."""
    count = len(neighbours.receive) + 1

    def swap(chunk: Tensor) -> Callable[[], None]:
        received = [torch.empty_like(chunk) for _ in neighbours.receive]
        sent = chunk.clone()
        operations = [dist.P2POp(dist.isend, sent, peer) for peer in neighbours.send]
        operations += [
            dist.P2POp(dist.irecv, buffer, peer) for buffer, peer in zip(received, neighbours.receive, strict=True)
        ]
        works = dist.batch_isend_irecv(operations)

        def finish() -> None:
            for work in works:
                work.wait()
            for buffer in received:
                chunk.add_(buffer)
            chunk.div_(count)

        return finish

    return exchange(tensors, swap)


@dataclass(frozen=True)
class Neighbours:
    """Whom a rank sends its values to in one round of gossip, and from whom it receives."""

    send: list[int]
    receive: list[int]


def one_peer(rank: int, world_size: int, round_number: int) -> Neighbours:
    """The one-peer exponential graph (Ying et al., NeurIPS 2021): in round t the peer is 2^(t mod log2 n) ranks further on.

    After log2 n rounds all ranks hold the exact average if n is a power of two.
    """
    step = 1 << (round_number % max(1, (world_size - 1).bit_length()))
    return Neighbours([(rank + step) % world_size], [(rank - step) % world_size])


def ring(rank: int, world_size: int) -> Neighbours:
    """Both neighbours on a ring, which for two workers are one."""
    both = sorted({(rank - 1) % world_size, (rank + 1) % world_size})
    return Neighbours(both, both)


def exchange(tensors: Sequence[Tensor], start: Exchange) -> Spread:
    """Run all tensors through an exchange."""
    spread = Spread([], [], [])
    run(_exchanged(chunk, start, spread) for chunk in chunks(tensors))
    return spread


def _exchanged(chunk: list[Tensor], start: Exchange, spread: Spread) -> Callable[[], None]:
    whole = packed(chunk)
    before = whole.clone()
    wait = start(whole)

    def finish() -> None:
        wait()
        unpack(whole, chunk)
        spread.add(whole, before.sub_(whole))

    return finish


def run(started: Iterable[Callable[[], None]]) -> None:
    """Have a few messages under way at a time: each item is one that has just been started, and waits for its end."""
    under_way: deque[Callable[[], None]] = deque()
    for finish in started:
        under_way.append(finish)
        if len(under_way) >= IN_FLIGHT:
            under_way.popleft()()
    while under_way:
        under_way.popleft()()


def packed(chunk: list[Tensor]) -> Tensor:
    """A chunk as one tensor: its only part itself, or a copy of them all."""
    return chunk[0] if len(chunk) == 1 else torch.cat(chunk)


def unpack(whole: Tensor, chunk: list[Tensor]) -> None:
    """Write the values of one tensor to a chunk's parts, unless it is the only part itself."""
    if chunk[0] is whole:
        return
    for part, values in zip(chunk, torch.split(whole, [part.numel() for part in chunk]), strict=True):
        part.copy_(values)


def chunks(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors as lists of flat views that go into one message each: a part of a large one, or several small ones."""
    small: list[Tensor] = []
    for tensor in tensors:
        flat = flat_view(tensor)
        if flat.numel() > SMALL:
            yield from ([part] for part in torch.split(flat, CHUNK))
        elif flat.numel():
            small.append(flat)
    by_kind = sorted(small, key=kind)
    for _, group in itertools.groupby(by_kind, kind):
        waiting: list[Tensor] = []
        for flat in group:
            waiting.append(flat)
            if sum(part.numel() for part in waiting) > CHUNK - SMALL:
                yield waiting
                waiting = []
        if waiting:
            yield waiting


def kind(tensor: Tensor) -> str:
    """What tensors in one message have in common."""
    return f"{tensor.dtype} {tensor.device}"


def flat_view(tensor: Tensor) -> Tensor:
    """All of a tensor's values in one dimension, in the order in which they lie in memory.

    Raises:
        ValueError: the tensor has holes or overlaps, so there is no such view.
    """
    tensor = tensor.detach()
    strides: tuple[int, ...] = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda i: (-strides[i], tensor.shape[i] == 1))
    ordered = tensor.permute(order)
    if not ordered.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {strides} does not lie in one piece")
    return ordered.view(-1)

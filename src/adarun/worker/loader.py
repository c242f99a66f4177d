"""The training loader: its global batches cut by shares, each piece remembered until its batch is consumed."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from adarun.events import Plan


class Piece(msgspec.Struct, frozen=True, gc=False):
    """One rank's part of the global batch of one step, and the weight of its mean gradient in the update."""

    step: int
    samples: int
    weight: float = 1.0
    plan: Plan | None = None


class Cut(NamedTuple):
    """Where in a global batch one rank's piece lies: batch[first:stop:stride]."""

    first: int
    stop: int
    stride: int
    weight: float


def cut(shares: Sequence[int], rank: int) -> Cut:
    """`rank`'s piece of a global batch.

    Under equal shares it is every n-th sample, just what DistributedSampler would have given this rank: a run in which
    nothing was changed is torchrun's to the bit. Otherwise it is a contiguous piece of the same set.
    """
    total = sum(shares)
    if len(set(shares)) == 1:
        return Cut(rank, total, len(shares), 1.0)
    first = sum(shares[:rank])
    return Cut(first, first + shares[rank], 1, shares[rank] * len(shares) / total)


def global_permutation(sampler: DistributedSampler[Any]) -> list[int]:
    """One epoch of a DistributedSampler as all ranks together see it, padding and dropping included."""
    whole = copy.copy(sampler)
    whole.rank, whole.num_replicas, whole.num_samples = 0, 1, sampler.total_size
    return list(whole)


class Session:
    """One iteration over a loader: the pieces drawn ahead and not yet consumed, oldest first."""

    def __init__(self, base: int, *, training: bool) -> None:
        self.base = base
        self.training = training
        self.planned = False
        self.pieces: deque[Piece] = deque()
        self.num_consumed = 0
        # How often the script came back to it from another loader, and why its batches cannot be told apart, if so.
        self.num_resumed = 0
        self.unsure: tuple[str, str] | None = None
        # Why its batches are only measured, if so.
        self.unplanned = ""


class ShareBatchSampler(BatchSampler):
    """Stands in for a loader's BatchSampler and gives this rank its piece of each global batch.

    `plan_for(step, global_batch, dataset_size)` blocks until the plan is known. Outside of training the original runs.
    """

    def __init__(
        self, original: BatchSampler, rank: int, world_size: int, plan_for: Callable[[int, int, int], Plan]
    ) -> None:
        self.__dict__.update(original.__dict__)
        self.original = original
        self.session: Session | None = None
        self._rank = rank
        self._world_size = world_size
        self._plan_for = plan_for

    def __iter__(self) -> Iterator[Any]:
        # Taken, not kept, by the loader's patch: a multi-process iterator asks for two iterations and uses the second.
        session = self.session
        if session is None or not session.planned:
            return iter(self.original)
        return self._pieces(session)

    def __len__(self) -> int:
        return len(self.original)

    def _pieces(self, session: Session) -> Iterator[Sequence[int]]:
        sampler: Any = self.original.sampler
        order = global_permutation(sampler)
        full, size = self.original.batch_size * self._world_size, len(sampler.dataset)
        end = len(order) - len(order) % full if self.original.drop_last else len(order)
        until = session.base
        for step, start in enumerate(range(0, end, full), session.base):
            # The cut is the same for all full batches of a plan; only the last batch may be smaller.
            if step >= until or start + full > end:
                plan = self._plan_for(step, full, size)
                until = plan.stop
                first, stop, stride, weight = cut(plan.shares_for(min(full, end - start)), self._rank)
            indices = order[start + first : start + stop : stride]
            session.pieces.append(Piece(step, len(indices), weight, plan))
            yield indices


def why_not(loader: DataLoader[Any], rank: int, world_size: int) -> str | None:
    """Why this loader's batches cannot be cut by shares, or None if they can."""
    sampler: Any = loader.sampler
    if isinstance(loader.dataset, IterableDataset):
        return "the dataset is an IterableDataset, whose samples have no index to share out"
    if type(loader.batch_sampler) is not BatchSampler and not isinstance(loader.batch_sampler, ShareBatchSampler):
        return "the loader does its own batching (batch_sampler or batch_size=None)"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return "the loader is a DataLoader subclass with an __iter__ of its own"
    if not isinstance(sampler, DistributedSampler):
        return "the loader has no DistributedSampler"
    if type(sampler).__iter__ is not DistributedSampler.__iter__:
        return "the loader's sampler is a DistributedSampler subclass with an __iter__ of its own"
    if (sampler.num_replicas, sampler.rank) != (world_size, rank):
        return f"the loader's DistributedSampler is for rank {sampler.rank} of {sampler.num_replicas}, not {rank} of {world_size}"
    if not getattr(loader, "in_order", True):
        return "the loader may give batches out of order (in_order=False)"
    return None

"""The cut training loader: each global batch is torchrun's, whatever the shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from adarun.events import Plan
from adarun.worker.loader import Cut, Session, ShareBatchSampler, cut, why_not

EXACT = settings(derandomize=True, deadline=None, database=None, max_examples=60)


class Numbers(Dataset[int]):
    """A dataset of the numbers below `size`: a sample is its index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


@dataclass(frozen=True)
class Job:
    """What a script chose for its loader, and the plans it is given: one split a window, in turn."""

    size: int
    batch_size: int
    world_size: int
    drop_last: bool
    sampler_drop_last: bool
    shuffle: bool
    epoch: int
    splits: list[list[int]]
    window: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def batch_sampler(self, rank: int) -> BatchSampler:
        """The batch sampler that the script's DataLoader makes on `rank`."""
        sampler = DistributedSampler(
            Numbers(self.size),
            num_replicas=self.world_size,
            rank=rank,
            shuffle=self.shuffle,
            seed=3,
            drop_last=self.sampler_drop_last,
        )
        sampler.set_epoch(self.epoch)
        return BatchSampler(sampler, self.batch_size, self.drop_last)

    def under_torchrun(self) -> list[list[list[int]]]:
        """Each rank's batches under torchrun."""
        return [list(self.batch_sampler(rank)) for rank in range(self.world_size)]

    def plan_for(self, step: int, global_batch: int, dataset_size: int) -> Plan:
        """The plan of a step, as the hub would give it."""
        assert (self.global_batch, self.size) == (global_batch, dataset_size)
        number = step // self.window
        shares = self.splits[number % len(self.splits)]
        return Plan(number=number, start=number * self.window, stop=(number + 1) * self.window, shares=shares)

    def under_adarun(self, base: int = 0) -> tuple[list[list[list[int]]], list[Session]]:
        """Each rank's batches under adarun, and the sessions that remember their pieces."""
        batches, sessions = [], []
        for rank in range(self.world_size):
            sampler = ShareBatchSampler(self.batch_sampler(rank), rank, self.world_size, self.plan_for)
            session = Session(base, training=True)
            session.planned = True
            sampler.session = session
            batches.append(list(sampler))
            sessions.append(session)
        return batches, sessions


@st.composite
def splits(draw: st.DrawFn, total: int, num_workers: int) -> list[int]:
    """Any split of `total` with at least a sample for everyone."""
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), min_size=num_workers - 1, max_size=num_workers - 1)))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]


@st.composite
def jobs(draw: st.DrawFn, *, even: bool = False) -> Job:
    """Any small job, with shares that change from plan to plan."""
    world_size = draw(st.integers(2, 5))
    batch_size = draw(st.integers(1, 6))
    total = batch_size * world_size
    equal = [batch_size] * world_size
    one = st.just(equal) if even else splits(total, world_size) if total > world_size else st.just(equal)
    return Job(
        size=draw(st.integers(1, 130)),
        batch_size=batch_size,
        world_size=world_size,
        drop_last=draw(st.booleans()),
        sampler_drop_last=draw(st.booleans()),
        shuffle=draw(st.booleans()),
        epoch=draw(st.integers(0, 3)),
        splits=draw(st.lists(one, min_size=1, max_size=4)),
        window=draw(st.integers(1, 5)),
    )


def whole(batches: list[list[list[int]]], step: int) -> Counter[int]:
    """The samples that all ranks together use at a step, with how often each is used."""
    return Counter(index for rank in batches for index in rank[step])


@EXACT
@given(jobs())
def test_each_global_batch_holds_torchruns_samples(job: Job) -> None:
    """At every step the ranks together use just the samples, as often, that they use under torchrun."""
    expected, (actual, _) = job.under_torchrun(), job.under_adarun()
    for step in range(len(expected[0])):
        assert whole(expected, step) == whole(actual, step)


@EXACT
@given(jobs())
def test_each_sample_is_used_as_often_per_epoch_as_under_torchrun(job: Job) -> None:
    """Padding and dropping are the sampler's: an epoch uses every index as often as torchrun's does."""
    expected, (actual, _) = job.under_torchrun(), job.under_adarun()
    assert Counter(i for rank in expected for b in rank for i in b) == Counter(i for r in actual for b in r for i in b)


@EXACT
@given(jobs())
def test_no_rank_has_a_step_more_or_less_than_under_torchrun(job: Job) -> None:
    """Steps per epoch stay the same on every rank, as does the loader's length."""
    expected, (actual, _) = job.under_torchrun(), job.under_adarun()
    assert [len(batches) for batches in expected] == [len(batches) for batches in actual]
    sampler = ShareBatchSampler(job.batch_sampler(0), 0, job.world_size, job.plan_for)
    assert len(job.batch_sampler(0)) == len(sampler)


@EXACT
@given(jobs(even=True))
def test_under_equal_shares_every_rank_gets_torchruns_batches(job: Job) -> None:
    """While all shares are equal each rank's batches are torch's own, sample by sample, in order."""
    assert job.under_torchrun() == job.under_adarun()[0]


@EXACT
@given(jobs(), st.integers(0, 1000))
def test_pieces_are_remembered_as_they_were_cut(job: Job, base: int) -> None:
    """For each batch drawn the session knows its step, its size, and what a mean over it weighs: 1 if all had as much."""
    batches, sessions = job.under_adarun(base)
    for rank, session in enumerate(sessions):
        assert [base + i for i in range(len(batches[rank]))] == [piece.step for piece in session.pieces]
        assert [len(batch) for batch in batches[rank]] == [piece.samples for piece in session.pieces]
    for step in range(len(batches[0])):
        sizes = [len(rank[step]) for rank in batches]
        assert [size * len(sizes) / sum(sizes) for size in sizes] == [
            session.pieces[step].weight for session in sessions
        ]


@EXACT
@given(jobs())
def test_every_rank_gets_the_share_of_its_plan(job: Job) -> None:
    """A whole global batch is cut just by the shares of the plan that covers its step."""
    batches, _ = job.under_adarun()
    for number in range(len(batches[0])):
        if sum(len(rank[number]) for rank in batches) == job.global_batch:
            plan = job.plan_for(number, job.global_batch, job.size)
            assert plan.shares == [len(rank[number]) for rank in batches]


@EXACT
@given(jobs())
def test_outside_of_training_the_batches_are_the_originals(job: Job) -> None:
    """Without a session, or in one that is not planned, the script's own batch sampler runs."""
    original = job.batch_sampler(1)
    sampler = ShareBatchSampler(job.batch_sampler(1), 1, job.world_size, job.plan_for)
    assert list(original) == list(sampler)
    sampler.session = Session(0, training=False)
    assert list(original) == list(sampler)


def test_the_last_batch_of_an_epoch_is_cut_in_proportion() -> None:
    """A last global batch of 8 under shares of 9 to 3 is cut 6 to 2."""
    job = Job(20, 6, 2, False, False, False, 0, [[9, 3]], 10)
    batches, _ = job.under_adarun()
    assert [[len(batch) for batch in rank] for rank in batches] == [[9, 6], [3, 2]]


def piece_of(batch: range, where: Cut) -> list[int]:
    return list(batch[where.first : where.stop : where.stride])


def test_unequal_pieces_are_contiguous_and_equal_ones_are_interleaved() -> None:
    """Uneven shares cut a batch into runs; even ones deal it out as DistributedSampler does."""
    assert [piece_of(range(4), cut([3, 1], rank)) for rank in (0, 1)] == [[0, 1, 2], [3]]
    assert [piece_of(range(4), cut([2, 2], rank)) for rank in (0, 1)] == [[0, 2], [1, 3]]


# --- loaders that cannot be cut ------------------------------------------------------------------------------------------


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class OwnLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


class OwnOrder(DistributedSampler[Any]):
    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()


class OwnBatches(BatchSampler):
    pass


DATA = TensorDataset(torch.arange(16))


def of_rank_0() -> DistributedSampler[Any]:
    return DistributedSampler(DATA, num_replicas=2, rank=0)


def test_a_loader_with_a_distributed_sampler_can_be_cut() -> None:
    """The loader that torch's documentation shows for training has no reason against it."""
    assert why_not(DataLoader(DATA, batch_size=4, sampler=of_rank_0()), 0, 2) is None
    assert why_not(DataLoader(DATA, batch_size=4, sampler=of_rank_0(), num_workers=2, drop_last=True), 0, 2) is None


def test_a_loader_that_is_cut_already_can_be_cut() -> None:
    """From its second epoch on a loader has adarun's batch sampler, which is no reason against it."""
    loader = DataLoader(DATA, batch_size=4, sampler=of_rank_0())
    original: Any = loader.batch_sampler
    loader.__dict__["batch_sampler"] = ShareBatchSampler(original, 0, 2, lambda *_: pytest.fail("no plan is needed"))
    assert why_not(loader, 0, 2) is None


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (
            DataLoader(Stream(), batch_size=4),
            "the dataset is an IterableDataset, whose samples have no index to share out",
        ),
        (
            DataLoader(DATA, batch_sampler=OwnBatches(of_rank_0(), 4, drop_last=False)),
            "the loader does its own batching (batch_sampler or batch_size=None)",
        ),
        (
            DataLoader(DATA, batch_size=None, sampler=of_rank_0()),
            "the loader does its own batching (batch_sampler or batch_size=None)",
        ),
        (
            OwnLoader(DATA, batch_size=4, sampler=of_rank_0()),
            "the loader is a DataLoader subclass with an __iter__ of its own",
        ),
        (DataLoader(DATA, batch_size=4), "the loader has no DistributedSampler"),
        (DataLoader(DATA, batch_size=4, shuffle=True), "the loader has no DistributedSampler"),
        (
            DataLoader(DATA, batch_size=4, sampler=OwnOrder(DATA, num_replicas=2, rank=0)),
            "the loader's sampler is a DistributedSampler subclass with an __iter__ of its own",
        ),
        (
            DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, num_replicas=2, rank=1)),
            "the loader's DistributedSampler is for rank 1 of 2, not 0 of 2",
        ),
        (
            DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, num_replicas=4, rank=0)),
            "the loader's DistributedSampler is for rank 0 of 4, not 0 of 2",
        ),
        (
            DataLoader(DATA, batch_size=4, sampler=of_rank_0(), num_workers=1, in_order=False),
            "the loader may give batches out of order (in_order=False)",
        ),
    ],
    ids=[
        "iterable dataset",
        "own batch sampler",
        "no batches",
        "own iteration",
        "sequential",
        "random",
        "own order",
        "another rank's",
        "another world's",
        "out of order",
    ],
)
def test_a_loader_that_cannot_be_cut_has_its_reason(loader: DataLoader[Any], reason: str) -> None:
    """Each kind of loader that shares would change is told from the others, in words for the user."""
    assert reason == why_not(loader, 0, 2)

"""Follows a script's training loop from the inside: its DDP model, its training loader, its backward passes."""

from __future__ import annotations

import functools
import gc
import io
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from adarun.errors import NotExact
from adarun.events import Hello, Loop, Notice, Plan, PlanRequest
from adarun.worker.client import Client
from adarun.worker.gradients import Backward
from adarun.worker.loader import Piece, Session, ShareBatchSampler, cut, why_not
from adarun.worker.observe import UPDATE, WAIT, Observer

if TYPE_CHECKING:
    from adarun.worker.sync import Synchroniser

T = TypeVar("T")

BATCHNORM = (
    "BatchNorm statistics depend on each worker's local batch, so the split stays even; "
    "convert the model with SyncBatchNorm, or accept other statistics with --batchnorm allow"
)
DRAWN_AHEAD = (
    "drawn_ahead",
    "the script draws its next batch before the backward pass of the last one (a prefetcher, or one backward pass for "
    "several batches), and the two cannot be told apart",
)
NO_DDP = "no model is wrapped in DistributedDataParallel or fully_shard, whose averaging the weights of uneven shares count on"
INTERLEAVED = (
    "interleaved",
    "the script draws from two training loaders in turn, and their batches cannot be told apart",
)

TEAR_DOWN_SECONDS = 0.02

# The one Training of this process, for the public API; None where adarun did not attach.
current: Training | None = None


class Training:
    """The state of one worker's training loop, and the patches that keep it up to date."""

    def __init__(
        self,
        client: Client,
        observer: Observer,
        hello: Hello,
        *,
        adapt: str,
        batchnorm: str,
        loss_reduction: str,
        sync: Synchroniser | None = None,
    ) -> None:
        self._client = client
        self._observer = observer
        self._backward = Backward(observer)
        # Only where the user has asked for a knob that changes the mathematics.
        self._sync = sync
        self._rank, self._world_size = hello.rank, hello.world_size
        # `observe` follows plans too; they are all even then, so its samples are torchrun's.
        self._planned = adapt != "off"
        self._freeze_on_batchnorm = batchnorm == "freeze"
        self._weighted = loss_reduction == "mean"
        # Those that all workers train together; a script that makes one after the other must be able to drop them.
        self._models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._batchnorms: weakref.WeakSet[_BatchNorm] = weakref.WeakSet()
        self._any_model = False
        self._notices: dict[str, bool] = {}
        # Of the batch drawn last.
        self._session: Session | None = None
        self._split_session = Session(0, training=True)
        self._split_session.planned = True
        self._even_plan = Plan(number=0, start=0, stop=1, shares=[1] * hello.world_size)
        # Whether the script batches by itself: its loaders, if any, are then no business of ours.
        self._splits = False
        # All steps, and those under a plan: only the latter must be the same on all ranks.
        self._steps_drawn = 0
        self._steps_planned = 0
        # The newest loop under a plan: its number and its first step.
        self._loop = (0, 0)
        self._passes_at_draw = 0
        self._met_uneven = False
        self._saved = False

    # --- life ------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Patch torch in this process. Every patch calls the original, and does nothing in a forked child."""
        global current  # noqa: PLW0603 - there is one training loop a process
        current = self
        self._backward.install()
        self._patch_ddp()
        self._patch_loader()
        self._patch_save()
        if self._sync is not None:
            self._sync.install(self._mine)
            self._backward.on_loss = self._sync.on_loss

    def close(self) -> None:
        """Send what was measured and hang up."""
        if self._mine():
            self._observer.end()
            self._client.close()
            # A gloo thread that gives back the tensors of the last collective needs Python's lock. While Python shuts down it
            # does not get it, and the process aborts (torch 2.13); a moment without the lock lets the thread through.
            time.sleep(TEAR_DOWN_SECONDS)

    def detach(self) -> None:
        """In a forked child: leave the parent's socket alone."""
        global current
        current, self._backward.weight = None, 1.0

    def _mine(self) -> bool:
        return current is self

    def _patch_ddp(self) -> None:
        original = DistributedDataParallel.__init__

        @functools.wraps(original)
        def __init__(model: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(model, *args, **kwargs)
            if self._mine():
                self._on_model(model)

        patch(DistributedDataParallel, "__init__", __init__)

    def _patch_loader(self) -> None:
        original_iter, original_next = DataLoader.__iter__, _BaseDataLoaderIter.__next__

        @functools.wraps(original_iter)
        def __iter__(loader: DataLoader[Any]) -> Any:  # noqa: N807
            if not self._mine():
                return original_iter(loader)
            session = self._open_session(loader)
            iterator = original_iter(loader)
            if isinstance(loader.batch_sampler, ShareBatchSampler):
                # Who else iterates over the batch sampler gets the original's batches.
                loader.batch_sampler.session = None
            iterator._adarun_session = session  # type: ignore[attr-defined]
            return iterator

        @functools.wraps(original_next)
        def __next__(iterator: _BaseDataLoaderIter) -> Any:  # noqa: N807
            session: Any = getattr(iterator, "_adarun_session", None)
            if session is None or not session.training or self._splits or current is not self:
                return original_next(iterator)
            # In most steps the script goes on drawing from the same loader, having learned from its last batch.
            if session is not self._session or self._backward.num_passes == self._passes_at_draw:
                self._look_closer(session)
            if self._sync is not None and session.planned:
                self._end_step(self._sync)
            self._observer.begin()
            try:
                batch = original_next(iterator)
            except StopIteration:
                self._after_last(session)
                raise
            if session.planned:
                self._after_draw(session, session.pieces.popleft())
            else:
                self._after_draw(session, Piece(session.base + session.num_consumed, batch_length(batch)))
            return batch

        patch(DataLoader, "__iter__", __iter__)
        patch(_BaseDataLoaderIter, "__next__", __next__)

    def _patch_save(self) -> None:
        original = torch.save

        @functools.wraps(original)
        def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
            original(obj, f, *args, **kwargs)
            # What is written to memory is a copy, not a checkpoint.
            if self._mine() and not isinstance(f, io.BytesIO):
                self.checkpointed()

        torch.save = save

    # --- the model ---------------------------------------------------------------------------------------------------

    def _on_model(self, model: DistributedDataParallel) -> None:
        if trained := [parameter for parameter in model.parameters() if parameter.requires_grad]:
            self._backward.listen(trained[-1])
        if self._sync is not None:
            self._sync.add_model(model)
        self._add_model(model, torch.distributed.get_world_size(model.process_group), "a DDP model")

    def _find_sharded(self) -> None:
        """Look for models that `fully_shard` has made: it changes a module's class, and tells nobody."""
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")
        if fsdp is None or not fsdp.FSDPModule.__subclasses__() or any(model.training for model in self._models):
            return
        sharded = [thing for thing in gc.get_objects() if fsdp.FSDPModule in type(thing).__mro__]
        for model in [model for model in sharded if model not in self._models]:
            mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
            self._add_model(model, mesh.size() if mesh is not None else 0, "a sharded model")
            if self._sync is not None:
                self._sync.refuse("sharded", "the model is sharded, so no worker has a replica of its own")

    def _add_model(self, model: torch.nn.Module, num_workers: int, what: str) -> None:
        self._any_model = True
        self._models.add(model)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
                self._batchnorms.add(module)
        self._observer.cuda = any(p.is_cuda for p in model.parameters())
        if num_workers != self._world_size:
            if self._sync is not None:
                self._sync.refuse("part", f"{what} is averaged over a part of the workers only")
            text = f"{what} is averaged over a part of the workers only, so the split stays even"
            self._notice("subgroup", text, freezes=True)

    def _is_training(self) -> bool:
        # Without DDP there is no telling whether a loop trains until it does; its steps are measured all the same.
        if len(self._models) > 1:
            # One that the script has dropped must be gone on all ranks, or they might disagree.
            gc.collect()
        return torch.is_grad_enabled() and (not self._any_model or any(model.training for model in self._models))

    def _notice(self, key: str, text: str, *, freezes: bool) -> None:
        if key not in self._notices:
            self._notices[key] = freezes
            self._client.post(Notice(key=key, text=text, freezes=freezes, rank=self._rank))

    def _frozen(self) -> str:
        """Why this rank must not be re-split, or an empty string."""
        if self._freeze_on_batchnorm and any(module.training for module in self._batchnorms):
            self._notice("batchnorm", BATCHNORM, freezes=True)
        return next((key for key, freezes in self._notices.items() if freezes), "")

    # --- the loader --------------------------------------------------------------------------------------------------

    def _open_session(self, loader: DataLoader[Any]) -> Session:
        self._find_sharded()
        session = Session(self._steps_drawn, training=self._is_training())
        reason = why_not(loader, self._rank, self._world_size)
        if reason is None and self._planned:
            # Put in place even for an evaluation: persistent data-loader workers keep the first sampler they are given.
            if not isinstance(loader.batch_sampler, ShareBatchSampler):
                # DataLoader refuses to have its batch_sampler set; ours is the same in every other respect.
                original: Any = loader.batch_sampler
                loader.__dict__["batch_sampler"] = ShareBatchSampler(
                    original, self._rank, self._world_size, self._plan_for
                )
            session.planned = session.training and self._any_model
            if session.planned:
                if self._sync is not None:
                    self._sync.begin_loop()
                session.base = self._steps_planned
                self._loop = (self._loop[0] + 1, session.base)
            loader.__dict__["batch_sampler"].session = session
        if session.training:
            self._begin_loop(session.base, getattr(loader.sampler, "epoch", -1))
        else:
            self._observer.disturb()
            return session
        if not self._any_model:
            session.unplanned = NO_DDP
        else:
            session.unplanned = reason or ""
        return session

    def _begin_loop(self, step: int, epoch: Any = -1) -> None:
        epoch = epoch if isinstance(epoch, int) else -1
        self._client.post(Loop(step=step, at=self._observer.now(), epoch=epoch, saved=self._saved))
        self._saved = False

    def _plan_for(self, step: int, global_batch: int, dataset_size: int) -> Plan:
        # Once a step: what it takes to ask is worked out only when it has to be.
        if known := self._client.known_plan(step):
            return known
        request = PlanRequest(
            step=step,
            global_batch=global_batch,
            dataset_size=dataset_size,
            frozen=self._frozen(),
            loop=self._loop[0],
            loop_start=self._loop[1],
        )
        plan = self._client.plan(request)
        self._met_uneven = self._met_uneven or not plan.even
        return plan

    def _look_closer(self, session: Session) -> None:
        last, self._session = self._session, session
        passed = self._backward.num_passes != self._passes_at_draw
        if not passed:
            # A batch that nobody learned from: skipped, or of an evaluation that left the model in training mode.
            self._observer.disturb()
        if last is not session and session.num_consumed:
            session.num_resumed += 1
            if last is not None and last.num_resumed:
                session.unsure = INTERLEAVED
        # Only the first two draws can tell: a loop that skips a batch later on still trains on the batch it drew last.
        elif session.num_consumed == 1 and not passed:
            session.unsure = DRAWN_AHEAD
        self._backward.before = self._before_backward if session.unplanned or session.unsure else None

    def _after_draw(self, session: Session, piece: Piece) -> None:
        session.num_consumed += 1
        self._steps_drawn += 1
        if session.planned and piece.step >= self._steps_planned:
            self._steps_planned = piece.step + 1
        self._passes_at_draw = self._backward.num_passes
        if self._sync is not None and piece.plan is not None:
            self._sync.begin_step(piece.plan, piece.step)
            self._backward.weight = self._sync.weight(piece.plan, piece.weight, mean=self._weighted)
        elif self._weighted:
            self._backward.weight = piece.weight
        self._observer.drawn(piece.step, piece.samples)

    def _end_step(self, sync: Synchroniser) -> None:
        if sync.due:
            self._observer.phase(WAIT)
        sync.end_step()

    def _after_last(self, session: Session) -> None:
        if self._sync is not None and session.planned:
            self._observer.phase(WAIT)
            self._sync.finish()
            self._sync.end_step()
        self._observer.end()
        if session.num_consumed == 1 and self._backward.num_passes == self._passes_at_draw:
            session.unsure, self._backward.before = DRAWN_AHEAD, self._before_backward
        # What the script trains on between two loops is not a piece of anything.
        self._backward.weight = 1.0

    def _before_backward(self) -> None:
        """Freeze the split if the batch at hand may not be the one drawn last; fail if the split is uneven already."""
        session = self._session
        if session is None:
            return
        if session.unplanned:
            self._notice("loader", f"{session.unplanned}, so the split stays even", freezes=True)
        if session.unsure is not None:
            key, text = session.unsure
            if self._met_uneven:
                raise NotExact(f"{text}, yet the split is uneven already; start the job with --adapt observe")
            self._notice(key, f"{text}, so the split stays even", freezes=True)

    # --- the public API ----------------------------------------------------------------------------------------------

    def split(self, batch: Sequence[T]) -> Sequence[T]:
        """This rank's piece of `batch`, the global batch that all ranks drew; begins a step."""
        session = self._split_session
        if not self._splits:
            self._splits, self._session = True, None
        if self._saved or not session.num_consumed:
            self._begin_loop(self._steps_planned)
        self._look_closer(session)
        if self._sync is not None:
            self._end_step(self._sync)
        self._observer.begin()
        step, plan = self._steps_planned, self._even_plan
        if self._planned:
            plan = self._plan_for(step, len(batch), 0)
        first, stop, stride, weight = cut(plan.shares_for(len(batch)), self._rank)
        samples = batch[first:stop:stride]
        self._after_draw(session, Piece(step, len(samples), weight, plan if self._planned else None))
        return samples

    def checkpointed(self) -> None:
        """The script has written a checkpoint from which it could go on."""
        self._saved = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is spent on waiting for the other workers."""
        self._observer.phase(WAIT)
        try:
            yield
        finally:
            self._observer.phase(UPDATE)


def patch(owner: type, name: str, function: Any) -> None:
    """Put `function` where torch keeps a method; it wraps the original."""
    setattr(owner, name, function)


def batch_length(batch: Any) -> int:
    """The number of samples in a batch of unknown make: its first tensor's first dimension, or 0 if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    parts: Any = batch.values() if isinstance(batch, dict) else batch
    if isinstance(parts, (list, tuple)) or isinstance(batch, dict):
        return next((length for part in parts if (length := batch_length(part))), 0)
    return 0

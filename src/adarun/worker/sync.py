"""Holds one worker's replica together with the others' where the plan lets them drift apart.

Under a plan with a sync period of H > 1, or with gossip, DDP's own synchronisation is off: each worker steps by its own
gradients, and every H steps the parameters are averaged, weighted by the samples behind them. That happens when the
script draws its next batch, or its loader is at its end: no step is cut in two, and all ranks are at the same place. Every
plan and every epoch ends with replicas that are the same.
"""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from adarun.errors import NotExact
from adarun.events import Averaged, Learned, Notice, Plan
from adarun.worker.averaging import Neighbours, Spread, average, average_moves, mix, one_peer, ring
from adarun.worker.client import Client
from adarun.worker.compression import Dispatcher
from adarun.worker.training import patch

# Momenta, and moments that are divided by one another. Those must be averaged together: a row of an embedding that only one
# worker has met has a second moment of zero elsewhere, by which a first one that came from that worker would be divided.
MOMENTUM_PERIOD, MOMENTS_PERIOD = 3, 6
# In what torch's optimizers call second moments, or a part of it.
SECOND_MOMENTS = ("sq", "square", "sum", "inf", "var")
# A gossip is followed by an average over all so many times.
GOSSIP_PERIOD = 8
# DiLoCo (Douillard et al., 2023).
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9

OWN_HOOK = (
    "comm_hook",
    "the script has a communication hook of its own, which stays in force, so --compress does nothing",
)


def local(plan: Plan) -> bool:
    """Whether workers step by their own gradients under this plan."""
    return plan.sync_period > 1 or plan.topology != "allreduce"


class Synchroniser:
    """What the knobs that change the mathematics do in one worker: sync period, compression, topology, outer step."""

    def __init__(self, client: Client, rank: int, world_size: int, *, compress: bool) -> None:
        self._client = client
        self._rank, self._world_size = rank, world_size
        self._compress = compress
        self._models: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        # Those that were trained since the last loop began, in the same order on all ranks.
        self._trained: list[DistributedDataParallel] = []
        self._dispatchers: weakref.WeakKeyDictionary[DistributedDataParallel, Dispatcher] = weakref.WeakKeyDictionary()
        self._with_own_hook: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        # In the order of their first steps, which is the same on all ranks; the others train something else.
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._looked_at: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._plan: Plan | None = None
        self._step = 0
        # Steps since the replicas were the same, rounds since a global average, rounds so far, and averages since the moments'.
        self._drifted = self._gossips = self._rounds = self._stale = 0
        self._ever_local = False
        # Whether the script was found to evaluate or to save on one rank alone.
        self._alone = False
        # Whether this is the process it was made in, and no forked child.
        self._mine: Callable[[], bool] = lambda: True
        # Keys of the notices that were given.
        self._said: set[str] = set()
        # Of the backward passes since the last report.
        self._losses: list[torch.Tensor] = []
        self._outer: Outer | None = None
        # By the parameter's identity: what it was when the replicas were the same.
        self._anchors: dict[int, torch.Tensor] = {}
        # Of embeddings: in how many steps since then each row was used.
        self._embeddings: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._visits: dict[int, torch.Tensor] = {}
        # torch's own, since a script's call is looked at.
        self._register = DistributedDataParallel.register_comm_hook

    # --- patches -----------------------------------------------------------------------------------------------------

    def install(self, mine: Callable[[], bool]) -> None:
        """Patch torch in this process; `mine` is false in a forked child, where nothing must happen."""
        self._mine = mine
        self._patch_forward()
        self._patch_scaler()
        if self._compress:
            self._patch_hooks()
        register_optimizer_step_post_hook(lambda optimizer, *_: self._on_optimizer(optimizer) if mine() else None)

    def _patch_forward(self) -> None:
        original: Any = DistributedDataParallel.forward

        @functools.wraps(original)
        def forward(model: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
            if self._plan is None or not self._mine():
                return original(model, *args, **kwargs)
            if model.training and model not in self._trained and torch.is_grad_enabled():
                self._trained.append(model)
                self._anchor(parameters_of(model))
                if self._outer is not None:
                    self._outer.anchor(parameters_of(model))
            if not local(self._plan):
                return original(model, *args, **kwargs)
            # As in `no_sync`, but whatever contexts the script has entered or leaves in between.
            wanted, model.require_backward_grad_sync = model.require_backward_grad_sync, False
            try:
                return original(model, *args, **kwargs)
            finally:
                model.require_backward_grad_sync = wanted

        patch(DistributedDataParallel, "forward", forward)

    def _patch_scaler(self) -> None:
        original = torch.amp.GradScaler.__init__

        @functools.wraps(original)
        def __init__(scaler: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(scaler, *args, **kwargs)
            if self._mine() and scaler.is_enabled():
                self.refuse(
                    "grad_scaler",
                    "a GradScaler would take another scale on each worker; use bfloat16, which needs none",
                )

        patch(torch.amp.GradScaler, "__init__", __init__)

    def _patch_hooks(self) -> None:
        original, builtin = self._register, DistributedDataParallel._register_builtin_comm_hook

        @functools.wraps(original)
        def register_comm_hook(model: DistributedDataParallel, state: object, hook: Any) -> None:
            dispatcher = None
            if self._mine():
                self._meet_own_hook(model)
                dispatcher = self._dispatchers.get(model)
            if dispatcher is None or dispatcher.of_script is not None:
                return original(model, state, hook)
            # A model takes one hook, and has ours: it hands over.
            dispatcher.of_script = (state, hook)
            return None

        @functools.wraps(builtin)
        def register_builtin(model: DistributedDataParallel, hook: Any) -> None:
            if self._mine():
                self._meet_own_hook(model)
            builtin(model, hook)  # type: ignore[no-untyped-call]

        patch(DistributedDataParallel, "register_comm_hook", register_comm_hook)
        patch(DistributedDataParallel, "_register_builtin_comm_hook", register_builtin)

    def _meet_own_hook(self, model: DistributedDataParallel) -> None:
        self._with_own_hook.add(model)
        self._notice(*OWN_HOOK)

    def _on_optimizer(self, optimizer: Optimizer) -> None:
        if optimizer in self._looked_at:
            return
        self._looked_at.add(optimizer)
        ours = {id(parameter) for parameter in self._parameters()}
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            self.refuse("zero", "ZeroRedundancyOptimizer updates each parameter on one worker only")
        if any(id(parameter) in ours for parameter in trained):
            self._optimizers.append(weakref.ref(optimizer))

    # --- what the training loop says ---------------------------------------------------------------------------------

    def add_model(self, model: DistributedDataParallel) -> None:
        """A model that all workers train."""
        self._models.add(model)
        model.module.register_forward_pre_hook(self._before_forward)
        model.module.register_state_dict_pre_hook(self._before_state_dict)
        for module in model.module.modules():
            if isinstance(module, torch.nn.Embedding) and module.weight.requires_grad:
                module.register_forward_pre_hook(self._before_embedding)
                self._embeddings.add(module)
        if model.find_unused_parameters:
            self.refuse("unused", "with find_unused_parameters each worker may train other parameters")

    def refuse(self, key: str, why: str) -> None:
        """The workers of this job must synchronise in every step.

        Raises:
            NotExact: they have not, so far.
        """
        if key not in self._said and self._ever_local:
            raise NotExact(f"{why}, so the sync period must be 1; start the job without --sync-period")
        self._notice(key, f"{why}, so the workers synchronise in every step", synchronises=True)

    def _notice(self, key: str, text: str, *, synchronises: bool = False) -> None:
        if key not in self._said:
            self._said.add(key)
            self._client.post(Notice(key=key, text=text, rank=self._rank, synchronises=synchronises))

    def weight(self, plan: Plan, share: float, *, mean: bool) -> float:
        """What to seed the backward pass with, where this rank has `share` times the even share of the batch.

        Where parameters are averaged by shares, gradients must not be weighted too, and those of a loss that sums over a
        batch are brought to the size that they have under even shares; a gossip mixes evenly, so its gradients are weighted
        as under DDP.
        """
        if plan.topology == "allreduce" and local(plan):
            return 1.0 if mean else 1.0 / share
        return share if mean else 1.0

    def begin_step(self, plan: Plan, step: int) -> None:
        """The script has drawn the batch of `step`."""
        if plan is not self._plan:
            if self._plan is not None and local(self._plan) and not local(plan):
                # From here on the same gradients meet the same moments everywhere.
                self._average_moments(everything=True)
            if self._compress:
                self._register_dispatchers()
            for dispatcher in self._dispatchers.values():
                dispatcher.switch(plan.compression)
            if self._outer is not None and plan.outer == "none":
                self._outer = None
            if self._outer is None and plan.outer == "nesterov":
                self._outer = Outer()
                self._outer.anchor(self._parameters())
            self._plan, before = plan, self._plan
            if before is None or not before.same_pace(plan):
                self._anchor(self._parameters())
        self._step = step
        self._drifted += local(plan)
        self._ever_local = self._ever_local or local(plan)

    @property
    def due(self) -> bool:
        """Whether the step that ends now calls for an average."""
        plan, next_step = self._plan, self._step + 1
        if plan is None or not self._drifted:
            return False
        return next_step >= plan.stop or (next_step - plan.start) % plan.sync_period == 0

    def end_step(self) -> None:
        """The step is over: average if it is due."""
        plan_ends = self._plan is not None and self._step + 1 >= self._plan.stop
        if self.due:
            self._synchronise(wholly=plan_ends)
        if plan_ends:
            self._report()

    def begin_loop(self) -> None:
        """A loop over a loader begins; the one before may have been left by a `break`."""
        self.finish()
        self._trained, self._anchors, self._visits = [], {}, {}

    def finish(self) -> None:
        """The loop over the loader is over: all replicas become the same, and so do the moments of their optimizers."""
        if self._drifted or self._gossips:
            self._synchronise(wholly=True, loop_ends=True)

    # --- an evaluation or a checkpoint in the middle of a loop -------------------------------------------------------

    def _before_forward(self, module: torch.nn.Module, _arguments: Any) -> None:
        if self._drifted and not (module.training and torch.is_grad_enabled()):
            self._meet("an evaluation")

    def _before_embedding(self, module: torch.nn.Module, arguments: Any) -> None:
        """Count in how many steps each row is used; without a look at the indices, which would have a GPU waited for."""
        visits = self._visits.get(id(module.weight))
        if visits is not None and arguments and torch.is_grad_enabled() and module.training:
            used = torch.zeros_like(visits, dtype=torch.bool)
            used[arguments[0].reshape(-1)] = True
            visits += used

    def _before_state_dict(self, _module: torch.nn.Module, _prefix: str, _keep_vars: bool) -> None:
        if self._drifted:
            self._meet("a checkpoint")

    def _meet(self, what: str) -> None:
        """Average now if all ranks are about to do the same; which only the hub can know, since one may do it alone."""
        if self._alone or not self._mine():
            return
        if self._client.meet(self._step):
            self.finish()
            return
        self._alone = True
        self._notice(
            "alone",
            f"{what} between two averages was not on all ranks, so it saw the replica of rank {self._rank} as it was",
        )

    # --- losses ------------------------------------------------------------------------------------------------------

    def on_loss(self, roots: Sequence[torch.Tensor | GradientEdge]) -> None:
        """A backward pass starts from these: their sum is taken to be the loss."""
        for root in roots:
            if isinstance(root, torch.Tensor) and root.numel() == 1:
                # As they are: what they add up to is worked out where nobody waits for it.
                self._losses.append(root.detach())

    # --- averaging ---------------------------------------------------------------------------------------------------

    def _synchronise(self, *, wholly: bool, loop_ends: bool = False) -> None:
        """Bring the replicas together: all of them to the same if `wholly`, with all moments where a loop ends."""
        plan = self._plan
        assert plan is not None
        began = time.perf_counter()
        parameters, buffers, weight = self._parameters(), self._buffers(), self._weight(plan)
        self._rounds += 1
        if plan.topology != "allreduce" and not wholly and self._gossips + 1 < GOSSIP_PERIOD:
            self._gossips += 1
            spread = mix([*parameters, *buffers], self._neighbours(plan))
        else:
            self._gossips = 0
            if self._anchors:
                self._amplify_rare_rows(parameters)
                spread = average_moves(parameters, [self._anchors[id(p)] for p in parameters], weight)
                # Replicas whose buffers differ are not the same either.
                spread.sums += average(buffers, weight).sums
            else:
                spread = average([*parameters, *buffers], weight)
            if self._outer is not None:
                self._outer.step(parameters)
                self._anchor(parameters)
            self._average_moments(everything=loop_ends)
        self._tell(spread, time.perf_counter() - began, same=self._gossips == 0)
        self._drifted = 0

    @torch.no_grad()
    def _amplify_rare_rows(self, parameters: Sequence[torch.Tensor]) -> None:
        """Make an embedding's rows move as far as they would if all workers stepped together.

        Only where the optimizer divides by a second moment: then the size of a gradient, halved or not, does not matter.
        """
        for parameter in parameters:
            visits = self._visits.get(id(parameter))
            if visits is None or not self._divides(parameter):
                continue
            torch.distributed.all_reduce(visits)
            factor = rare_row_factor(visits / max(1, self._drifted), self._world_size)
            anchor = self._anchors[id(parameter)]
            parameter.sub_(anchor).mul_(factor.to(parameter.dtype).unsqueeze(1)).add_(anchor)
            visits.zero_()

    def _divides(self, parameter: torch.Tensor) -> bool:
        """Whether its optimizer divides by a second moment."""
        return any(divided(optimizer.state.get(parameter, {})) for optimizer in self._living())

    def _anchor(self, parameters: Sequence[torch.Tensor]) -> None:
        """All replicas hold these: from here the ways to the next average are counted. A gossip sends whole parameters."""
        if self._plan is None or not local(self._plan) or self._plan.topology != "allreduce":
            self._anchors, self._visits = {}, {}
            return
        embeddings = {id(module.weight) for module in self._embeddings}
        for parameter in parameters:
            self._anchors[id(parameter)] = parameter.detach().clone()
            if id(parameter) in embeddings:
                self._visits[id(parameter)] = torch.zeros(len(parameter), device=parameter.device)

    def _weight(self, plan: Plan) -> float:
        """What this replica counts in an average: as the samples behind it, but for gossip, which mixes evenly."""
        return plan.shares[self._rank] / sum(plan.shares) if plan.topology == "allreduce" else 1.0 / self._world_size

    def _tell(self, spread: Spread, seconds: float, *, same: bool) -> None:
        step, steps = self._step, max(1, self._drifted)

        def averaged() -> Averaged:
            return Averaged(
                step=step,
                steps=steps,
                seconds=seconds,
                distance=finite(spread.distance()),
                norm=finite(spread.norm()),
                checksum=spread.checksum() if same else None,
            )

        self._client.post(averaged)

    def _neighbours(self, plan: Plan) -> Neighbours:
        if plan.topology == "ring":
            return ring(self._rank, self._world_size)
        return one_peer(self._rank, self._world_size, self._rounds)

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for model in self._trained for parameter in parameters_of(model)]

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for model in self._trained for buffer in model.modules_buffers if buffer.is_floating_point()]

    def _living(self) -> list[Optimizer]:
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def _average_moments(self, *, everything: bool) -> None:
        """Average what the optimizers remember, if it is due: in half the bytes, which is exact enough for what is divided."""
        plan = self._plan
        assert plan is not None
        self._stale += 1
        moments = []
        for parameter in self._parameters():
            for optimizer in self._living():
                state = optimizer.state.get(parameter, {})
                if everything or self._stale % (MOMENTS_PERIOD if divided(state) else MOMENTUM_PERIOD) == 0:
                    # The count of steps is the same on all ranks.
                    values = [value for name, value in sorted(state.items()) if name != "step"]
                    moments += [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
        if everything:
            self._stale = 0
        sent = [moment.bfloat16() if moment.dtype is torch.float32 else moment for moment in moments]
        average(sent, self._weight(plan))
        for moment, value in zip(moments, sent, strict=True):
            moment.copy_(value)

    # --- compression and reports -------------------------------------------------------------------------------------

    def _register_dispatchers(self) -> None:
        for model in self._models:
            if model not in self._with_own_hook and model not in self._dispatchers:
                dispatcher = Dispatcher(model.process_group)
                # torch checks annotations, and takes none in words.
                self._register(model, dispatcher, lambda state, bucket: state.hook(bucket))
                self._dispatchers[model] = dispatcher

    def _report(self) -> None:
        step, losses, self._losses = self._step, self._losses, []
        rates = [group["lr"] for optimizer in self._living() for group in optimizer.param_groups[:1]]
        lr = rates[0] if rates and not (isinstance(rates[0], torch.Tensor) and rates[0].is_cuda) else None

        def learned() -> Learned:
            values = torch.stack([loss.float().reshape(()).cpu() for loss in losses]) if losses else torch.zeros(0)
            mean, spread = (float(values.mean()), float(values.std())) if len(values) > 1 else (math.nan, math.nan)
            return Learned(
                step=step,
                steps=max(1, len(values)),
                loss=finite(mean),
                spread=finite(spread),
                lr=float(lr) if lr is not None else None,
            )

        self._client.post(learned)


def rare_row_factor(visits: torch.Tensor, world_size: int) -> torch.Tensor:
    """How many times as far an embedding's rows move under n workers that step together as in the mean of n that do not.

    `visits`, shape (rows,): in which parts of its steps a worker met the row, summed over the workers. An optimizer that divides
    by a second moment takes a whole step for a row as soon as one worker has met it, and one step for all that meet it at
    once: with p the mean part, in 1 - (1 - p)^n of the steps, where each alone takes p. From n for rare rows to 1 for those
    that all meet in every step, or that nobody met.
    """
    part = (visits / world_size).clamp(max=1.0)
    return torch.where(part > 0.0, -torch.expm1(world_size * torch.log1p(-part)) / part, 1.0)


def divided(state: dict[str, Any]) -> bool:
    """Whether an optimizer with this state divides by a second moment."""
    return any(part in name for name in state for part in SECOND_MOMENTS)


def finite(value: float) -> float | None:
    """The number, or None for one that JSON cannot say."""
    return value if math.isfinite(value) else None


def parameters_of(model: DistributedDataParallel) -> list[torch.Tensor]:
    """What DDP would average the gradients of."""
    return [parameter for parameter in model._module_parameters if parameter.requires_grad]


class Outer:
    """An optimizer over averages: the way from one to the next is the gradient of SGD with Nesterov's momentum."""

    def __init__(self) -> None:
        # By the parameter's identity: what it was at the last average, and the momentum.
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def anchor(self, parameters: Sequence[torch.Tensor]) -> None:
        """All replicas hold these: here the way to the next average begins."""
        for parameter in parameters:
            value = parameter.detach().clone()
            known = self._states.get(id(parameter))
            momentum = known[1] if known and known[1].shape == value.shape else torch.zeros_like(value)
            self._states[id(parameter)] = (value, momentum)

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.Tensor]) -> None:
        """Move `parameters`, just averaged, further along; all ranks do the same."""
        for parameter in parameters:
            anchor, momentum = self._states[id(parameter)]
            gradient = anchor - parameter  # against the way that the workers went
            momentum.mul_(OUTER_MOMENTUM).add_(gradient)
            anchor.sub_(gradient.add_(momentum, alpha=OUTER_MOMENTUM), alpha=OUTER_LR)
            parameter.copy_(anchor)

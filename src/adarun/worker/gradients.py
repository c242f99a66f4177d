"""The weight of a worker's gradient, and the two moments of the backward pass that tell busy from wait.

Rank i's mean loss over k_i of a global batch's B samples must count k_i/B in the update. DDP divides the summed gradients
by the number of ranks n, so each backward pass is seeded with w_i = k_i n / B instead of 1. The seed, not the model's
output, because then every path to the parameters has the weight exactly once: auxiliary losses that a module keeps aside,
models fed into one another, penalties on gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from adarun.worker.observe import BACKWARD, UPDATE, WAIT, Observer

Root = torch.Tensor | GradientEdge
ENGINE: Any = torch.autograd.Variable._execution_engine


class Backward:
    """Stands in for `torch.autograd.backward`, which `Tensor.backward` calls too."""

    def __init__(self, observer: Observer) -> None:
        self.weight = 1.0
        self.num_passes = 0
        # Called before a pass that a script starts, where there is something to check; may refuse it.
        self.before: Callable[[], None] | None = None
        # Told what each pass starts from, where somebody wants to know the loss.
        self.on_loss: Callable[[Sequence[Root]], None] | None = None
        self._observer = observer
        self._running = False
        # Whether a parameter's hook tells that a pass is under way (None: there is no such hook), and did in this one.
        self._listens: bool | None = None
        self._heard = False
        # Callbacks run in the order queued, once every gradient is there: this one comes before DDP's, which waits for the
        # all-reduce, because DDP queues its own when its last bucket is ready.
        self._on_ready = functools.partial(observer.phase, WAIT)
        self._original: Callable[..., None] = torch.autograd.backward

    def install(self) -> None:
        """Take the place of `torch.autograd.backward` in this process."""
        original, observer = self._original, self._observer

        @functools.wraps(original)
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            if self._running:
                # Re-entrant checkpointing runs a backward pass inside one: its gradients carry the weight already. The
                # parameter's hook may belong to the inner pass, at whose end not all gradients are ready.
                self._listens = False if self._listens else None
                return original(tensors, grad_tensors, *args, **kwargs)
            self._running, hook = True, None
            try:
                if self.before is not None:
                    self.before()
                if self.on_loss is not None:
                    self.on_loss(roots_of(tensors))
                observer.phase(BACKWARD)
                if self.weight != 1.0:
                    # torch still takes the seeds under their old name.
                    tensors = roots_of(tensors)
                    grad_tensors = weighted_seeds(tensors, kwargs.pop("grad_variables", grad_tensors), self.weight)
                # A hook on the loss is sure to be called, but costs five times as much as one on a parameter.
                if not self._listens:
                    hook = self._hook_root(roots_of(tensors))
                return original(tensors, grad_tensors, *args, **kwargs)
            finally:
                if hook is not None:
                    hook.remove()
                # A pass that did not reach the parameter: another may not either.
                if self._listens and not self._heard:
                    self._listens = False
                self._running = self._heard = False
                self.num_passes += 1
                observer.phase(UPDATE)

        torch.autograd.backward = backward

    def listen(self, parameter: torch.Tensor) -> None:
        """Take the gradient of `parameter`, which most backward passes reach, as the sign that one is under way."""
        if self._listens is None:
            self._listens = True
            parameter.register_hook(self._on_parameter)  # type: ignore[no-untyped-call]

    def _hook_root(self, roots: Sequence[Root]) -> Any:
        timed = next((root for root in roots if isinstance(root, torch.Tensor) and root.requires_grad), None)
        return timed.register_hook(self._on_root) if timed is not None else None  # type: ignore[no-untyped-call]

    def _on_parameter(self, _gradient: torch.Tensor) -> None:
        if self._running and self._listens:
            self._heard = True
            ENGINE.queue_callback(self._on_ready)

    def _on_root(self, _gradient: torch.Tensor) -> None:
        ENGINE.queue_callback(self._on_ready)


def roots_of(tensors: Any) -> Sequence[Root]:
    """What a backward pass starts from; a gradient edge is a tuple too, but one root."""
    return (tensors,) if isinstance(tensors, torch.Tensor | GradientEdge) else tuple(tensors)


def weighted_seeds(roots: Sequence[Root], seeds: Any, weight: float) -> list[torch.Tensor | None]:
    """The backward pass's seeds times `weight`, where torch would fill in ones; what it refuses is left for it to refuse."""
    given = [seeds] * len(roots) if seeds is None or isinstance(seeds, torch.Tensor) else list(seeds)
    return [seed_of(root, weight) if seed is None else seed * weight for root, seed in zip(roots, given, strict=False)]


def seed_of(root: Root, weight: float) -> torch.Tensor | None:
    """`weight` in a scalar root's shape, type and place."""
    like: Any = root.node._input_metadata[root.output_nr] if isinstance(root, GradientEdge) else root
    if math.prod(like.shape) != 1 or not getattr(like, "requires_grad", True):
        return None
    return torch.full(like.shape, weight, dtype=like.dtype, device=like.device)

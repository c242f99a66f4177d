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


class Backward:
    """Stands in for `torch.autograd.backward`, which `Tensor.backward` calls too."""

    def __init__(self, observer: Observer) -> None:
        self.weight = 1.0
        self.num_passes = 0
        # Called before every pass that a script starts; may refuse it.
        self.before: Callable[[], None] = lambda: None
        self._observer = observer
        self._running = False
        self._original: Callable[..., None] = torch.autograd.backward

    def install(self) -> None:
        """Take the place of `torch.autograd.backward` in this process."""

        @functools.wraps(self._original)
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            # Re-entrant checkpointing runs a backward pass inside one: its gradients carry the weight already.
            if self._running:
                return self._original(tensors, grad_tensors, *args, **kwargs)
            return self._run(tensors, grad_tensors, args, kwargs)

        torch.autograd.backward = backward

    def _run(self, tensors: Any, seeds: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer, self._running = self._observer, True
        try:
            self.before()
            observer.phase(BACKWARD)
            # A gradient edge is a tuple too, but one root.
            roots = (tensors,) if isinstance(tensors, torch.Tensor | GradientEdge) else tuple(tensors)
            if self.weight != 1.0:
                # torch still takes the seeds under their old name.
                seeds = weighted_seeds(roots, kwargs.pop("grad_variables", seeds), self.weight)
            timed = next((root for root in roots if isinstance(root, torch.Tensor) and root.requires_grad), None)
            hook: Any = timed.register_hook(self._on_root) if timed is not None else None  # type: ignore[no-untyped-call]
            try:
                self._original(roots, seeds, *args, **kwargs)
            finally:
                if hook is not None:
                    hook.remove()
        finally:
            self._running = False
            self.num_passes += 1
            observer.phase(UPDATE)

    def _on_root(self, _gradient: torch.Tensor) -> None:
        # Callbacks run in the order queued, once every gradient is there: this one comes before DDP's, which waits for the
        # all-reduce, because DDP queues its own when its last bucket is ready.
        torch.autograd.Variable._execution_engine.queue_callback(self._on_ready)

    def _on_ready(self) -> None:
        self._observer.phase(WAIT)


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

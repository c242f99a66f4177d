"""Compression of gradients: one DDP communication hook that stands for several and is switched between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

# PowerSGD (Vogels et al., NeurIPS 2019): gradients as products of matrices of this rank; the first two steps are sent whole.
POWERSGD_RANK = 4
POWERSGD_START = 2

# Of a state and a GradBucket, a type that torch keeps to itself.
Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]


class Dispatcher:
    """The hook of one model; `mode` is the same on all ranks in any one step."""

    def __init__(self, group: Any) -> None:
        self.mode = "none"
        # A hook that the script registered after ours: then only that one counts.
        self.of_script: tuple[Any, Hook] | None = None
        self._group = group
        self._powersgd: Any = None

    def switch(self, mode: str) -> None:
        """Use another compression from the next backward pass on; what PowerSGD has not sent yet is forgotten."""
        if mode != self.mode:
            self.mode, self._powersgd = mode, None

    def hook(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """Average one bucket over all ranks."""
        if self.of_script is not None:
            state, hook = self.of_script
            return hook(state, bucket)
        if self.mode == "bf16":
            return default_hooks.bf16_compress_hook(self._group, bucket)
        if self.mode == "powersgd":
            # Imported here: few need it, and it brings much with it.
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook  # noqa: PLC0415

            if self._powersgd is None:
                self._powersgd = powerSGD_hook.PowerSGDState(
                    self._group, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START
                )
            return powerSGD_hook.powerSGD_hook(self._powersgd, bucket)
        return default_hooks.allreduce_hook(self._group, bucket)

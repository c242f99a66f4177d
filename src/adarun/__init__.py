"""adarun: torchrun that adapts.

A script needs none of this. One that batches by itself takes part with `split`; without adarun, or under torchrun, the same
script runs unchanged, since every function here then does what torchrun's users do by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from adarun.worker.training import Training

__version__ = "0.1.0"
__all__ = ["__version__", "active", "checkpointed", "split", "waiting"]

T = TypeVar("T")


def active() -> bool:
    """Whether this process is a worker that adarun measures."""
    return _training() is not None


def split(batch: Sequence[T]) -> Sequence[T]:
    """This worker's piece of a global batch; call it once a step, on every rank, with the same batch.

    The gradients of the backward passes that follow are weighted so that the update is the one of the whole batch: take the
    mean of the loss over the piece, and let DistributedDataParallel average.

    Args:
        batch: the global batch of this step, say its sample indices, in the same order on all ranks.

    Returns:
        The piece: every n-th sample from this rank's on while the shares are even (and always without adarun), a
        contiguous piece otherwise.

    Raises:
        ValueError: there are fewer samples than workers.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if len(batch) < world_size:
        raise ValueError(f"a batch of {len(batch)} samples cannot be split among {world_size} workers")
    training = _training()
    if training is not None:
        return training.split(batch)
    if len(batch) % world_size:
        raise ValueError(f"a batch of {len(batch)} samples cannot be split evenly among {world_size} workers")
    return batch[rank::world_size]


def checkpointed() -> None:
    """Say that a checkpoint was written, from which the script goes on when it is started again.

    What `torch.save` and `torch.distributed.checkpoint` write is seen without it. Under `--tune`, workers are restarted only
    after a checkpoint.
    """
    training = _training()
    if training is not None:
        training.checkpointed()


def waiting() -> AbstractContextManager[None]:
    """Time inside this context is spent on waiting for other workers: put your own collectives in it.

    DistributedDataParallel's are known without it.
    """
    training = _training()
    return training.waiting() if training is not None else nullcontext()


def _training() -> Training | None:
    # Attached means that this module is loaded; importing it here would import torch where nothing needs it.
    module = sys.modules.get("adarun.worker.training")
    return module.current if module is not None else None

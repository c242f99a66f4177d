"""Finds a policy by its name: adarun's own, one that another package brings, or a trained network in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import msgspec
import numpy as np
import platformdirs

from adarun import ppo
from adarun.control.built_in import BUILT_IN, built_in
from adarun.control.policy import Policy
from adarun.control.qlearning import QLearning, Row
from adarun.errors import UsageError

GROUP = "adarun.policies"


def table_path() -> Path:
    """Where what `qlearning` has learned is kept from one run to the next."""
    return Path(platformdirs.user_state_dir("adarun")) / "qlearning.json"


@dataclass(frozen=True)
class Tuning:
    """What is to be tuned, and how.

    The settings in words (none without --tune), the policy's name, its seed, and the job's epochs, 0 if unknown.
    """

    names: list[str]
    policy: str
    seed: int
    num_epochs: int


def load(tuning: Tuning) -> Policy:
    """The policy that `--policy` names; `fixed` keeps the first setting.

    An entry point of the group `adarun.policies` is called with a numpy Generator and gives a policy.

    Raises:
        UsageError: there is none of that name.
    """
    rng = np.random.default_rng(tuning.seed)
    if tuning.policy.startswith("ppo:"):
        return ppo.load(Path(tuning.policy[4:]), rng)
    if tuning.policy == "qlearning":
        return QLearning.from_table(rng, read_table(table_path()))
    if policy := built_in(tuning.policy, rng, *tuning.names[:1]):
        return policy
    found = entry_points(group=GROUP)
    for entry in found.select(name=tuning.policy):
        loaded: Policy = entry.load()(rng)
        return loaded
    names = ", ".join([*BUILT_IN, *sorted(found.names), "ppo:FILE"])
    raise UsageError(f"there is no policy {tuning.policy}; there are {names}")


def read_table(path: Path) -> list[Row]:
    """The table in a file; an empty one where there is none, or one that cannot be read: it is only a head start."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Row])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return []


def keep(policy: Policy) -> None:
    """Write down what a policy has learned, if it is of that kind; under another name first, so that it is always whole.

    Raises:
        OSError: the user's state folder cannot be written.
    """
    if isinstance(policy, QLearning):
        path = table_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_bytes(msgspec.json.encode(policy.to_table()))
        unfinished.replace(path)

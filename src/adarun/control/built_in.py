"""The policies that adarun comes with, by name."""

from __future__ import annotations

import numpy as np

from adarun.control.bandit import Thompson, Ucb
from adarun.control.policy import Fixed, Off, Policy
from adarun.control.qlearning import QLearning

BUILT_IN = ("thompson", "ucb", "qlearning", "fixed", "off")


def built_in(name: str, rng: np.random.Generator, option: str = "") -> Policy | None:
    """The policy of that name, or None if it is none of adarun's; `option` is what `fixed` holds on to."""
    if name == "thompson":
        return Thompson(rng)
    if name == "ucb":
        return Ucb()
    if name == "qlearning":
        return QLearning(rng)
    if name == "fixed":
        return Fixed(option)
    return Off() if name == "off" else None

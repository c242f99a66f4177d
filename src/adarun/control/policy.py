"""What a policy is: it chooses a setting of the discrete knobs, and learns from what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# By how much a window's reward usually differs from the next one's, before any window has shown it.
USUAL_NOISE = 0.03
# Of what an option gave longer ago than so many windows, the mean keeps little: machines drift.
MEMORY_WINDOWS = 30


@dataclass(frozen=True)
class Option:
    """One arm: a setting of all discrete knobs, such as `batch_size=32 OMP_NUM_THREADS=1`."""

    name: str
    # The structural model's reward for it in useful samples per second, NaN where there is no model.
    predicted: float = math.nan


@dataclass(frozen=True)
class Situation:
    """What the job is like when a choice is due."""

    utilisation: float  # R(s): busy / (busy + wait), 0 to 1
    overhead: float  # C(s): wait / step, 0 to 1
    incumbent: int  # the option that is in force when nothing is tried
    remaining: int  # decisions that are left, or 0 where unknown


class Choice(NamedTuple):
    """What a policy wants next, how likely each option was to be chosen, and why in words."""

    index: int  # type: ignore[assignment] # hides the tuple's search, which nobody needs here
    propensities: tuple[float, ...]
    reason: str


class Policy(Protocol):
    """Chooses among options, which are the same in all calls of a run; the first choice is to measure the incumbent."""

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """The option for the next window."""
        ...

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Take in the reward that option `choice` gave in `situation`; 0 where it failed."""
        ...


def certain(index: int, options: Sequence[Option], reason: str) -> Choice:
    """The choice of a policy that leaves nothing to chance."""
    return Choice(index, tuple(float(number == index) for number in range(len(options))), reason)


def measured_first(incumbent: int, options: Sequence[Option]) -> Choice:
    """The choice while nothing is known of the incumbent."""
    return certain(incumbent, options, f"kept: {options[incumbent].name} is to be measured first")


class Off:
    """Tries nothing: the incumbent stays."""

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """The incumbent."""
        return certain(situation.incumbent, options, "kept: the policy is off")

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Nothing to learn."""


class Fixed:
    """Always the option that the user named."""

    def __init__(self, name: str) -> None:
        self._name = name

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:  # noqa: ARG002 # the protocol has it
        """The option of that name.

        Raises:
            ValueError: there is no such option.
        """
        names = [option.name for option in options]
        if self._name not in names:
            raise ValueError(f"no option is named {self._name!r}; there are {', '.join(names)}")
        return certain(names.index(self._name), options, f"fixed: {self._name}")

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Nothing to learn."""


@dataclass
class Mean:
    """The running mean of one option's measurements, and the sum of their squared distances from it."""

    count: int = 0
    value: float = 0.0
    squares: float = 0.0

    def see(self, value: float) -> None:
        """Take in one measurement; one among many counts as one among `MEMORY_WINDOWS`."""
        if self.count == MEMORY_WINDOWS:
            self.squares *= 1.0 - 1.0 / MEMORY_WINDOWS
        else:
            self.count += 1
        before, self.value = self.value, self.value + (value - self.value) / self.count
        self.squares += (value - before) * (value - self.value)


class Incumbent:
    """The option to be in force when nothing is tried: the one with the best mean reward less one standard error."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._means: dict[int, Mean] = {}

    def learn(self, choice: int, reward: float) -> None:
        """Take in a reward; the one that gave it may become the incumbent, or cease to be."""
        self._means.setdefault(choice, Mean()).see(reward)
        self.index = max(self._means, key=self._score)

    def _score(self, index: int) -> float:
        mean = self._means[index]
        return mean.value * (1.0 - USUAL_NOISE / math.sqrt(mean.count))

"""What an option is judged by: more is better for every objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Outcome:
    """A step under some option, measured or predicted."""

    samples: float  # of all workers together
    compute_seconds: float
    exposed_seconds: float  # communication that no computation hides
    efficiency: float = 1.0  # how much a sample teaches, against one of the exact training; 1 for exact knobs

    @property
    def step_seconds(self) -> float:
        """T'(s): compute and exposed communication."""
        return self.compute_seconds + self.exposed_seconds


class Objective(Protocol):
    """Turns an outcome into a reward."""

    def reward(self, outcome: Outcome) -> float:
        """How good the outcome is."""
        ...


class Throughput:
    """Samples per second, whatever they teach."""

    def reward(self, outcome: Outcome) -> float:
        """The rate of samples."""
        return outcome.samples / outcome.step_seconds


class Goodput:
    """Useful samples per second: throughput times statistical efficiency (Qiao et al., OSDI 2021)."""

    def reward(self, outcome: Outcome) -> float:
        """The rate of samples, each counted by what it teaches."""
        return outcome.samples * outcome.efficiency / outcome.step_seconds


class StepTime:
    """The shortest step T'(s), whatever is in it; for options that all do the same work in a step."""

    def reward(self, outcome: Outcome) -> float:
        """Steps per second."""
        return 1.0 / outcome.step_seconds


OBJECTIVES: dict[str, Objective] = {"throughput": Throughput(), "goodput": Goodput(), "step_time": StepTime()}

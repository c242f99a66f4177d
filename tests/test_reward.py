"""Objectives: what each counts, and in which they differ."""

from __future__ import annotations

import pytest

from adarun.control.reward import OBJECTIVES, Outcome

EXACT = Outcome(samples=64.0, compute_seconds=0.3, exposed_seconds=0.1)
# Less communication, and each sample teaches less.
INEXACT = Outcome(samples=64.0, compute_seconds=0.3, exposed_seconds=0.02, efficiency=0.7)


@pytest.mark.parametrize(("name", "expected"), [("throughput", 160.0), ("goodput", 160.0), ("step_time", 2.5)])
def test_an_exact_step_is_worth_its_samples_or_its_time(name: str, expected: float) -> None:
    """64 samples in 0.3 s of computation and 0.1 s of exposed communication are 160 a second and 2.5 steps a second."""
    assert expected == pytest.approx(OBJECTIVES[name].reward(EXACT))


@pytest.mark.parametrize(("name", "better"), [("throughput", True), ("goodput", False), ("step_time", True)])
def test_only_goodput_counts_what_a_sample_teaches(name: str, better: bool) -> None:
    """A step that is a fifth shorter and teaches 30 % less is better by every objective but goodput."""
    objective = OBJECTIVES[name]
    assert better == (objective.reward(INEXACT) > objective.reward(EXACT))

"""The backward pass: when its gradients are ready is seen, whichever parameters it reaches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from adarun.worker.gradients import Backward
from adarun.worker.observe import BACKWARD, UPDATE, WAIT

PASS = [BACKWARD, WAIT, UPDATE]


class Marks:
    """Stands in for the observer: remembers the phases."""

    def __init__(self) -> None:
        self.phases: list[int] = []

    def phase(self, phase: int) -> None:
        self.phases.append(phase)

    def taken(self) -> list[int]:
        taken, self.phases = self.phases, []
        return taken


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Marks:
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)
    return Marks()


@pytest.fixture
def backward(marks: Marks) -> Iterator[Backward]:
    patched = Backward(marks)  # type: ignore[arg-type]
    patched.install()
    yield patched


def test_each_pass_waits_between_its_gradients_and_its_end(backward: Backward, marks: Marks) -> None:
    """With a parameter to listen to, and without one, each pass is marked at its start, when it is ready, and at its end."""
    layer = torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    assert marks.taken() == PASS
    backward.listen(layer.bias)
    for _ in range(3):
        layer(torch.ones(1, 2)).sum().backward()
        assert marks.taken() == PASS


def test_a_pass_that_does_not_reach_the_parameter_is_seen_from_then_on(backward: Backward, marks: Marks) -> None:
    """Where the parameter listened to has no gradient, only the first pass lacks its moment of readiness."""
    used, unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    backward.listen(unused.bias)
    used(torch.ones(1, 2)).sum().backward()
    assert marks.taken() == [BACKWARD, UPDATE]
    for model in (used, used, unused):
        model(torch.ones(1, 2)).sum().backward()
        assert marks.taken() == PASS


def test_a_parameter_inside_a_checkpoint_does_not_tell_too_early(backward: Backward, marks: Marks) -> None:
    """With re-entrant checkpointing, whose passes lie inside one another, the outer pass's readiness counts."""
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    backward.listen(second.bias)
    for _ in range(3):
        marks.taken()
        x = torch.ones(1, 2, requires_grad=True)
        checkpoint(second, first(x), use_reentrant=True).sum().backward()
    assert marks.taken() == PASS


def test_a_gradient_taken_outside_of_a_pass_is_no_sign(backward: Backward, marks: Marks) -> None:
    """torch.autograd.grad, which no optimizer step follows, marks nothing."""
    layer = torch.nn.Linear(2, 1)
    backward.listen(layer.bias)
    torch.autograd.grad(layer(torch.ones(1, 2)).sum(), [layer.bias])
    assert marks.taken() == []

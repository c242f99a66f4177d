"""The public API: a script that batches by itself takes part with it, and without adarun it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adarun
from adarun.events import Plan
from conftest import Job

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_batches.py"
ARGUMENTS = ("--epochs", 3, "--out")
TWO = ("--standalone", "--nproc-per-node", 2)


LAUNCHERS = {
    "torchrun": ("torchrun", *TWO),
    "adarun": ("adarun", "--window", 3, "--shares", "3,1;1,3;1,1;5,2", *TWO),
    "plain": ("python",),
}


@pytest.fixture(scope="module")
def learned(start: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, dict]]:
    """What the example prints and learns under torchrun, under adarun with changing shares, and in one plain process."""
    out = tmp_path_factory.mktemp("out")
    jobs = {name: start(*command, EXAMPLE, *ARGUMENTS, out / name) for name, command in LAUNCHERS.items()}
    return {name: (job.succeed(), torch.load(out / name)) for name, job in jobs.items()}


@pytest.mark.parametrize("launcher", ["adarun", "plain"])
def test_own_batches_are_exact(launcher: str, learned: dict[str, tuple[Job, dict]]) -> None:
    """A script that draws its own batches and cuts them with `adarun.split` learns, and prints, what it does under torchrun."""
    (torchrun, expected), (job, actual) = learned["torchrun"], learned[launcher]
    differences = [((actual[name] - value).abs() / value.abs()).max() for name, value in expected.items()]
    assert float(torch.stack(differences).nan_to_num(float("inf")).max()) <= 1e-10
    assert torchrun.stdout == job.stdout


def test_own_batches_are_cut_unevenly(learned: dict[str, tuple[Job, dict]]) -> None:
    """The shares of a script that draws its own batches change as those of any other."""
    assert len({tuple(plan.shares) for plan in learned["adarun"][0].events(Plan)}) == 4


def test_public_names() -> None:
    """The public names are these and no others."""
    assert adarun.__all__ == ["__version__", "active", "checkpointed", "split", "waiting"]


def test_a_plain_process_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without adarun, `active` is False, `split` gives the whole batch, and the others do nothing."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert False is adarun.active()
    assert list(adarun.split([3, 1, 2])) == [3, 1, 2]
    with adarun.waiting() as nothing:
        assert None is nothing
    assert None is adarun.checkpointed()


def test_split_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun `split` gives every n-th sample, as DistributedSampler does, and refuses what it cannot cut evenly."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert list(adarun.split("abcdef")) == ["b", "e"]
    with pytest.raises(ValueError, match="a batch of 7 samples cannot be split evenly among 3 workers"):
        adarun.split("abcdefg")
    with pytest.raises(ValueError, match="a batch of 2 samples cannot be split among 3 workers"):
        adarun.split("ab")

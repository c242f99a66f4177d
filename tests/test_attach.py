"""adarun gets into the workers that it started, and into nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adarun.events import Attached, Refused, Step
from conftest import Job

IMPORT = "import sys, torch; print('adarun.worker.training' in sys.modules, torch.ones(1).item())"


def test_importing_torch_elsewhere_does_nothing(start: Callable[..., Job]) -> None:
    """Where adarun did not start the process, `import torch` loads nothing of the worker's side and says nothing."""
    job = start("python", "-c", IMPORT, RANK="0", WORLD_SIZE="1").succeed()
    assert (job.stdout, job.stderr) == ("False 1.0\n", "")


def test_a_hub_that_is_not_there(start: Callable[..., Job], tmp_path: Path) -> None:
    """Where the hub cannot be reached, `import torch` works all the same, and one line says that nothing is adapted."""
    job = start("python", "-c", IMPORT, RANK="0", WORLD_SIZE="1", ADARUN_HUB=str(tmp_path / "hub")).succeed()
    assert job.stdout.split()[1] == "1.0"
    assert job.stderr.count("\n") == 1
    assert job.stderr.startswith("adarun: could not attach to this worker, it runs unadapted (")


@pytest.fixture(scope="module")
def family(
    start: Callable[..., Job], scripts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, list[dict]]:
    """A job whose workers start children of every kind: the job, and what each rank found."""
    folder = tmp_path_factory.mktemp("dumps")
    options = ("--window", 3, "--shares", "3,1;1,3;1,1;5,2", "--standalone", "--nproc-per-node", 2)
    job = start("adarun", *options, scripts / "children.py", DUMPS=str(folder)).succeed()
    return job, [json.loads((folder / str(rank)).read_text()) for rank in (0, 1)]


def test_children_of_a_worker_do_not_attach(family: tuple[Job, list[dict]]) -> None:
    """Only the two workers attach: not their forked children, not the programs they start, not their loaders' processes."""
    job, dumps = family
    for dump in dumps:
        assert True is dump["worker"]
        assert False is dump["forked"]
        assert dump["fork"]["active"] + dump["spawn"]["active"] == 0
    assert dumps[0]["program"] == "False\n"
    assert sorted(event.hello.rank for event in job.events(Attached)) == [0, 1]
    assert job.events(Refused) == []
    assert "could not attach" not in job.stderr


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_loader_processes(context: str, family: tuple[Job, list[dict]]) -> None:
    """Loader processes that live for two epochs, forked or spawned, deliver uneven pieces of every epoch's samples."""
    drawn = [dump[context]["drawn"] for dump in family[1]]
    # One process a rank, and it is not the worker itself.
    assert [dump[context]["processes"] for dump in family[1]] == [1, 1]
    assert [len(steps) for steps in drawn] == [20, 20]
    assert {10} == {len(mine) + len(other) for mine, other in zip(*drawn, strict=True)}
    assert [len(steps) for steps in drawn[0]] != [len(steps) for steps in drawn[1]]
    for epoch in (slice(0, 10), slice(10, 20)):
        assert sorted(itertools.chain(*drawn[0][epoch], *drawn[1][epoch])) == list(range(100))


def test_waiting_is_counted_as_waiting(family: tuple[Job, list[dict]]) -> None:
    """Time inside `adarun.waiting()` is logged as a wait for the other workers."""
    first = [step.wait for step in family[0].events(Step) if step.step == 0]
    assert len(first) == 2
    assert min(first) >= 0.25

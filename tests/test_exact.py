"""What a model learns under adarun is what it learns under torchrun, whatever the split does meanwhile."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adarun.events import Attached, Decision, Plan, Step, WorkersStarted
from conftest import Job

CASES = {
    "clipping": "--clip",
    "accumulation": "--optimizer adamw --clip --accumulate 3",
    "own hook": "--hook --auxiliary --num-workers 2",
    "checkpointing": "--checkpointing",
    "drop_last": "--drop-last",
    "sum": "--sum --lr 0.005 --break-at 7 --num-workers 2",
    "batchnorm": "--batchnorm",
    "prefetch": "--prefetch",
    "sharded": "--fsdp --optimizer adamw",
}
ADAPTABLE = ("clipping", "accumulation", "own hook", "checkpointing", "drop_last", "sharded")
RANKS = (0, 1)
# The split changes every three steps, and is uneven in three of four windows.
CHANGING = ("--window", 3, "--shares", "3,1;1,3;1,1;5,2")
# The launcher and its options, the cases it trains one after the other, and what is added to their options.
TRAININGS = {
    "torchrun": (("torchrun",), CASES, ""),
    "changing": (("adarun", *CHANGING), ADAPTABLE, ""),
    "summed": (("adarun", *CHANGING, "--loss-reduction", "sum"), ("sum", "clipping"), ""),
    "observed": (("adarun", "--adapt", "observe"), CASES, ""),
    "batchnorm": (("adarun", *CHANGING), ("batchnorm",), ""),
    "prefetch": (("adarun", *CHANGING), ("prefetch",), ""),
    "allowed": (("adarun", *CHANGING, "--batchnorm", "allow"), ("batchnorm", "prefetch"), ""),
    "restarted": (("adarun", *CHANGING, "--max-restarts", 1), ("clipping",), "--fail-at 17"),
}
UNADAPTABLE = {
    "iterable": "the dataset is an IterableDataset, whose samples have no index to share out",
    "sampler": "the loader has no DistributedSampler",
    "batch_sampler": "the loader does its own batching",
    "no_ddp": "no model is wrapped in DistributedDataParallel",
}
LIMIT = 1e-10

# What each rank left: its parameters, and the samples of each of its steps.
Result = list[dict]


@dataclass(frozen=True)
class Training:
    """A job that has ended, and what it left of each case."""

    job: Job
    results: dict[str, Result]


@pytest.fixture(scope="module")
def ended(
    start: Callable[..., Job], scripts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Training]]:
    """Waits for one of the trainings; two at a time run in the background, since a start leaves a core idle."""
    base = tmp_path_factory.mktemp("out")

    def train(name: str) -> Training:
        command, names, then = TRAININGS[name]
        out = base / name
        out.mkdir()
        cases = [f"{CASES[case]} {then}" for case in names]
        if name == "observed":
            cases.append("--until-decided runs")
        job = start(*command, "--standalone", "--nproc-per-node", 2, scripts / "exact.py", out, *cases).wait()
        assert (job.process.returncode != 0) == (name == "allowed"), job.stderr
        files = {case: [out / f"{number}.{rank}" for rank in RANKS] for number, case in enumerate(names)}
        return Training(job, {case: [torch.load(file) for file in files[case] if file.exists()] for case in names})

    def measure(kind: str) -> Training:
        return Training(start("adarun", "--standalone", scripts / "unadaptable.py", kind).wait(), {})

    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(1) as first:
        calls = {name: functools.partial(train, name) for name in TRAININGS}
        calls |= {kind: functools.partial(measure, kind) for kind in UNADAPTABLE}
        futures = {name: pool.submit(call) for name, call in calls.items()}

        def ended(name: str) -> Training:
            # A test that runs alone need not wait for the others' trainings.
            if futures[name].cancel():
                futures[name] = first.submit(calls[name])
            return futures[name].result()

        yield ended
        pool.shutdown(cancel_futures=True)


def difference(expected: Result, actual: Result) -> float:
    """The largest relative difference of a parameter on any rank."""
    assert len(RANKS) == len(expected) == len(actual)
    differences = [
        ((mine["parameters"][name] - theirs).abs() / theirs.abs()).max()
        for mine, its in zip(actual, expected, strict=True)
        for name, theirs in its["parameters"].items()
    ]
    # max() would pass over a NaN.
    return float(torch.stack(differences).nan_to_num(float("inf")).max())


def lengths(result: Result) -> list[list[int]]:
    """The number of samples in each step, by rank."""
    return [[len(step) for step in rank["drawn"]] for rank in result]


def used(result: Result) -> list[list[int]]:
    """The samples that all ranks together used in each step, sorted."""
    return [sorted(itertools.chain(*steps)) for steps in zip(*(rank["drawn"] for rank in result), strict=True)]


def identical(expected: Result, actual: Result) -> bool:
    """Equal to the bit: parameters, buffers, and which rank used which sample when."""
    return all(
        mine["drawn"] == its["drawn"]
        and mine["parameters"].keys() == its["parameters"].keys()
        and all(torch.equal(mine["parameters"][name], theirs) for name, theirs in its["parameters"].items())
        for mine, its in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("case", ADAPTABLE)
def test_changing_shares_learn_what_torchrun_learns(case: str, ended: Callable[[str], Training]) -> None:
    """After three epochs under a split that changes every three steps, each parameter is torchrun's to 1e-10."""
    expected, actual = ended("torchrun").results[case], ended("changing").results[case]
    assert lengths(actual)[0] != lengths(actual)[1]
    assert difference(expected, actual) <= LIMIT


@pytest.mark.parametrize("case", ADAPTABLE)
def test_every_step_uses_the_samples_that_it_uses_under_torchrun(case: str, ended: Callable[[str], Training]) -> None:
    """In each step the workers together use the very samples that torchrun's use, each of them as often."""
    assert used(ended("torchrun").results[case]) == used(ended("changing").results[case])


def test_a_summed_loss_is_exact_with_its_option(ended: Callable[[str], Training]) -> None:
    """With --loss-reduction sum a loss summed over the samples learns what it does under torchrun, early break included."""
    expected, actual = ended("torchrun").results["sum"], ended("summed").results["sum"]
    assert lengths(actual)[0] != lengths(actual)[1]
    assert used(expected) == used(actual)
    assert difference(expected, actual) <= LIMIT


def test_it_is_the_weights_that_make_it_exact(ended: Callable[[str], Training]) -> None:
    """A mean loss that is taken for a summed one, and so gets no weights, learns something else."""
    expected, actual = ended("torchrun").results["clipping"], ended("summed").results["clipping"]
    assert used(expected) == used(actual)
    assert difference(expected, actual) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_observing_changes_no_bit(case: str, ended: Callable[[str], Training]) -> None:
    """Under --adapt observe every parameter and the order of all samples are torchrun's to the bit."""
    assert identical(ended("torchrun").results[case], ended("observed").results[case])


def test_observing_logs_what_would_have_been_decided(ended: Callable[[str], Training]) -> None:
    """--adapt observe logs decisions, all of them for the even split, and says why."""
    job = ended("observed").job
    assert {tuple(decision.chosen) for decision in job.events(Decision)} == {(8, 8)}
    assert "shares stayed even: --adapt observe" in job.said


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("batchnorm", "convert the model with SyncBatchNorm, or accept other statistics with --batchnorm allow"),
        ("prefetch", "the script draws its next batch before the backward pass of the last one"),
    ],
)
def test_what_would_not_be_exact_stays_even(case: str, said: str, ended: Callable[[str], Training]) -> None:
    """A model with BatchNorm, or a script that draws ahead, learns to the bit what it does under torchrun, and is told why."""
    assert identical(ended("torchrun").results[case], ended(case).results[case])
    assert all(plan.even for plan in ended(case).job.events(Plan))
    assert said in ended(case).job.said


def test_batchnorm_allow_lifts_the_freeze(ended: Callable[[str], Training]) -> None:
    """With --batchnorm allow the split of a model with BatchNorm changes, over the same samples."""
    expected, actual = ended("torchrun").results["batchnorm"], ended("allowed").results["batchnorm"]
    assert lengths(actual)[0] != lengths(actual)[1]
    assert used(expected) == used(actual)


def test_what_cannot_be_exact_any_more_fails(ended: Callable[[str], Training]) -> None:
    """A script that begins to draw ahead once the split is uneven fails, and the message names the remedy."""
    training = ended("allowed")
    assert training.results["prefetch"] == []
    assert training.job.process.returncode == 1
    assert "NotExact: the script draws its next batch before" in training.job.said
    assert "start the job with --adapt observe" in training.job.said


def test_restarted_workers_start_over(ended: Callable[[str], Training]) -> None:
    """Workers that fail under an uneven split are restarted, and then learn what torchrun's do."""
    job, actual = ended("restarted").job, ended("restarted").results["clipping"]
    assert [event.attempt for event in job.events(WorkersStarted)] == [0, 1]
    assert sorted((e.hello.attempt, e.hello.rank) for e in job.events(Attached)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert lengths(actual)[0] != lengths(actual)[1]
    assert difference(ended("torchrun").results["clipping"], actual) <= LIMIT


@pytest.mark.parametrize("kind", UNADAPTABLE)
def test_what_cannot_be_adapted_is_measured(kind: str, ended: Callable[[str], Training]) -> None:
    """A loop that cannot be adapted runs to its end and is measured, and the summary says why it is not adapted."""
    job = ended(kind).job.succeed()
    assert len(job.events(Step)) > 10
    assert job.events(Plan) == []
    assert f"not adapted: {UNADAPTABLE[kind]}" in job.said

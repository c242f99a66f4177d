"""Sync periods, compression, gossip: what workers that do not synchronise in every step learn, and that they stay together."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adarun.events import Averaged, Notice, Paced, Plan, RunEnded, WorkersStarted
from adarun.worker.sync import OUTER_LR, OUTER_MOMENTUM, Outer, rare_row_factor
from conftest import Job

RANKS = (0, 1)
LOCAL = ("--sync-period", 4, "--window", 8)
# The launcher's options, and the options of exact.py's one case.
TRAININGS = {
    "torchrun": ((), "--clip"),
    "sgd": ((*LOCAL, "--shares", "3,1;1,3"), "--clip"),
    "adamw": ((*LOCAL, "--shares", "3,1"), "--optimizer adamw"),
    "sum": ((*LOCAL, "--shares", "3,1", "--loss-reduction", "sum"), "--sum --lr 0.005"),
    "period one": (("--sync-period", "1:2", "--window", 1000), "--clip"),
    "and back": (("--sync-period", "1:8", "--window", 6, "--topology", "auto"), "--accumulate 2 --num-workers 2"),
    "gossip": (("--topology", "gossip", "--sync-period", 2, "--window", 8), "--clip"),
    "ring": (("--topology", "ring", "--window", 8), "--clip"),
    "bf16": (("--compress", "bf16"), "--clip"),
    "powersgd": (("--compress", "powersgd"), "--clip"),
    "outer": (("--sync-period", 32, "--outer", "nesterov", "--window", 32), "--clip"),
}
SCRIPTS = [
    "embedding",
    "unused",
    "evaluates",
    "evaluates alone",
    "saves",
    "break",
    "scaler",
    "hook",
    "late hook",
    "buffers",
    "fails",
    "diverges",
]


@pytest.fixture(scope="module")
def jobs(
    start: Callable[..., Job], scripts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[Job, list[Any]]]]:
    """Waits for a training, named as above; gives the job and what each rank left."""
    base = tmp_path_factory.mktemp("sync")

    def exact(name: str) -> tuple[Job, list[Any]]:
        options, case = TRAININGS[name]
        out = base / name
        out.mkdir()
        launcher = ("adarun", *options) if options else ("torchrun",)
        job = start(*launcher, "--standalone", "--nproc-per-node", 2, scripts / "exact.py", out, case).succeed()
        return job, [torch.load(out / f"0.{rank}") for rank in RANKS]

    def local(name: str) -> tuple[Job, list[Any]]:
        out = base / name
        out.mkdir()
        options = ("--sync-period", 8, "--compress", "bf16", "--max-restarts", int(name == "fails"))
        job = start(
            "adarun", *options, "--standalone", "--nproc-per-node", 2, scripts / "local.py", out, name
        ).succeed()
        return job, [json.loads((out / str(rank)).read_text()) for rank in RANKS]

    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(exact, name) for name in TRAININGS}
        futures |= {name: pool.submit(local, name) for name in SCRIPTS}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


# --- one process that does what two workers should have done ---------------------------------------------------------


class Replica:
    """One worker's model and optimizer, as exact.py makes them."""

    def __init__(self, scripts: Path, case: str) -> None:
        sys.path.insert(0, str(scripts))
        import exact

        self.args = exact.parser.parse_args(case.split())
        torch.manual_seed(0)
        self.model = exact.Model(self.args).double()
        self.data = exact.Data(self.args.samples)
        adamw = self.args.optimizer == "adamw"
        kind = torch.optim.AdamW if adamw else torch.optim.SGD
        self.optimizer = kind(self.model.parameters(), lr=self.args.lr, **({} if adamw else {"momentum": 0.9}))

    def gradients(self, samples: list[int]) -> None:
        """Those of the mean loss over samples."""
        self.optimizer.zero_grad()
        _, x, y = (
            torch.stack([torch.as_tensor(part) for part in column])
            for column in zip(*map(self.data.__getitem__, samples), strict=True)
        )
        nn.functional.mse_loss(self.model(x), y).backward()

    def step(self) -> None:
        """The optimizer's step."""
        if self.args.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def values(self, part: str) -> list[torch.Tensor]:
        """The parameters, or the first or second moments."""
        parameters = list(self.model.parameters())
        if part == "parameters":
            return [parameter.data for parameter in parameters]
        names = {"first": ("momentum_buffer", "exp_avg"), "second": ("exp_avg_sq",)}[part]
        return [self.optimizer.state[p][name] for p in parameters for name in names if name in self.optimizer.state[p]]


def averaged(replicas: list[Replica], weights: list[float], part: str) -> None:
    for values in zip(*(replica.values(part) for replica in replicas), strict=True):
        mean = sum(weight * value for weight, value in zip(weights, values, strict=True))
        for value in values:
            value.copy_(mean)


def by_one_process(scripts: Path, case: str, drawn: list[list[list[int]]], plans: list[Plan]) -> Replica:
    """Local SGD over the samples that the workers drew, under the plans that they had, with clipping before each step."""
    replicas = [Replica(scripts, case) for _ in RANKS]
    batches_per_epoch, stale = len(drawn[0]) // replicas[0].args.epochs, 0
    for step, samples in enumerate(zip(*drawn, strict=True)):
        plan = next(plan for plan in plans if plan.start <= step < plan.stop)
        total = sum(map(len, samples))
        for replica, mine in zip(replicas, samples, strict=True):
            replica.gradients(mine)
            if replica.args.sum:
                # As under torchrun, where the gradients of the sums are averaged over the workers.
                for parameter in replica.model.parameters():
                    parameter.grad *= total / len(RANKS)
        if plan.sync_period == 1:
            for gradients in zip(*(replica.model.parameters() for replica in replicas), strict=True):
                mean = sum(len(mine) / total * p.grad for mine, p in zip(samples, gradients, strict=True))
                for parameter in gradients:
                    parameter.grad = mean.clone()
        for replica in replicas:
            replica.step()
        everything = (step + 1) % batches_per_epoch == 0
        if plan.sync_period > 1 and (everything or (step + 1 - plan.start) % plan.sync_period == 0):
            stale += 1
            weights = [share / sum(plan.shares) for share in plan.shares]
            averaged(replicas, weights, "parameters")
            # Adam's two moments together, SGD's momentum more often.
            if everything or stale % (6 if replicas[0].args.optimizer == "adamw" else 3) == 0:
                averaged(replicas, weights, "first")
                averaged(replicas, weights, "second")
            stale = 0 if everything else stale
    return replicas[0]


@pytest.mark.parametrize("name", ["sgd", "adamw", "sum"])
def test_local_steps_are_what_one_process_makes_of_them(
    name: str, jobs: Callable[[str], tuple[Job, list[Any]]], scripts: Path
) -> None:
    """Four local steps, then an average weighted by shares, moments now and then: to 1e-10 what one process computes."""
    job, results = jobs(name)
    plans = job.events(Plan)
    assert {plan.sync_period for plan in plans} == {1, 4}
    assert any(not plan.even for plan in plans)
    expected = by_one_process(scripts, TRAININGS[name][1], [result["drawn"] for result in results], plans)
    for result, (key, value) in itertools.product(results, expected.model.state_dict().items()):
        assert float(((result["parameters"][key] - value).abs() / value.abs()).max()) < 1e-10, key


def test_a_period_of_one_is_torchruns_to_the_bit(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """Where longer periods are allowed but not begun, parameters and samples are torchrun's to the bit."""
    job, results = jobs("period one")
    assert {plan.sync_period for plan in job.events(Plan)} == {1}
    for mine, its in zip(results, jobs("torchrun")[1], strict=True):
        assert mine["drawn"] == its["drawn"]
        assert all(torch.equal(mine["parameters"][key], value) for key, value in its["parameters"].items())


@pytest.mark.parametrize("name", TRAININGS)
def test_replicas_are_the_same_in_the_end(name: str, jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """However workers synchronise, they end with the same parameters to the bit."""
    one, other = jobs(name)[1]
    assert all(torch.equal(one["parameters"][key], value) for key, value in other["parameters"].items())
    assert all(bool(value.isfinite().all()) for value in one["parameters"].values())


@pytest.mark.parametrize("name", ["sgd", "adamw", "gossip", "ring", "outer"])
def test_after_an_average_the_replicas_have_one_checksum(
    name: str, jobs: Callable[[str], tuple[Job, list[Any]]]
) -> None:
    """Each average is on all ranks at the same step, and leaves replicas with the same checksum; a gossip has none."""
    by_step: dict[int, list[Averaged]] = {}
    for event in jobs(name)[0].events(Averaged):
        by_step.setdefault(event.step, []).append(event)
    assert by_step
    for events in by_step.values():
        assert sorted(event.rank for event in events) in ([0, 1], [0, 0, 1, 1])
        assert len({event.checksum for event in events} - {None}) <= 1
    assert any(event.distance for events in by_step.values() for event in events)


@pytest.mark.parametrize("name", ["bf16", "powersgd"])
def test_compressed_gradients_learn_nearly_the_same(name: str, jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """Compression is in force from the second window on, and the parameters are near torchrun's but not the same."""
    job, (mine, _) = jobs(name)
    assert [plan.compression for plan in job.events(Plan)][:2] == ["none", name]
    its = jobs("torchrun")[1][0]["parameters"]
    distance = math.sqrt(sum(float((mine["parameters"][key] - value).norm()) ** 2 for key, value in its.items()))
    assert 0.0 < distance < 0.2 * math.sqrt(sum(float(value.norm()) ** 2 for value in its.values()))


def test_the_first_window_is_torchruns(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """Until every worker has shown that it follows plans, none steps by its own gradients, whatever was asked for."""
    for name in ("sgd", "gossip", "bf16", "outer"):
        first, second = jobs(name)[0].events(Plan)[:2]
        assert (first.sync_period, first.topology, first.compression) == (1, "allreduce", "none")
        assert not first.same_pace(second)


def test_plans_hold_whole_periods(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """No plan ends within a sync period, so that replicas are the same where plans change."""
    for name in ("sgd", "adamw", "gossip", "and back", "outer"):
        assert all((plan.stop - plan.start) % plan.sync_period == 0 for plan in jobs(name)[0].events(Plan))


# --- what a script may do meanwhile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evaluates", "saves", "break"])
def test_what_all_ranks_look_at_is_one_model(name: str, jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """An evaluation or a state dict between two averages, on all ranks, sees the average on each of them."""
    one, other = jobs(name)[1]
    assert one == other
    assert len(one) == 4


def test_what_one_rank_looks_at_alone_does_not_stop_the_job(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """An evaluation between two averages on rank 0 only sees its own replica, and the user is told; all end the same."""
    job, (one, other) = jobs("evaluates alone")
    assert (len(one), len(other)) == (4, 1)
    assert one[-1] == other[-1]
    assert "was not on all ranks, so it saw the replica of rank 0" in job.said


def test_a_scaler_keeps_the_workers_together(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """With a GradScaler no plan has local steps, and the summary says why."""
    job, (one, other) = jobs("scaler")
    assert {plan.sync_period for plan in job.events(Plan)} == {1}
    assert one == other
    assert "a GradScaler would take another scale on each worker" in job.said


@pytest.mark.parametrize("name", ["hook", "late hook"])
def test_the_scripts_own_hook_wins(name: str, jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """A communication hook of the script's own, registered early or late, stays in force, and is spoken of once."""
    job, results = jobs(name)
    said = [event.text for event in job.events(Notice) if event.key == "comm_hook"]
    assert said == ["the script has a communication hook of its own, which stays in force, so --compress does nothing"]
    assert results[0][-1] == results[1][-1]


def test_statistics_of_batchnorm_are_averaged_too(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """Float buffers, such as a BatchNorm's running variance, are the same on all ranks in the end."""
    one, other = jobs("buffers")[1]
    assert one == other


def test_a_worker_may_die_between_two_averages(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """A worker that dies after some local steps is started again with the others, and the job goes on to its end."""
    job, (one, other) = jobs("fails")
    assert len(job.events(WorkersStarted)) == 2
    assert job.events(RunEnded)[0].exit_code == 0
    assert one == other


def test_a_loss_that_is_no_number_any_more_ends_local_steps(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """A run that diverges is not stopped by adarun's own reports, and goes back to synchronising."""
    job, _ = jobs("diverges")
    assert all(event.distance is None or event.distance >= 0.0 for event in job.events(Averaged))
    assert all("nan" not in str(event.loss) for event in job.events(Paced))


def test_rare_rows_of_an_embedding_move_as_far_as_under_ddp() -> None:
    """A row that hardly anyone meets moves n times the mean of n workers' ways, one that all always meet moves the mean."""
    visits = torch.tensor([0.0, 1e-4, 0.5, 2.0, 4.0, 5.0])
    expected = torch.tensor([1.0, 4.0, (1 - 0.875**4) / 0.125, (1 - 0.5**4) / 0.5, 1.0, 1.0])
    assert torch.allclose(rare_row_factor(visits, 4), expected, rtol=1e-3)


def test_an_embedding_is_trained_by_all(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """Under Adam and local steps each worker's rows end the same on both."""
    job, (one, other) = jobs("embedding")
    assert {plan.sync_period for plan in job.events(Plan)} == {1, 8}
    assert one == other


def test_a_model_with_unused_parameters_is_refused(jobs: Callable[[str], tuple[Job, list[Any]]]) -> None:
    """With find_unused_parameters, where workers' optimizers may hold other states, all steps are synchronised."""
    job, (one, other) = jobs("unused")
    assert {plan.sync_period for plan in job.events(Plan)} == {1}
    assert one == other
    assert "with find_unused_parameters each worker may train other parameters" in job.said


def test_averaging_is_right_for_all_kinds_of_tensors(start: Callable[..., Job], scripts: Path) -> None:
    """Averages, gossip and checksums on four workers, over large, small, strided, empty and half-precision tensors."""
    start("torchrun", "--standalone", "--nproc-per-node", 4, scripts / "averaging.py").succeed()


# --- the outer step --------------------------------------------------------------------------------------------------


def test_the_outer_step_goes_on_in_the_workers_direction() -> None:
    """The pseudo-gradient points from the average to the anchor: the step goes past the anchor towards the average, and on."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    outer = Outer()
    outer.anchor([parameter])
    moved = torch.tensor([0.5, 0.25])
    with torch.no_grad():
        parameter += moved
    outer.step([parameter])
    first = torch.tensor([1.0, -2.0]) + OUTER_LR * (1.0 + OUTER_MOMENTUM) * moved
    assert torch.allclose(parameter, first)
    # Workers that stay where they are: the momentum alone carries on, the same way.
    outer.step([parameter])
    assert torch.allclose(parameter, first + OUTER_LR * OUTER_MOMENTUM**2 * moved)

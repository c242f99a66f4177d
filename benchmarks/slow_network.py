"""Two workers joined by a slow network: torchrun, and adarun with fewer averagings or smaller messages.

Usage: python benchmarks/slow_network.py --part a,b,c --pairs 3

a: at 100 Mbit/s, the time to the loss that torchrun reaches in the end. b: at the full speed of this machine, where there is
nothing to gain. c: at 100 Mbit/s, and worker 1 has half a core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median

import harness
import network
from harness import Figure, Record, SlowGroup
from network import Network

# Whom the parts compare, by adarun's options; torchrun has none.
TORCHRUN, AUTO, BF16, SHARES, SYNC = "torchrun", "sync period and shares", "bf16", "shares alone", "sync period alone"
OPTIONS: dict[str, list[str] | None] = {
    TORCHRUN: None,
    AUTO: ["--sync-period", "auto"],
    BF16: ["--compress", "bf16"],
    SHARES: [],
    SYNC: ["--sync-period", "auto", "--shares", "1,1"],
}
LONGER = ", longer"
STEPS_PER_EPOCH, SMOKE_STEPS = 50, 2
GRADIENT_BYTES = 6_162_944  # of characters.py's model


@dataclass(frozen=True)
class Part:
    """A network, how much of its core worker 1 has, and who is compared there."""

    title: str
    rate: str | None
    quota: int | None
    contenders: tuple[str, ...]
    to_target: bool = False  # judged by the time to torchrun's loss


PARTS = {
    "a": Part("100 Mbit/s", "100mbit", None, (TORCHRUN, AUTO, BF16), to_target=True),
    "b": Part("full speed", None, None, (TORCHRUN, AUTO)),
    "c": Part("100 Mbit/s, worker 1 at 50 % of its core", "100mbit", 50, (TORCHRUN, SHARES, SYNC, AUTO)),
}


@dataclass(frozen=True)
class Job:
    """How long characters.py trains, and in how many namespaces a launcher is started."""

    epochs: int
    steps_per_epoch: int
    nodes: int


@dataclass(frozen=True)
class Result:
    """What one run left behind. The first time and loss are those before the first epoch."""

    seconds: list[float]
    train_losses: list[float | None]
    losses: list[float]  # on the held-out text
    sent: int  # bytes, from worker 0 to worker 1
    shares: list[list[int]]  # one per plan; empty under torchrun

    def time_to(self, target: float) -> float:
        """Return when the loss first came down to the target, on straight lines from epoch to epoch."""
        for (start, before), (stop, after) in pairwise(zip(self.seconds, self.losses, strict=True)):
            if after <= target:
                return start + (stop - start) * (before - target) / (before - after)
        return inf


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="a,b,c", help="which parts, with commas between")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of torchrun and its rivals, in each part")
    parser.add_argument(
        "--epochs", type=int, default=6, help=f"how long to train, in epochs of {STEPS_PER_EPOCH} steps"
    )
    parser.add_argument("--extra-epochs", type=int, default=1, help="part a: each contender also runs so much longer")
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="2: a launcher in each namespace")
    parser.add_argument("--smoke", action="store_true", help="a seconds-long version that shows that it runs")
    arguments = parser.parse_args()
    arguments.part = arguments.part.split(",")
    if unknown := set(arguments.part) - set(PARTS):
        parser.error(f"there is no part {min(unknown)}; the parts are {', '.join(PARTS)}")
    return arguments


def commands(job: Job, joined: Network, options: Sequence[str] | None, folder: Path) -> list[list[str]]:
    """Return a command per launcher: one for both workers, or one in each namespace."""
    script = [str(harness.HERE / "characters.py"), "--epochs", str(job.epochs)]
    script += ["--steps-per-epoch", str(job.steps_per_epoch), "--result", str(folder / "result")]
    job_wide = ["--nnodes", str(job.nodes), "--nproc-per-node", str(harness.WORKERS // job.nodes)]
    job_wide += ["--master-addr", network.ADDRESSES[0], "--master-port", "29500"]
    launcher = [*harness.launcher(options, folder / "runs"), *job_wide]
    return [[*joined.inside(node), *launcher, "--node-rank", str(node), *script] for node in range(job.nodes)]


def train(job: Job, joined: Network, slow: SlowGroup | None, options: Sequence[str] | None) -> Result:
    """Train once."""
    environment = harness.environment(slow) | {"GLOO_SOCKET_IFNAME": network.DEVICE}
    if job.nodes == 1:
        environment["BENCH_NETWORK"] = joined.path(1)
    with tempfile.TemporaryDirectory(prefix="adarun-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        output = stack.enter_context((folder / "output").open("wb"))
        processes = []
        for command in commands(job, joined, options, folder):
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            processes.append(process)
        codes = [process.wait() for process in processes]
        result = folder / "result"
        rows = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
        # torch can abort a worker in its tear-down, after all was trained and written.
        if any(codes) and len(rows) <= job.epochs:
            text = (folder / "output").read_text(errors="replace")
            raise RuntimeError(f"the training run failed with codes {codes}:\n{text[-4000:]}")
        plans = harness.read_plans(folder / "runs") if (folder / "runs").exists() else []
    return Result(
        seconds=[row["seconds"] for row in rows],
        train_losses=[row["train_loss"] for row in rows],
        losses=[row["eval_loss"] for row in rows],
        sent=joined.sent(),
        shares=[plan.shares for plan in plans],
    )


def run(job: Job, part: Part, options: Sequence[str] | None) -> Result:
    """Train once, in a network of its own, and check that what should hold the workers back did."""
    with contextlib.ExitStack() as stack:
        joined = stack.enter_context(network.joined(part.rate))
        slow = stack.enter_context(harness.slow_group(part.quota)) if part.quota else None
        result = train(job, joined, slow, options)
        if slow and not slow.throttled():
            raise RuntimeError("the quota did not hold the slow worker back: the figures would mean nothing")
    if options is None and result.sent < job.epochs * job.steps_per_epoch * GRADIENT_BYTES:
        raise RuntimeError("torchrun's gradients did not go through the network: the figures would mean nothing")
    return result


def measure(job: Job, name: str, pairs: int, extra_epochs: int, record: Record) -> list[dict[str, Result]]:
    """Run a part's contenders in turn, so many rounds; where the time to a loss is judged, each for longer, too."""
    part = PARTS[name]
    longer = replace(job, epochs=job.epochs + extra_epochs)
    rounds: list[dict[str, Result]] = []
    for number in range(pairs):
        results: dict[str, Result] = {}
        for label in part.contenders:
            results[label] = run(job, part, OPTIONS[label])
            if extra_epochs and part.to_target:
                results[label + LONGER] = run(longer, part, OPTIONS[label])
        for label, result in results.items():
            record.write(type="run", part=name, round=number, label=label, **asdict(result))
        rounds.append(results)
    return rounds


def time_to_target(results: dict[str, Result], label: str) -> float:
    """Return the seconds to the loss that torchrun ended with, in the run that comes there first."""
    target = results[TORCHRUN].losses[-1]
    return min(results[name].time_to(target) for name in (label, label + LONGER) if name in results)


def sooner(rounds: list[dict[str, Result]], label: str, than: str = TORCHRUN) -> float:
    """Return how many times sooner than another a contender reaches the target; 0 if it does not."""
    return median(time_to_target(results, than) / time_to_target(results, label) for results in rounds)


def faster(rounds: list[dict[str, Result]], label: str, than: str = TORCHRUN) -> float:
    """Return how many times faster than another a contender trains the same epochs."""
    return median(results[than].seconds[-1] / results[label].seconds[-1] for results in rounds)


def loss_ratio(rounds: list[dict[str, Result]], label: str) -> float:
    """Return a contender's final loss relative to torchrun's."""
    return median(results[label].losses[-1] / results[TORCHRUN].losses[-1] for results in rounds)


def figures(name: str, rounds: list[dict[str, Result]]) -> list[Figure]:
    """Return what a part is judged by."""
    if name == "a":
        return [
            Figure("torchrun / sync period, time to target", sooner(rounds, AUTO), ">= 4"),
            Figure("sync period / torchrun, final loss, as many epochs", loss_ratio(rounds, AUTO), "<= 1.01"),
            Figure("torchrun / bf16, time to target", sooner(rounds, BF16), ">= 1.8"),
        ]
    if name == "b":
        return [
            Figure("torchrun / sync period, whole training", faster(rounds, AUTO), ">= 0.98"),
            Figure("sync period / torchrun, final loss", loss_ratio(rounds, AUTO), "<= 1.01"),
        ]
    return [Figure(f"{label} / both, whole training", faster(rounds, AUTO, label), ">= 1") for label in (SHARES, SYNC)]


def report(job: Job, name: str, rounds: list[dict[str, Result]], *, smoke: bool) -> None:
    """Print what a part measured."""
    rows = []
    for label in PARTS[name].contenders:
        runs = [results[label] for results in rounds]
        steps = job.epochs * job.steps_per_epoch
        rows.append(
            [
                label,
                ",".join(map(str, runs[-1].shares[-1])) if runs[-1].shares else "even",
                f"{median(result.seconds[-1] for result in runs) / steps * 1e3:.1f}",
                f"{median(result.sent for result in runs) / steps / 1e6:.2f}",
                f"{median(result.losses[-1] for result in runs):.4f}",
                f"{median(time_to_target(results, label) for results in rounds):.1f}",
                f"{sooner(rounds, label):.2f}",
            ]
        )
    columns = ["", "last shares", "ms per step", "MB per step", "final loss", "s to target", "times torchrun"]
    title = f"{PARTS[name].title}: {job.epochs} epochs, {len(rounds)} rounds"
    harness.show_rows(title, columns, rows, smoke=smoke)
    harness.show_figures(figures(name, rounds), smoke=smoke)


def main() -> None:
    """Measure and report, part by part."""
    arguments = parse_arguments()
    smoke = arguments.smoke
    record = Record("slow_network", smoke)
    job = Job(arguments.epochs, STEPS_PER_EPOCH, arguments.nodes)
    pairs, extra_epochs = arguments.pairs, arguments.extra_epochs
    if smoke:
        job, pairs, extra_epochs = replace(job, epochs=2, steps_per_epoch=SMOKE_STEPS), 1, 0
    for name in arguments.part:
        rounds = measure(job, name, pairs, extra_epochs, record)
        report(job, name, rounds, smoke=smoke)


if __name__ == "__main__":
    harness.run_or_skip(main)

"""The textbook case in the simulator: four nodes with eight resources each share four sub-tasks; then adarun adapts.

    python examples/four_nodes.py

Other jobs take 0, 2, 4 and 0 of the nodes' resources, so equal sub-tasks leave the free ones waiting. adarun's own control
first gives each node what it can do, D(s,H); then a policy finds out how often to exchange, P(s,H). Nothing but numpy runs.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from adarun.control.bandit import Thompson
from adarun.control.controller import Controller
from adarun.control.policy import Incumbent, Option, Situation
from adarun.control.reward import Goodput
from adarun.simulate.cluster import Cluster, Noise
from adarun.simulate.communication import Link, Network
from adarun.simulate.job import Job, Measured, Setting

RESOURCES, TAKEN = 8, np.array([0, 2, 4, 0])
GLOBAL_BATCH = 256
# A sample is 20 ms of work for one resource; 10 ms of a step are there however small the sub-task is.
WORK, FIXED = 0.020, 0.010
# A gigabyte of gradients every 100 ms or so, over 100 Gbit/s.
NUM_BYTES, NETWORK = 0.5e9, Network(4, 1, inside=Link(1e-6, 1e-11), between=Link(2e-5, 8e-11))
DRIFT = 0.02
WINDOWS, STEPS = 20, 24
EXACT = Setting()
SETTINGS = [EXACT, Setting(sync_period=2), Setting(sync_period=4), Setting(sync_period=8)]


def make_job() -> Job:
    """The four nodes: a worker each, as fast as it has resources, with steps that vary by 3 %."""
    rng = np.random.default_rng(0)
    cluster = Cluster(np.full(4, FIXED), WORK / (RESOURCES - TAKEN), rng, Noise(own=0.03, memory=0.5))
    return Job(cluster, NETWORK, NUM_BYTES, DRIFT)


def adapt_shares(job: Job) -> list[int]:
    """Let the live controller split the batch, window by window; the shares in the end."""
    controller = Controller(4)
    controller.start(GLOBAL_BATCH)
    for _ in range(WINDOWS):
        window = job.run(controller.shares, EXACT, STEPS).window
        controller.learn(window)
        controller.decide(window, GLOBAL_BATCH)
    return controller.shares


def adapt_setting(job: Job, shares: list[int]) -> Setting:
    """Let the default policy find the sync period, window by window; the incumbent in the end."""
    options = [Option(setting.name, Goodput().reward(job.predict(shares, setting))) for setting in SETTINGS]
    policy, incumbent, running = Thompson(np.random.default_rng(1)), Incumbent(0), 0
    for remaining in reversed(range(WINDOWS)):
        measured = job.run(shares, SETTINGS[running], STEPS)
        situation = Situation(measured.utilisation, measured.overhead, incumbent.index, remaining)
        policy.learn(situation, running, measured.reward)
        incumbent.learn(running, measured.reward)
        situation = Situation(measured.utilisation, measured.overhead, incumbent.index, remaining)
        running = policy.choose(situation, options).index
    return SETTINGS[incumbent.index]


def row(label: str, shares: list[int], setting: Setting, measured: Measured) -> list[str]:
    """One line of the table."""
    numbers = [f"{measured.utilisation:.2f}", f"{measured.overhead:.2f}", f"{measured.reward:.0f}"]
    return [label, " ".join(map(str, shares)), str(setting.sync_period), *numbers]


def main() -> None:
    """Adapt, and print utilisation, overhead and reward before and after."""
    job = make_job()
    even = [GLOBAL_BATCH // 4] * 4
    table = Table("", "sub-tasks k", "period H", "R(s)", "C(s)", "reward, samples/s")
    table.add_row(*row("before", even, EXACT, job.run(even, EXACT, 10 * STEPS)))
    shares = adapt_shares(job)
    table.add_row(*row("sub-tasks adapted", shares, EXACT, job.run(shares, EXACT, 10 * STEPS)))
    setting = adapt_setting(job, shares)
    table.add_row(*row("exchange adapted too", shares, setting, job.run(shares, setting, 10 * STEPS)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

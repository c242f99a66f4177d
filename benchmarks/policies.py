"""Every policy on the same test problems of 36 options: how soon it is near the oracle, and what the way there costs.

No job is started: `adarun.simulate.arms` gives the rewards. Beside adarun's own policies stand the usual ones from the
literature, which know no structural model. Nothing guards them: the table shows what a policy does by itself.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from harness import Figure, Record, show_figures, show_rows

from adarun.control.built_in import built_in
from adarun.control.controller import Controller
from adarun.control.policy import Choice, Option, Policy, Situation, certain
from adarun.control.qlearning import State, discretise
from adarun.control.split import Floats
from adarun.events import Window
from adarun.simulate.arms import NOISE, Game, Problem, play

PROBLEMS = {"H free": True, "H = 1": False}
SPLIT_WORKERS = 10_000
SETTLED_MEDIAN, SETTLED_90, REGRET, RELATIVE_TIME = 10, 25, 2, 1.02
DECISION_MS, SPLIT_MS = 1, 10


# --- what is in the literature --------------------------------------------------------------------------------------------


class Published:
    """What the policies below have in common: they look at the baseline first, and keep means relative to it."""

    def __init__(self, rng: np.random.Generator, num_options: int) -> None:
        self.rng = rng
        self.num_options = num_options
        self.counts: Floats = np.zeros(num_options)
        self.means: Floats = np.zeros(num_options)
        self.scale = 0.0
        self.state: State = (0, 0)

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """The baseline at first, then what the policy picks."""
        self.state = discretise(situation)
        return certain(self.pick() if self.scale else 0, options, "published")

    def learn(self, situation: Situation, choice: int, reward: float) -> None:  # noqa: ARG002 # the protocol has it
        """Take in one reward, relative to the first."""
        self.scale = self.scale or reward
        self.credit(choice, reward / self.scale)
        self.counts[choice] += 1.0
        self.means[choice] += (reward / self.scale - self.means[choice]) / self.counts[choice]

    def pick(self) -> int:
        """The next option."""
        raise NotImplementedError

    def credit(self, choice: int, reward: float) -> None:
        """Whatever else a policy learns."""


class FlatThompson(Published):
    """Gaussian Thompson sampling of independent options: known noise, a wide prior around the baseline."""

    def pick(self) -> int:
        """The best of one draw each."""
        weight, prior = self.counts / NOISE**2, 1.0 / 0.5**2
        mean = (weight * self.means + prior) / (weight + prior)
        return int(np.argmax(self.rng.normal(mean, 1.0 / np.sqrt(weight + prior))))


class Ucb1(Published):
    """UCB1 (Auer et al., Machine Learning, 2002); rewards are taken to lie between 0 and three times the baseline's."""

    def pick(self) -> int:
        """The highest upper bound; each option once before."""
        if not self.counts.all():
            return int(np.argmin(self.counts))
        return int(np.argmax(self.means / 3.0 + np.sqrt(2.0 * math.log(self.counts.sum()) / self.counts)))


class Exp3(Published):
    """EXP3 (Auer et al., SIAM Journal on Computing, 2002) with a tenth of uniform exploration."""

    mixing = 0.1

    def __init__(self, rng: np.random.Generator, num_options: int) -> None:
        super().__init__(rng, num_options)
        self.gains: Floats = np.zeros(num_options)

    def pick(self) -> int:
        """A draw from the present chances."""
        return int(self.rng.choice(self.num_options, p=self.chances()))

    def chances(self) -> Floats:
        """The probability of each option."""
        logits = self.mixing * self.gains / self.num_options
        weights = np.exp(logits - logits.max())
        chances: Floats = (1.0 - self.mixing) * weights / weights.sum() + self.mixing / self.num_options
        return chances

    def credit(self, choice: int, reward: float) -> None:
        """Weigh the reward by how unlikely it was to be seen."""
        self.gains[choice] += min(1.0, reward / 3.0) / self.chances()[choice]


class TabularQ(Published):
    """Q-learning as in the textbook: an empty table, a step of 0.1, a discount of 0.9, a tenth of random choices."""

    def __init__(self, rng: np.random.Generator, num_options: int) -> None:
        super().__init__(rng, num_options)
        self.table: dict[State, Floats] = {}
        self.last: tuple[State, int, float] | None = None

    def pick(self) -> int:
        """The option of the highest value, or any."""
        values = self.values(self.state)
        if self.last:
            state, choice, reward = self.last
            before = self.values(state)
            before[choice] += 0.1 * (reward + 0.9 * values.max() - before[choice])
        return int(self.rng.integers(self.num_options) if self.rng.random() < 0.1 else np.argmax(values))

    def values(self, state: State) -> Floats:
        """The row of a state."""
        return self.table.setdefault(state, np.zeros(self.num_options))

    def credit(self, choice: int, reward: float) -> None:
        """Keep the reward until the next state is known."""
        self.last = (self.state, choice, reward)


# --- the games ------------------------------------------------------------------------------------------------------------


def own(name: str, problem: Problem, seed: int) -> Policy:
    """One of adarun's policies; `fixed` stays with what the structural model thinks best."""
    best = max(problem.options, key=lambda option: option.predicted)
    policy = built_in(name, np.random.default_rng(seed), option=best.name)
    assert policy is not None
    return policy


Maker = Callable[[Problem, int], Policy]


def makers() -> dict[str, Maker]:
    """How each contender is made for a problem and a seed."""

    def published(kind: type[Published]) -> Maker:
        return lambda problem, seed: kind(np.random.default_rng(seed), len(problem.options))

    def ours(name: str) -> Maker:
        return lambda problem, seed: own(name, problem, seed)

    return {
        "thompson": ours("thompson"),
        "ucb": ours("ucb"),
        "qlearning": ours("qlearning"),
        "fixed: the model's best": ours("fixed"),
        "off": ours("off"),
        "flat Thompson": published(FlatThompson),
        "UCB1": published(Ucb1),
        "EXP3": published(Exp3),
        "tabular Q": published(TabularQ),
    }


@dataclass(frozen=True)
class Results:
    """What one policy did in all seeds of one problem."""

    settled: list[int]
    regret: list[float]
    time_end: list[float]  # over the baseline's for the same work, after the last decision
    time_worst: list[float]  # the same at its worst moment

    def row(self) -> list[str]:
        """The cells of the table."""
        settled = [f"{np.percentile(self.settled, at):.0f}" for at in (50, 90)]
        ends = [f"{np.percentile(self.time_end, at):.3f}" for at in (50, 95)]
        worst = [f"{np.percentile(self.time_worst, at):.3f}" for at in (50, 95)]
        return [*settled, f"{np.median(self.regret):.2f}", *ends, *worst]

    def figures(self, problem: str) -> list[Figure]:
        """What is asked of the default policy."""
        return [
            Figure(f"{problem}: decisions, median", float(np.median(self.settled)), f"<= {SETTLED_MEDIAN}", 0),
            Figure(f"{problem}: decisions, 90 %", float(np.percentile(self.settled, 90)), f"<= {SETTLED_90}", 0),
            Figure(f"{problem}: regret, median", float(np.median(self.regret)), f"<= {REGRET}", 2),
            Figure(f"{problem}: worst time, 95 %", float(np.percentile(self.time_worst, 95)), f"<= {RELATIVE_TIME}"),
        ]


def results(games: Sequence[Game]) -> Results:
    """The figures of some games."""
    times = [game.relative_times() for game in games]
    return Results(
        settled=[game.decisions_to_settle() for game in games],
        regret=[round(game.regret(), 4) for game in games],
        time_end=[round(float(each[-1]), 4) for each in times],
        time_worst=[round(float(each.max()), 4) for each in times],
    )


# --- how long a decision takes --------------------------------------------------------------------------------------------


def decision_ms(name: str, num_decisions: int) -> float:
    """The median time of a choice among 36 options and of learning from it."""
    problem = Problem(0)
    policy, times = own(name, problem, 0), []
    for number in range(num_decisions):
        decision = number % 60
        started = time.perf_counter()
        situation = problem.situation(0, 0, decision)
        choice = policy.choose(situation, problem.options).index
        policy.learn(situation, choice, problem.measured(decision, choice))
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def split_ms(num_windows: int) -> float:
    """The median time in which the controller takes in a window of 10,000 workers and decides their shares."""
    rng = np.random.default_rng(0)
    speeds = rng.uniform(0.5, 1.5, SPLIT_WORKERS)
    controller, times = Controller(SPLIT_WORKERS), []
    global_batch = 32 * SPLIT_WORKERS
    controller.start(global_batch)
    for number in range(num_windows):
        shares = np.array(controller.shares, dtype=np.float64)
        busy = (0.1 + shares / 32) * speeds * (1.0 + 0.01 * rng.standard_normal(SPLIT_WORKERS))
        window = Window(
            plan=number,
            steps=20,
            step_seconds=float(busy.max()),
            samples=shares.tolist(),
            busy_seconds=busy.tolist(),
            wait_seconds=(busy.max() - busy).tolist(),
            noise=[0.005] * SPLIT_WORKERS,
        )
        started = time.perf_counter()
        controller.learn(window)
        controller.decide(window, global_batch)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


# --- the table ------------------------------------------------------------------------------------------------------------

COLUMNS = ["policy", "decisions", "90 %", "regret", "time at the end", "95 %", "time at its worst", "95 %"]


def compare(problem: str, num_seeds: int, record: Record, *, smoke: bool) -> list[Figure]:
    """Play all seeds of one problem with every policy; print the table; return what is judged."""
    problems = [Problem(seed, sync_free=PROBLEMS[problem]) for seed in range(num_seeds)]
    rows, judged = [], []
    for label, make in makers().items():
        result = results([play(each, make(each, seed)) for seed, each in enumerate(problems)])
        record.write(type="policy", problem=problem, label=label, seeds=num_seeds, **vars(result))
        rows.append([label, *result.row()])
        if label == "thompson":
            judged = result.figures(problem)
    show_rows(f"{problem}: 36 options, 60 decisions, {num_seeds} seeds", COLUMNS, rows, smoke=smoke)
    return judged


def main() -> None:
    """Compare, time, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    num_seeds = 4 if options.smoke else options.seeds
    record = Record("policies", options.smoke)
    judged = [figure for problem in PROBLEMS for figure in compare(problem, num_seeds, record, smoke=options.smoke)]
    names = ("thompson", "ucb", "qlearning")
    times = {name: decision_ms(name, 20 if options.smoke else 1000) for name in names}
    split = split_ms(2 if options.smoke else 30)
    record.write(type="times", decision_ms=times, split_ms=split)
    judged += [Figure(f"{name}: ms per decision", times[name], f"<= {DECISION_MS}") for name in names]
    judged.append(Figure(f"split of {SPLIT_WORKERS:,} workers: ms", split, f"<= {SPLIT_MS}", 1))
    show_figures(judged, smoke=options.smoke)


if __name__ == "__main__":
    main()

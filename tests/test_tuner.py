"""The tuner on simulated jobs: laps, checkpoints and restarts are events, and their moments the only clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from adarun.control.bandit import Thompson
from adarun.control.policy import Choice, Option, Situation
from adarun.control.tuner import Tuner
from adarun.events import Loop, Step, Tuned, WorkersStarted

WORLD_SIZE = 2
SAMPLES = 2000  # in an epoch
STEPS = 20
RESTART_SECONDS = 5.0


class Wants:
    """A policy that wants given options in turn, and remembers what it was told."""

    def __init__(self, *wanted: int) -> None:
        self.wanted = list(wanted)
        self.learned: list[tuple[int, float]] = []

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        index = self.wanted.pop(0) if self.wanted else situation.incumbent
        return Choice(index, tuple(float(number == index) for number in range(len(options))), "wanted")

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        self.learned.append((choice, reward))


class Job:
    """A script of some epochs that saves after each, and resumes from there; its settings have known rates."""

    def __init__(self, tuner: Tuner, rates: Sequence[float], *, saves: bool = True, resumes: bool = True) -> None:
        self.tuner, self.rates, self.saves, self.resumes = tuner, rates, saves, resumes
        self.now = 100.0
        self.decisions: list[Tuned] = []
        self.trained: list[int] = []
        self.attempts = 0

    def run(self, epochs: int) -> Job:
        epoch = 0
        while epoch < epochs and self.attempts < 50:
            epoch = self.attempt(epoch if self.resumes else 0, epochs)
        return self

    def attempt(self, epoch: int, epochs: int) -> int:
        """Train until a restart is wanted or all is done; the epoch at which to go on."""
        self.see(WorkersStarted(self.attempts, [0, 1], WORLD_SIZE, 1, 0, self.now))
        self.attempts += 1
        self.now += RESTART_SECONDS
        step, saved = 0, False
        while epoch < epochs:
            loops = [Loop(step=step, at=self.now, epoch=epoch, saved=saved and not rank, rank=rank) for rank in (0, 1)]
            if self.see(*loops):
                return epoch
            self.trained.append(self.tuner.current)
            for _ in range(STEPS):
                seconds = SAMPLES / STEPS / self.rates[self.tuner.current]
                self.now += seconds
                half = SAMPLES // STEPS // WORLD_SIZE
                steps = [Step(rank, step, half, 0.0, seconds, 0.0, 0.0, 0.0, self.now) for rank in (0, 1)]
                step += 1
                if self.see(*steps):
                    return epoch
            epoch, saved = epoch + 1, self.saves
        return epoch

    def see(self, *events: Loop | Step | WorkersStarted) -> bool:
        tuned = [decision for event in events if (decision := self.tuner.see(event)) is not None]
        self.decisions += tuned
        return any(decision.restart for decision in tuned)


NAMES = ["batch_size=32", "batch_size=64", "batch_size=128"]


def test_a_setting_is_judged_by_the_samples_per_second_of_whole_laps() -> None:
    """What a policy learns of a setting is the rate of an epoch, from its first draw to the next epoch's."""
    policy = Wants()
    Job(Tuner(NAMES, policy, 10), [100.0, 1.0, 1.0]).run(10)
    assert [choice for choice, _ in policy.learned] == [0] * 9
    assert [reward for _, reward in policy.learned] == pytest.approx([100.0] * 9)


def test_workers_are_restarted_under_the_setting_that_the_policy_wants() -> None:
    """After a lap and its checkpoint the job goes on under the wanted setting, from the epoch at which it stopped."""
    job = Job(Tuner(NAMES, Wants(1), 400), [100.0, 200.0, 1.0]).run(6)
    assert job.trained == [0, 1, 1, 1, 1, 1]
    assert [(decision.before, decision.chosen) for decision in job.decisions if decision.restart] == [
        (NAMES[0], NAMES[1])
    ]
    assert job.tuner.incumbent == 1
    assert job.tuner.restart_seconds == pytest.approx([RESTART_SECONDS, RESTART_SECONDS])


def test_a_script_that_saves_nothing_is_never_restarted() -> None:
    """Without a checkpoint a restart would lose the work, so nothing is tried."""
    job = Job(Tuner(NAMES, Wants(1, 1, 1), 100), [100.0, 200.0, 1.0], saves=False).run(20)
    assert set(job.trained) == {0}
    assert job.decisions == []
    assert not job.tuner.ever_saved


def test_a_script_that_does_not_resume_is_restarted_once() -> None:
    """A script that begins anew in spite of its checkpoint loses one epoch, and is then left alone, with the reason."""
    job = Job(Tuner(NAMES, Wants(1, 0, 1, 0), 400), [100.0, 110.0, 1.0], resumes=False).run(6)
    assert job.attempts == 2
    assert "does not resume from what it saves" in job.tuner.stopped


def test_a_trial_that_is_far_slower_is_aborted_and_taken_back() -> None:
    """A setting at less than two thirds of the incumbent's speed is left after a few steps, not after a whole epoch."""
    job = Job(Tuner(NAMES, Wants(1), 400), [100.0, 20.0, 1.0]).run(5)
    reasons = [decision.reason for decision in job.decisions if decision.restart]
    assert job.trained == [0, 1, 0, 0, 0, 0]
    assert reasons[1].startswith("aborted: after 3 steps the trial is 5.0 times as slow")


def test_a_restart_that_cannot_pay_is_refused() -> None:
    """In the last epochs of a job nothing is tried any more, with the reason in the log."""
    job = Job(Tuner(NAMES, Wants(0, 0, 0, 1), 6), [100.0, 130.0, 1.0]).run(6)
    assert set(job.trained) == {0}
    assert "refused: the switch costs" in job.decisions[3].reason


@pytest.mark.parametrize("seed", range(10))
def test_the_best_setting_is_found_and_kept(seed: int) -> None:
    """Among eight settings the default policy ends on the best, within 1.15 of what it alone would have taken."""
    batch_sizes, threads = [16, 32, 64, 128], [1, 2]
    names = [f"batch_size={b} OMP_NUM_THREADS={t}" for b in batch_sizes for t in threads]
    rates = [60.0, 55.0, 80.0, 74.0, 100.0, 91.0, 104.0, 93.0]
    epochs = 60
    job = Job(Tuner(names, Thompson(np.random.default_rng(seed)), epochs), rates).run(epochs)
    alone = RESTART_SECONDS + epochs * SAMPLES / max(rates)
    assert rates[job.trained[-1]] >= 0.96 * max(rates)
    assert job.now - 100.0 <= 1.15 * alone


@pytest.mark.parametrize("seed", range(10))
def test_a_job_whose_first_setting_is_best_takes_little_longer(seed: int) -> None:
    """Where nothing is to be gained, all that is tried costs at most 5 % of the job, and a restart."""
    names = [f"batch_size={b}" for b in (128, 64, 32, 16)]
    rates = [100.0, 90.0, 75.0, 50.0]
    epochs = 60
    job = Job(Tuner(names, Thompson(np.random.default_rng(seed)), epochs), rates).run(epochs)
    assert job.trained[-1] == 0
    assert job.now - 100.0 <= 1.05 * epochs * SAMPLES / rates[0] + 2 * RESTART_SECONDS

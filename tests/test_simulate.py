"""The simulator: each of its parts behaves as its model says, and the whole finds what is best where that is known."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adarun.control.policy import Off
from adarun.control.reward import Goodput
from adarun.control.split import Floats
from adarun.simulate.cluster import Cluster, Noise, affine
from adarun.simulate.communication import TOPOLOGIES, Link, Network, peer_offset
from adarun.simulate.consensus import efficiency, squared_distance
from adarun.simulate.episode import SETTINGS, Episode, draw_job, play
from adarun.simulate.job import Job, Setting, measured

ROOT = Path(__file__).parents[1]
RING, QUIET = Setting(), Noise()


def cluster(num_workers: int, noise: Noise = QUIET, seed: int = 0) -> Cluster:
    """Workers that take a second for a share of ten."""
    return Cluster(*affine(np.ones(num_workers), 0.0, 10.0), np.random.default_rng(seed), noise)


def network(num_nodes: int, workers_per_node: int = 1, latency: float = 0.0, beta: float = 0.0) -> Network:
    link = Link(latency, beta)
    return Network(num_nodes, workers_per_node, inside=link, between=link)


# --- workers -------------------------------------------------------------------------------------------------------------


def test_without_noise_a_step_takes_what_the_cost_says() -> None:
    """Busy seconds are fixed + per_sample * share, in every step."""
    fixed, per_sample = affine([1.0, 2.0], 0.25, 10.0)
    workers = Cluster(fixed, per_sample, np.random.default_rng(0))
    assert workers.run([20, 5], 3) == pytest.approx(np.array([[0.25 + 0.75 * 2, 0.5 + 1.5 * 0.5]] * 3))


def test_noise_has_the_spread_and_the_memory_that_were_asked_for() -> None:
    """Log seconds have standard deviation `own` and correlation `memory` from step to step, and seconds the cost as mean."""
    seconds = cluster(2000, Noise(own=0.2, memory=0.7)).run([10] * 2000, 50)
    logs = np.log(seconds)
    assert logs.std() == pytest.approx(0.2, rel=0.03)
    assert np.corrcoef(logs[:-1].ravel(), logs[1:].ravel())[0, 1] == pytest.approx(0.7, abs=0.02)
    assert seconds.mean() == pytest.approx(1.0, abs=0.01)


def test_common_noise_is_the_same_for_all_workers() -> None:
    """Without noise of their own, all workers are slower or faster together."""
    seconds = cluster(5, Noise(common=0.3)).run([10] * 5, 20)
    assert np.ptp(seconds, axis=1).max() == pytest.approx(0.0, abs=1e-12)
    assert seconds[:, 0].std() > 0.1


def test_a_slow_state_is_as_frequent_and_lasts_as_long_as_its_chances_say() -> None:
    """With chances b to begin and e to end, a part b / (b + e) of the steps is slow, and slow stays slow with 1 - e."""
    noise = Noise(slow_factor=2.0, slow_begins=0.05, slow_ends=0.2)
    slow = cluster(1000, noise).run([10] * 1000, 100) > 1.5
    assert slow.mean() == pytest.approx(0.2, abs=0.01)
    assert slow[1:][slow[:-1]].mean() == pytest.approx(0.8, abs=0.01)


def test_stalls_are_as_frequent_as_asked_for() -> None:
    """A part `stall` of the steps takes `stall_seconds` longer."""
    seconds = cluster(1000, Noise(stall=0.01, stall_seconds=5.0)).run([10] * 1000, 50)
    assert set(np.round(seconds, 9).ravel()) == {1.0, 6.0}
    assert (seconds > 5.0).mean() == pytest.approx(0.01, rel=0.1)


def test_the_same_seed_gives_the_same_steps() -> None:
    """All randomness comes from the generator that was given."""
    noise = Noise(common=0.1, own=0.1, memory=0.5, slow_factor=2.0, slow_begins=0.1, slow_ends=0.1, stall=0.1)
    assert (cluster(4, noise, 3).run([10] * 4, 9) == cluster(4, noise, 3).run([10] * 4, 9)).all()


# --- exchanges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("ring", 14 * (0.5 + 2.0 * 100.0 / 8)),
        ("tree", 6 * (0.5 + 2.0 * 100.0)),
        ("gossip", 0.5 + 2.0 * 100.0),
        ("hierarchical", 2 * (0.1 + 0.2 * 100.0 / 2) + 6 * (0.5 + 2.0 * 100.0 / 4)),
    ],
)
def test_an_exchange_costs_what_the_alpha_beta_model_says(topology: str, expected: float) -> None:
    """Each topology takes its known number of latencies and bytes, here for 4 nodes of 2 workers."""
    nodes = Network(4, 2, inside=Link(0.1, 0.2), between=Link(0.5, 2.0))
    assert pytest.approx(expected) == nodes.seconds(topology, 100.0)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_single_worker_exchanges_nothing(topology: str) -> None:
    """One worker alone pays for no exchange."""
    assert network(1, latency=1.0).seconds(topology, 100.0) == 0.0


def test_an_unknown_topology_is_refused() -> None:
    """The error names what there is."""
    with pytest.raises(ValueError, match="no topology 'star'; there are ring, tree"):
        network(2).seconds("star", 1.0)


@pytest.mark.parametrize("num_workers", [2, 4, 8, 16])
@pytest.mark.parametrize("topology", ["ring", "gossip"])
@pytest.mark.parametrize("sync_period", [1, 2, 4])
def test_the_consensus_distance_is_that_of_random_walks(topology: str, sync_period: int, num_workers: int) -> None:
    """Replicas that take random steps and are averaged are as far apart as the formula says, to within 5 %."""
    rng, replicas, squares = np.random.default_rng(0), np.zeros((num_workers, 2000)), []
    for step in range(1, 81):
        if step > 40:
            squares.append(np.square(replicas - replicas.mean(axis=0)).mean())
        replicas += rng.standard_normal(replicas.shape)
        if step % sync_period == 0 and topology == "ring":
            replicas[:] = replicas.mean(axis=0)
        elif step % sync_period == 0:
            replicas = (replicas + np.roll(replicas, peer_offset(step // sync_period, num_workers), axis=0)) / 2.0
    expected = squared_distance(topology, sync_period, num_workers, drift=1.0)
    assert np.mean(squares) == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_a_sample_is_worth_less_the_further_the_replicas_are_apart() -> None:
    """Exact averaging in every step costs nothing; at the critical distance a sample is worth half."""
    assert efficiency(squared_distance("ring", 1, 8, drift=1.0)) == 1.0
    assert efficiency(1.0) == 0.5
    assert efficiency(squared_distance("ring", 4, 8, 0.1)) > efficiency(squared_distance("ring", 8, 8, 0.1))


# --- jobs ----------------------------------------------------------------------------------------------------------------


def test_a_window_says_who_was_busy_and_who_waited() -> None:
    """A step ends with the slowest worker and the exchange; utilisation, overhead and reward follow from it."""
    fixed, per_sample = affine([1.0, 2.0], 0.0, 10.0)
    workers = Cluster(fixed, per_sample, np.random.default_rng(0))
    seen = Job(workers, network(2, latency=0.25), 0.0).run([10, 10], RING, 4)
    # Two workers: a ring of 2 messages.
    assert seen.window.step_seconds == pytest.approx(2.5)
    assert pytest.approx([1.5, 0.5]) == seen.window.wait_seconds
    assert pytest.approx([1.0, 2.0]) == seen.window.busy_seconds
    assert seen.utilisation == pytest.approx((1.0 / 2.5 + 2.0 / 2.5) / 2)
    assert seen.overhead == pytest.approx(0.5 / 2.5)
    assert seen.reward == pytest.approx(20 / 2.5)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_without_noise_a_job_does_what_was_predicted(setting: Setting) -> None:
    """The structural model's reward is the one that a long window without noise shows, for every setting."""
    workers = Cluster(*affine(np.linspace(1.0, 2.0, 8), 0.3, 10.0), np.random.default_rng(0))
    job = Job(workers, network(4, 2, latency=0.01, beta=0.001), 100.0, drift=0.05)
    shares = [10] * 8
    job.run(shares, setting, 64)
    assert job.run(shares, setting, 64).reward == pytest.approx(
        Goodput().reward(job.predict(shares, setting)), rel=0.02
    )


def test_gossip_waits_for_fewer_workers() -> None:
    """Where steps vary, a step with gossip is shorter than one with an all-reduce that costs as much."""
    noise = Noise(own=0.3)
    together, gossip = (
        Job(cluster(64, noise), network(64), 0.0).run([10] * 64, setting, 50).window.step_seconds
        for setting in (RING, Setting("gossip"))
    )
    assert gossip < 0.9 * together


def test_a_long_period_waits_more_rarely() -> None:
    """Where steps vary, their noise averages out between exchanges, so a step is shorter."""
    noise = Noise(own=0.3)
    every, eighth = (
        Job(cluster(64, noise), network(64), 0.0).run([10] * 64, Setting(sync_period=period), 48).window.step_seconds
        for period in (1, 8)
    )
    assert eighth < 0.8 * every


def test_10000_workers_are_measured_at_once() -> None:
    """A window of ten thousand workers has an entry for each, and its noise is that of a mean of steps."""
    noise = Noise(common=0.05, own=0.05, memory=0.5, slow_factor=2.0, slow_begins=1e-4, slow_ends=0.1)
    job = Job(cluster(10_000, noise), network(1250, 8, latency=1e-6), 1e6)
    window = job.run(np.full(10_000, 10), RING, 20).window
    assert len(window.busy_seconds) == len(window.wait_seconds) == len(window.noise) == 10_000
    assert 0.0 < float(np.median(window.noise)) < 0.05


def test_cluster_and_network_must_be_of_as_many_workers() -> None:
    """A job cannot be made of parts that do not fit."""
    with pytest.raises(ValueError, match="3 workers cannot be in a network of 4"):
        Job(cluster(3), network(2, 2), 0.0)


def test_the_noise_of_a_window_is_the_standard_error_of_its_mean() -> None:
    """`Window.noise` is relative, one value a worker."""
    busy: Floats = np.array([[1.0, 2.0], [3.0, 2.0]])
    window = measured(busy, np.array([3.0, 3.0]), [1, 1])
    assert pytest.approx([math.sqrt(2.0) / math.sqrt(2) / 2.0, 0.0]) == window.noise
    assert pytest.approx([1.0, 1.0]) == window.wait_seconds


# --- episodes and the example --------------------------------------------------------------------------------------------


def test_episodes_are_repeatable_and_differ() -> None:
    """The seed says which job it is and all that happens in it."""
    first, again, other = (Episode(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert [first.run(0) for _ in range(3)] == [again.run(0) for _ in range(3)]
    assert first.reward != other.reward


def test_an_episode_lasts_as_many_windows_as_it_was_given() -> None:
    """Playing runs the first window and then one for each choice, and ends."""
    episode = Episode(np.random.default_rng(0), num_windows=5)
    assert episode.remaining == 4
    play(episode, Off())
    assert episode.remaining == 0


def test_jobs_are_of_many_kinds() -> None:
    """Among random jobs are those in which the exchange hardly counts and those which mostly exchange."""
    shares = []
    for seed in range(40):
        job = draw_job(np.random.default_rng(seed))
        outcome = job.predict([32] * job.cluster.num_workers, RING)
        shares.append(outcome.exposed_seconds / outcome.step_seconds)
    assert min(shares) < 0.1
    assert max(shares) > 0.7


def test_the_textbook_case_gains_from_both_adaptations() -> None:
    """Four nodes of eight resources: utilisation and reward rise with each adaptation, and the overhead falls in the end."""
    script = ROOT / "examples" / "four_nodes.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=120)
    rows = [line.split("│")[1:-1] for line in run.stdout.splitlines() if "adapted" in line or "before" in line]
    utilisation, overhead, reward = ([float(row[column]) for row in rows] for column in (3, 4, 5))
    assert len(rows) == 3
    assert utilisation[0] < utilisation[1] < utilisation[2]
    assert overhead[2] < overhead[0]
    assert reward[0] < reward[1] < reward[2]

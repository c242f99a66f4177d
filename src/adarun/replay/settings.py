"""What a run with settings to choose among (`--tune`, or how the workers synchronise) would have done under another policy.

Off-policy estimates weigh what was measured by how likely the other policy was to choose the same. SNIPS: Swaminathan and
Joachims, "The Self-Normalized Estimator for Counterfactual Learning", NIPS 2015. Doubly robust: Dudik et al., ICML 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from adarun.control.policy import Choice, Fixed, Option, Policy, Situation
from adarun.control.split import Floats
from adarun.control.tuner import Tuner
from adarun.events import Logged, Loop, Paced, Step, Tuned, Window, WorkersStarted
from adarun.replay.check import policy as policy_of
from adarun.replay.what_if import Estimate, Prediction, Run
from adarun.runlog import Skipped, read_batches

# Fewer decisions' worth of evidence say nothing.
MIN_EFFECTIVE = 10.0
# A setting is simulated in so many runs, each lap in so many steps.
NUM_RUNS, LAP_STEPS = 20, 10


@dataclass
class Chosen:
    """One logged decision, and what came of it."""

    chosen: int
    chances: Sequence[float]  # of the policy that chose
    target: Sequence[float]  # of the policy that is asked about
    reward: float = math.nan


@dataclass
class Following:
    """A policy that chooses as the log did, and asks another one what it would have done, with the same knowledge."""

    target: Policy
    names: Sequence[str]
    decisions: list[Chosen] = field(default_factory=list)
    rewards: dict[int, list[float]] = field(default_factory=dict)
    next: Tuned | None = None

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """What was chosen, and what the target would have."""
        target = self.target.choose(situation, options).propensities
        tuned = self.next
        if tuned is None:
            return Choice(situation.incumbent, (), "")
        # What the policy wanted; the guard may have refused it.
        wanted = tuned.reason.partition("(wanted: ")[2].rstrip(")") or tuned.chosen
        index = self.names.index(wanted)
        if wanted == tuned.chosen and tuned.propensities and tuned.propensities[index] > 0.0:
            self.decisions.append(Chosen(index, tuned.propensities, target))
        return Choice(index, tuple(tuned.propensities), tuned.reason)

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Take in a reward."""
        self.target.learn(situation, choice, reward)
        self.rewards.setdefault(choice, []).append(reward)
        if self.decisions and self.decisions[-1].chosen == choice and math.isnan(self.decisions[-1].reward):
            self.decisions[-1].reward = reward


def estimates(directory: Path, about: dict[str, Any], names: Sequence[str]) -> list[Estimate]:
    """What the log says of policies, or of single settings, by name.

    Raises:
        UsageError: there is no such policy.
    """
    events = [event for batch in read_batches(directory, Skipped()) for event in batch if not isinstance(event, Step)]
    tunes = any(isinstance(event, Tuned) for event in events)
    paced = [event for event in events if isinstance(event, Paced) and event.propensities]
    made = []
    for name in names:
        if tunes and about.get("settings"):
            made.append(estimate(name, follow(directory, about, target(about, name)).decisions))
        elif paced:
            made.append(estimate(name, paced_decisions(events, about, name)))
    return made


def target(about: dict[str, Any], name: str) -> Policy:
    """A policy by its name, or the one that always takes the setting of that name."""
    if name in (about.get("settings") or []):
        return Fixed(name)
    return policy_of({**about, "settings": about.get("settings") or [""]}, name)


def follow(directory: Path, about: dict[str, Any], policy: Policy) -> Following:
    """Go through the log with the same tuner as the run had, and with `policy` looking on."""
    names: list[str] = about["settings"]
    following = Following(policy, names)
    tuner = Tuner(names, following, about.get("epochs") or 0)
    held: list[Logged] = []
    for batch in read_batches(directory, Skipped()):
        for event in batch:
            if isinstance(event, Step | Loop | WorkersStarted):
                for earlier in held:
                    tuner.see(earlier)
                held = [event]
            elif isinstance(event, Tuned):
                # It was decided on the event before it.
                following.next = event
                for earlier in held:
                    tuner.see(earlier)
                held, following.next = [], None
    for earlier in held:
        tuner.see(earlier)
    return following


def paced_decisions(events: Iterable[Logged], about: dict[str, Any], name: str) -> list[Chosen]:
    """The decisions on how the workers synchronise, each with the samples per second of the windows that followed."""
    decisions: list[Chosen] = []
    rates: list[float] = []
    policy: Policy | None = None
    situation: Situation | None = None
    for event in events:
        if isinstance(event, Window):
            rates.append(sum(event.samples) / event.step_seconds)
        elif isinstance(event, Paced) and event.propensities:
            if decisions and rates and policy and situation:
                decisions[-1].reward = fmean(rates)
                policy.learn(situation, decisions[-1].chosen, decisions[-1].reward)
            policy = policy or (Fixed(name) if name in event.options else target(about, name))
            options = [Option(option) for option in event.options]
            now = event.options.index(event.before) if event.before in event.options else 0
            situation = Situation(1.0 - event.communication, event.communication, now, 0)
            chances = policy.choose(situation, options).propensities
            rates = []
            if event.chosen in event.options:
                decisions.append(Chosen(event.options.index(event.chosen), event.propensities, chances))
    if decisions and rates:
        decisions[-1].reward = fmean(rates)
    return decisions


def estimate(name: str, decisions: Sequence[Chosen]) -> Estimate:
    """SNIPS and the doubly robust estimate of the reward under the target's choices; refused where hardly any counts."""
    known = [one for one in decisions if not math.isnan(one.reward)]
    weights = np.array([one.target[one.chosen] / one.chances[one.chosen] for one in known])
    rewards = np.array([one.reward for one in known])
    effective = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
    if effective < MIN_EFFECTIVE:
        refused = f"refused: {effective:.1f} decisions' worth of evidence, and {MIN_EFFECTIVE:g} is the least"
        return Estimate(name, len(known), effective, refused=refused)
    snips = float((weights * rewards).sum() / weights.sum())
    snips_error = float(np.sqrt((weights**2 * (rewards - snips) ** 2).sum()) / weights.sum())
    model = reward_model(known)
    direct = np.array([float(np.dot(one.target, row)) for one, row in zip(known, model, strict=True)])
    residual = rewards - model[np.arange(len(known)), [one.chosen for one in known]]
    robust = direct + weights * residual
    return Estimate(
        name,
        len(known),
        effective,
        snips,
        snips_error,
        float(robust.mean()),
        float(robust.std(ddof=1) / math.sqrt(len(robust))),
    )


def reward_model(known: Sequence[Chosen]) -> Floats:
    """For each decision what every option gave in the other decisions, on average; the mean of all where it was never chosen."""
    num_options = len(known[0].chances)
    sums, counts = np.zeros(num_options), np.zeros(num_options)
    for one in known:
        sums[one.chosen] += one.reward
        counts[one.chosen] += 1
    model = np.empty((len(known), num_options))
    for row, one in zip(model, known, strict=True):
        others, times = sums.copy(), counts.copy()
        others[one.chosen] -= one.reward
        times[one.chosen] -= 1
        row[:] = np.where(times > 0, others / np.maximum(times, 1), others.sum() / max(1.0, times.sum()))
    return model


# --- the same job, lap by lap ----------------------------------------------------------------------------------------


def predict(directory: Path, run: Run, name: str) -> Prediction:
    """What the run would have taken under another policy, or under one setting throughout.

    Raises:
        UsageError: there is no such policy.
    """
    about = run.about
    names: list[str] = about.get("settings") or []
    target(about, name)
    if not names:
        return unchanged(run, name, "the run had no settings to choose among")
    followed = follow(directory, about, Fixed(names[0]))
    measured = {names[index]: rewards for index, rewards in followed.rewards.items()}
    if name in names and name not in measured:
        return unchanged(run, name, "never tried in this run, so nothing is known of it")
    num_laps = sum(map(len, measured.values()))
    if not num_laps:
        return unchanged(run, name, "no whole lap was measured")
    left = [setting for setting in names if setting in measured]
    lap = Lap(run, sum(sum(1.0 / rate for rate in rates) for rates in measured.values()), num_laps)
    plays = [
        play(lap, left, measured, lambda: target({**about, "settings": left}, name), seed) for seed in range(NUM_RUNS)
    ]
    recorded = lap.recorded_seconds
    times = [seconds for seconds, _ in plays]
    mean = fmean(times)
    note = f"{len(names) - len(left)} settings were never tried and are left out" if len(left) < len(names) else ""
    return Prediction(
        name=name,
        seconds=run.story.seconds - recorded + mean,
        step_seconds=run.step_seconds / sum(len(g.busy) for g in run.groups) * mean / recorded,
        speed=recorded / mean,
        error=max(stdev(times) / mean, 1.0 / math.sqrt(num_laps) * spread(measured)),
        shares=[],
        num_changes=round(fmean(restarts for _, restarts in plays)),
        note=note,
    )


def unchanged(run: Run, name: str, note: str) -> Prediction:
    """The run as it was."""
    step = run.step_seconds / sum(len(group.busy) for group in run.groups)
    return Prediction(name, run.story.seconds, step, 1.0, 0.0, [], 0, note)


def spread(measured: dict[str, list[float]]) -> float:
    """How much laps under the same setting differ, relative."""
    logs = [np.log(rates) - np.log(rates).mean() for rates in measured.values() if len(rates) > 1]
    return float(np.concatenate(logs).std()) if logs else 0.0


@dataclass
class Lap:
    """What each lap of a run does, and what a restart has cost."""

    run: Run
    per_sample: float  # the sum over all laps of the seconds per sample
    num_laps: int

    @property
    def samples(self) -> float:
        """Samples a lap."""
        return sum(int(group.samples.sum()) for group in self.run.groups) / self.num_laps

    @property
    def restart_seconds(self) -> float:
        """What a restart takes, as far as the run shows it."""
        attempts = self.run.story.attempts
        restarts = sum(attempt.state == "RETUNED" for attempt in attempts)
        starts = [window.began for window in self.run.story.windows if window.start == 0]
        first = starts[0] if starts else 0.0
        return self.run.story.parts.adarun / restarts if restarts else first

    @property
    def recorded_seconds(self) -> float:
        """What all laps took together, with the restarts."""
        restarts = sum(attempt.state == "RETUNED" for attempt in self.run.story.attempts)
        return self.samples * self.per_sample + restarts * self.restart_seconds


def play(
    lap: Lap, names: Sequence[str], measured: dict[str, list[float]], policy: Callable[[], Policy], seed: int
) -> tuple[float, int]:
    """The job from start to end under a policy, by the live tuner; its seconds and its restarts."""
    rng = np.random.default_rng(seed)
    tuner = Tuner(names, policy(), lap.num_laps)
    now, step, done, attempt = 0.0, 0, 0, 0
    start_workers(tuner, attempt, now)
    while done < lap.num_laps:
        seconds = lap.samples / rng.choice(measured[names[tuner.current]])
        restart = False
        for _ in range(LAP_STEPS):
            now += seconds / LAP_STEPS
            tuned = tuner.see(step_event(step, round(lap.samples / LAP_STEPS), seconds / LAP_STEPS, now))
            step += 1
            if tuned is not None and tuned.restart:
                restart = True
                break
        else:
            done += 1
            tuned = tuner.see(Loop(step=step, at=now, epoch=done, saved=True, rank=0))
            restart = tuned is not None and tuned.restart
        if restart:
            now += lap.restart_seconds
            attempt, step = attempt + 1, 0
            start_workers(tuner, attempt, now, done)
    return now, attempt


def start_workers(tuner: Tuner, attempt: int, now: float, epoch: int = 0) -> None:
    """A worker group begins its first loop; one worker stands for all."""
    tuner.see(WorkersStarted(attempt=attempt, ranks=[0], world_size=1, num_nodes=1, group_rank=0, at=now))
    tuner.see(Loop(step=0, at=now, epoch=epoch, rank=0))


def step_event(step: int, samples: int, seconds: float, now: float) -> Step:
    """A step without waiting."""
    return Step(
        rank=0,
        step=step,
        samples=samples,
        data=0.0,
        forward=0.0,
        backward=seconds,
        wait=0.0,
        update=0.0,
        ended=now,
    )

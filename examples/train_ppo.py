"""Train a policy by PPO (stable-baselines3) in the simulator, save it, and compare it with others on jobs it has not seen.

    pip install 'adarun[rl]'
    python examples/train_ppo.py --out ppo.npz

Takes about a minute on one core. The file holds the network's weights as plain arrays: see docs/simulator.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

from adarun.control.bandit import Thompson
from adarun.control.policy import Choice, Off, Option, Policy, Situation, certain
from adarun.gym import TuningEnv
from adarun.ppo import FEATURES, Layers, Ppo, save
from adarun.simulate.episode import Episode, play

HIDDEN = 32
LEARNING_RATE = 1e-3
NUM_ENVIRONMENTS, ROLLOUT_STEPS, BATCH = 16, 128, 256
# Of seeds that training does not use.
FIRST_TEST_SEED = 1_000_000


class Scorer(nn.Module):
    """Scores each option by the same network; rows of the observation that hold no option are never chosen."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(last.weight)
        self.network = nn.Sequential(
            nn.Linear(len(FEATURES), HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), last
        )

    def forward(self, observations: Tensor) -> Tensor:
        """From flat observations, shape (batch, options * features), to logits, shape (batch, options)."""
        rows = observations.reshape(len(observations), -1, len(FEATURES))
        scores: Tensor = self.network(rows).squeeze(-1)
        return scores.masked_fill(rows[..., 0] == 0.0, -1e9)

    def layers(self) -> Layers:
        """The weights and biases, as numpy arrays."""
        linear = [layer for layer in self.network if isinstance(layer, nn.Linear)]
        return [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in linear]


class Random:
    """Any option, all equally likely."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:  # noqa: ARG002
        """The option for the next window."""
        return certain(int(self._rng.integers(len(options))), options, "random")

    def learn(self, situation: Situation, choice: int, reward: float) -> None:
        """Nothing to learn."""


def train(num_steps: int, seed: int) -> Layers:
    """Train for so many windows of simulated jobs; returns the network."""
    environments = make_vec_env(TuningEnv, NUM_ENVIRONMENTS, seed=seed)
    model = PPO(
        "MlpPolicy",
        environments,
        learning_rate=LEARNING_RATE,
        n_steps=ROLLOUT_STEPS,
        batch_size=BATCH,
        n_epochs=5,
        gamma=0.9,
        ent_coef=0.003,
        # The scorer takes the place of the policy's own network.
        policy_kwargs={"net_arch": {"pi": [], "vf": [64]}},
        seed=seed,
        device="cpu",
    )
    scorer = Scorer()
    model.policy.action_net = scorer
    model.policy.optimizer = torch.optim.Adam(model.policy.parameters(), lr=LEARNING_RATE, eps=1e-5)
    model.learn(num_steps)
    return scorer.layers()


def judge(make: Callable[[np.random.Generator], Policy], num_episodes: int) -> float:
    """The mean reward over the best option's of a policy, in the same jobs for each policy."""
    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + num_episodes)
    rates = [play(Episode(np.random.default_rng(seed)), make(np.random.default_rng((seed, 1)))) for seed in seeds]
    return float(np.mean(rates))


def main() -> None:
    """Train, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ppo.npz"), help="file to save the policy to")
    parser.add_argument("--steps", type=int, default=60_000, help="windows to train for")
    parser.add_argument("--episodes", type=int, default=200, help="jobs to compare on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    layers = train(arguments.steps, arguments.seed)
    save(arguments.out, layers)
    print(f"saved to {arguments.out}; mean reward over the best option's, in {arguments.episodes} other jobs:")
    contenders: dict[str, Callable[[np.random.Generator], Policy]] = {
        "random": Random,
        "first option": lambda _: Off(),
        "thompson": Thompson,
        "ppo": lambda rng: Ppo(layers, rng),
    }
    for name, make in contenders.items():
        print(f"  {name:<12} {judge(make, arguments.episodes):.3f}")


if __name__ == "__main__":
    main()

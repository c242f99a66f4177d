"""A policy that was trained by PPO in the simulator: a small network that scores each option, evaluated in numpy.

PPO is Schulman et al., "Proximal Policy Optimization Algorithms", 2017. `examples/train_ppo.py` trains and saves. Every option is
scored by the same network from what is known of it, so a policy serves any number of options in any order. The file holds
arrays and is read without pickle, so nothing in it can be executed; neither torch nor stable-baselines3 is needed to use it.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adarun.control.policy import Choice, Option, Situation, certain
from adarun.control.split import Floats
from adarun.errors import AdarunError

# What the network sees of an option. Rewards and predictions are logarithms, relative to the option whose last reward is the
# best, and bounded by LIMIT; ages and remaining windows are x / (x + SOME_WINDOWS).
FEATURES = (
    "exists",
    "incumbent",
    "tried",
    "last_reward",
    "age",
    "foreseen",
    "prediction",
    "utilisation",
    "overhead",
    "remaining",
)
LIMIT = 2.0
SOME_WINDOWS = 10.0

Layers = Sequence[tuple[Floats, Floats]]


class Memory:
    """Each option's last reward, and how many windows ago it was."""

    def __init__(self) -> None:
        self._rewards: dict[int, float] = {}
        self._learned: dict[int, int] = {}
        self._num_windows = 0

    def __contains__(self, index: int) -> bool:
        return index in self._rewards

    def learn(self, choice: int, reward: float) -> None:
        """Take in a window."""
        # An option that failed gave 0, whose logarithm no bound would hold.
        self._rewards[choice] = max(reward, 1e-12)
        self._learned[choice] = self._num_windows
        self._num_windows += 1

    def features(self, situation: Situation, options: Sequence[Option]) -> Floats:
        """What the network sees, shape (options, features); at least one option must have been tried."""
        best = max(self._rewards, key=self._rewards.__getitem__)
        return np.array([self._row(situation, options, index, best) for index in range(len(options))])

    def _row(self, situation: Situation, options: Sequence[Option], index: int, best: int) -> list[float]:
        tried = index in self._rewards
        prediction = _log_ratio(options[index].predicted, options[best].predicted)
        return [
            1.0,
            float(index == situation.incumbent),
            float(tried),
            _log_ratio(self._rewards[index], self._rewards[best]) if tried else 0.0,
            _squashed(self._num_windows - 1 - self._learned[index]) if tried else 0.0,
            float(not math.isnan(prediction)),
            0.0 if math.isnan(prediction) else prediction,
            situation.utilisation,
            situation.overhead,
            _squashed(situation.remaining),
        ]


def _log_ratio(value: float, base: float) -> float:
    return float(np.clip(math.log(value / base), -LIMIT, LIMIT)) if value > 0.0 and base > 0.0 else math.nan


def _squashed(windows: int) -> float:
    return windows / (windows + SOME_WINDOWS)


class Ppo:
    """Draws an option by the network's softmax, once the incumbent was measured."""

    def __init__(self, layers: Layers, rng: np.random.Generator) -> None:
        """`layers`: weights of shape (out, in) and biases of shape (out,), from the features to one score."""
        self._layers = layers
        self._rng = rng
        self._memory = Memory()

    def choose(self, situation: Situation, options: Sequence[Option]) -> Choice:
        """The option for the next window."""
        if situation.incumbent not in self._memory:
            return certain(situation.incumbent, options, f"ppo: {options[situation.incumbent].name} is measured first")
        chances = softmax(scores(self._layers, self._memory.features(situation, options)))
        index = int(self._rng.choice(len(options), p=chances))
        reason = f"ppo: {options[index].name}, drawn with a probability of {chances[index]:.0%}"
        return Choice(index, tuple(chances.tolist()), reason)

    def learn(self, situation: Situation, choice: int, reward: float) -> None:  # noqa: ARG002
        """Remember a reward; the network itself stays as it was trained."""
        self._memory.learn(choice, reward)


def scores(layers: Layers, features: Floats) -> Floats:
    """The network: affine layers with tanh between them; from shape (options, features) to shape (options,)."""
    for weight, bias in layers[:-1]:
        features = np.tanh(features @ weight.T + bias)
    weight, bias = layers[-1]
    last: Floats = features @ weight.T + bias
    return last[:, 0]


def softmax(logits: Floats) -> Floats:
    """Probabilities in proportion to exp(logits), shape (options,)."""
    weights = np.exp(logits - logits.max())
    chances: Floats = weights / weights.sum()
    return chances


def save(path: Path, layers: Layers) -> None:
    """Write a network, and the names of the features that it was trained on, to an .npz file."""
    arrays: dict[str, Any] = {
        f"{kind}_{number}": array
        for number, layer in enumerate(layers)
        for kind, array in zip("wb", layer, strict=True)
    }
    with path.open("wb") as file:
        np.savez(file, features=np.array(FEATURES), **arrays)


def load(path: Path, rng: np.random.Generator) -> Ppo:
    """The policy in a file that `save` wrote.

    Raises:
        AdarunError: there is no such file, it holds something else, or another version's features.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        names = tuple(arrays.pop("features").tolist())
        layers = [(arrays[f"w_{number}"], arrays[f"b_{number}"]) for number in range(len(arrays) // 2)]
    except OSError as error:
        raise AdarunError(f"the policy {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise AdarunError(f"{path} is not a policy that examples/train_ppo.py has saved") from error
    if names != FEATURES or not _fits(layers):
        raise AdarunError(
            f"the policy {path} was trained for another version; train it again with examples/train_ppo.py"
        )
    return Ppo(layers, rng)


def _fits(layers: Layers) -> bool:
    """Whether the layers lead from the features to one finite score."""
    width = len(FEATURES)
    for weight, bias in layers:
        if weight.shape != (len(bias), width) or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            return False
        width = len(bias)
    return bool(layers) and width == 1

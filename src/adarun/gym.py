"""The simulator as a Gymnasium environment: which setting should the next window run under?

Needs the extra `adarun[rl]`. An observation has a row of `adarun.ppo.FEATURES` for each option and rows of zeros up to
MAX_OPTIONS; an action is an option's number, and one that does not exist keeps what ran before. The reward is the
logarithm of the useful samples per second over those of the best option: 0 is perfect.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from adarun.errors import AdarunError
from adarun.ppo import FEATURES, LIMIT, Memory
from adarun.simulate.episode import MAX_OPTIONS, NUM_WINDOWS, Episode

try:
    import gymnasium
except ImportError as error:
    raise AdarunError("the simulator's environment needs Gymnasium: pip install 'adarun[rl]'") from error

Observation = npt.NDArray[np.float32]
# Worse than by a factor of 20 is all the same.
WORST = -3.0


class TuningEnv(gymnasium.Env[Observation, np.int64]):
    """Another random job in each episode, and a window of it in each step."""

    def __init__(self, num_windows: int = NUM_WINDOWS) -> None:
        self.observation_space = gymnasium.spaces.Box(-LIMIT, LIMIT, (MAX_OPTIONS, len(FEATURES)), np.float32)
        self.action_space = gymnasium.spaces.Discrete(MAX_OPTIONS)
        self._num_windows = num_windows

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a job and run its first window under the first option; `options` are not used."""
        super().reset(seed=seed, options=options)
        self._episode = Episode(self.np_random, self._num_windows)
        self._memory = Memory()
        self._running = 0
        self._memory.learn(0, self._episode.reward)
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Run the next window under an option."""
        episode = self._episode
        if action < len(episode.options):
            self._running = int(action)
        rate = episode.run(self._running)
        self._memory.learn(self._running, rate)
        reward = float(np.clip(math.log(rate / episode.best), WORST, -WORST))
        return self._observe(), reward, False, episode.remaining == 0, {}

    def _observe(self) -> Observation:
        episode = self._episode
        observation = np.zeros((MAX_OPTIONS, len(FEATURES)), dtype=np.float32)
        observation[: len(episode.options)] = self._memory.features(episode.situation, episode.options)
        return observation

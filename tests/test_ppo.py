"""The trained policy: its file, its network, the environment that it is trained in, and that training is worth it."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from adarun.control.policy import Option, Situation
from adarun.errors import AdarunError
from adarun.ppo import FEATURES, Layers, Memory, Ppo, load, save, scores, softmax
from adarun.simulate.episode import Episode

ROOT = Path(__file__).parents[1]
SITUATION = Situation(utilisation=0.8, overhead=0.1, incumbent=0, remaining=5)
OPTIONS = [Option("a", 100.0), Option("b", 150.0), Option("c")]


def linear(**weights: float) -> Layers:
    """A network of one layer that scores by these features."""
    return [(np.array([[weights.get(name, 0.0) for name in FEATURES]]), np.zeros(1))]


def random_layers(seed: int = 0) -> Layers:
    """A network like the one that training makes."""
    rng, widths = np.random.default_rng(seed), [len(FEATURES), 8, 1]
    return [(rng.standard_normal((out, into)), rng.standard_normal(out)) for into, out in pairwise(widths)]


def policy(layers: Layers, *rewards: tuple[int, float]) -> Ppo:
    """A policy that has learned these rewards."""
    made = Ppo(layers, np.random.default_rng(0))
    for choice, reward in rewards:
        made.learn(SITUATION, choice, reward)
    return made


# --- choosing ------------------------------------------------------------------------------------------------------------


def test_the_incumbent_is_measured_first() -> None:
    """Before the incumbent's reward is known nothing else is chosen."""
    choice = policy(random_layers()).choose(SITUATION, OPTIONS)
    assert choice.index == 0
    assert choice.propensities == (1.0, 0.0, 0.0)


def test_a_choice_says_how_likely_each_option_was() -> None:
    """The propensities are those of the draw: they sum to one, and options are drawn as often as they say."""
    made = policy(random_layers(), (0, 100.0), (2, 90.0))
    choices = [made.choose(SITUATION, OPTIONS) for _ in range(2000)]
    propensities = np.array(choices[0].propensities)
    assert propensities.sum() == pytest.approx(1.0)
    drawn = np.bincount([choice.index for choice in choices], minlength=3) / 2000
    assert np.abs(drawn - propensities).max() < 0.04
    assert choices[0].reason.startswith("ppo: ")


def test_a_network_can_hold_on_to_the_best_reward_or_try_what_is_foreseen() -> None:
    """What a network needs for both is among its features."""
    seen = [(0, 100.0), (1, 130.0), (2, 90.0)]
    assert policy(linear(last_reward=1e3), *seen).choose(SITUATION, OPTIONS).index == 1
    assert policy(linear(prediction=1e3), (0, 100.0)).choose(SITUATION, OPTIONS).index == 1
    assert policy(linear(tried=-1e3, foreseen=-1e2), (0, 100.0)).choose(SITUATION, OPTIONS).index == 2


def test_the_order_and_the_number_of_options_do_not_matter() -> None:
    """Each option is as likely in whatever place it stands, and 40 options are served like 3."""
    layers, made = random_layers(), policy(random_layers(), (0, 100.0))
    turned = [OPTIONS[0], OPTIONS[2], OPTIONS[1]]
    one, other = (made.choose(SITUATION, options).propensities for options in (OPTIONS, turned))
    assert pytest.approx([one[0], one[2], one[1]]) == list(other)
    many = [Option(str(number)) for number in range(40)]
    assert len(policy(layers, (0, 1.0)).choose(SITUATION, many).propensities) == 40


def test_an_option_that_failed_is_remembered_as_bad_as_can_be() -> None:
    """A reward of 0 gives finite features."""
    memory = Memory()
    memory.learn(0, 100.0)
    memory.learn(1, 0.0)
    features = memory.features(SITUATION, OPTIONS)
    assert np.isfinite(features).all()
    assert features[1, FEATURES.index("last_reward")] == features.min() == -2.0


def test_softmax_bears_large_scores() -> None:
    """Scores of any size give probabilities."""
    assert pytest.approx([0.0, 1.0]) == softmax(np.array([-1e9, 1e9])).tolist()


# --- the file ------------------------------------------------------------------------------------------------------------


def test_a_saved_policy_chooses_as_before(tmp_path: Path) -> None:
    """Saving and loading keeps every probability."""
    layers, path = random_layers(), tmp_path / "policy"
    save(path, layers)
    loaded = load(path, np.random.default_rng(0))
    loaded.learn(SITUATION, 0, 100.0)
    expected = policy(layers, (0, 100.0)).choose(SITUATION, OPTIONS)
    assert expected == loaded.choose(SITUATION, OPTIONS)


class Bomb:
    """What a pickle does when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    """A file that would run code when unpickled is refused in one sentence, on its own and inside an .npz."""
    alone, inside = tmp_path / "alone", tmp_path / "inside.npz"
    alone.write_bytes(pickle.dumps(Bomb()))
    np.savez(inside, features=np.array([Bomb()], dtype=object))
    for path in (alone, inside):
        with pytest.raises(AdarunError, match="is not a policy that"):
            load(path, np.random.default_rng(0))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04rubbish", b"\x93NUMPY", b"text"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    """Whatever a file holds, the user gets one sentence."""
    path = tmp_path / "policy"
    path.write_bytes(content)
    with pytest.raises(AdarunError, match="is not a policy that"):
        load(path, np.random.default_rng(0))


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    """An .npy file is no policy."""
    np.save(tmp_path / "policy.npy", np.zeros(3))
    with pytest.raises(AdarunError, match="is not a policy that"):
        load(tmp_path / "policy.npy", np.random.default_rng(0))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A path that leads nowhere is said to."""
    with pytest.raises(AdarunError, match="gone cannot be read: No such file"):
        load(tmp_path / "gone", np.random.default_rng(0))


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [(np.zeros((1, len(FEATURES) + 1)), np.zeros(1))],
        [(np.zeros((2, len(FEATURES))), np.zeros(2))],
        [(np.full((1, len(FEATURES)), np.nan), np.zeros(1))],
    ],
    ids=["empty", "other features", "two scores", "not a number"],
)
def test_a_network_that_does_not_fit_is_refused(tmp_path: Path, layers: Layers) -> None:
    """Layers must lead from the features to one finite score."""
    save(tmp_path / "policy", layers)
    with pytest.raises(AdarunError, match="was trained for another version"):
        load(tmp_path / "policy", np.random.default_rng(0))


# --- the environment and training ----------------------------------------------------------------------------------------


def example() -> ModuleType:
    """The training script as a module."""
    spec = importlib.util.spec_from_file_location("train_ppo", ROOT / "examples" / "train_ppo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_environment_keeps_gymnasiums_contract() -> None:
    """Gymnasium's own checker finds nothing wrong."""
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    from adarun.gym import TuningEnv

    check_env(TuningEnv(), skip_render_check=True)


def test_an_environment_shows_what_the_policy_will_see() -> None:
    """An observation has the policy's features of each option, then zeros; an action that does not exist changes nothing."""
    pytest.importorskip("gymnasium")
    from adarun.gym import TuningEnv

    environment = TuningEnv(num_windows=3)
    observation, _ = environment.reset(seed=5)
    episode = Episode(np.random.default_rng(np.random.PCG64(np.random.SeedSequence(5))), 3)
    memory = Memory()
    memory.learn(0, episode.reward)
    count = len(episode.options)
    expected = memory.features(episode.situation, episode.options)
    assert observation[:count] == pytest.approx(expected, abs=1e-6)
    assert not observation[count:].any()
    assert count < 8
    assert [environment.step(np.int64(7))[3] for _ in range(2)] == [False, True]
    assert environment._running == 0


def test_without_the_extra_the_environment_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it without Gymnasium is one sentence, not a traceback of an import."""
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "adarun.gym", raising=False)
    with pytest.raises(AdarunError, match=r"pip install 'adarun\[rl\]'"):
        importlib.import_module("adarun.gym")


def test_numpy_and_torch_score_alike() -> None:
    """The policy's network is the one that was trained."""
    pytest.importorskip("stable_baselines3")
    import torch

    torch.manual_seed(0)
    scorer = example().Scorer()
    torch.nn.init.normal_(scorer.network[-1].weight)
    features = np.random.default_rng(0).standard_normal((4, len(FEATURES))).astype(np.float32)
    expected = scorer(torch.from_numpy(features).reshape(1, -1)).detach().numpy()[0]
    assert pytest.approx(expected, abs=1e-5) == scores(scorer.layers(), features.astype(np.float64))


def test_a_short_training_beats_chance() -> None:
    """After a few seconds of training a policy gets clearly more of the best option's rate than random choice."""
    pytest.importorskip("stable_baselines3")
    module = example()
    layers = module.train(8192, seed=0)
    trained = module.judge(lambda rng: Ppo(layers, rng), 60)
    assert trained > 1.05 * module.judge(module.Random, 60)

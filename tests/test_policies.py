"""Policies by name: which there are, where their knowledge is kept, and what is said of one that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from adarun import policies
from adarun.control.policy import Option, Situation
from adarun.control.qlearning import QLearning
from adarun.errors import AdarunError, UsageError
from adarun.policies import Tuning, keep, load, table_path

OPTIONS = [Option("batch_size=8"), Option("batch_size=16")]
SITUATION = Situation(0.9, 0.1, 0, 0)


def tuning(name: str) -> Tuning:
    return Tuning([option.name for option in OPTIONS], name, 3, 0)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state folder of the test's own."""
    monkeypatch.setattr(policies.platformdirs, "user_state_dir", lambda _: str(tmp_path / "state"))


@pytest.mark.parametrize("name", ["thompson", "ucb", "qlearning", "fixed", "off"])
def test_adaruns_policies_are_found_by_name(name: str) -> None:
    """Each begins with the incumbent, of which something must be known first."""
    assert load(tuning(name)).choose(SITUATION, OPTIONS).index == 0


def test_what_qlearning_has_learned_is_kept_for_the_next_run() -> None:
    """A run that ends writes its table, and the next one begins with it."""
    first = load(tuning("qlearning"))
    assert isinstance(first, QLearning)
    first.choose(SITUATION, OPTIONS)
    first.learn(SITUATION, 0, 100.0)
    first.choose(SITUATION, OPTIONS)
    keep(first)
    second = load(tuning("qlearning"))
    assert isinstance(second, QLearning)
    assert second.to_table() == first.to_table() != []


def test_a_table_that_cannot_be_read_is_as_good_as_none() -> None:
    """A torn table costs its head start, not the run."""
    table_path().parent.mkdir(parents=True)
    table_path().write_bytes(b'[[0,0,"a"')
    policy = load(tuning("qlearning"))
    assert isinstance(policy, QLearning)
    assert policy.to_table() == []


def test_a_missing_policy_is_named_with_those_there_are() -> None:
    """A name that nobody knows, and a file that is not there, end in one sentence."""
    with pytest.raises(UsageError, match="there is no policy nope; there are thompson, ucb"):
        load(tuning("nope"))
    with pytest.raises(AdarunError, match=r"gone\.npz cannot be read"):
        load(tuning("ppo:gone.npz"))

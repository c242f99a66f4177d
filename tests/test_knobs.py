"""`--tune`: what is a knob, and where its values go."""

from __future__ import annotations

import pytest

from adarun.errors import UsageError
from adarun.launch.knobs import arguments_with, environment_of, in_words, parse

ARGUMENTS = ["--batch-size", "{batch_size}", "--out=x{batch_size}.pt", "{other}"]


def test_every_combination_is_a_setting_and_the_first_values_come_first() -> None:
    """Two knobs give each pair of values once, beginning with the first of each."""
    settings = parse(["batch_size=32,64", "OMP_NUM_THREADS=1,2"], ARGUMENTS)
    assert [in_words(setting) for setting in settings] == [
        "batch_size=32 OMP_NUM_THREADS=1",
        "batch_size=32 OMP_NUM_THREADS=2",
        "batch_size=64 OMP_NUM_THREADS=1",
        "batch_size=64 OMP_NUM_THREADS=2",
    ]
    assert parse([], ARGUMENTS) == []


def test_values_go_into_the_arguments_and_the_environment() -> None:
    """A value stands wherever its name stood in braces; other braces are the script's own; an upper-case name is no argument."""
    (setting, _) = parse(["batch_size=32,64", "OMP_NUM_THREADS=2"], ARGUMENTS)
    assert arguments_with(setting, ARGUMENTS) == ("--batch-size", "32", "--out=x32.pt", "{other}")
    assert environment_of(setting) == {"OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["batch_size"], "not of the form NAME=VALUE"),
        (["batch_size="], "not of the form NAME=VALUE"),
        (["batch_size=1,1"], "with values that differ"),
        (["batch_size=1,,2"], "not of the form NAME=VALUE"),
        (["batch size=1,2"], "not of the form NAME=VALUE"),
        (["batch_size=1,2", "batch_size=3"], "names batch_size twice"),
        (["width=1,2"], "the script's arguments have no {width}"),
        (["Width=1,2"], "the script's arguments have no {Width}"),
        ([f"A={','.join(map(str, range(65)))}"], "gives 65 combinations, more than 64"),
    ],
)
def test_what_is_no_knob_is_refused(texts: list[str], message: str) -> None:
    """A knob that has no values, or no place for them, is refused in one sentence."""
    with pytest.raises(UsageError, match=r".*") as refused:
        parse(texts, ARGUMENTS)
    assert message in str(refused.value)

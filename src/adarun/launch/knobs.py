"""`--tune NAME=v1,v2,...`: what the script takes on its command line or from its environment, and adarun may turn."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from adarun.errors import UsageError

MAX_OPTIONS = 64
Setting = dict[str, str]


def parse(texts: Sequence[str], arguments: Sequence[str]) -> list[Setting]:
    """Every combination of the knobs' values; the first, made of the first values, is what runs until another is better.

    Args:
        texts: `NAME=v1,v2,...`, one a knob; in upper case an environment variable, otherwise `{NAME}` in the arguments.
        arguments: the script's.

    Raises:
        UsageError: a text is no knob, or its name is nowhere in the arguments.
    """
    knobs: dict[str, list[str]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        values = listed.split(",")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name) or "" in values or len(set(values)) < len(values):
            raise UsageError(f"--tune {text} is not of the form NAME=VALUE,VALUE,... with values that differ")
        if name in knobs:
            raise UsageError(f"--tune names {name} twice; give all its values at once")
        if not name.isupper() and not any(f"{{{name}}}" in argument for argument in arguments):
            raise UsageError(
                f"--tune {name}: the script's arguments have no {{{name}}} to put a value in; an environment variable's "
                "name is written in upper case"
            )
        knobs[name] = values
    settings = [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())] if knobs else []
    if len(settings) > MAX_OPTIONS:
        raise UsageError(f"--tune gives {len(settings)} combinations, more than {MAX_OPTIONS}; name fewer values")
    return settings


def in_words(setting: Setting) -> str:
    """`batch_size=32 OMP_NUM_THREADS=1`."""
    return " ".join(f"{name}={value}" for name, value in setting.items())


def arguments_with(setting: Setting, arguments: Sequence[str]) -> tuple[str, ...]:
    """The script's arguments with the setting's values in place of `{NAME}`."""
    filled = list(arguments)
    for name, value in setting.items():
        if not name.isupper():
            filled = [argument.replace(f"{{{name}}}", value) for argument in filled]
    return tuple(filled)


def environment_of(setting: Setting) -> dict[str, str]:
    """The environment variables among the setting's knobs."""
    return {name: value for name, value in setting.items() if name.isupper()}

"""The man pages are what the command line says of itself."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    """The names defined by scripts/make_man.py."""
    return runpy.run_path(str(ROOT / "scripts" / "make_man.py"))


def test_committed_pages_are_the_generated_ones(generator: dict[str, Any]) -> None:
    """The committed pages are just what the generator gives: run `make man` after a change of the command line."""
    committed = {path.name: path.read_text() for path in (ROOT / "man").iterdir()}
    assert committed == generator["pages"]()


def test_roff_control_characters_are_escaped(generator: dict[str, Any]) -> None:
    """A help text cannot be mistaken for roff: a line's leading dot, a quote, a backslash and a hyphen are escaped."""
    assert generator["escape"](".x\n'y \\ a-b") == "\\&.x\n\\&'y \\e a\\-b"

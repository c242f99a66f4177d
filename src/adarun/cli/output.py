"""Where commands print."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Wide enough for every column where the output is no terminal: rich would cut them to 80 characters.
PLAIN_WIDTH = 120


def console() -> Console:
    """Standard output, as wide as the terminal; what is printed is taken as it is."""
    from rich.console import Console as Rich  # noqa: PLC0415 - what prints JSON does without

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where a terminal has no bars, it shows question marks
    return Rich(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)

"""A story for other programs: as one JSON document, and as rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import msgspec

from adarun.replay.story import Story
from adarun.replay.what_if import Estimate, Prediction

HEAD = ["plan", "attempt", "start", "steps", "began", "ended", "rank", "share", "step_seconds", "busy_seconds"]
HEAD += ["waiting_seconds", "communication_seconds", "samples_per_second"]


def as_json(story: Story, made: Sequence[Prediction], estimated: Sequence[Estimate]) -> str:
    """The story with what would have been, indented."""
    document = finite(msgspec.to_builtins({"story": story, "what_if": made, "off_policy": estimated}))
    return msgspec.json.format(msgspec.json.encode(document)).decode() + "\n"


def finite(value: Any) -> Any:
    """The same with None for what JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(story: Story) -> str:
    """A row for each worker in each window."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEAD)
    for window in story.windows:
        for column, share in enumerate(window.shares):
            writer.writerow(
                [
                    window.plan,
                    window.attempt,
                    window.start,
                    window.steps,
                    f"{window.began:.6f}",
                    f"{window.ended:.6f}",
                    story.workers[column].rank,
                    share,
                    f"{window.step_seconds:.9f}",
                    f"{window.busy[column]:.9f}",
                    f"{window.waiting[column]:.9f}",
                    f"{window.communication:.9f}",
                    f"{window.rate:.3f}",
                ]
            )
    return file.getvalue()

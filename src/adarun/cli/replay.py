"""Tell the story of a run from its log, and say what other policies, knobs or workers would have made of it.

RUN is a run's name in the runs folder, or a folder with an events.jsonl; without it, the latest run is told, which may still
be running. With --compare give two, with --import the file to import.
"""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adarun.cli.output import console
from adarun.errors import AdarunError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from adarun.replay.what_if import Estimate, Prediction, Run

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# What a page asks of its own accord.
PAGE_QUESTIONS = "recorded,even,adapt,static,oracle"


class Format(str, Enum):
    """What can be imported."""

    csv = "csv"


def replay(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Which run.", show_default=False)] = None,
    runs_dir: Annotated[
        Path,
        typer.Option(
            "--runs-dir", help="Folder with the logs of the runs.", envvar="ADARUN_RUNS_DIR", show_envvar=False
        ),
    ] = Path("runs"),
    what_if: Annotated[
        str,
        typer.Option(
            "--what-if",
            help="The time that the run would have taken under each of these, separated by commas: even, adapt, static, "
            "oracle, shares=K:K, sync_period=H, drop=rankN, rankN.speed=X, several of them joined by +, or a policy.",
        ),
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Decide everything again; what comes out otherwise is an error.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Two runs side by side.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the story as a page to this file.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a trace to this file, for Perfetto or chrome://tracing.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the story as JSON instead.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print a row per window and worker as CSV instead.")] = False,
    import_: Annotated[
        Format | None,
        typer.Option(
            "--import", help="Take RUN for a file of this kind, with the columns step, worker and compute_seconds."
        ),
    ] = None,
) -> None:
    """Read the log, print what was asked for."""
    names = runs or []
    if len(names) != 2 and compare:
        raise UsageError(f"--compare takes two runs, and {len(names)} are given")
    if len(names) > 1 and not compare:
        raise UsageError("give one run; to see two beside each other there is --compare")
    if import_ and not names:
        raise UsageError("--import needs the file to import")
    if import_ and (check or trace or compare):
        raise UsageError(
            "what is imported holds no decisions and no moments: --check, --trace and --compare need a run"
        )
    try:
        if compare:
            print_comparison(names, runs_dir)
        elif check:
            print_check(names, runs_dir)
        else:
            tell(names, runs_dir, what_if, html, trace, json=json, csv=csv, foreign=import_ is not None)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has seen enough; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(
    names: list[str],
    runs_dir: Path,
    what_if: str,
    html: Path | None,
    trace: Path | None,
    *,
    json: bool,
    csv: bool,
    foreign: bool,
) -> None:
    """Everything about one run."""
    # numpy and rich take time, which --help need not wait for.
    from adarun import runlog
    from adarun.replay import story as stories

    if what_if:
        from adarun.replay.what_if import parse

        parse(what_if)  # what means nothing is refused before anything is printed
    directory = Path(names[0]) if foreign else runlog.find(names[0] if names else "", runs_dir)
    questions = what_if or (PAGE_QUESTIONS if html else "")
    run: Run | None = None
    if foreign:
        from adarun.replay.foreign import import_csv

        run = import_csv(directory)
        story = run.story
        questions = questions or PAGE_QUESTIONS
    else:
        story = stories.tell(directory)
    if not json and not csv:
        from adarun.report.text import story_text

        show(story_text(story, str(directory)))
    made, estimated = predictions(directory, questions, run, required=bool(what_if), foreign=foreign)
    if json or csv:
        from adarun.report import tables

        sys.stdout.write(tables.as_json(story, made, estimated) if json else tables.as_csv(story))
    else:
        show_answers(made, estimated)
    if html:
        from adarun.report.html import page

        write(html, page(story, made, estimated))
    if trace:
        from adarun.report.trace import write_trace

        try:
            write_trace(directory, trace)
        except OSError as error:
            raise AdarunError(f"{trace} cannot be written ({error.strerror})") from None


def predictions(
    directory: Path, questions: str, run: Run | None, *, required: bool, foreign: bool
) -> tuple[list[Prediction], list[Estimate]]:
    """The answers to what was asked; where only the page asks, what cannot be answered is left out."""
    if not questions:
        return [], []
    from adarun.replay import settings, what_if

    asked = what_if.parse(questions)
    try:
        run = run or what_if.load_run(directory)
    except AdarunError:
        if required:
            raise
        return [], []
    if asked and not any(question.base == "recorded" for question in asked):
        asked = [what_if.Question("recorded", "recorded"), *asked]
    others = [question.policy for question in asked if question.base == "policy"]
    made = [
        settings.predict(directory, run, question.policy) if question.policy else what_if.answer(run, question)
        for question in asked
    ]
    return made, settings.estimates(directory, run.about, others) if others and not foreign else []


def print_check(names: list[str], runs_dir: Path) -> None:
    """Repeat a run's decisions."""
    from adarun import runlog
    from adarun.replay.check import check

    directory = runlog.find(names[0] if names else "", runs_dir)
    print(f"{directory.name}: {check(directory)} decisions, all the same when repeated")


def print_comparison(names: list[str], runs_dir: Path) -> None:
    """Two runs side by side."""
    from adarun import runlog
    from adarun.replay.story import tell as story_of
    from adarun.report.text import comparison

    one, other = (story_of(runlog.find(name, runs_dir)) for name in names)
    show(comparison(one, other))


def show_answers(made: list[Prediction], estimated: list[Estimate]) -> None:
    """The tables of what would have been."""
    from adarun.report.text import estimates_table, what_if_table

    if made:
        show("", what_if_table(made))
    if estimated:
        show("", estimates_table(estimated))


def show(*what: RenderableType) -> None:
    """Print with rich, plainly and wide enough where the output is no terminal."""
    output = console()
    for part in what:
        output.print(part)


def write(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        AdarunError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AdarunError(f"{path} cannot be written ({error.strerror})") from None

"""The `adarun` command: finds the subcommand, prints errors in one place."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import typer

from adarun import __version__
from adarun.cli import replay, run, status
from adarun.errors import AdarunError

app = typer.Typer(
    name="adarun",
    help="torchrun that adapts. `adarun [OPTIONS] train.py [ARGS]` is short for `adarun run ...`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run", context_settings=run.CONTEXT, help=run.__doc__)(run.run)
app.command("status", context_settings=status.CONTEXT, help=status.__doc__)(status.status)
app.command("replay", context_settings=replay.CONTEXT, help=replay.__doc__)(replay.replay)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"adarun {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `adarun` script and of `python -m adarun`."""
    try:
        code = app(with_command(sys.argv[1:]), prog_name="adarun", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except AdarunError as error:
        sys.stderr.write(f"adarun: {error}\n")
        sys.exit(error.exit_code)
    except Exception as error:
        # typer's own errors are known by this method; which class they have depends on its version.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = message()
        # No command at all: the help is the message.
        command = "status" if sys.argv[1:2] == ["status"] else "run"
        sys.stderr.write(f"{text}\n" if text.startswith("Usage:") else f"adarun: {text} See adarun {command} --help.\n")
        sys.exit(2)


def with_command(arguments: list[str]) -> list[str]:
    """Put `run` in front of a command line that names no command, as torchrun's users write it."""
    commands = [command.name or "" for command in app.registered_commands]
    first = arguments[0] if arguments else "--help"
    if first in (*commands, "--help", "--version"):
        return arguments
    if not first.startswith("-") and not Path(first).exists():
        near = difflib.get_close_matches(first, commands, n=1)
        hint = f"did you mean adarun {near[0]}?" if near else "adarun --help lists the commands"
        sys.stderr.write(f"adarun: {first} is neither a command nor a file; {hint}\n")
        sys.exit(2)
    return ["run", *arguments]

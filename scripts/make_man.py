"""Write man/*.1 from the command line's own definition: `make man`."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import typer.main

import adarun
from adarun.cli.app import app
from adarun.screen.view import KEYS

MAN = Path(__file__).parents[1] / "man"

DESCRIPTION = """
adarun starts the workers of a PyTorch script as torchrun does, with the same command line, and measures each of them.
It gives each worker the share of the global batch that it can do, while the job runs. The samples of each global batch
stay the same, and so does the update, up to floating-point order.
"""

EXIT_STATUS = [
    ("0", "The job succeeded."),
    ("1", "A worker failed and no restart was left, or something that adarun needs is not there."),
    ("2", "The command line asks for what cannot be done; nothing was started."),
    ("128+n", "The job was ended by signal n."),
]

STATUS_EXIT = [
    ("0", "Something was shown."),
    ("1", "There is no such run, none at all, or its launcher does not answer."),
    ("2", "The command line asks for what cannot be done."),
]

ENVIRONMENT = [
    ("NO_COLOR", "If set to anything, no colours."),
    ("XDG_RUNTIME_DIR", "Where running jobs are announced, in its folder adarun."),
]

REPLAY_STATUS = [
    ("0", "The run was told."),
    ("1", "There is no such run, its log cannot be read, or a decision came out otherwise."),
    ("2", "The command line asks for what cannot be done."),
]

FILES = [
    ("runs/<id>/events.jsonl", "What happened in the run, one JSON object per line. See docs/run-log.md."),
    ("runs/<id>/run.json", "What the run was."),
]


def escape(text: str) -> str:
    """Plain text for roff."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def paragraphs(text: str) -> str:
    """A help text: wrapped lines joined, empty lines kept as paragraph breaks."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(text).replace("\b", "").strip())
    return "\n.PP\n".join(escape(" ".join(part.split())) for part in parts)


def entries(items: list[tuple[str, str]]) -> str:
    """A list of tagged paragraphs; the tags are roff already."""
    return "\n".join(f".TP\n{tag}\n{escape(' '.join(text.split()))}" for tag, text in items)


def bold(text: str) -> str:
    """One word in bold."""
    return f"\\fB{escape(text)}\\fR"


def named(items: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same list with its plain tags in bold."""
    return [(bold(tag), text) for tag, text in items]


def is_option(parameter: Any) -> bool:
    """An option, in contrast to an argument."""
    return bool(parameter.param_type_name == "option")


def placeholder(parameter: Any, kind: Any) -> str:
    """What stands for an option's value: the choices, or a name."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(bold(choice.value) for choice in kind)
    return f"\\fI{escape(parameter.metavar or parameter.name.upper().replace('_', '-'))}\\fR"


def option(parameter: Any, callback: Callable[..., Any]) -> tuple[str, str]:
    """An option's spellings with the placeholder of its value, and its help with its default."""
    default = inspect.signature(callback).parameters[parameter.name].default
    default = getattr(default, "value", default)
    spellings = ", ".join(bold(name) for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return spellings, parameter.help or ""
    kind = typing.get_type_hints(callback)[parameter.name]
    shown = f" Default: {default}." if isinstance(default, (str, int, Path)) and str(default) else ""
    return f"{spellings} {placeholder(parameter, kind)}", f"{parameter.help or ''}{shown}"


def panels(command: Any, callback: Callable[..., Any]) -> dict[str, list[tuple[str, str]]]:
    """The options of a command under the headings of its help, in its order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        if is_option(parameter) and not parameter.hidden:
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            found.setdefault(heading, []).append(option(parameter, callback))
    return found


def environment(command: Any) -> list[tuple[str, str]]:
    """The variables that give a command's options."""
    given = [parameter for parameter in command.params if is_option(parameter) and parameter.envvar]
    return [(bold(parameter.envvar), f"The same as {parameter.opts[0]}, which goes first.") for parameter in given]


def page(name: str, summary: str, sections: dict[str, str]) -> str:
    """A whole page."""
    head = f'.TH "{escape(name.upper())}" "1" "" "adarun {escape(adarun.__version__)}" "User Commands"\n'
    head += f".SH NAME\n{escape(name)} \\- {escape(summary)}\n"
    return head + "".join(f".SH {heading}\n{body}\n" for heading, body in sections.items())


def first_sentence(text: str) -> str:
    """What a help text says first, without its full stop."""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def see_also(pages: list[str], own: str) -> str:
    """The other pages."""
    return ", ".join(f"{bold(name)}(1)" for name in pages if name != own)


def pages() -> dict[str, str]:
    """Every page by its file name."""
    group: Any = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands
    # typer's parameters do not keep the types and defaults of the functions, which are the same in every version of it.
    callbacks: dict[str | None, Any] = {command.name: command.callback for command in app.registered_commands}
    overall: Any = app.registered_callback
    names = ["adarun", *(f"adarun-{name}" for name in commands)]
    start = f"{bold('adarun')} [\\fIoptions\\fR] \\fIscript\\fR [\\fIarguments\\fR]"
    started = f"{start}\n.br\n{bold('adarun run')} [\\fIoptions\\fR] \\fIscript\\fR [\\fIarguments\\fR]"
    overview = {
        "SYNOPSIS": start,
        "DESCRIPTION": paragraphs(DESCRIPTION),
        "COMMANDS": entries([(bold(name), first_sentence(command.help) + ".") for name, command in commands.items()]),
        "OPTIONS": "\n".join(entries(options) for options in panels(group, overall.callback).values()),
        "EXIT STATUS": entries(named(EXIT_STATUS)),
        "FILES": entries(named(FILES)),
        "SEE ALSO": see_also(names, "adarun"),
    }

    def page_of(
        name: str,
        exit_status: list[tuple[str, str]],
        synopsis: str = "",
        keys: dict[str, str] | None = None,
        variables: list[tuple[str, str]] | None = None,
    ) -> str:
        command, title = commands[name], f"adarun-{name}"
        sections = {
            "SYNOPSIS": synopsis or f"{bold(f'adarun {name}')} [\\fIoptions\\fR] [\\fIrun\\fR]",
            "DESCRIPTION": paragraphs(command.help),
            **{heading.upper(): entries(options) for heading, options in panels(command, callbacks[name]).items()},
            **(keys or {}),
            "ENVIRONMENT": entries([*environment(command), *named(variables or [])]),
            "EXIT STATUS": entries(named(exit_status)),
            "SEE ALSO": see_also(names, title),
        }
        return page(title, first_sentence(command.help), sections)

    return {
        "adarun.1": page("adarun", "torchrun that adapts to its workers", overview),
        "adarun-run.1": page_of("run", EXIT_STATUS, synopsis=started),
        "adarun-status.1": page_of("status", STATUS_EXIT, keys={"KEYS": entries(named(KEYS))}, variables=ENVIRONMENT),
        "adarun-replay.1": page_of("replay", REPLAY_STATUS),
    }


def main() -> None:
    """Write the pages."""
    MAN.mkdir(exist_ok=True)
    for name, text in pages().items():
        (MAN / name).write_text(text)
        print(MAN / name)


if __name__ == "__main__":
    main()

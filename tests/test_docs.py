"""The documentation says what is there: its links, options, fields, messages and snippets are checked."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer.main
from torch.distributed.run import get_args_parser

import adarun
from adarun import errors, events
from adarun.cli.app import app
from adarun.control.planner import Settings
from adarun.launch.record import Recording
from adarun.policies import Tuning
from adarun.report.openmetrics import COUNTERS, GAUGES, JOB_COUNTERS, JOB_GAUGES
from adarun.screen.view import KEYS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()
# Options of other programs that the documentation names.
FOREIGN_OPTIONS = {
    "--extra-index-url",
    "--batch-size",
    "--checkpoint",
    "--epochs",
    "--help",
    "--minutes",
    "--smoke",
    "--quota",
    "--pairs",
    "--width",
    "--part",
    "--extra-epochs",
}


def without_code(text: str) -> str:
    """Markdown without its fenced blocks, whose brackets are no links and whose comments no headings."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page, to files here, that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if re.match(r"https?:", link):
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(link)
    return broken


def section(heading: str, text: str = README) -> str:
    """What stands under a heading, up to the next one of the same level."""
    return re.split(rf"^## {re.escape(heading)}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all Markdown tables in a text, without their heads."""
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    heads = [number for number, cells in enumerate(lines) if re.fullmatch(r"[-| ]+", "|".join(cells))]
    return [cells for number, cells in enumerate(lines) if not {number, number + 1} & set(heads)]


def command_options(command: str = "run") -> set[str]:
    """Every long option of a command, under its first spelling."""
    group: Any = typer.main.get_command(app)
    options = [parameter for parameter in group.commands[command].params if parameter.param_type_name == "option"]
    return {next(name for name in option.opts if name.startswith("--")) for option in options}


def torchrun_options() -> set[str]:
    """Every long option of torchrun, under its first spelling."""
    actions = [action for action in get_args_parser()._actions if action.option_strings]
    return {next(name for name in action.option_strings if name.startswith("--")) for action in actions} - {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_alive(page: Path) -> None:
    """Every link to a file or heading of the project leads there."""
    assert broken_links(page, page.read_text()) == []


def test_a_dead_link_is_seen() -> None:
    """A link to a missing file or heading is reported, and one inside a code block is none."""
    text = "[a](LICENSE) [b](gone.md) [c](README.md#gone) [d](README.md#options)\n```\n[e](gone)\n```\n"
    assert broken_links(ROOT / "page.md", text) == ["gone.md", "README.md#gone"]


def test_readme_lists_adaruns_own_options() -> None:
    """The README's table has a row for each option that torchrun does not have, and for no other."""
    listed = {match[0] for cells in rows(section("Options")) if (match := re.search(r"--[\w-]+", cells[0]))}
    assert listed == command_options() - torchrun_options()


def test_man_page_has_every_option() -> None:
    """The man page describes every option of torchrun and of adarun."""
    page = (ROOT / "man" / "adarun-run.1").read_text().replace("\\-", "-")
    described = set(re.findall(r"\\fB(--[\w-]+)\\fR", page))
    assert (command_options() | torchrun_options()) - described == set()


def test_replay_page_and_man_page_have_every_option() -> None:
    """docs/replay.md has a row for each option of `adarun replay`, and for no other; the man page describes each."""
    listed = {
        cells[0].strip("`").split()[0] for cells in rows((ROOT / "docs" / "replay.md").read_text().split("\n## ")[0])
    }
    assert listed == command_options("replay")
    page = (ROOT / "man" / "adarun-replay.1").read_text().replace("\\-", "-")
    assert command_options("replay") - set(re.findall(r"\\fB(--[\w-]+)\\fR", page)) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_options_exist(page: Path) -> None:
    """An option that a page names is one of adarun's or torchrun's."""
    ours = {name for command in app.registered_commands for name in command_options(command.name or "")}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
    named = {name.replace("_", "-") for name in named}
    assert named - ours - torchrun_options() - FOREIGN_OPTIONS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_make_targets_exist(page: Path) -> None:
    """A `make` target that a page names is in the Makefile."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make (\w+)", page.read_text(), flags=re.MULTILINE)) - targets == set()


def test_run_log_page_has_every_event_and_field() -> None:
    """docs/run-log.md describes each event of the log with all its fields, and nothing else."""
    text = (ROOT / "docs" / "run-log.md").read_text()
    parts = re.split(r"^`(\w+)`: ", text, flags=re.MULTILINE)[1:]
    described = {
        tag: {cells[0].strip("`") for cells in rows(part)} for tag, part in zip(parts[::2], parts[1::2], strict=True)
    }
    logged = {event.__struct_config__.tag: set(event.__struct_fields__) for event in get_args(events.Logged)}
    assert described == logged


def test_run_log_page_has_every_field_of_hello() -> None:
    """docs/run-log.md names what a worker says of itself."""
    text = (ROOT / "docs" / "run-log.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `hello`"))
    assert set(re.findall(r"`(\w+)`", row)) == {
        "hello",
        *(field.name for field in msgspec.structs.fields(events.Hello)),
    }


def test_run_log_page_has_every_field_of_run_json(tmp_path: Path) -> None:
    """docs/run-log.md describes each field of run.json, and nothing else."""
    with Recording(tmp_path, "a-run", ["train.py"], Settings(), Tuning([], "off", 0, 0)):
        pass
    text = (ROOT / "docs" / "run-log.md").read_text().split("`run.json` holds:")[1].split("\n## ")[0]
    described = {cells[0].strip("`") for cells in rows(text)}
    assert described == set(json.loads((tmp_path / "a-run" / "run.json").read_text()))


def described(text: str) -> set[str]:
    """The names in the first cells of a text's tables."""
    return {name for cells in rows(text) for name in re.findall(r"`(\w+)`", cells[0])}


def test_status_page_has_every_option() -> None:
    """docs/status.md has a row for each option of `adarun status`."""
    text = section("What is no terminal", (ROOT / "docs" / "status.md").read_text())
    assert {cells[0].split()[0].strip("`") for cells in rows(text)} == command_options("status")


@pytest.mark.parametrize(
    ("heading", "struct"), [("The job", events.Snapshot), ("A worker", events.WorkerNow), ("A decision", events.Said)]
)
def test_status_page_has_every_field(heading: str, struct: type[msgspec.Struct]) -> None:
    """docs/status.md describes each field of what --json prints, and nothing else."""
    text = re.split(rf"^### {heading}$", (ROOT / "docs" / "status.md").read_text(), flags=re.MULTILINE)[1]
    assert described(re.split(r"^##", text, flags=re.MULTILINE)[0]) == set(struct.__struct_fields__) | (
        {"type"} if struct is events.Snapshot else set()
    )


def test_status_page_has_every_metric() -> None:
    """docs/status.md lists the metrics under the names that Prometheus sees."""
    served = {*(f"{name}_total" for name in (*COUNTERS, *JOB_COUNTERS)), *GAUGES, *JOB_GAUGES, "adarun_info"}
    assert described(section("Prometheus", (ROOT / "docs" / "status.md").read_text())) == served


def test_status_page_has_every_key() -> None:
    """docs/status.md has the keys of the help page."""
    text = section("Keys", (ROOT / "docs" / "status.md").read_text())
    assert [(cells[0].strip("`"), cells[1]) for cells in rows(text)] == KEYS


def test_readme_quotes_real_messages() -> None:
    """Every message in the README's table of what is not adapted stands in the source."""
    texts = [
        node.value
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = [cells[1] for cells in rows(section("What is adapted, and what is not"))]
    assert len(quoted) > 5
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def test_readme_lists_the_exit_codes() -> None:
    """The README's table has every exit code that an error carries."""
    listed = {cells[0] for cells in rows(section("Exit codes"))}
    carried = {str(error.exit_code) for error in vars(errors).values() if isinstance(error, type)}
    assert listed == carried | {"0", "128+n"}


def test_readme_shows_the_api() -> None:
    """The README's snippet uses every public function, and runs without adarun's launcher."""
    (snippet,) = re.findall(r"```python\n(.*?)```", section("API"), flags=re.DOTALL)
    public = {name for name in adarun.__all__ if not name.startswith("__")}
    assert set(re.findall(r"adarun\.(\w+)", snippet)) == public

    class Anything:
        """Takes every call; remembers what the model was given."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __call__(self, *arguments: Any) -> Anything:
            self.seen.extend(arguments)
            return self

        def __getattr__(self, name: str) -> Anything:
            return Anything()

    names: dict[str, Any] = {"share_metrics": lambda loss: None}
    exec(snippet, names)
    names["train"]([[1, 2], [3, 4]], model := Anything(), Anything())
    assert [piece for piece in model.seen if isinstance(piece, list)] == [[1, 2], [3, 4]]


def test_decisions_are_numbered_and_listed() -> None:
    """The decisions are numbered without a gap, and their index links to each."""
    folder = ROOT / "docs" / "decisions"
    files = sorted(path.name for path in folder.glob("0*.md"))
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    assert re.findall(r"\((\d.+?\.md)\)", (folder / "README.md").read_text()) == files


def test_changelog_is_of_this_version() -> None:
    """The changelog's first entry is the version of the package."""
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first
    assert first[1] == adarun.__version__

"""The layers import only what they may; each fence names its reason."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src"
# Whatever else there is in the standard library does I/O, knows the clock, or was not needed so far.
CALM = {"__future__", "abc", "bisect", "collections", "copy", "dataclasses", "enum", "functools", "heapq", "itertools"}
CALM |= {"math", "operator", "statistics", "typing", "msgspec", "numpy"}
SCREEN_MODEL = ("adarun.screen.model", "adarun.screen.straggler", "adarun.screen.rows")
PURE = ("adarun.state", "adarun.control", "adarun.simulate", "adarun.events", "adarun.errors")


class Fence(NamedTuple):
    """One rule: modules under `inside` may not import what `refuses` names, because of `reason`."""

    name: str
    inside: Callable[[str], bool]
    refuses: Callable[[str], bool]
    reason: str


def under(module: str, *packages: str) -> bool:
    """Is `module` one of `packages`, or inside one?"""
    return any(module == package or module.startswith(package + ".") for package in packages)


def top(module: str) -> str:
    return module.partition(".")[0]


LIBRARIES = {"msgspec", "torch"}
WORKER = ("adarun.worker", "adarun.events", "adarun.errors")
FENCES = [
    Fence(
        "worker",
        lambda module: under(module, "adarun.worker"),
        lambda name: (
            not under(name, *WORKER)
            if top(name) == "adarun"
            else top(name) not in {*sys.stdlib_module_names, *LIBRARIES}
        ),
        "it runs inside the user's process: what it imports costs time there and may clash with the script's own",
    ),
    Fence(
        "pure",
        lambda module: under(module, "adarun.state", "adarun.control", "adarun.simulate"),
        lambda name: not under(name, *PURE) if top(name) == "adarun" else top(name) not in CALM,
        "decisions are pure functions of what was seen: no I/O, clock, torch or screen, so they can be repeated",
    ),
    Fence(
        "screen",
        lambda module: under(module, *SCREEN_MODEL),
        lambda name: (
            not under(name, "adarun.events", *SCREEN_MODEL)
            if top(name) == "adarun"
            else top(name) not in {*CALM, "re"} - {"numpy"}
        ),
        "what is shown is a pure function of what was seen, and a viewer that starts at once has no time for numpy",
    ),
    Fence(
        "torch",
        lambda module: not under(module, "adarun.launch", "adarun.worker"),
        lambda name: top(name) == "torch",
        "importing torch takes seconds, which only a launcher or a worker may spend",
    ),
    Fence(
        "replay",
        lambda module: under(module, "adarun.replay", "adarun.report"),
        lambda name: under(name, "adarun.hub", "adarun.launch", "adarun.worker"),
        "a log is read where nothing runs, by the control's own code and nothing of a live job's",
    ),
    Fence(
        "cli",
        lambda module: not under(module, "adarun.cli", "adarun.__main__"),
        lambda name: under(name, "adarun.cli"),
        "the command line calls the rest, never the other way round",
    ),
]


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that a piece of source imports, at the top or inside a function, and its built-in I/O."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from adarun import hub` may mean the module or a name in it; both are held against the fence.
            yield from (f"{base}.{alias.name}" if top(base) == "adarun" else base for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield str(node.args[0].value)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"open", "print", "input"}
        ):
            yield f"builtins.{node.func.id}"


def breaches(fence: Fence, module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What `module` imports against `fence`."""
    if not fence.inside(module):
        return []
    package = module if is_package else module.rpartition(".")[0]
    return sorted({name for name in imports(ast.parse(source), package) if fence.refuses(name)})


def modules() -> list[tuple[str, Path]]:
    """Every module of the package, by its dotted name."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize("fence", FENCES, ids=lambda fence: fence.name)
def test_no_module_breaks_a_fence(fence: Fence) -> None:
    """No module imports what its layer may not."""
    inside = [(module, path) for module, path in modules() if fence.inside(module)]
    assert len(inside) > 1, f"the fence {fence.name} stands around nothing"
    broken = {
        module: found
        for module, path in inside
        if (found := breaches(fence, module, path.read_text(), is_package=path.name == "__init__.py"))
    }
    assert not broken, f"{broken}: {fence.reason}"


@pytest.mark.parametrize(
    ("name", "module", "source", "expected"),
    [
        ("worker", "adarun.worker.loader", "import numpy", ["numpy"]),
        ("worker", "adarun.worker.loader", "from adarun import hub", ["adarun.hub"]),
        ("worker", "adarun.worker.loader", "from ..state import fold", ["adarun.state.fold"]),
        ("worker", "adarun.worker.loader", "import os, msgspec, torch.nn\nfrom adarun.events import Plan", []),
        ("pure", "adarun.control.split", "def f():\n    from time import time", ["time"]),
        ("pure", "adarun.state", "import os.path", ["os.path"]),
        ("pure", "adarun.state", "from adarun.runlog import RunLog", ["adarun.runlog.RunLog"]),
        ("pure", "adarun.state", "open('log')", ["builtins.open"]),
        ("pure", "adarun.simulate.job", "import gymnasium", ["gymnasium"]),
        ("pure", "adarun.control", "import math, numpy\nfrom .cost import CostModel", []),
        ("screen", "adarun.screen.model", "import numpy, time, rich.text\nimport re", ["numpy", "rich.text", "time"]),
        ("screen", "adarun.screen.rows", "from adarun.state import State", ["adarun.state.State"]),
        ("torch", "adarun.hub", "def f():\n    import torch.distributed", ["torch.distributed"]),
        ("torch", "adarun", "import importlib\nimportlib.import_module('torch')", ["torch"]),
        ("torch", "adarun.launch.agent", "import torch", []),
        ("replay", "adarun.replay.story", "from adarun import hub", ["adarun.hub"]),
        (
            "replay",
            "adarun.report.html",
            "from adarun.launch.record import Recording",
            ["adarun.launch.record.Recording"],
        ),
        ("replay", "adarun.replay", "from adarun.control.planner import Planner\nfrom adarun.runlog import read", []),
        ("cli", "adarun.hub", "from adarun.cli import app", ["adarun.cli.app"]),
        ("cli", "adarun.__main__", "from adarun.cli.app import main", []),
    ],
)
def test_a_breach_is_seen(name: str, module: str, source: str, expected: list[str]) -> None:
    """A fence reports every kind of import that breaks it, and no other."""
    fence = next(fence for fence in FENCES if fence.name == name)
    assert breaches(fence, module, source, is_package=module == "adarun.control") == expected


def loaded(program: str) -> set[str]:
    """Run a program in a fresh interpreter; return the top-level modules it has loaded in the end."""
    program = f"import sys\ntry:\n    {program}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    report = "import sys; print('\\nLOADED', *{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program + report], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "program",
    [
        "import adarun; assert adarun.active() is False",
        "import runpy; sys.argv = ['adarun', '--help']; runpy.run_module('adarun', run_name='__main__')",
        "import runpy; sys.argv = ['adarun', 'run', '--help']; runpy.run_module('adarun', run_name='__main__')",
        "import runpy; sys.argv = ['adarun', 'status', '--help']; runpy.run_module('adarun', run_name='__main__')",
        "import adarun.screen.live, adarun.screen.panel, adarun.screen.view, adarun.registry; import adarun",
        "import runpy; sys.argv = ['adarun', 'replay', '--help']; runpy.run_module('adarun', run_name='__main__')",
        "import runpy; sys.argv = ['adarun', '--version']; runpy.run_module('adarun', run_name='__main__')",
    ],
    ids=["import", "help", "run-help", "status-help", "screen", "replay-help", "version"],
)
def test_torch_is_not_imported(program: str) -> None:
    """Importing adarun and asking for its help never import torch, which takes seconds."""
    names = loaded(program)
    assert "adarun" in names
    assert "torch" not in names


def test_pure_modules_stay_pure_when_loaded() -> None:
    """Loading the state and the controller brings in neither torch nor rich, by whatever detour."""
    names = loaded("import adarun.state, adarun.control.controller")
    assert "adarun" in names
    assert not names & {"torch", "rich", "typer", "psutil"}

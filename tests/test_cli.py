"""The command line is torchrun's, to the last option, with a few options of adarun's own."""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed.run as torchrun
import typer.main
from torch.distributed.argparse_util import check_env, env

import adarun
from adarun.cli import app, run
from adarun.control.pace import Allowed
from adarun.control.planner import Settings
from adarun.launch import agent
from adarun.launch.views import Views
from adarun.policies import Tuning
from conftest import Job

# For each of torch's options a value that is not its default.
SAMPLES = {
    "nnodes": "1:3",
    "nproc_per_node": "3",
    "rdzv_backend": "c10d",
    "rdzv_endpoint": "localhost:29411",
    "rdzv_id": "job-7",
    "rdzv_conf": "join_timeout=30,read_timeout=20",
    "standalone": None,
    "max_restarts": "4",
    "monitor_interval": "0.5",
    "start_method": "fork",
    "event_log_handler": "console",
    "role": "trainer",
    "module": None,
    "no_python": None,
    "run_path": None,
    "log_dir": "logs_and_more",
    "redirects": "0:1,1:2",
    "tee": "3",
    "local_ranks_filter": "0,1",
    "duplicate_stdout_filters": "loss,step_1",
    "duplicate_stderr_filters": "a,,b",
    "node_rank": "2",
    "master_addr": "localhost",
    "master_port": "29412",
    "local_addr": "127.0.0.1",
    "logs_specs": "default",
    "numa_binding": "node",
    "signals_to_handle": "SIGTERM,SIGUSR1",
    "shutdown_timeout": "11",
    "virtual_local_rank": None,
}
OWN = ["--adapt", "--window", "--shares", "--max-share", "--batchnorm", "--loss-reduction"]
OWN += ["--sync-period", "--compress", "--topology", "--outer"]
OWN += ["--tune", "--tune-epochs", "--policy", "--runs-dir", "--live", "--metrics-port"]
STATUS = ["--json", "--watch", "--runs-dir"]
VIEWS = Views(live=True, metrics_port=9464)
SCRIPT = [__file__, "--nnodes", "7", "-m", "--", "rest"]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The environment as it was before each test, and without what would change torch's defaults."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith(("PET_", "ADARUN_"))]:
            del os.environ[name]
        yield


def options() -> dict[str, tuple[str, ...]]:
    """Torch's options: their names, by where torch keeps their value."""
    return {
        a.dest: tuple(a.option_strings)
        for a in torchrun.get_args_parser()._actions
        if a.option_strings[1:] != ["--help"]
    }


def handed_on(arguments: list[str]) -> list[str]:
    """The command line that `adarun run` hands on to torch's parser."""
    command_lines = []
    take = mock.patch.object(run, "job", lambda arguments, *_: command_lines.append(arguments) or 0)
    with take, mock.patch.object(sys, "argv", ["adarun", *arguments]), contextlib.suppress(SystemExit):
        app.main()
    assert len(command_lines) == 1, arguments
    return command_lines[0]


def meaning(arguments: list[str]) -> Namespace:
    """What a command line of torchrun's means."""
    return torchrun.get_args_parser().parse_args(arguments)


def everything(of: object) -> object:
    """An object with all that is in it, for comparing what has no equality of its own."""
    if isinstance(of, Enum) or not hasattr(of, "__dict__"):
        return of
    return type(of), {name: everything(value) for name, value in vars(of).items()}


def test_torch_has_the_options_that_are_known_here() -> None:
    """Adarun has just the options of this torch's torchrun; a new torch with another set fails here."""
    options_of_torch = {dest for dest in options() if dest not in ("training_script", "training_script_args")}
    command = typer.main.get_command(app.app).commands["run"]
    ours = {p.name for p in command.params if getattr(p, "rich_help_panel", None) == run.TORCHRUN}
    assert options_of_torch == set(SAMPLES)
    assert options_of_torch == ours


def spellings(dest: str) -> list[list[str]]:
    """All the ways to give an option its sample value."""
    value, written = SAMPLES[dest], []
    for name in options()[dest]:
        for spelled in {name, name if name.count("-") == 1 else "--" + name[2:].replace("-", "_")}:
            if value is None:
                written.append([spelled])
            elif spelled.startswith("--"):
                written += [[spelled, value], [f"{spelled}={value}"]]
            else:
                written += [[spelled, value], [f"{spelled}{value}"]]
    return written


@pytest.mark.parametrize("dest", SAMPLES)
def test_an_option_means_what_it_means_to_torchrun(dest: str) -> None:
    """Every spelling of an option, with dashes or underscores, a blank or an equals sign, means what torchrun takes it for."""
    default = meaning(SCRIPT)
    for given in spellings(dest):
        expected = meaning([*given, *SCRIPT])
        assert expected == meaning(handed_on([*given, *SCRIPT]))
        assert getattr(default, dest) != getattr(expected, dest)


@pytest.mark.parametrize(
    "dest", [a.dest for a in torchrun.get_args_parser()._actions if isinstance(a, env | check_env)]
)
def test_a_pet_variable_means_what_it_means_to_torchrun(dest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option not given takes its value from PET_<its name>, where torchrun's does."""
    default = meaning(SCRIPT)
    monkeypatch.setenv(f"PET_{dest.upper()}", SAMPLES[dest] or "1")
    expected = meaning(SCRIPT)
    assert expected == meaning(handed_on(SCRIPT))
    assert getattr(default, dest) != getattr(expected, dest)


@pytest.mark.parametrize(
    "given", [["--stand"], ["--max-r", "4"], ["--rdzv_b=c10d"], ["--nproc-p", "3"], ["--mod"], ["--duplicate-stdo=x"]]
)
def test_an_abbreviation_means_what_it_means_to_torchrun(given: list[str]) -> None:
    """The beginning of an option's name stands for it where only one of torchrun's begins so."""
    assert meaning([*given, *SCRIPT]) == meaning(handed_on([*given, *SCRIPT]))


def test_what_is_launched_is_what_torchrun_would_launch(tmp_path: Path) -> None:
    """Config, program and arguments that come of a command line are those that torchrun makes of it."""
    rendezvous = ["--nnodes", "2:3", "--rdzv-backend", "c10d", "--rdzv_endpoint=localhost:29411", "--rdzv_id", "7"]
    given = [*rendezvous, "--max_restarts", "4", "-r3", "--log_dir", str(tmp_path), *SCRIPT]
    config, entrypoint, arguments = torchrun.config_from_args(meaning(given))
    actual = agent.configure(handed_on(given))
    assert everything(config) == everything(actual[0])
    assert (entrypoint, arguments) == actual[1:]


def test_own_options() -> None:
    """Adarun's own options are these and no others."""
    command = typer.main.get_command(app.app).commands["run"]
    assert [p.opts[0] for p in command.params if getattr(p, "rich_help_panel", None) == run.ADARUN] == OWN


def test_options_of_status() -> None:
    """The options of `adarun status` are these and no others."""
    command = typer.main.get_command(app.app).commands["status"]
    assert [p.opts[0] for p in command.params if p.param_type_name == "option"] == STATUS


def test_replays_options() -> None:
    """The options of `adarun replay` are these and no others."""
    command = typer.main.get_command(app.app).commands["replay"]
    options = [p.opts[0] for p in command.params if p.param_type_name == "option"]
    outputs = ["--html", "--trace", "--json", "--csv"]
    assert options == ["--runs-dir", "--what-if", "--check", "--compare", *outputs, "--import"]


def test_own_options_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own option not given takes its value from ADARUN_<its name>, and means the same."""
    values = ["on", "7", "3,1;1,3", "40", "allow", "sum", "2:64", "auto", "gossip", "nesterov"]
    values += ["OMP_NUM_THREADS=1,2", "9", "ucb", "elsewhere", None, "9464"]
    monkeypatch.setattr(run.secrets, "randbits", lambda _: 5)
    given = [word for option in zip(OWN, values, strict=True) for word in option if word]
    with mock.patch.object(run, "job", side_effect=SystemExit) as job:
        with pytest.raises(SystemExit):
            app.app(["run", *given, __file__])
        passed_on = [
            {name: os.environ.pop(name) for name in ("ADARUN_BATCHNORM", "ADARUN_LOSS_REDUCTION", "ADARUN_SYNC")}
        ]
        for option, value in zip(OWN, values, strict=True):
            monkeypatch.setenv(f"ADARUN_{option[2:].upper().replace('-', '_')}", value or "1")
        with pytest.raises(SystemExit):
            app.app(["run", __file__])
        passed_on.append({name: os.environ[name] for name in passed_on[0]})
    settings = [{"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "2"}]
    tuning = Tuning(["OMP_NUM_THREADS=1", "OMP_NUM_THREADS=2"], "ucb", 5, 9)
    allowed = Allowed((2, 64), ("none", "bf16", "powersgd"), ("gossip",), "nesterov")
    asked = Settings("on", 7, [[3, 1], [1, 3]], 40, allowed)
    expected = mock.call([__file__], __file__, Path("elsewhere"), asked, tuning, settings, VIEWS)
    assert job.call_args_list == [expected, expected]
    assert (
        passed_on == [{"ADARUN_BATCHNORM": "allow", "ADARUN_LOSS_REDUCTION": "sum", "ADARUN_SYNC": "on,compress"}] * 2
    )


def test_no_script_option_is_taken_for_adaruns() -> None:
    """What stands behind the script is the script's, whatever it is called."""
    arguments = [__file__, "--window", "9", "--shares", "x", "--help", "-m"]
    assert handed_on(["--window", "3", *arguments]) == arguments
    assert handed_on(["run", *arguments]) == arguments


REFUSED = {
    "an unknown word": (["nothing"], "nothing is neither a command nor a file; adarun --help lists the commands"),
    "a misspelled command": (["rnu"], "rnu is neither a command nor a file; did you mean adarun run?"),
    "a missing script": (["run", "nothing.py"], "there is no script nothing.py"),
    "no script": (["run"], "SCRIPT"),
    "negative window": (["--window", "-1", __file__], "--window -1 is negative"),
    "a window that is no number": (["--window", "x", __file__], "--window"),
    "shares that are no numbers": (["--shares", "3,x", __file__], "--shares 3,x is not a list of positive numbers"),
    "shares of nothing": (["--shares", "3,0", __file__], "--shares 3,0 is not a list of positive numbers"),
    "shares of several lengths": (["--shares", "3,1;1", __file__], "--shares 3,1;1 is not a list of positive numbers"),
    "shares of others": (
        ["--shares", "1,2,3", "--nproc-per-node", "2", __file__],
        "--shares names 3 workers and the job has 2",
    ),
    "shares unadapted": (
        ["--shares", "3,1", "--adapt", "observe", __file__],
        "--shares changes the split, which --adapt observe",
    ),
    "a knob that is nowhere": (["--tune", "width=1,2", __file__], "the script's arguments have no {width}"),
    "an unknown policy": (
        ["--tune", "A=1,2", "--policy", "nope", __file__],
        "there is no policy nope; there are thompson,",
    ),
    "a negative share": (["--max-share", "-1", __file__], "--max-share -1 is negative"),
    "negative epochs": (["--tune-epochs", "-1", __file__], "--tune-epochs -1 is negative"),
    "tuning on two nodes": (["--tune", "A=1,2", "--nnodes", "2", __file__], "--tune restarts the workers of one node"),
    "a period that is none": (["--sync-period", "0", __file__], "--sync-period 0 is no number from 1 to 1024"),
    "a period that shrinks": (["--sync-period", "8:2", __file__], "--sync-period 8:2 is no number from 1 to 1024"),
    "an outer step over few": (
        ["--sync-period", "8", "--outer", "nesterov", __file__],
        "--outer nesterov needs many local steps; give --sync-period 32 or more",
    ),
    "local steps unadapted": (
        ["--compress", "bf16", "--adapt", "off", __file__],
        "change the training, which --adapt off forbids",
    ),
    "a large ring": (
        ["--topology", "ring", "--nproc-per-node", "9", __file__],
        "--topology ring is for up to 8 workers and the job has 9",
    ),
    "a port that is none": (["--metrics-port", "65536", __file__], "--metrics-port 65536 is no port"),
    "a watch of no time": (["status", "--watch", "-1"], "--watch -1 is not between 0.1 and 86400 seconds"),
    "an unknown option of status": (["status", "--nope"], "See adarun status --help"),
    "unknown adapt": (["--adapt", "maybe", __file__], "--adapt"),
    "an unknown option": (["--nope", __file__], "--nope"),
    "an option without its value": (["--log-dir"], "--log-dir"),
    "nnodes": (["--nnodes", "a:b", __file__], "'a'"),
    "nproc": (["--nproc-per-node", "many", __file__], "Unsupported nproc_per_node value: many"),
    "rendezvous": (["--rdzv-backend", "nope", __file__], "there is no rendezvous backend nope; torch has c10d, etcd,"),
    "an ambiguous abbreviation": (["--rdzv", "c10d", __file__], "--rdzv"),
    "start method": (["--start-method", "nope", __file__], "invalid choice: 'nope'"),
    "restarts": (["--max-restarts", "x", __file__], "invalid int value: 'x'"),
    "redirects": (["--redirects", "9", __file__], "9 does not match"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(
    case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be is refused with exit code 2 and one line on stderr, which names it, before anything is started."""
    arguments, text = REFUSED[case]
    os.environ["OMP_NUM_THREADS"] = "1"
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(sys, "argv", ["adarun", *arguments]), pytest.raises(SystemExit) as end:
        app.main()
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (2, "")
    assert text in err
    assert err.startswith("adarun: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_installed_command(start: Callable[..., Job]) -> None:
    """The installed command ends with that line and code too, and leaves no run log."""
    job = start("adarun", "rnu").wait()
    assert job.process.returncode == 2
    assert job.stderr == "adarun: rnu is neither a command nor a file; did you mean adarun run?\n"
    assert list(job.folder.glob("runs")) == []


@pytest.mark.parametrize("given", [("--event-log-handler", "nope"), ("--nproc-per-node", "0")], ids=" ".join)
def test_what_fails_at_the_start_is_said_in_one_line(given: tuple[str, ...], start: Callable[..., Job]) -> None:
    """What torch finds fault with only when it starts the job ends it with one line from adarun, and no traceback."""
    job = start("adarun", *given, __file__).wait()
    assert job.process.returncode in (1, 2)
    assert "Traceback (most recent call last)" not in job.stderr
    assert job.stderr.splitlines()[-1].startswith("adarun: ")


@pytest.mark.parametrize("command", [("adarun",), ("python", "-m", "adarun")], ids=" ".join)
def test_help_and_version(command: tuple[str, ...], start: Callable[..., Job]) -> None:
    """--help and --version answer at once, for the script and for the module, and `run --help` names every option."""
    assert start(*command, "--version").succeed().stdout == f"adarun {adarun.__version__}\n"
    assert start(*command, "--help").succeed().stdout == start(*command).wait().stderr
    text = start(*command, "run", "--help").succeed().stdout
    assert text.startswith("Usage: adarun run ")
    missing = [
        name for name in (*OWN, *(f"--{dest.replace('_', '-')}" for dest in SAMPLES)) if f" {name} " not in text + " "
    ]
    assert missing == []

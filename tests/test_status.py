"""`adarun status` as a person sees it: a real job, the installed command, a real terminal (tmux)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adarun.events import Plan, Snapshot, Step
from adarun.registry import Entry
from conftest import BIN, Job

SCREENS = Path(__file__).parent / "screens"
PATIENCE_SECONDS = 60.0
NEEDS_TMUX = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
FIGURE = r" *[+-]?\d[\d.:,]*(?: ms| MiB| GiB|%)?"
VOLATILE = [
    (r"\d{8}-\d{6}-paced-[0-9a-f]{4}", "RUN"),
    (r"^\d\d:\d\d:\d\d .*", "TIME DECISION"),
    (r"(?<=samples/s )[▁▂▃▄▅▆▇█]+", "HISTORY"),
    (r"^\S+: (?=\d+ workers,)", "NODE: "),
    (FIGURE, " #"),
]
TWO = ("--standalone", "--nproc-per-node", "2")


class Watched:
    """A job that runs until it is told to end, and whose announcement only these tests see."""

    def __init__(self, start: Callable[..., Job], scripts: Path, folder: Path, *options: object) -> None:
        self.runtime, self.end = folder / "runtime", folder / "end"
        self.runtime.mkdir(mode=0o700)
        self.start = start
        self.job = start("adarun", *options, *TWO, scripts / "paced.py", self.end, XDG_RUNTIME_DIR=str(self.runtime))
        self.job.until(lambda: len(self.job.events(Plan)) >= 4 or "--adapt" not in options)
        self.job.until(lambda: len(self.job.events(Step)) >= 100)

    @property
    def run(self) -> str:
        (folder,) = self.job.folder.glob("runs/*")
        return folder.name

    def status(self, *arguments: object, **env: str) -> Job:
        return self.start("adarun", "status", *arguments, XDG_RUNTIME_DIR=str(self.runtime), **env)


@pytest.fixture(scope="module")
def watched(start: Callable[..., Job], scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    job = Watched(start, scripts, folder, "--adapt", "observe")
    yield job
    job.end.touch()
    job.job.wait()


def masked(screen: str) -> str:
    """A screen without what differs from run to run: figures, bars, times, decisions."""
    return "\n".join(masked_line(line) for line in screen.rstrip().splitlines()) + "\n"


def masked_line(line: str) -> str:
    """In the table every sign keeps its place; elsewhere a figure may be of any length."""
    if re.match(r"[ ▶][ >] +\d", line):
        line = re.sub(r"[█▒·]{8,}", lambda bar: "=" * len(bar[0]), line)
        return re.sub(FIGURE, lambda found: "#".rjust(len(found[0])), line).rstrip()
    for volatile, stand_in in VOLATILE:
        line = re.sub(volatile, stand_in, line)
    return line.rstrip()


class Terminal:
    """A tmux session of its own server, in which a command runs."""

    def __init__(self, command: list[str], env: dict[str, str], width: int, height: int, folder: Path) -> None:
        self._socket = str(folder / "tmux")
        words = ["env", *(f"{name}={value}" for name, value in env.items()), *command]
        size = ("-x", str(width), "-y", str(height))
        self.tmux("-f", "/dev/null", "new-session", "-d", "-s", "a", *size, shlex.join(words) + "; cat")

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", self._socket, *arguments]
        env = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", "-t", "a", *keys)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p", "-t", "a")

    def until(self, condition: Callable[[str], Any]) -> str:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition(screen := self.screen()):
            assert time.monotonic() < deadline, screen
            time.sleep(0.1)
        return screen

    def shows(self, name: str) -> None:
        """In the end the screen is, figures masked, the one that is kept; ADARUN_KEEP_SCREENS keeps what is there now."""
        file = SCREENS / f"{name}.txt"
        if os.environ.get("ADARUN_KEEP_SCREENS"):
            time.sleep(3.0)
            file.parent.mkdir(exist_ok=True)
            file.write_text(masked(self.screen()))
        self.until(lambda screen: masked(screen) == file.read_text())

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], check=False, capture_output=True)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened = []

    def open_(command: list[str], runtime: Path, width: int, height: int) -> Terminal:
        folder = tmp_path / str(len(opened))
        folder.mkdir()
        env = {"XDG_RUNTIME_DIR": str(runtime), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        opened.append(Terminal(command, env, width, height, folder))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


# --- in a terminal -------------------------------------------------------------------------------------------------------


@NEEDS_TMUX
@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50)])
def test_the_screens_of_a_running_job(
    width: int, height: int, watched: Watched, terminal: Callable[..., Terminal]
) -> None:
    """Workers, one worker, decisions and help look as they are kept, at this size, and q leaves the terminal as it was."""
    shown = terminal([str(BIN / "adarun"), "status", watched.run], watched.runtime, width, height)
    shown.shows(f"workers-{width}x{height}")
    shown.press("d")
    shown.until(lambda screen: "decisions, newest first" in screen)
    shown.press("h")
    shown.shows(f"help-{width}x{height}")
    shown.press("h", "Down", "Enter")
    shown.until(lambda screen: re.search(r"^ +steps \d+ to \d+", screen, re.MULTILINE) and "rank 1 on" in screen)
    shown.press("Escape")
    shown.shows(f"workers-{width}x{height}-picked")
    shown.press("q")
    shown.until(lambda screen: not screen.strip())


@NEEDS_TMUX
def test_the_screen_follows_resizes(watched: Watched, terminal: Callable[..., Terminal]) -> None:
    """When the window changes, so does the screen: its last line is always the one with the keys."""
    shown = terminal([str(BIN / "adarun"), "status", watched.run], watched.runtime, 80, 24)
    for width, height in ((80, 24), (120, 40), (60, 12)):
        shown.tmux("resize-window", "-t", "a", "-x", str(width), "-y", str(height))
        shown.until(lambda screen, height=height: screen.split("\n")[height - 1].startswith("s sort (slowest)"))


@NEEDS_TMUX
def test_a_paused_screen_stands_still(watched: Watched, terminal: Callable[..., Terminal]) -> None:
    """After p the figures stay, and after another p they move on."""
    shown = terminal([str(BIN / "adarun"), "status", watched.run], watched.runtime, 80, 24)
    shown.until(lambda screen: "elapsed" in screen)
    shown.press("p")
    still = shown.until(lambda screen: "PAUSED" in screen)
    steps = len(watched.job.events(Step))
    watched.job.until(lambda: len(watched.job.events(Step)) > steps + 60)
    assert shown.screen() == still
    shown.press("p")
    shown.until(lambda screen: "PAUSED" not in screen and screen.splitlines()[1] != still.splitlines()[1])


@NEEDS_TMUX
def test_several_jobs_are_chosen_from(
    watched: Watched, terminal: Callable[..., Terminal], start: Callable[..., Job], tmp_path: Path, scripts: Path
) -> None:
    """With two jobs a list comes first, arrows choose, Enter shows; without a terminal the list is printed."""
    (original,) = watched.runtime.glob("adarun/*.json")
    entry = msgspec.json.decode(original.read_bytes(), type=Entry)
    twin = original.with_name("20990101-000000-twin-0000.json")
    twin.write_bytes(msgspec.json.encode(msgspec.structs.replace(entry, run="20990101-000000-twin-0000", started=2e9)))
    try:
        shown = terminal([str(BIN / "adarun"), "status"], watched.runtime, 80, 24)
        shown.until(lambda screen: f"> {watched.run}" in screen and "20990101-000000-twin" in screen)
        shown.press("Down")
        shown.until(lambda screen: "> 20990101-000000-twin" in screen)
        shown.press("Enter")
        shown.until(lambda screen: "elapsed" in screen)
        printed = watched.status().succeed().stdout
        assert re.search(rf"{watched.run} +\d+:\d\d +2 +\d+ +\S+  training", printed)
        assert "20990101-000000-twin-0000" in printed
        refused = watched.status("--json").wait()
        assert refused.process.returncode == 2
        assert refused.stderr.startswith("adarun: 2 runs are meant; name one of ")
    finally:
        twin.unlink()


@NEEDS_TMUX
def test_live_shows_the_screen_under_the_script_s_output(
    terminal: Callable[..., Terminal], scripts: Path, tmp_path: Path
) -> None:
    """`adarun run --live`: the script's lines above, the screen below, and at the end the summary in a clean terminal."""
    end = tmp_path / "end"
    runs = ["--runs-dir", str(tmp_path / "runs")]
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    command = [str(BIN / "adarun"), "run", "--live", *runs, *TWO, str(scripts / "paced.py"), str(end)]
    shown = terminal(command, runtime, 100, 40)

    def both(screen: str) -> bool:
        lines = screen.split("\n")
        return any(line.startswith("epoch ") for line in lines[:20]) and any("elapsed" in line for line in lines[20:])

    shown.until(both)
    shown.until(lambda screen: "\nepoch 2\n" in screen and both(screen))
    end.touch()
    over = shown.until(lambda screen: "  log: " in screen)
    assert "elapsed" not in over
    assert "\nepoch 2\n" in over


# --- without a terminal --------------------------------------------------------------------------------------------------


def test_what_is_no_terminal_gets_one_plain_snapshot(watched: Watched) -> None:
    """The plain snapshot has the job, each worker, and no control characters."""
    job = watched.status(watched.run, PYTHONUTF8="1").succeed()
    assert job.stderr == ""
    assert "paced.py  training" in job.stdout
    assert "rank 1 holds the others back" in job.stdout
    assert "\x1b" not in job.stdout
    assert job.stdout == watched.status(watched.run[-6:], PYTHONUTF8="1").succeed().stdout or "paced" in job.stdout


def test_json_is_a_snapshot(watched: Watched) -> None:
    """--json prints one document, which has the version and decodes as a snapshot."""
    printed = watched.status("--json", watched.run).succeed().stdout
    seen = msgspec.json.decode(printed, type=Snapshot)
    assert json.loads(printed)["version"] == 1
    assert (seen.run, seen.script, seen.state, len(seen.workers)) == (watched.run, "paced.py", "training", 2)
    assert (seen.straggler, seen.cause) == (1, "compute")


def test_watch_prints_again_and_again(watched: Watched) -> None:
    """--watch N with --json prints a line every N seconds."""
    job = watched.status("--json", "--watch", "1", watched.run)
    job.until(lambda: job.stdout.count("\n") >= 3)
    job.stop()
    times = [json.loads(line)["at"] for line in job.stdout.splitlines()[:3]]
    assert times == sorted(set(times))


@pytest.mark.parametrize("seconds", ["-1", "0.01", "nan", "x"])
def test_a_watch_of_no_time_is_refused(seconds: str, watched: Watched) -> None:
    """An interval that cannot be is refused in one line, with exit code 2."""
    job = watched.status("--watch", seconds).wait()
    assert (job.process.returncode, job.stderr.count("\n")) == (2, 1)
    assert "--watch" in job.stderr


def test_an_unknown_run_is_an_error_with_a_next_step(watched: Watched) -> None:
    """A name that no run has ends with exit code 1 and one line."""
    job = watched.status("nothing-like-it").wait()
    assert (job.process.returncode, job.stdout) == (1, "")
    assert job.stderr == "adarun: no run of yours here is called nothing-like-it; adarun status lists those that run\n"


def test_status_starts_fast_and_without_torch_and_numpy(watched: Watched) -> None:
    """Showing a running job imports neither torch nor numpy."""
    program = (
        "import runpy, sys; sys.argv = ['adarun', 'status', sys.argv[1]]\n"
        "try:\n    runpy.run_module('adarun', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    env = {**os.environ, "XDG_RUNTIME_DIR": str(watched.runtime)}
    out = subprocess.run(
        [sys.executable, "-c", program, watched.run], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert "training" in out
    assert not set(out.rpartition("LOADED")[2].split()) & {"torch", "numpy", "psutil"}


# --- after the end -------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_summed_up_with_its_metrics_served_before(
    start: Callable[..., Job], scripts: Path, tmp_path: Path
) -> None:
    """While it runs --metrics-port serves it; afterwards its announcement is gone, and status says how it ended."""
    port = 29871
    watched = Watched(start, scripts, tmp_path, "--metrics-port", port)
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    with urllib.request.urlopen(urllib.request.Request(f"http://localhost:{port}/metrics", headers=accept)) as answer:
        text = answer.read().decode()
    assert text.endswith("# EOF\n")
    assert re.search(r'^adarun_worker_steps_total\{node="[^"]+",rank="1"\} \d', text, re.MULTILINE)
    assert len(list(watched.runtime.glob("adarun/*.json"))) == 1
    watched.end.touch()
    watched.job.succeed()
    assert list(watched.runtime.glob("adarun/*.json")) == []
    runs = watched.job.folder / "runs"
    said = " ".join(watched.status("--runs-dir", runs, watched.run).succeed().stdout.split())
    assert re.search(r"adarun: [\d.]+ s, \d+ steps, \d+ samples/s", said)
    assert f"{watched.run} ended " in said
    assert said.count("exit code 0") == 1
    seen = msgspec.json.decode(watched.status("--json", runs / watched.run).succeed().stdout, type=Snapshot)
    assert (seen.state, seen.exit_code, seen.run) == ("ended", 0, watched.run)
    assert {row.state for row in seen.workers} == {"gone"}


def test_a_taken_port_is_an_error_before_the_start(start: Callable[..., Job], scripts: Path, tmp_path: Path) -> None:
    """A port that cannot be had ends the command in one line, before any worker starts."""
    import socket

    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        job = start("adarun", "--metrics-port", port, *TWO, scripts / "paced.py", tmp_path / "end").wait()
    assert job.process.returncode == 1
    assert job.stderr.splitlines()[-1].startswith(f"adarun: --metrics-port {port} cannot be served (")
    assert job.events(Step) == []

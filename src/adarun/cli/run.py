"""Train with a script that torchrun can start, unmodified, and give each worker the share of the batch it can do.

Takes torchrun's command line, its options with dashes or underscores, and its PET_* variables. `adarun train.py` is short
for `adarun run train.py`. Options of adarun's own come from the environment too, as ADARUN_ADAPT and so on.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adarun.errors import UsageError, WorkersFailed
from adarun.launch import knobs
from adarun.launch.views import Views

if TYPE_CHECKING:
    from adarun.control.pace import Allowed
    from adarun.control.planner import Settings
    from adarun.policies import Tuning

TORCHRUN = "torchrun's options"
ADARUN = "adarun's options"
# What --sync-period, --compress, --topology and --outer are by default.
EXACT_KNOBS = ("1", "none", "allreduce", "none")
RING_WORKERS = 8
# Filled as typer reads the signature below.
TORCHRUN_NAMES: set[str] = set()


def spelled_out(token: str) -> str:
    """An option's name as it is defined: with dashes, and whole where its beginning can be only one of torchrun's."""
    name = token.replace("_", "-")
    if len(name) < 2 or name in TORCHRUN_NAMES:
        return name
    matches = [known for known in TORCHRUN_NAMES if known.startswith(name)]
    return matches.pop() if len(matches) == 1 else name


CONTEXT = {
    "allow_interspersed_args": False,
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": spelled_out,
    "max_content_width": 100,
}


class Adapt(str, Enum):
    """What adarun may do."""

    on = "on"
    observe = "observe"
    off = "off"


class BatchNorm(str, Enum):
    """What becomes of a model with BatchNorm."""

    freeze = "freeze"
    allow = "allow"


class LossReduction(str, Enum):
    """How the script reduces its loss over the samples of a batch."""

    mean = "mean"
    sum = "sum"


class Topology(str, Enum):
    """Whom the workers average their parameters with."""

    allreduce = "allreduce"
    gossip = "gossip"
    ring = "ring"
    auto = "auto"


class Compress(str, Enum):
    """How gradients are sent."""

    none = "none"
    bf16 = "bf16"
    powersgd = "powersgd"
    auto = "auto"


class Outer(str, Enum):
    """What is done with averaged parameters."""

    none = "none"
    nesterov = "nesterov"


def torchrun(text: str, *names: str) -> Any:
    """An option of torchrun's; torch's own parser gives it its meaning, default and PET_* variable."""
    TORCHRUN_NAMES.add(names[0][2:])
    return typer.Option(*names, help=text, rich_help_panel=TORCHRUN, show_default=False)


def adarun(text: str, name: str) -> Any:
    """An option of adarun's own."""
    return typer.Option(
        name,
        help=text,
        rich_help_panel=ADARUN,
        envvar=f"ADARUN_{name[2:].upper().replace('-', '_')}",
        show_envvar=False,
    )


def run(
    context: typer.Context,
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT",
            help="What to train with: a file, or what -m or --no-python make of it.",
            show_default=False,
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="The script's own arguments.", show_default=False)
    ] = None,
    adapt: Annotated[
        Adapt,
        adarun(
            "on: re-split the batch where it pays; observe: only log what on would do; off: only measure.", "--adapt"
        ),
    ] = Adapt.on,
    window: Annotated[
        int, adarun("Steps between two decisions; 0: at least 20 steps and at least 2 s.", "--window")
    ] = 0,
    shares: Annotated[
        str,
        adarun(
            "Fixed shares instead of measured ones, as proportions, a number a rank: 3,1. Several, as 3,1;1,3, take turns, one a window.",
            "--shares",
        ),
    ] = "",
    max_share: Annotated[
        int, adarun("The most samples per step that a worker may get; 0: no limit but its GPU's memory.", "--max-share")
    ] = 0,
    batchnorm: Annotated[
        BatchNorm,
        adarun(
            "freeze: keep the split even where BatchNorm trains on local statistics; allow: accept other statistics.",
            "--batchnorm",
        ),
    ] = BatchNorm.freeze,
    loss_reduction: Annotated[
        LossReduction, adarun("How the script's loss is reduced over a batch's samples.", "--loss-reduction")
    ] = LossReduction.mean,
    sync_period: Annotated[
        str,
        adarun(
            "Average the parameters every so many steps instead of the gradients in each: a number, a range as 1:32, or auto. 1 is exact.",
            "--sync-period",
        ),
    ] = "1",
    compress: Annotated[
        Compress, adarun("Compress gradients on their way; auto: where it pays. none is exact.", "--compress")
    ] = Compress.none,
    topology: Annotated[
        Topology,
        adarun(
            "allreduce: average over all workers; gossip: with one other at a time; ring: with both neighbours.",
            "--topology",
        ),
    ] = Topology.allreduce,
    outer: Annotated[
        Outer,
        adarun("nesterov: DiLoCo's outer step on the averages, from a sync period of 32 on.", "--outer"),
    ] = Outer.none,
    tune: Annotated[
        list[str] | None,
        adarun(
            "NAME=V1,V2,...: try these values, of {NAME} in the script's arguments or, in upper case, of an environment variable. May be given several times.",
            "--tune",
        ),
    ] = None,
    tune_epochs: Annotated[
        int,
        adarun(
            "How many epochs the script trains, for what may be spent on trying; 0: what its --epochs says, if anything.",
            "--tune-epochs",
        ),
    ] = 0,
    policy: Annotated[
        str,
        adarun(
            "What chooses among the settings of --tune, --compress auto and --topology auto: thompson, ucb, qlearning, fixed, off, ppo:FILE, or one that another package brings.",
            "--policy",
        ),
    ] = "thompson",
    runs_dir: Annotated[Path, adarun("Folder that gets a subfolder with the log of each run.", "--runs-dir")] = Path(
        "runs"
    ),
    live: Annotated[
        bool, adarun("Show the screen of adarun status in this terminal, under the script's output.", "--live")
    ] = False,
    metrics_port: Annotated[
        int,
        adarun("Serve OpenMetrics for Prometheus on this port; 0: do not. Needs adarun[metrics].", "--metrics-port"),
    ] = 0,
    nnodes: Annotated[
        str | None, torchrun("Number of nodes, or a range MIN:MAX for an elastic job.", "--nnodes")
    ] = None,
    nproc_per_node: Annotated[
        str | None, torchrun("Workers per node: a number, auto, cpu, gpu or xpu.", "--nproc-per-node")
    ] = None,
    rdzv_backend: Annotated[str | None, torchrun("Rendezvous backend.", "--rdzv-backend")] = None,
    rdzv_endpoint: Annotated[str | None, torchrun("Rendezvous endpoint, HOST:PORT.", "--rdzv-endpoint")] = None,
    rdzv_id: Annotated[str | None, torchrun("Job id, the same on all nodes.", "--rdzv-id")] = None,
    rdzv_conf: Annotated[str | None, torchrun("More rendezvous settings, KEY=VALUE,...", "--rdzv-conf")] = None,
    standalone: Annotated[
        bool, torchrun("One node, with a rendezvous of its own on a free port.", "--standalone")
    ] = False,
    max_restarts: Annotated[
        str | None, torchrun("How often a failed worker group is started again.", "--max-restarts")
    ] = None,
    monitor_interval: Annotated[
        str | None, torchrun("Seconds between two looks at the workers.", "--monitor-interval")
    ] = None,
    start_method: Annotated[
        str | None,
        torchrun("How workers of a function entry point are started: spawn, fork or forkserver.", "--start-method"),
    ] = None,
    event_log_handler: Annotated[
        str | None, torchrun("Registered handler of torch's own events.", "--event-log-handler")
    ] = None,
    role: Annotated[str | None, torchrun("Name of the workers' role.", "--role")] = None,
    module: Annotated[bool, torchrun("The script is a module, as with python -m.", "--module", "-m")] = False,
    no_python: Annotated[
        bool, torchrun("Run the script as a program of its own, without python.", "--no-python")
    ] = False,
    run_path: Annotated[bool, torchrun("Run the script, an absolute path, with runpy.run_path.", "--run-path")] = False,
    log_dir: Annotated[str | None, torchrun("Folder for the workers' output files.", "--log-dir")] = None,
    redirects: Annotated[
        str | None,
        torchrun(
            "Which output goes to files instead: 0 none, 1 stdout, 2 stderr, 3 both, or LOCAL_RANK:N,...",
            "--redirects",
            "-r",
        ),
    ] = None,
    tee: Annotated[str | None, torchrun("Which output goes to files as well; the same form.", "--tee", "-t")] = None,
    local_ranks_filter: Annotated[
        str | None, torchrun("Only these local ranks' output on the console, comma-separated.", "--local-ranks-filter")
    ] = None,
    duplicate_stdout_filters: Annotated[
        str | None,
        torchrun(
            "Also copy stdout lines that contain one of these to a file, comma-separated.", "--duplicate-stdout-filters"
        ),
    ] = None,
    duplicate_stderr_filters: Annotated[
        str | None, torchrun("The same for stderr.", "--duplicate-stderr-filters")
    ] = None,
    node_rank: Annotated[str | None, torchrun("This node's rank, for the static rendezvous.", "--node-rank")] = None,
    master_addr: Annotated[
        str | None, torchrun("Address of node 0, for the static rendezvous.", "--master-addr")
    ] = None,
    master_port: Annotated[str | None, torchrun("Port on node 0, for the static rendezvous.", "--master-port")] = None,
    local_addr: Annotated[
        str | None, torchrun("This node's own address, where it is guessed wrongly.", "--local-addr")
    ] = None,
    logs_specs: Annotated[
        str | None,
        torchrun("Entry point in the group torchrun.logs_specs that says where output goes.", "--logs-specs"),
    ] = None,
    numa_binding: Annotated[
        str | None,
        torchrun("Bind workers to the CPUs near their GPU: node, socket, exclusive or core-complex.", "--numa-binding"),
    ] = None,
    signals_to_handle: Annotated[
        str | None, torchrun("Signals that are passed on to the workers, comma-separated.", "--signals-to-handle")
    ] = None,
    shutdown_timeout: Annotated[
        str | None, torchrun("Seconds a worker has to end before it is killed.", "--shutdown-timeout")
    ] = None,
    virtual_local_rank: Annotated[
        bool, torchrun("Every worker sees its GPU as device 0 and LOCAL_RANK 0.", "--virtual-local-rank")
    ] = False,
) -> None:
    """Check the command line, start the job, print the summary."""
    arguments = arguments or []
    if (
        not (module or no_python or given_by_torchrun("MODULE") or given_by_torchrun("NO_PYTHON"))
        and not Path(script).is_file()
    ):
        raise UsageError(f"there is no script {script}; give the path of a file, or a module's name after -m")
    if window < 0:
        raise UsageError(f"--window {window} is negative; give a number of steps, or 0 to let adarun choose")
    if max_share < 0:
        raise UsageError(f"--max-share {max_share} is negative; give a number of samples, or 0 for no limit")
    if not 0 <= metrics_port < 1 << 16:
        raise UsageError(f"--metrics-port {metrics_port} is no port; give a number from 1 to 65535")
    scripted = parse_shares(shares)
    if scripted and adapt is not Adapt.on:
        raise UsageError(f"--shares changes the split, which --adapt {adapt.value} forbids; leave one of them out")
    knobs_given = (sync_period, compress.value, topology.value, outer.value)
    if knobs_given != EXACT_KNOBS and adapt is not Adapt.on:
        raise UsageError(
            f"--sync-period, --compress, --topology and --outer change the training, which --adapt {adapt.value} forbids; "
            "leave one of them out"
        )
    settings = knobs.parse(tune or [], arguments)
    if tune_epochs < 0:
        raise UsageError(f"--tune-epochs {tune_epochs} is negative; give the number of epochs that the script trains")
    from adarun.control.planner import Settings  # noqa: PLC0415 - numpy takes a tenth of a second
    from adarun.policies import Tuning, load  # noqa: PLC0415

    asked = Settings(adapt.value, window, scripted, max_share, allowed_pace(*knobs_given))
    num_epochs = tune_epochs or epochs_in(arguments)
    tuning = Tuning([knobs.in_words(setting) for setting in settings], policy, secrets.randbits(32), num_epochs)
    load(tuning)  # a policy that there is not is known before anything is started
    os.environ.update(
        ADARUN_ADAPT=adapt.value,
        ADARUN_BATCHNORM=batchnorm.value,
        ADARUN_LOSS_REDUCTION=loss_reduction.value,
        ADARUN_SYNC="" if knobs_given == EXACT_KNOBS else "on" if compress is Compress.none else "on,compress",
    )
    for variable in ("ADARUN_HUB", "ADARUN_ATTEMPT", "ADARUN_ATTACHED"):
        os.environ.pop(variable, None)  # of a job in whose worker this one was started
    given = torchrun_arguments(context, script, arguments)
    sys.exit(job(given, script, runs_dir, asked, tuning, settings, Views(live, metrics_port)))


def given_by_torchrun(name: str) -> bool:
    """Whether the flag `name` is set by its PET_* variable."""
    return os.environ.get(f"PET_{name}", "0") != "0"


def parse_shares(text: str) -> list[list[int]]:
    """`3,1;1,3` as [[3, 1], [1, 3]].

    Raises:
        UsageError: it is something else.
    """
    try:
        splits = [[int(share) for share in split.split(",")] for split in text.split(";")] if text else []
    except ValueError:
        splits = [[0]]
    if any(share < 1 for split in splits for share in split) or len({len(split) for split in splits}) > 1:
        raise UsageError(f"--shares {text} is not a list of positive numbers, one a rank, as in 3,1 or 3,1;1,3")
    return splits


def allowed_pace(sync_period: str, compress: str, topology: str, outer: str) -> Allowed:
    """What --sync-period, --compress, --topology and --outer allow.

    Raises:
        UsageError: the period is not one, or too short for the outer step.
    """
    from adarun.control.pace import MOST, OUTER_PERIOD, Allowed  # noqa: PLC0415 - numpy takes a tenth of a second

    match = re.fullmatch(r"(\d+)(?::(\d+))?", f"1:{MOST}" if sync_period == "auto" else sync_period)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most <= MOST:
        raise UsageError(
            f"--sync-period {sync_period} is no number from 1 to {MOST}, no range of them as 1:32, and not auto"
        )
    if outer != "none" and most < OUTER_PERIOD:
        raise UsageError(
            f"--outer {outer} needs many local steps; give --sync-period {OUTER_PERIOD} or more, or leave it out"
        )
    compressions = ("none", "bf16", "powersgd") if compress == "auto" else (compress,)
    topologies = ("allreduce", "gossip") if topology == "auto" else (topology,)
    return Allowed((least, most), compressions, topologies, outer)


def torchrun_arguments(context: typer.Context, script: str, arguments: list[str]) -> list[str]:
    """The command line as torch's own parser takes it: what was given of its options, the script, the script's arguments."""
    given = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if getattr(parameter, "rich_help_panel", None) == TORCHRUN and value not in (None, False):
            given.append(parameter.opts[0] if value is True else f"{parameter.opts[0]}={value}")
    return [*given, script, *arguments]


def epochs_in(arguments: list[str]) -> int:
    """How many epochs the script's own arguments ask for, 0 if they do not say."""
    found = re.search(r"(?:^| )--(?:num[-_]|max[-_])?epochs[= ](\d+)", " ".join(arguments))
    return int(found[1]) if found else 0


def job(
    arguments: list[str],
    script: str,
    runs_dir: Path,
    asked: Settings,
    tuning: Tuning,
    settings: list[knobs.Setting],
    views: Views,
) -> int:
    """Run the job and return the exit code."""
    # torch takes 1.5 to 2 s to import: only now is it needed.
    from adarun.launch import agent  # noqa: PLC0415
    from adarun.launch.record import Recording  # noqa: PLC0415

    configured = agent.configure(arguments)
    num_workers = configured[0].max_nodes * configured[0].nproc_per_node
    if asked.scripted and len(asked.scripted[0]) != num_workers:
        raise UsageError(
            f"--shares names {len(asked.scripted[0])} workers and the job has {num_workers}; give a number a rank"
        )
    if "ring" in asked.allowed.topologies and num_workers > RING_WORKERS:
        raise UsageError(
            f"--topology ring is for up to {RING_WORKERS} workers and the job has {num_workers}; use gossip, which "
            "mixes faster"
        )
    if settings and configured[0].max_nodes > 1:
        raise UsageError("--tune restarts the workers of one node; it cannot be used with --nnodes above 1")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(script).stem}-{secrets.token_hex(2)}"
    with Recording(runs_dir, name, sys.argv[1:], asked, tuning, views) as recording:
        try:
            agent.launch(configured, recording.hub, recording.hub.workers_ended, settings)
        except WorkersFailed as error:
            sys.stderr.write(f"{error}\n")
            recording.exit_code = error.exit_code
        except agent.SignalException as error:
            recording.exit_code = agent.exit_code_of(error)
        except KeyboardInterrupt:
            recording.exit_code = 130
    return recording.exit_code

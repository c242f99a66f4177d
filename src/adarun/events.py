"""Every message that crosses a process or a file: frozen structs, told apart by their "type" field.

Times are seconds, moments are Unix times, ranks are global. On the socket a message is msgpack behind a 4-byte
big-endian length; in the run log it is one line of JSON. A field is only ever added, with a default, so that an older log
stays readable; anything else raises SCHEMA_VERSION.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

SCHEMA_VERSION = 1
MAX_MESSAGE_BYTES = 1 << 20
MAX_REPORTS = 4096
SNAPSHOT_VERSION = 1
# 2,000 workers take about 1 MiB.
MAX_SNAPSHOT_BYTES = 16 << 20

Rank = Annotated[int, Meta(ge=0, lt=1 << 20)]
Count = Annotated[int, Meta(ge=0, lt=1 << 40)]
Positive = Annotated[int, Meta(ge=1, lt=1 << 40)]
Seconds = Annotated[float, Meta(ge=0.0, lt=1e9)]
# A Unix time; the bounds also keep out what JSON cannot say.
Moment = Annotated[float, Meta(ge=0.0, lt=1e12)]
Text = Annotated[str, Meta(max_length=2000)]


def apportion(weights: Sequence[int], total: int) -> list[int]:
    """Cut `total` samples in proportion to `weights`: at least one each, largest remainders first, lower rank on a tie.

    Raises:
        ValueError: there are fewer samples than workers.
    """
    if total < len(weights):
        raise ValueError(f"{total} samples cannot be cut among {len(weights)} workers")
    whole = sum(weights)
    shares = [max(1, total * weight // whole) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole))
    for i in by_remainder[: max(0, total - sum(shares))]:
        shares[i] += 1
    # The ones that were given a sample they had no claim to take it from the largest.
    for _ in range(sum(shares) - total):
        shares[shares.index(max(shares))] -= 1
    return shares


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all messages."""


# --- worker -> hub ---------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """A worker's first message."""

    rank: Rank
    local_rank: Rank
    world_size: Positive
    num_nodes: Positive
    attempt: Count
    pid: Positive
    host: Text
    device: Text
    torch: Text


class Step(Message, frozen=True, tag="step"):
    """Where one worker's time went in one step. The phases partition it: their sum is the step's length.

    `backward` ends when all local gradients are ready, `wait` when the synchronisation is over; everything but `wait` is
    busy time. `update` is the rest of the step: the optimizer and whatever the script does before it draws again.
    `counted` is False where other work (an evaluation, a checkpoint) was seen inside the step.
    """

    rank: Rank
    step: Count
    samples: Count
    data: Seconds
    forward: Seconds
    backward: Seconds
    wait: Seconds
    update: Seconds
    ended: Moment
    counted: bool = True

    @property
    def busy_seconds(self) -> float:
        """Time in which this worker was not waiting for the others."""
        return self.data + self.forward + self.backward + self.update

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.busy_seconds + self.wait


class Steps(Message, frozen=True, tag="steps"):
    """A worker's reports since the last ones; `lost` counts those dropped because the hub did not read."""

    reports: Annotated[list[Step], Meta(max_length=MAX_REPORTS)]
    lost: Count = 0


class PlanRequest(Message, frozen=True, tag="plan_request"):
    """Asks for the plan of `step`. The facts must be the same on all ranks; `frozen` is why this one must not be re-split."""

    step: Count
    global_batch: Positive
    dataset_size: Count
    frozen: Text = ""
    # Which of this rank's loops over a training loader asks, and the step at which that loop began.
    loop: Count = 0
    loop_start: Count = 0


class Notice(Message, frozen=True, tag="notice"):
    """Something the user should know, said once per job: `key` is the same on every rank that says it.

    `freezes`: the split must stay even. `synchronises`: the workers must synchronise in every step, as under torchrun.
    """

    key: Text
    text: Text
    freezes: bool = False
    rank: int = -1
    synchronises: bool = False


class Loop(Message, frozen=True, tag="loop"):
    """A worker begins a loop over its training loader, or goes on after a checkpoint where it batches by itself.

    `epoch` is what the script last gave to `set_epoch`, or -1. `saved`: since its last loop the worker has written a
    checkpoint, so the script can be started again from here.
    """

    step: Count
    at: Moment
    epoch: int = -1
    saved: bool = False
    rank: int = -1


class Meeting(Message, frozen=True, tag="meeting"):
    """Asks whether all ranks are about to evaluate or to save after `step`, so that their replicas may be averaged first."""

    step: Count


class Averaged(Message, frozen=True, tag="averaged"):
    """The replicas were averaged after `step`, `steps` steps after the last time.

    `distance` is this replica's from the average, `norm` the average's own length, both Euclidean over all parameters; None
    where they are not finite.
    `checksum` is the same on all ranks if the replicas are; None after a gossip, which leaves them apart.
    """

    step: Count
    steps: Positive
    seconds: Seconds
    distance: float | None = None
    norm: float | None = None
    checksum: int | None = None
    rank: int = -1


class Learned(Message, frozen=True, tag="learned"):
    """How a worker's training went up to `step`: the mean loss of `steps` backward passes, their standard deviation, the rate.

    None where unknown or not finite.
    """

    step: Count
    steps: Positive
    loss: float | None = None
    spread: float | None = None
    lr: float | None = None
    rank: int = -1


# --- hub -> worker ---------------------------------------------------------------------------------------------------


class Plan(Message, frozen=True, tag="plan"):
    """What every worker does in steps [start, stop): `shares` samples per rank and step, summing to the global batch.

    `sync_period` is H: parameters are averaged every H steps; 1 is DDP's gradient averaging in every step. `compression` of
    the gradients is none, bf16 or powersgd; `topology` of the averaging is allreduce, gossip or ring; `outer` is what is
    done with the average: none or nesterov.
    """

    number: Count
    start: Count
    stop: Positive
    shares: list[Positive]
    attempt: Count = 0
    reason: str = ""
    sync_period: Positive = 1
    compression: str = "none"
    topology: str = "allreduce"
    outer: str = "none"

    @property
    def even(self) -> bool:
        """All workers have the same share, as under torchrun."""
        return len(set(self.shares)) <= 1

    def same_pace(self, other: Plan) -> bool:
        """Whether the workers synchronise in the same way under both."""
        mine = (self.sync_period, self.compression, self.topology, self.outer)
        return mine == (other.sync_period, other.compression, other.topology, other.outer)

    def shares_for(self, global_batch: int) -> list[int]:
        """The shares of a batch of another size: the last one of an epoch, or another loader's."""
        if global_batch == sum(self.shares):
            return self.shares
        return apportion(self.shares, global_batch)


class Met(Message, frozen=True, tag="met"):
    """The answer to `Meeting`, the same for all ranks that ask."""

    all: bool


class Refusal(Message, frozen=True, tag="refusal"):
    """The hub will not serve this client, and why."""

    reason: Text


# --- viewer <-> hub --------------------------------------------------------------------------------------------------


class Watch(Message, frozen=True, tag="watch"):
    """A viewer's first message, and its next ones when it wants the recent steps of another worker; -1: of none."""

    rank: Annotated[int, Meta(ge=-1, lt=1 << 20)] = -1


class WorkerNow(msgspec.Struct, frozen=True):
    """A worker as viewers see it: means per step over its last steps, totals over the run, None where unknown.

    `busy_seconds` includes `data_seconds`. `state` is starting, training, silent or gone.
    """

    rank: int
    node: str
    device: str
    pid: int
    state: str
    share: int | None = None
    step: int | None = None
    samples_per_second: float = 0.0
    busy_seconds: float = 0.0
    wait_seconds: float = 0.0
    data_seconds: float = 0.0
    cpu_fraction: float | None = None
    memory_bytes: int | None = None
    gpu_fraction: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_capacity_bytes: int | None = None
    total_steps: int = 0
    total_samples: int = 0
    total_busy_seconds: float = 0.0
    total_wait_seconds: float = 0.0
    total_data_seconds: float = 0.0
    lost_reports: int = 0


class Said(msgspec.Struct, frozen=True):
    """A decision in words; `changed` says whether something is another way since."""

    at: float
    text: str
    changed: bool = False


class Snapshot(Message, frozen=True, tag="snapshot"):
    """A job at one moment, for viewers. `adarun status --json` prints it: what raises `version` is what breaks a reader.

    `state` is starting, training, silent, restarting or ended. `gain` is over the even split. `history` are samples per
    second, one for each `history_seconds`, the newest last. `recent` are the last steps of the ranks that were asked for.
    """

    version: int
    run: str
    command: list[str]
    script: str
    host: str
    folder: str
    log: str
    pid: int
    started: float
    at: float
    state: str
    attempt: int
    world_size: int
    num_nodes: int
    workers: list[WorkerNow]
    exit_code: int | None = None
    epoch: int | None = None
    num_epochs: int | None = None
    step: int | None = None
    left_seconds: float | None = None
    samples_per_second: float = 0.0
    history: list[float] = []
    history_seconds: float = 2.0
    gain: float | None = None
    gain_error: float | None = None
    straggler: int | None = None
    cause: str = ""
    cause_text: str = ""
    plan: Plan | None = None
    setting: str = ""
    guard: str = ""
    decisions: list[Said] = []
    num_changes: int = 0
    warnings: list[str] = []
    recent: dict[int, list[Step]] = {}


# --- only in the log -------------------------------------------------------------------------------------------------


class RunStarted(Message, frozen=True, tag="run_started"):
    """The first line of every log."""

    schema: int
    run: str
    command: list[str]
    at: float


class WorkersStarted(Message, frozen=True, tag="workers_started"):
    """A worker group came up: at the start, and again after each restart."""

    attempt: int
    ranks: list[int]
    world_size: int
    num_nodes: int
    group_rank: int
    at: float


class Attached(Message, frozen=True, tag="attached"):
    """A worker said hello."""

    hello: Hello
    at: float


class Asked(Message, frozen=True, tag="asked"):
    """A worker asked for its first plan, or gives another reason to stay even: without these no plan can be repeated."""

    rank: int
    step: int
    frozen: str = ""


class Window(Message, frozen=True, tag="window"):
    """What was measured under the shares just run, one entry per rank: the controller's input."""

    plan: int
    steps: int
    step_seconds: float
    samples: list[float]
    busy_seconds: list[float]
    wait_seconds: list[float]
    noise: list[float]
    # The part of a step that no worker spent on its own work: communication that nothing hid.
    sync_seconds: float = 0.0


class Decision(Message, frozen=True, tag="decision"):
    """What the controller did at a window's end. `gain` and `gain_error` are relative: 0.5 is one and a half times as fast."""

    plan: int
    before: list[int]
    proposed: list[int]
    chosen: list[int]
    fixed_seconds: list[float]
    sample_seconds: list[float]
    gain: float
    gain_error: float
    reason: str
    at: float = 0.0


class Tuned(Message, frozen=True, tag="tuned"):
    """Under which of its settings a job goes on after a lap. `rates` are samples per second, an entry a setting, 0 if unknown."""

    lap: int
    before: str
    chosen: str
    rates: list[float]
    propensities: list[float]
    restart: bool
    cost_seconds: float
    reason: str
    at: float = 0.0


class Paced(Message, frozen=True, tag="paced"):
    """How the workers synchronise after the window of `plan`: settings by name, as `sync_period=8 compression=none ...`.

    `communication` is the part of a step, 0 to 1, that goes to synchronisation that nothing hid, `distance` the replicas'
    from their average, relative to its length; `loss` and `forecast` are the window's and what it was expected to be. None
    where unknown. `options`, `propensities` are of the settings that a policy chose from, if one did.
    """

    plan: int
    before: str
    chosen: str
    communication: float
    reason: str
    gain: float = 0.0
    distance: float | None = None
    loss: float | None = None
    forecast: float | None = None
    lr: float | None = None
    options: list[str] = []
    propensities: list[float] = []
    at: float = 0.0


class Resources(Message, frozen=True, tag="resources"):
    """A worker's use of its machine over the last interval; `gpu_*` are None where there is none."""

    rank: int
    cpu_fraction: float
    memory_bytes: int
    at: float
    gpu_fraction: float | None = None
    gpu_memory_bytes: int | None = None
    gpu_capacity_bytes: int | None = None


class Refused(Message, frozen=True, tag="refused"):
    """The hub turned a client away."""

    reason: str
    pid: int
    at: float


class Lost(Message, frozen=True, tag="lost"):
    """Reports of this rank that never reached the log."""

    rank: int
    reports: int


class WorkersEnded(Message, frozen=True, tag="workers_ended"):
    """A worker group is gone: `state` is torch's word for it."""

    attempt: int
    state: str
    at: float


class RunEnded(Message, frozen=True, tag="run_ended"):
    """The last line of a log whose launcher came to its end."""

    exit_code: int
    at: float


FromWorker = Hello | Steps | PlanRequest | Notice | Loop | Meeting | Averaged | Learned
ToWorker = Plan | Met | Refusal
ToHub = FromWorker | Watch
ToViewer = Snapshot | Refusal
Logged = (
    RunStarted
    | WorkersStarted
    | Attached
    | Asked
    | Step
    | Window
    | Decision
    | Tuned
    | Plan
    | Notice
    | Loop
    | Averaged
    | Learned
    | Paced
    | Resources
    | Refused
    | Lost
    | WorkersEnded
    | RunEnded
)


def frame(message: ToHub | ToWorker | ToViewer) -> bytes:
    """The bytes of a message on the socket."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "big") + body

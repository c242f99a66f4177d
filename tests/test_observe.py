"""The observer: its phases partition every step, on a clock that the test turns."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adarun.events import MAX_REPORTS, Step, Steps
from adarun.worker import observe
from adarun.worker.observe import BACKWARD, UPDATE, WAIT, Observer

# A tick is exact in binary and in the seven decimals of a report, so that sums are exact.
TICK = 1 / 64
UNIX = 1_700_000_000.0


class Clock:
    """Stands in for the `time` module in observe.py."""

    def __init__(self, start: float = 8.0) -> None:
        self.now = start

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return UNIX + self.now

    def tick(self, ticks: int) -> None:
        self.now += ticks * TICK


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(observe, "time", clock)
    return clock


def drained(observer: Observer) -> list[Step]:
    steps = observer.drain()
    return list(steps.reports) if steps is not None else []


def train(
    observer: Observer, clock: Clock, step: int, ticks: tuple[int, int, int, int, int], samples: int = 32
) -> None:
    """One step as a training loop makes it, with the given ticks of data, forward, backward, wait and update."""
    data, forward, backward, wait, update = ticks
    observer.begin()
    clock.tick(data)
    observer.drawn(step, samples)
    clock.tick(forward)
    observer.phase(BACKWARD)
    clock.tick(backward)
    observer.phase(WAIT)
    clock.tick(wait)
    observer.phase(UPDATE)
    clock.tick(update)


def phases(step: Step) -> tuple[float, ...]:
    return tuple(seconds / TICK for seconds in (step.data, step.forward, step.backward, step.wait, step.update))


def test_each_phase_has_its_own_time(clock: Clock) -> None:
    """Data, forward, backward, wait and update are told apart to the tick, with the step's number and samples."""
    observer = Observer(3)
    train(observer, clock, 7, (1, 2, 4, 8, 16), samples=24)
    observer.begin()
    (step,) = drained(observer)
    assert phases(step) == (1, 2, 4, 8, 16)
    assert (step.rank, step.step, step.samples, step.counted) == (3, 7, 24, True)
    assert step.busy_seconds == 23 * TICK
    assert step.seconds == 31 * TICK


# A phase that begins, after some ticks.
MARKS = st.lists(st.tuples(st.sampled_from([BACKWARD, WAIT, UPDATE]), st.integers(0, 50)), max_size=12)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), MARKS), min_size=1, max_size=6))
def test_the_phases_partition_every_step(steps: list[tuple[int, int, list[tuple[int, int]]]]) -> None:
    """Whatever phases a script goes through, and how often, they sum to the step's length, and steps follow without gaps."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(observe, "time", clock)
        observer = Observer(0)
        began = [clock.now]
        for number, (data, forward, marks) in enumerate(steps):
            observer.begin()
            clock.tick(data)
            observer.drawn(number, 1)
            clock.tick(forward)
            for phase, ticks in marks:
                observer.phase(phase)
                clock.tick(ticks)
            began.append(clock.now)
        observer.end()
        reports = drained(observer)
    assert [step.seconds for step in reports] == [after - before for before, after in itertools.pairwise(began)]
    assert [step.data / TICK for step in reports] == [data for data, _, _ in steps]
    for step, (_, forward, marks) in zip(reports, steps, strict=True):
        totals = {phase: sum(ticks for other, ticks in marks if other == phase) for phase in (BACKWARD, WAIT, UPDATE)}
        assert phases(step)[1:] == (forward, totals[BACKWARD], totals[WAIT], totals[UPDATE])


def test_several_backward_passes_of_one_step_add_up(clock: Clock) -> None:
    """With gradient accumulation inside a step, its backward passes and waits are summed."""
    observer = Observer(0)
    observer.begin()
    observer.drawn(0, 32)
    for _ in range(3):
        observer.phase(BACKWARD)
        clock.tick(2)
        observer.phase(WAIT)
        clock.tick(1)
        observer.phase(UPDATE)
        clock.tick(5)
    observer.end()
    (step,) = drained(observer)
    assert phases(step) == (0, 0, 6, 3, 15)


def test_a_step_ends_at_a_unix_time(clock: Clock) -> None:
    """A step's end is a moment that other machines' logs can be compared with."""
    observer = Observer(0)
    clock.tick(3)
    train(observer, clock, 0, (1, 1, 1, 1, 1))
    observer.end()
    assert drained(observer)[0].ended == UNIX + clock.now


def test_a_clock_that_is_set_does_not_change_a_steps_length(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are measured on the clock that nobody sets."""
    observer = Observer(0)
    monkeypatch.setattr(clock, "time", lambda: 0.0)
    train(observer, clock, 0, (1, 1, 1, 1, 1))
    observer.end()
    assert drained(observer)[0].seconds == 5 * TICK


def test_time_between_two_loops_belongs_to_no_step(clock: Clock) -> None:
    """What a script does after an epoch and before the next is not counted."""
    observer = Observer(0)
    train(observer, clock, 0, (1, 1, 1, 1, 1))
    observer.begin()
    observer.end()
    clock.tick(1000)
    train(observer, clock, 1, (1, 1, 1, 1, 1))
    observer.end()
    assert [step.seconds for step in drained(observer)] == [5 * TICK, 5 * TICK]


def test_phases_outside_of_a_step_are_not_recorded(clock: Clock) -> None:
    """A backward pass before the first batch is no part of any step."""
    observer = Observer(0)
    observer.phase(BACKWARD)
    clock.tick(9)
    train(observer, clock, 0, (1, 2, 3, 4, 5))
    observer.end()
    observer.phase(BACKWARD)
    clock.tick(9)
    observer.end()
    assert [phases(step) for step in drained(observer)] == [(1, 2, 3, 4, 5)]


def test_a_backward_pass_while_a_batch_is_drawn_is_part_of_drawing_it(clock: Clock) -> None:
    """Until the script has its batch, whatever happens is the time for data."""
    observer = Observer(0)
    observer.begin()
    clock.tick(1)
    observer.phase(BACKWARD)
    clock.tick(2)
    observer.drawn(0, 32)
    clock.tick(4)
    observer.end()
    assert [phases(step) for step in drained(observer)] == [(3, 4, 0, 0, 0)]


def test_a_step_with_an_evaluation_in_it_is_not_counted(clock: Clock) -> None:
    """The step in which something else happened says so, and only that one."""
    observer = Observer(0)
    for number in range(4):
        train(observer, clock, number, (1, 1, 1, 1, 1))
        if number == 1:
            observer.disturb()
            clock.tick(500)
    observer.end()
    assert [step.counted for step in drained(observer)] == [True, False, True, True]


def test_an_evaluation_between_two_loops_disturbs_no_step(clock: Clock) -> None:
    """An evaluation after the last step of an epoch leaves the next epoch's first step counted."""
    observer = Observer(0)
    train(observer, clock, 0, (1, 1, 1, 1, 1))
    observer.end()
    observer.disturb()
    train(observer, clock, 1, (1, 1, 1, 1, 1))
    observer.end()
    assert [step.counted for step in drained(observer)] == [True, True]


def test_only_finished_steps_are_drained(clock: Clock) -> None:
    """A step is reported once, when it is over, and an observer with nothing new says nothing."""
    observer = Observer(0)
    assert observer.drain() is None
    train(observer, clock, 0, (1, 1, 1, 1, 1))
    assert observer.drain() is None
    observer.begin()
    assert [step.step for step in drained(observer)] == [0]
    assert observer.drain() is None


def test_at_most_a_message_full_is_drained_at_once(clock: Clock) -> None:
    """More steps than fit into one message come in several, in order."""
    observer = Observer(0)
    for number in range(MAX_REPORTS + 3):
        train(observer, clock, number, (0, 0, 1, 0, 0))
    observer.end()
    sizes = []
    numbers = []
    while (steps := observer.drain()) is not None:
        sizes.append(len(steps.reports))
        numbers += [step.step for step in steps.reports]
    assert sizes == [MAX_REPORTS, 3]
    assert numbers == list(range(MAX_REPORTS + 3))


def test_reports_that_nobody_fetches_are_dropped_and_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the hub does not read, the oldest steps go, their number is reported once, and training goes on."""
    monkeypatch.setattr(observe, "MAX_PENDING", 3)
    observer = Observer(0)
    for number in range(10):
        train(observer, clock, number, (0, 0, 1, 0, 0))
    observer.end()
    steps = observer.drain()
    assert isinstance(steps, Steps)
    assert ([step.step for step in steps.reports], steps.lost) == ([7, 8, 9], 7)
    assert observer.drain() is None


class Event:
    """A CUDA event: knows when the stream, which runs behind the host, has passed it."""

    def __init__(self, stream: SimpleNamespace) -> None:
        self._stream = stream
        self.at = -1.0

    def record(self) -> None:
        self.at = self._stream.queued

    def query(self) -> bool:
        return self.at <= self._stream.done

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1000.0


def test_on_cuda_time_is_the_devices_and_nobody_waits_for_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device runs behind, a step is reported when the device has finished it, with the device's times."""
    stream = SimpleNamespace(queued=0.0, done=0.0)
    monkeypatch.setattr(observe.torch.cuda, "Event", lambda enable_timing: Event(stream))
    observer = Observer(0)
    observer.cuda = True
    for number in range(2):
        observer.begin()
        observer.drawn(number, 32)
        stream.queued += 2.0
        observer.phase(BACKWARD)
        stream.queued += 4.0
        observer.phase(UPDATE)
        clock.tick(1)
    observer.end()
    assert observer.drain() is None
    stream.done = 6.0
    (step,) = drained(observer)
    assert (step.step, step.forward, step.backward, step.update) == (0, 2.0, 4.0, 0.0)
    stream.done = 12.0
    assert [step.step for step in drained(observer)] == [1]

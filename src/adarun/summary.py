"""What is printed when a run ends: where the time went, who had which share, what it brought."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from adarun.control.pace import Pacer
from adarun.control.planner import Planner
from adarun.control.tuner import Tuner
from adarun.runlog import read
from adarun.screen.finished import snapshot_of
from adarun.state import State, fold


def summary(planner: Planner, tuner: Tuner | None, seconds: float, log: Path) -> Group:
    """The summary as something rich can print; `seconds` is the launcher's own time from start to end."""
    state = planner.state
    lines = [headline(state, seconds)]
    if state.totals:
        lines.append(gain_line(planner))
    if planner.pacer is not None and state.plan is not None:
        lines.append(pace_line(planner, planner.pacer))
    if tuner is not None:
        lines.append(tuning_line(tuner))
    said = (planner.why_even(), planner.why_exact() if planner.pacer is not None else "")
    lines += [Text(f"  note: {notice.text}") for notice in state.notices.values() if notice.text not in said]
    lines.append(Text(f"  log: {log}"))
    return Group(lines[0], *([workers_table(state)] if state.totals else []), *lines[1:])


def headline(state: State, seconds: float) -> Text:
    """Time, steps, throughput."""
    if not state.totals:
        return Text(f"adarun: {seconds:.1f} s; no training step was seen, so nothing was measured")
    totals = state.totals.values()
    began, ended = min(t.first_began for t in totals), max(t.last_ended for t in totals)
    rate = sum(t.samples for t in totals) / max(1e-9, ended - began)
    return Text(f"adarun: {seconds:.1f} s, {max(t.steps for t in totals)} steps, {rate:.0f} samples/s", style="bold")


def workers_table(state: State) -> Table:
    """A row a worker."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("  rank", "share", "busy/step", "wait/step", "waiting", "data", "cpu", "memory"):
        table.add_column(column, justify="right")
    for rank, totals in sorted(state.totals.items()):
        used = state.resources.get(rank)
        share = str(state.plan.shares[rank]) if state.plan else f"{totals.samples / max(1, totals.steps):.0f}"
        table.add_row(
            str(rank),
            share,
            f"{totals.busy_seconds / totals.steps * 1e3:.1f} ms",
            f"{totals.wait / totals.steps * 1e3:.1f} ms",
            f"{1.0 - totals.utilisation:.0%}",
            f"{totals.data / totals.steps * 1e3:.1f} ms",
            f"{used.cpu_fraction:.0%}" if used else "-",
            f"{used.memory_bytes / 2**20:.0f} MiB" if used else "-",
        )
    return table


def gain_line(planner: Planner) -> Text:
    """What the shares brought, or why they stayed as they were."""
    state, controller, why_even = planner.state, planner.controller, planner.why_even()
    if state.plan is None:
        return Text(f"  not adapted: {why_even or 'the script draws no batches that adarun can cut'}")
    if why_even and not state.ever_uneven:
        return Text(f"  shares stayed even: {why_even}")
    if controller is None or controller.actual_seconds == 0.0:
        return Text("  not adapted: the run was too short to measure")
    if not state.ever_uneven:
        return Text(f"  shares stayed even: {why_even or state.plan.reason}")
    if planner.scripted:
        return Text("  shares as given by --shares")
    gain = controller.even_seconds / controller.actual_seconds - 1.0
    error = controller.gain_error
    return Text(f"  estimated gain over the even split: {gain:+.0%} (give or take {error:.0%})")


def pace_line(planner: Planner, pacer: Pacer) -> Text:
    """How the workers synchronised in the end, and why."""
    if forced := planner.why_exact():
        return Text(f"  synchronised in every step: {forced}")
    plans = planner.state.plans
    exact = sum(plan.stop - plan.start for plan in plans if plan.same_pace(plans[0]))
    part = exact / max(1, plans[-1].stop - plans[0].start)
    return Text(
        f"  synchronised as torchrun does in {part:.0%} of the planned steps; in the end {pacer.pace.name}: {pacer.reason}"
    )


def tuning_line(tuner: Tuner) -> Text:
    """Which setting was found best, what it brought, and what finding it has cost."""
    if not tuner.ever_saved:
        return Text(
            "  --tune tried nothing: no checkpoint was seen, without which a restart would lose the work "
            "(torch.save, torch.distributed.checkpoint, or adarun.checkpointed())"
        )
    measured = sum(rate > 0.0 for rate in tuner.rates)
    best, first = tuner.rates[tuner.incumbent], tuner.rates[0]
    gain = f", {best / first - 1.0:+.0%} over the first setting" if first else ""
    return Text(
        f"  tuned: {tuner.names[tuner.incumbent]} is the best of {measured} settings tried ({best:.0f} samples/s{gain}); "
        f"{tuner.num_restarts} restarts took {sum(tuner.restart_seconds[1:]):.0f} s"
    )


def of_log(folder: Path) -> Group:
    """The summary of a run that is over, from its log."""
    state, seen = State(), snapshot_of(folder)
    for event in read(folder):
        fold(state, event)
    lines = [headline(state, max(0.0, seen.at - seen.started))]
    if seen.gain is not None:
        error = f" (give or take {seen.gain_error:.0%})" if seen.gain_error is not None else ""
        lines.append(Text(f"  estimated gain over the even split: {seen.gain:+.0%}{error}"))
    lines += [Text(f"  note: {text}") for text in seen.warnings]
    how = "its launcher was killed" if seen.exit_code is None else f"exit code {seen.exit_code}"
    lines.append(Text(f"  {seen.run} ended {datetime.fromtimestamp(seen.at):%Y-%m-%d %H:%M:%S}: {how}"))
    lines.append(Text(f"  log: {folder}"))
    return Group(lines[0], *([workers_table(state)] if state.totals else []), *lines[1:])

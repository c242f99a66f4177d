"""The metrics are what the library's own parser takes for OpenMetrics, with the names that are documented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from adarun.events import Resources
from adarun.report.openmetrics import COUNTERS, GAUGES, JOB_COUNTERS, JOB_GAUGES, Collector
from test_screen import trained

ROOT = Path(__file__).parents[1]
NAMES = {"adarun", *COUNTERS, *GAUGES, *JOB_COUNTERS, *JOB_GAUGES}


def exposed() -> dict[str, Any]:
    model = trained()
    model.see(Resources(0, 0.9, 1 << 28, 1.0, gpu_fraction=0.5, gpu_memory_bytes=7, gpu_capacity_bytes=9))
    registry = CollectorRegistry()
    registry.register(Collector(lambda: model.snapshot(1004.0)))
    text = generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_the_parser_reads_back_what_was_measured() -> None:
    """Values and labels come back from the library's parser as they are in the snapshot."""
    found = exposed()
    samples = {(s.labels["rank"], s.labels["node"]): s.value for s in found["adarun_worker_steps"].samples}
    assert samples == {("0", "here"): 40.0, ("1", "here"): 40.0}
    assert [s.value for s in found["adarun_samples_per_second"].samples] == pytest.approx([640.0])
    assert [s.value for s in found["adarun_worker_memory_bytes"].samples] == [float(1 << 28)]
    assert found["adarun"].samples[0].labels["script"] == "train.py"
    assert set(found) <= NAMES


def test_names_end_in_base_units() -> None:
    """Times are in seconds, memory in bytes, parts are ratios: no milliseconds, no percent."""
    assert [name for name in NAMES if re.search(r"(_ms|_millis|_percent|_mib|_minutes)", name)] == []


def test_the_dashboard_asks_for_what_there_is() -> None:
    """Every metric in the Grafana dashboard is one that adarun serves."""
    dashboard = json.loads((ROOT / "examples" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"adarun\w*", target["expr"])
    }
    served = {*(f"{name}_total" for name in (*COUNTERS, *JOB_COUNTERS)), *GAUGES, *JOB_GAUGES, "adarun_info"}
    assert len(asked) > 8
    assert asked - served == set()

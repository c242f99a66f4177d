"""A job as OpenMetrics, for Prometheus: `adarun run --metrics-port P`. docs/status.md lists the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from adarun.errors import AdarunError
from adarun.events import Snapshot, WorkerNow

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


def _sync_period(snapshot: Snapshot) -> float | None:
    return snapshot.plan.sync_period if snapshot.plan else None


# Names are without the suffixes _total and _info, which the library adds.
COUNTERS: dict[str, tuple[str, Callable[[WorkerNow], float | None]]] = {
    "adarun_worker_steps": ("Training steps.", lambda row: row.total_steps),
    "adarun_worker_samples": ("Samples trained on.", lambda row: row.total_samples),
    "adarun_worker_busy_seconds": ("Time not spent waiting for other workers.", lambda row: row.total_busy_seconds),
    "adarun_worker_wait_seconds": ("Time spent waiting for other workers.", lambda row: row.total_wait_seconds),
    "adarun_worker_data_seconds": ("Time spent waiting for data; part of busy.", lambda row: row.total_data_seconds),
    "adarun_worker_lost_reports": ("Reports that never reached the log.", lambda row: row.lost_reports),
}
GAUGES: dict[str, tuple[str, Callable[[WorkerNow], float | None]]] = {
    "adarun_worker_share_samples": ("Share of the global batch.", lambda row: row.share),
    "adarun_worker_cpu_cores": ("CPU use: 1 is one core.", lambda row: row.cpu_fraction),
    "adarun_worker_memory_bytes": ("Resident memory.", lambda row: row.memory_bytes),
    "adarun_worker_gpu_utilization_ratio": ("Use of its GPU, 0 to 1.", lambda row: row.gpu_fraction),
    "adarun_worker_gpu_memory_bytes": ("GPU memory of this worker.", lambda row: row.gpu_memory_bytes),
}
JOB_GAUGES: dict[str, tuple[str, Callable[[Snapshot], float | None]]] = {
    "adarun_workers": ("Workers of the job, on all nodes.", lambda seen: seen.world_size),
    "adarun_samples_per_second": ("Throughput over the last steps.", lambda seen: seen.samples_per_second),
    "adarun_epoch": ("Epoch, from 1.", lambda seen: seen.epoch),
    "adarun_left_seconds": ("Time that the job still needs.", lambda seen: seen.left_seconds),
    "adarun_gain_ratio": ("Gain over the even split so far: 0.5 is half as fast again.", lambda seen: seen.gain),
    "adarun_gain_error_ratio": ("How far off the gain may be.", lambda seen: seen.gain_error),
    "adarun_sync_period_steps": ("Steps from one synchronisation to the next.", _sync_period),
    "adarun_start_time_seconds": ("When the run started, as a Unix time.", lambda seen: seen.started),
}
JOB_COUNTERS: dict[str, tuple[str, Callable[[Snapshot], float | None]]] = {
    "adarun_restarts": ("Restarts of the worker group.", lambda seen: seen.attempt),
    "adarun_changes": ("Decisions that changed something.", lambda seen: seen.num_changes),
}


class Collector:
    """Gives the metrics anew with each scrape."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """All metrics; what is unknown is left out."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily  # noqa: PLC0415

        seen = self._snapshot()
        about = {"run": seen.run, "script": seen.script, "host": seen.host}
        yield InfoMetricFamily("adarun", "The run.", value=about)
        for names, family in ((JOB_COUNTERS, CounterMetricFamily), (JOB_GAUGES, GaugeMetricFamily)):
            for name, (text, of_job) in names.items():
                value = of_job(seen)
                if value is not None:
                    yield family(name, text, value=value)
        for rows, family in ((COUNTERS, CounterMetricFamily), (GAUGES, GaugeMetricFamily)):
            for name, (text, of_worker) in rows.items():
                metric = family(name, text, labels=["rank", "node"])
                for row in seen.workers:
                    value = of_worker(row)
                    if value is not None:
                        metric.add_metric([str(row.rank), row.node], value)
                yield metric


def serve(port: int, snapshot: Callable[[], Snapshot]) -> Callable[[], None]:
    """Serve a job's metrics on all addresses; returns what stops it.

    Raises:
        AdarunError: the library is missing, or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415 - an extra
    except ImportError:
        raise AdarunError(
            "--metrics-port needs prometheus-client; install it with pip install 'adarun[metrics]'"
        ) from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(snapshot))
    try:
        server, _ = start_http_server(port, registry=registry)
    except OSError as error:
        raise AdarunError(f"--metrics-port {port} cannot be served ({error.strerror}); name a free port") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop

"""What Prometheus reads at `/metrics`: requests as this process has counted them, jobs and hosts by the database.

The latter are read at each scrape, so that a restart loses nothing and several API processes say the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jobs import figures, reads
from jobs.db import Database
from jobs.status import JobStatus

# From a row by its key (1 ms) to the shapes of a new model (6 s and more).
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The metrics of one server process."""

    def __init__(self, db: Database) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "lomo_http_requests_total", "Requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "lomo_http_response_start_seconds",
            "Time until a response began; streams go on long after.",
            ("method", "route"),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(_ServiceCollector(db))

    def note_request(self, *, method: str, route: str, status: int, start_s: float | None) -> None:
        """Count a request. `route` is the path's template, so that there are only as many as the API has; `start_s` is
        None where no response began."""
        self._requests.labels(method, route, str(status)).inc()
        if start_s is not None:
            self._seconds.labels(method, route).observe(start_s)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    """Asks the database when it is asked itself."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def describe(self) -> Iterator[Metric]:
        """Nothing: at its registration the database may not answer yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Jobs, then hosts."""
        yield from self._jobs()
        yield from self._hosts()

    def _jobs(self) -> Iterator[Metric]:
        found = figures.read_figures(self._db)
        jobs = GaugeMetricFamily("lomo_jobs", "Jobs by status.", labels=("status",))
        for status in JobStatus:
            jobs.add_metric((status.value,), found.num_jobs.get(status.value, 0))
        yield jobs
        yield GaugeMetricFamily(
            "lomo_queue_oldest_seconds", "Age of the oldest job that could start now.", value=found.oldest_queued_s
        )
        memory = GaugeMetricFamily(
            "lomo_running_memory_bytes", "Of the running jobs, each at its highest step.", labels=("category",)
        )
        for category, num_bytes in found.running_memory_bytes.items():
            memory.add_metric((category,), num_bytes)
        yield memory
        yield SummaryMetricFamily(
            "lomo_planned_by_measured_peak",
            "Of the succeeded jobs: planned by measured peak memory.",
            count_value=found.num_judged,
            sum_value=found.sum_of_ratios,
        )
        yield CounterMetricFamily("lomo_trained_tokens", "Tokens with a loss, of all jobs.", value=found.trained_tokens)

    def _hosts(self) -> Iterator[Metric]:
        alive = GaugeMetricFamily("lomo_host_alive", "Whether a worker was seen within a minute.", labels=("host",))
        running = GaugeMetricFamily("lomo_host_running_jobs", "Jobs that run there.", labels=("host",))
        slots = GaugeMetricFamily("lomo_host_slots", "Jobs that may run there at once.", labels=("host",))
        memory = GaugeMetricFamily(
            "lomo_host_memory_bytes", "Of its device: for jobs, and what their plans leave.", labels=("host", "which")
        )
        cards = GaugeMetricFamily(
            "lomo_host_gpu_memory_bytes", "Of each graphics card, in all.", labels=("host", "gpu", "name")
        )
        for state in reads.list_hosts(self._db):
            name = state.host.name
            alive.add_metric((name,), int(state.is_alive))
            running.add_metric((name,), len(state.running))
            slots.add_metric((name,), state.host.slots)
            if state.host.available_bytes is not None:
                memory.add_metric((name, "available"), state.host.available_bytes)
                memory.add_metric((name, "free"), state.free_bytes or 0)
            for card in state.host.devices.get("gpus", []):
                cards.add_metric((name, str(card["index"]), card["name"]), card["memory_bytes"])
        yield from (alive, running, slots, memory, cards)

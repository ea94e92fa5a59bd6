"""How fast do journal lines get into Postgres? `jobs.eventlog.ship` in batches of different sizes, with fsync on.

Each JSON line: batch size, lines per second (median of the batches), and against batches of one. Run: `make bench`.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from jobs import eventlog, lifecycle, migrate, submission
from jobs.db import Database
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec
from local.postgres import Postgres
from lomo_core.events import JournalLine, MemoryBytes, Step

BATCH_SIZES = (1, 50, 500)
SECONDS_PER_SIZE = 5.0


def make_line(number: int) -> eventlog.NumberedLine:
    """The usual line: one step with its memory."""
    memory = MemoryBytes(
        parameters_bytes=269_030_016,
        gradients_bytes=56_623_104,
        optimizer_bytes=0,
        activations_bytes=25_000_000,
        other_bytes=600_000_000,
        peak_bytes=950_653_120,
    )
    step = Step(
        step=number + 1,
        total_steps=10_000_000,
        epoch=0.5,
        loss=1.234,
        mean_token_accuracy=0.5,
        learning_rate=0.01,
        grad_norm=0.7,
        num_tokens=500,
        num_trained_tokens=number,
        step_s=1.5,
        tokens_per_s=333.0,
        memory=memory,
    )
    return number, JournalLine(time.time(), step)


def measure(db: Database, batch_size: int) -> float:
    """Lines per second: the median over the batches of some seconds, the first one left out."""
    spec = JobSpec(model="bench", training_file="file-0", seed=0)
    submission.submit(db, planned=PlannedJob(spec=spec), owner=Owner("bench"), api_key_id=None, metadata={})
    claim = lifecycle.claim(db, owner="bench/0", lease_s=3600)
    assert claim is not None
    rates: list[float] = []
    number, end = 0, time.monotonic() + SECONDS_PER_SIZE
    while time.monotonic() < end:
        lines = [make_line(number + offset) for offset in range(batch_size)]
        start = time.perf_counter()
        eventlog.ship(db, claim.lease, lines, attempt=1, relative=str)
        rates.append(batch_size / (time.perf_counter() - start))
        number += batch_size
    return statistics.median(rates[1:])


def main() -> None:
    """Print one JSON line per batch size."""
    with tempfile.TemporaryDirectory() as folder:
        server = Postgres(Path(folder) / "postgres", log_path=Path(folder) / "postgres.log")
        server.start()
        try:
            migrate.upgrade(server.url())
            db = Database(server.url())
            rates = {size: measure(db, size) for size in BATCH_SIZES}
            db.dispose()
        finally:
            server.stop()
    for size, rate in rates.items():
        result = {
            "bench": "ship",
            "batch_lines": size,
            "lines_per_s": round(rate),
            "times_batch_of_one": round(rate / rates[1], 1),
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        }
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

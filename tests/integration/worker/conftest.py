"""A worker with short intervals over a fresh database, with the scripted engine of `tests/support/fake_engine.py`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.db import Database
from tests.support.worker_bench import FAKE_ENGINE, MODEL, SHORT, Bench, CeleryWorker
from worker.settings import WorkerSettings


@pytest.fixture
def bench(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Bench]:
    """A fresh database (30 ms) and data folder with one base model."""
    settings = WorkerSettings(
        database_url=database_url,
        broker_url=broker_url,
        data_dir=tmp_path / "data",
        worker_name="host-a",
        engine_command=(sys.executable, str(FAKE_ENGINE)),
        ship_every_s=0.02,
        stop_grace_s=10.0,
        **SHORT,
    )
    model = settings.data_dir / "models" / MODEL
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"")
    db = Database(database_url)
    bench = Bench(db, settings)
    yield bench
    for node in bench.nodes:
        node.close()
    bench.db.dispose()


@pytest.fixture
def in_background(bench: Bench) -> Iterator[Callable[[Callable[[], None]], threading.Thread]]:
    """Run something in a thread that is joined at the test's end."""
    threads: list[threading.Thread] = []

    def start(work: Callable[[], None]) -> threading.Thread:
        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return threads[-1]

    yield start
    for node in bench.nodes:
        node.stopping.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def start_worker(bench: Bench, tmp_path: Path) -> Iterator[Callable[..., CeleryWorker]]:
    """Start real Celery workers (about 2 s each); what still runs at the test's end is killed."""
    workers: list[CeleryWorker] = []

    def start(*, concurrency: int = 2, **changes: Any) -> CeleryWorker:
        settings = bench.settings.model_copy(update=changes)
        log_path = tmp_path / f"worker-{len(workers)}.log"
        workers.append(CeleryWorker(settings, log_path=log_path, concurrency=concurrency))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()

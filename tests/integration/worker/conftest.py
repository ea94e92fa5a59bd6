"""A worker with short intervals over a fresh database, with the scripted engine of `tests/support/fake_engine.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import lifecycle, reads
from jobs.db import Database
from jobs.ids import new_file_id
from jobs.models import Event, Job
from jobs.spec import JobSpec
from jobs.status import TERMINAL, JobStatus
from tests.conftest import wait_until_true
from worker.node import Node
from worker.settings import WorkerSettings

FAKE_ENGINE = Path(__file__).parents[2] / "support" / "fake_engine.py"
ORGANIZATION = "org-test"
MODEL = "base"

# Short, but with room for a loaded machine: a renewal every 0.2 s, a lease of 3 s.
SHORT = {"heartbeat_s": 0.2, "lease_s": 3.0, "lease_grace_s": 0.5, "reap_every_s": 0.5, "retry_backoff_s": 0.05}

Action = Sequence[Any]


@dataclass
class Bench:
    """A data folder, a database and the means to submit jobs and look at them."""

    db: Database
    settings: WorkerSettings
    rings: list[None] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def submit(self, *attempts: Sequence[Action], **options: Any) -> str:
        """Queue a job whose engine plays these scripts, one per attempt. Returns its id."""
        files = self.settings.files_dir
        files.mkdir(parents=True, exist_ok=True)
        file_id = new_file_id()
        (files / file_id).write_text(json.dumps({"attempts": attempts}) + "\n", encoding="utf-8")
        spec = JobSpec.model_validate({"model": MODEL, "training_file": file_id, "seed": 1, **options})
        job = lifecycle.submit(self.db, spec=spec, organization_id=ORGANIZATION, api_key_id=None, metadata={})
        return job.id

    def node(self, **changes: Any) -> Node:
        """A worker in this process; rings only add to `rings`."""
        settings = self.settings.model_copy(update=changes)
        self.nodes.append(Node(settings, send_ring=lambda: self.rings.append(None)))
        return self.nodes[-1]

    def work_until_ended(self, node: Node, job_id: str) -> Job:
        """Let a node look at the queue until the job has ended: after a failure it comes back at the back-off's end."""

        def has_ended() -> bool:
            node.work()
            return JobStatus(self.job(job_id).status) in TERMINAL

        wait_until_true(has_ended, 30, f"the end of {job_id}")
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        """The job's row as it is now."""
        return reads.get_job(self.db, organization_id=ORGANIZATION, job_id=job_id)

    def events(self, job_id: str) -> Sequence[Event]:
        """Every event, oldest first, after a check that the sequence has no gap."""
        last_seq = self.job(job_id).last_seq  # first, since a running job goes on between the two reads
        events = reads.events_since(self.db, job_id=job_id, seq=0, limit=100_000)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert last_seq <= len(events)
        return events

    def messages(self, job_id: str) -> list[str]:
        """The events' texts, oldest first."""
        return [event.message for event in self.events(job_id)]

    def steps(self, job_id: str) -> list[int]:
        """The steps of the shipped metrics events, in order of arrival."""
        return [event.data["step"] for event in self.events(job_id) if event.type == "metrics" and event.data]

    def folder(self, job_id: str) -> Path:
        """The job's folder."""
        return self.settings.runs_dir / job_id

    def touch(self, job_id: str, name: str) -> None:
        """Let a script go on that waits for `name`."""
        (self.folder(job_id) / name).touch()

    def engine_pid(self, job_id: str, *, attempt: int = 1) -> int | None:
        """The number of an attempt's engine, once it runs."""
        try:
            return int((self.folder(job_id) / f"attempt-{attempt}" / "engine.pid").read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None

    def is_engine_alive(self, job_id: str, *, attempt: int = 1) -> bool:
        """Whether an attempt's engine runs; a zombie does not."""
        try:
            pid = self.engine_pid(job_id, attempt=attempt)
            return pid is not None and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def has_touched(self, job_id: str, name: str) -> bool:
        """Whether a script has come to its `touch`."""
        return (self.folder(job_id) / name).exists()

    def cancel(self, job_id: str) -> None:
        """Ask for the job's end, as the API does."""
        lifecycle.request_cancel(self.db, organization_id=ORGANIZATION, job_id=job_id)


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


class CeleryWorker:
    """A real worker: `python -m celery -A worker.app worker`, with beat in it, in a session of its own."""

    def __init__(self, settings: WorkerSettings, *, log_path: Path, concurrency: int) -> None:
        self.log_path = log_path
        command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--pool=threads", "--beat"]
        command += [f"--concurrency={concurrency}", "-Q", "jobs,control", "--without-gossip", "--without-mingle"]
        command += ["--loglevel=INFO", "--schedule", str(log_path.with_suffix(".schedule"))]
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=log_path.parent,
                env=environment(settings),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        """What it wrote so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """`kill -9`, beat included; the engines, each in a session of its own, get no signal by this."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def terminate(self, timeout_s: float = 30) -> int:
        """SIGTERM, and wait. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def environment(settings: WorkerSettings) -> dict[str, str]:
    """The environment from which a worker reads exactly these settings."""
    names = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    values = {
        **{name: str(getattr(settings, name)) for name in ("database_url", "broker_url", "data_dir", "worker_name")},
        **{name: str(getattr(settings, name)) for name in (*SHORT, "ship_every_s", "stop_grace_s", "slots")},
        "engine_command": " ".join(settings.engine_command),
    }
    return {**names, **{f"LOMO_{name.upper()}": value for name, value in values.items() if value}}


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
        if worker.process.poll() is None:
            worker.kill()

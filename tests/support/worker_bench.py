"""A worker over a database of the test's own: submit jobs, look at them, start real Celery workers and kill them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from jobs import lifecycle, reads, submission
from jobs.db import Database
from jobs.ids import new_file_id
from jobs.models import Event, Job
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec
from jobs.status import TERMINAL, JobStatus
from tests.conftest import wait_until_true
from worker.node import Node
from worker.settings import WorkerSettings

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
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

    def submit(self, *attempts: Sequence[Action], planned_bytes: int | None = None, **options: Any) -> str:
        """Queue a job whose engine plays these scripts, one per attempt. Returns its id."""
        file_id = self.store(json.dumps({"attempts": attempts}) + "\n")
        values = {"model": MODEL, "training_file": file_id, "seed": 1, **options}
        return self.submit_spec(values, planned_bytes=planned_bytes)

    def store(self, text: str) -> str:
        """Put an uploaded file into the data folder. Returns its id."""
        files = self.settings.files_dir
        files.mkdir(parents=True, exist_ok=True)
        file_id = new_file_id()
        (files / file_id).write_text(text, encoding="utf-8")
        return file_id

    def submit_spec(self, values: dict[str, Any], *, planned_bytes: int | None = None) -> str:
        """Queue a job. Its message is "lost": the worker's reaper has to find it. Returns its id."""
        spec = JobSpec.model_validate(values)
        job = submission.submit(
            self.db,
            planned=PlannedJob(spec=spec, planned_bytes=planned_bytes),
            owner=Owner(ORGANIZATION),
            api_key_id=None,
            metadata={},
        )
        return job.id

    def node(self, **changes: Any) -> Node:
        """A worker in this process; rings only add to `rings`."""
        settings = self.settings.model_copy(update=changes)
        self.nodes.append(Node(settings, send_ring=lambda: self.rings.append(None)))
        return self.nodes[-1]

    def work_until_ended(self, node: Node, job_id: str, *, timeout_s: float = 30) -> Job:
        """Let a node look at the queue until the job has ended: after a failure it comes back at the back-off's end."""

        def has_ended() -> bool:
            node.work()
            return JobStatus(self.job(job_id).status) in TERMINAL

        wait_until_true(has_ended, timeout_s, f"the end of {job_id}")
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        """The job's row as it is now."""
        return reads.get_job(self.db, owner=Owner(ORGANIZATION), job_id=job_id)

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
        pid = self.engine_pid(job_id, attempt=attempt)
        return pid is not None and is_alive(pid)

    def has_touched(self, job_id: str, name: str) -> bool:
        """Whether a script has come to its `touch`."""
        return (self.folder(job_id) / name).exists()

    def cancel(self, job_id: str) -> None:
        """Ask for the job's end, as the API does."""
        lifecycle.request_cancel(self.db, owner=Owner(ORGANIZATION), job_id=job_id)

    def pause(self, job_id: str) -> None:
        """Ask for the job's pause, as the API does."""
        lifecycle.request_pause(self.db, owner=Owner(ORGANIZATION), job_id=job_id)

    def resume(self, job_id: str) -> None:
        """Let a paused job go on, as the API does."""
        lifecycle.resume(self.db, owner=Owner(ORGANIZATION), job_id=job_id)


class CeleryWorker:
    """A real worker and a real beat, as a stack has them: `python -m celery -A worker.app worker` and `... beat`, each
    in a session of its own. (A beat inside the worker is forked from it while its threads run, and may stand still.)"""

    def __init__(self, settings: WorkerSettings, *, log_path: Path, concurrency: int) -> None:
        self.log_path = log_path
        command = ["worker", "--pool=threads", f"--concurrency={concurrency}", "-Q", "jobs,control"]
        self.process = self._start([*command, "--without-gossip", "--without-mingle"], settings, log_path)
        schedule = f"--schedule={log_path.with_suffix('.schedule')}"
        self._beat = self._start(["beat", schedule, "--pidfile="], settings, log_path.with_suffix(".beat.log"))

    def _start(self, command: list[str], settings: WorkerSettings, log_path: Path) -> subprocess.Popen[bytes]:
        with log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "worker.app", *command, "--loglevel=INFO"],
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
        for process in (self.process, self._beat):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def end(self) -> None:
        """Make sure that it runs no more."""
        self.kill()

    def kill_child(self, pid: int) -> None:
        """`kill -9` of one of its engines."""
        assert pid in {child.pid for child in psutil.Process(self.process.pid).children()}
        os.kill(pid, signal.SIGKILL)

    def terminate(self, timeout_s: float = 30) -> int:
        """SIGTERM, and wait. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def environment(settings: WorkerSettings) -> dict[str, str]:
    """The environment from which a worker reads exactly these settings."""
    names = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    if "PYTHONPATH" in os.environ:  # the sources under test are not the installed ones
        names["PYTHONPATH"] = os.environ["PYTHONPATH"]
    values = {
        **{name: str(getattr(settings, name)) for name in ("database_url", "broker_url", "data_dir", "worker_name")},
        **{name: str(getattr(settings, name)) for name in (*SHORT, "ship_every_s", "stop_grace_s", "slots")},
        "engine_command": " ".join(settings.engine_command),
    }
    return {**names, **{f"LOMO_{name.upper()}": value for name, value in values.items() if value}}


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

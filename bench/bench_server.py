"""How fast is the service? One API process, a Postgres that syncs, and this process as all of its clients.

Prints one JSON line per bound:

    submit        jobs created per second
    read          requests per second for one job
    first_page    list of jobs, events and metrics of a job with a million events: p99
    chart         a chart of its million steps: time and size
    ship          batches of journal lines into Postgres, lines per second
    journal       the same from the file on, with the figures told to TensorBoard, as a worker does it
    flat          cost of shipping a batch as the table grows, against an almost empty one
    stream        event streams at 100 lines/s: delay of a line from its shipping to its reader, lines lost

Run: `make bench-server` (`ARGS="--rows 10000000"` for the longest table; `--only stream,ship` for some of them).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import text

from bench.bench_ship import make_line
from bench.harness import machine
from bench.http_load import Answers, ask, follow, make_request
from jobs import eventlog, files, host_registry, keys, lifecycle, migrate, series, submission
from jobs.db import Database
from jobs.host_registry import HostReport
from jobs.lifecycle import Claim
from jobs.organizations import DEFAULT_ORGANIZATION
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec
from local.ports import reserve_port
from local.postgres import Postgres
from local.valkey import Valkey
from lomo_core.events import JOURNAL_NAME, JournalLine, Message, encode_line
from worker.journal_shipper import JournalShipper, Listeners
from worker.settings import WorkerSettings
from worker.trackers import Trackers

ALL = ("submit", "read", "first_page", "chart", "ship", "journal", "flat", "stream")
MODEL_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
BATCH = 500
READY_TIMEOUT_S = 60.0
_SAID = re.compile(rb"sent at ([0-9.]+) number ([0-9]+)!")


@dataclass(frozen=True, slots=True)
class Service:
    """What is measured."""

    db: Database
    port: int
    key: str
    data_dir: Path
    server: psutil.Process

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """A request with the key."""
        return make_request(method, path, key=self.key, body=b"" if body is None else json.dumps(body).encode())


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(ALL), help=f"comma-separated, of {', '.join(ALL)}")
    parser.add_argument("--rows", type=int, default=1_000_000, help="events in the table at the end of `flat`")
    parser.add_argument("--streams", type=int, default=500, help="readers in `stream`")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of `stream`")
    given = parser.parse_args()
    chosen = given.only.split(",")
    where = machine()
    with running_service() as service:
        for name in chosen:
            for figures in MEASURES[name](service, given):
                sys.stdout.write(json.dumps({"bench": name, **figures, **where}) + "\n")
                sys.stdout.flush()


@contextmanager
def running_service() -> Iterator[Service]:
    """Postgres, Valkey and one server process over a temporary folder; no worker, so that jobs stay where they are."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = Postgres(folder / "postgres", log_path=folder / "postgres.log")
        valkey = Valkey(folder / "valkey", log_path=folder / "valkey.log")
        for part in (postgres, valkey):
            part.start()
            stack.callback(part.stop)
        migrate.upgrade(postgres.url())
        db = Database(postgres.url())
        stack.callback(db.dispose)
        model = folder / "models" / "tiny"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(MODEL_CONFIG), encoding="utf-8")
        (model / "model.safetensors").write_bytes(b"weights")
        key = keys.create_key(db, name="bench")
        port = reserve_port("127.0.0.1", 0)
        environment = {
            **os.environ,
            "LOMO_DATABASE_URL": postgres.url(),
            "LOMO_BROKER_URL": valkey.broker_url,
            "LOMO_DATA_DIR": str(folder),
            "LOMO_SERVER_PORT": str(port),
            "LOMO_MAX_STREAMS_PER_KEY": "1000",
            "LOMO_REQUESTS_PER_MINUTE": "10000000",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "server"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        _wait_until_up(port, process)
        yield Service(db, port, key, folder, psutil.Process(process.pid))


def _wait_until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            asyncio.run(ask(port, lambda _: make_request("GET", "/healthz", key=""), num_requests=1, num_connections=1))
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit("The server did not start.")


def measure_submit(service: Service, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Jobs created per second: validated, planned, written and announced."""
    register_host(service.db)
    file_id = _store_file(service)
    body = {"model": "tiny", "training_file": file_id, "lomo": {"max_seq_length": 128}}
    request = service.request("POST", "/v1/fine_tuning/jobs", body)
    asyncio.run(ask(service.port, lambda _: request, num_requests=20, num_connections=1))  # reads the model's shapes
    answers = asyncio.run(ask(service.port, lambda _: request, num_requests=2000, num_connections=8))
    yield {"connections": 8, "per_s": round(answers.per_s), "p99_ms": round(answers.quantile_ms(0.99), 1)} | bound(
        "per_s", at_least=150
    )


def measure_read(service: Service, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Requests for one job per second."""
    job_id = claim_job(service.db).lease.job_id
    request = service.request("GET", f"/v1/fine_tuning/jobs/{job_id}")
    answers = asyncio.run(ask(service.port, lambda _: request, num_requests=8000, num_connections=8))
    yield {"connections": 8, "per_s": round(answers.per_s), "p99_ms": round(answers.quantile_ms(0.99), 1)} | bound(
        "per_s", at_least=800
    )


def measure_first_page(service: Service, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """First pages of a job with a million events, one request at a time."""
    job_id = _long_job(service)
    jobs = "/v1/fine_tuning/jobs"
    for path in (jobs, f"{jobs}/{job_id}/events", f"{jobs}/{job_id}/metrics?max_points=100", f"{jobs}/{job_id}"):
        answers = _repeat(service, path, times=200)
        yield {"page": path.replace(job_id, "{id}"), "p50_ms": round(answers.quantile_ms(0.5), 1)} | {
            "p99_ms": round(answers.quantile_ms(0.99), 1),
            **bound("p99_ms", at_most=50),
        }


def measure_chart(service: Service, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the dashboard asks for to draw a million steps."""
    answers = _repeat(service, f"/v1/fine_tuning/jobs/{_long_job(service)}/metrics?max_points=400", times=50)
    yield {
        "p50_ms": round(answers.quantile_ms(0.5), 1),
        "p99_ms": round(answers.quantile_ms(0.99), 1),
        "num_bytes": answers.num_bytes,
        **bound("p99_ms", at_most=100),
        **{f"bytes_{name}": value for name, value in bound("num_bytes", at_most=100_000).items()},
    }


def measure_ship(service: Service, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines of a journal into Postgres, one batch after the other."""
    claim = claim_job(service.db)
    rates = [BATCH / seconds for seconds in ship(service.db, claim, first=0, num_batches=60)]
    yield {
        "batch_lines": BATCH,
        "lines_per_s": round(statistics.median(rates)),
        **bound("lines_per_s", at_least=20_000),
    }


def measure_journal(service: Service, _: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A journal of 30,000 steps that lies there, as after an outage: read, told to TensorBoard, shipped."""
    claim = claim_job(service.db)
    folder, num_lines = service.data_dir / "runs" / claim.lease.job_id, 60 * BATCH
    path = folder / "attempt-1" / JOURNAL_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(encode_line(make_line(number)[1]) for number in range(num_lines)))
    # Nothing is sent to a broker here.
    settings = WorkerSettings(database_url=service.db.url, broker_url="redis://", data_dir=service.data_dir)
    trackers = Trackers(folder, claim, settings)
    listeners = Listeners(on_lines=trackers.take, on_checkpoint=lambda: None)
    shipper = JournalShipper(service.db, claim, path, relative=str, every_s=1.0, listeners=listeners)
    shipper.end()
    gc.freeze()  # as the worker does when it starts
    started = time.perf_counter()
    shipper.run()
    seconds = time.perf_counter() - started
    assert eventlog.shipped_lines(service.db, job_id=claim.lease.job_id, attempt=1) == num_lines
    yield {"lines": num_lines, "lines_per_s": round(num_lines / seconds), **bound("lines_per_s", at_least=20_000)}


def measure_flat(service: Service, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The cost of a batch at 10 thousand rows and at ten times as many, and so on, in one job."""
    claim = claim_job(service.db)
    number, base, rows = 0, None, 10_000
    while rows <= given.rows:
        _fill(service.db, claim, first=number, last=rows)
        number = rows
        costs = ship(service.db, claim, first=number, num_batches=40)
        number += 40 * BATCH
        cost_us = 1e6 * statistics.median(costs) / BATCH
        base = base or cost_us
        yield {"rows": rows, "us_per_line": round(cost_us, 1), "times_first": round(cost_us / base, 2)}
        rows *= 10


def measure_stream(service: Service, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Readers of one job while its engine says 100 lines a second."""
    claim = claim_job(service.db)
    path = f"/v1/fine_tuning/jobs/{claim.lease.job_id}/events?stream=true"
    num_lines = int(100 * given.seconds)
    delays: list[float] = []
    counts: list[int] = []

    async def read() -> None:
        seen: list[int] = []

        def on_frames(frames: bytes) -> bool:
            now = time.time()
            for stamp, number in _SAID.findall(frames):
                delays.append(now - float(stamp))
                seen.append(int(number))
            return bool(seen) and seen[-1] == num_lines - 1

        await follow(service.port, service.request("GET", path), on_frames)
        assert seen == sorted(seen), "lines came out of order"
        counts.append(len(seen))

    async def read_all() -> None:
        started = threading.Timer(2.0, lambda: _say(service.db, claim, num_lines))
        started.start()
        await asyncio.gather(*(read() for _ in range(given.streams)))

    asyncio.run(read_all())
    answers = Answers(latencies_s=delays, seconds=1.0)
    yield {
        "streams": given.streams,
        "lines_per_s": 100,
        "p50_ms": round(answers.quantile_ms(0.5)),
        "p99_ms": round(answers.quantile_ms(0.99)),
        "lines_lost": given.streams * num_lines - sum(counts),
        "server_rss_mib": round(service.server.memory_info().rss / 2**20),
        **bound("p99_ms", at_most=300),
    }


MEASURES = {
    "submit": measure_submit,
    "read": measure_read,
    "first_page": measure_first_page,
    "chart": measure_chart,
    "ship": measure_ship,
    "journal": measure_journal,
    "flat": measure_flat,
    "stream": measure_stream,
}


def bound(figure: str, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """What a figure of the same line is held against."""
    limit = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
    return {"bound": {"figure": figure, **limit}}


def register_host(db: Database) -> None:
    """A host with room for everything, so that jobs are planned against one."""
    report = HostReport(
        name="bench", incarnation="0", memory_bytes=2**40, available_bytes=2**40, device_kind="cuda", devices={}
    )
    host_registry.register_host(db, report)


def claim_job(db: Database) -> Claim:
    """A running job of the default organization; queued ones, of earlier measures, are cancelled first."""
    with db.transaction() as session:
        session.execute(text("UPDATE jobs SET status = 'cancelled', finished_at = now() WHERE status = 'queued'"))
    submission.submit(
        db,
        planned=PlannedJob(spec=JobSpec(model="tiny", training_file="file-0", seed=0)),
        owner=Owner(DEFAULT_ORGANIZATION),
        api_key_id=None,
        metadata={},
    )
    claim = lifecycle.claim(db, owner="bench/0", lease_s=3600)
    assert claim is not None
    return claim


def ship(db: Database, claim: Claim, *, first: int, num_batches: int) -> list[float]:
    """Ship batches of step lines; the seconds that each took."""
    costs = []
    for number in range(first, first + num_batches * BATCH, BATCH):
        lines = [make_line(number + offset) for offset in range(BATCH)]
        started = time.perf_counter()
        eventlog.ship(db, claim.lease, lines, attempt=claim.lease.attempt, relative=str)
        costs.append(time.perf_counter() - started)
    return costs


def _say(db: Database, claim: Claim, num_lines: int) -> None:
    """A hundred lines a second in batches of twenty, as a worker ships them; each holds the moment of its shipping."""
    started = time.monotonic()
    for number in range(0, num_lines, 20):
        time.sleep(max(0.0, started + number / 100 - time.monotonic()))
        now = time.time()
        lines = [
            (line, JournalLine(now, Message(level="info", message=f"sent at {now} number {line}!")))
            for line in range(number, number + 20)
        ]
        eventlog.ship(db, claim.lease, lines, attempt=claim.lease.attempt, relative=str)


def _long_job(service: Service) -> str:
    """A job with a million steps; made once."""
    with service.db.read() as session:
        known = session.scalar(text("SELECT id FROM jobs WHERE last_seq > 1000000 LIMIT 1"))
    if known is not None:
        return str(known)
    claim = claim_job(service.db)
    _fill(service.db, claim, first=0, last=1_000_000)
    ship(service.db, claim, first=1_000_000, num_batches=1)
    return claim.lease.job_id


def _fill(db: Database, claim: Claim, *, first: int, last: int) -> None:
    """Lines `first` to `last` as shipping leaves them: one batch is shipped, and Postgres repeats its rows."""
    ship(db, claim, first=first, num_batches=1)
    values = {"job_id": claim.lease.job_id, "first": first + BATCH, "last": last - 1}
    with db.transaction() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        session.execute(
            text("""
                INSERT INTO events (job_id, seq, attempt, line, level, type, message, data, created_at)
                SELECT job_id, seq + n - line, attempt, n, level, type, message, data, created_at
                FROM events, generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n
                WHERE job_id = :job_id AND line = :first - 1
            """),
            values,
        )
        session.execute(
            text("""
                INSERT INTO metrics
                SELECT job_id, n + 1, attempt, created_at, epoch, loss + 1 / (n + 1.0), mean_token_accuracy,
                    learning_rate, grad_norm, tokens_per_s, step_s, parameters_bytes, gradients_bytes, optimizer_bytes,
                    activations_bytes, other_bytes, peak_bytes
                FROM metrics, generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n
                WHERE job_id = :job_id AND step = :first
            """),
            values,
        )
        session.execute(
            text("UPDATE jobs SET last_seq = last_seq + :last - :first + 1, step = :last + 1 WHERE id = :job_id"),
            values,
        )
        session.execute(
            text("UPDATE attempts SET shipped_lines = :last + 1 WHERE job_id = :job_id AND number = 1"), values
        )
    with db.transaction() as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        series.roll_up(session, claim.lease.job_id, before=first, after=last)
        session.execute(text("ANALYZE events, metrics, metric_spans"))
        # What filling has left to be written is no cost of shipping.
        session.execute(text("CHECKPOINT"))


def _store_file(service: Service) -> str:
    stored = files.store_file(
        service.db,
        io.BytesIO(ROW * 8),
        files_dir=service.data_dir / "files",
        owner=Owner(DEFAULT_ORGANIZATION),
        filename="train.jsonl",
        purpose="fine-tune",
    )
    return stored.id


def _repeat(service: Service, path: str, *, times: int) -> Answers:
    request = service.request("GET", path)
    asyncio.run(ask(service.port, lambda _: request, num_requests=5, num_connections=1))
    return asyncio.run(ask(service.port, lambda _: request, num_requests=times, num_connections=1))


if __name__ == "__main__":
    main()

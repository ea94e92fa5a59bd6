"""A real server on a free port over a fresh database, its clients, and runs told to it the way a worker tells them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs import eventlog, host_registry, keys, lifecycle, reads, step_metrics
from jobs.db import Database
from jobs.host_registry import HostReport
from jobs.lifecycle import Claim, JobFailure
from lomo_core import events as engine
from server.serve import Server
from server.settings import ServerSettings

from ...conftest import KnownShapes, WaitUntil, wait_until_true

MODEL = "tiny"
MODEL_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TRAIN_ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
LEASE_S = 60.0
HOST = "gpu1"
_DEADLINE_S = 30.0


@dataclass
class Run:
    """A claimed job, as its worker sees it: what its engine says is shipped line by line."""

    db: Database
    claim: Claim
    num_lines: int = 0

    @property
    def job_id(self) -> str:
        return self.claim.lease.job_id

    def say(self, *events: engine.Event) -> None:
        """Ship events as the next lines of the journal, in one batch."""
        lines = [
            (self.num_lines + offset, engine.JournalLine(time.time(), event)) for offset, event in enumerate(events)
        ]
        self.num_lines += len(lines)
        eventlog.ship(self.db, self.claim.lease, lines, attempt=self.claim.lease.attempt, relative=lambda path: path)

    def start(self, *, total_steps: int = 100, planned: engine.MemoryBytes | None = None) -> None:
        self.say(
            engine.Started(
                step=0,
                total_steps=total_steps,
                num_parameters=1_000_000,
                num_train_rows=8,
                num_truncated_rows=0,
                num_trainable_tokens=64,
                device="cpu (test)",
                device_bytes=2**34,
                planned=planned,
            )
        )

    def step(self, *steps: int, total_steps: int = 100) -> None:
        self.say(*(make_step(step, total_steps=total_steps) for step in steps))

    def message(self, *texts: str) -> None:
        self.say(*(engine.Message(level="info", message=text) for text in texts))

    def succeed(self, data_dir: Path | None = None) -> str:
        """End well; with a data folder, the result file is written there."""
        result_file = None
        if data_dir is not None:
            path = data_dir / "runs" / self.job_id / "attempt-1" / step_metrics.FILE_NAME
            result_file = step_metrics.write_step_metrics(self.db, job_id=self.job_id, path=path, data_dir=data_dir)
        return lifecycle.succeed(
            self.db,
            self.claim.lease,
            model_path=f"runs/{self.job_id}/model",
            weights_sha256="ab" * 32,
            trained_tokens=9,
            result_file=result_file,
        )

    def fail(self, message: str = "The loss is not finite.") -> None:
        lifecycle.fail(self.db, self.claim.lease, JobFailure(code="diverged", message=message))


def make_step(step: int, *, total_steps: int = 100) -> engine.Step:
    """The figures of one step; the loss falls as 10 / step."""
    memory = engine.MemoryBytes(
        parameters_bytes=1000,
        gradients_bytes=100 + step,
        optimizer_bytes=0,
        activations_bytes=50,
        other_bytes=10,
        peak_bytes=2000 + step,
    )
    return engine.Step(
        step=step,
        total_steps=total_steps,
        epoch=step / total_steps,
        loss=10 / step,
        mean_token_accuracy=0.5,
        learning_rate=0.01,
        grad_norm=1.0,
        num_tokens=64,
        num_trained_tokens=32 * step,
        step_s=0.5,
        tokens_per_s=128.0,
        memory=memory,
    )


@dataclass
class Frame:
    """One server-sent event as a client parses it."""

    event: str = "message"
    data: str = ""
    id: str | None = None

    @property
    def body(self) -> Any:
        return json.loads(self.data)


def read_frames(response: httpx.Response) -> Iterator[Frame]:
    """Parse frames as the standard says: comments and frames without data are not seen."""
    frame = Frame()
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if not line:
            if frame.data:
                yield frame
            frame = Frame()
        elif name == "data":
            frame.data = value
        elif name == "event":
            frame.event = value
        elif name == "id":
            frame.id = value


class Follower:
    """A client that reads a stream in a thread of its own and keeps every frame."""

    def __init__(self, client: httpx.Client, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.frames: list[Frame] = []
        self.arrivals: list[float] = []
        self.error: httpx.HTTPError | None = None
        self._client = client
        self._url = url
        self._headers = dict(headers or {})
        self._response: httpx.Response | None = None
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    @property
    def seqs(self) -> list[int]:
        return [int(frame.id) for frame in self.frames if frame.id]

    @property
    def is_done(self) -> bool:
        return bool(self.frames) and self.frames[-1].data == "[DONE]"

    @property
    def has_ended(self) -> bool:
        return not self.thread.is_alive()

    def join(self) -> None:
        self.thread.join(_DEADLINE_S)
        assert self.has_ended, "the stream did not end"

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        wait_until_true(condition, _DEADLINE_S, what)

    def _read(self) -> None:
        try:
            with self._client.stream("GET", self._url, headers=self._headers, timeout=_DEADLINE_S) as response:
                assert response.status_code == 200, response.read()
                for frame in read_frames(response):
                    self.arrivals.append(time.time())
                    self.frames.append(frame)
        except httpx.HTTPError as error:
            self.error = error


@dataclass
class Site:
    """A running server and what a test needs beside it."""

    server: Server
    db: Database
    settings: ServerSettings
    url: str
    key: str
    wait_until: WaitUntil
    clients: list[httpx.Client] = field(default_factory=list)

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        """An HTTP client with the site's key, or another; with `key=""` without any."""
        token = self.key if key is None else key
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = httpx.Client(base_url=self.url, headers=headers | options.pop("headers", {}), **options)
        self.clients.append(client)
        return client

    def follow(self, path: str, headers: Mapping[str, str] | None = None) -> Follower:
        """Read a stream in the background."""
        return Follower(self.client(), path, headers)

    def follow_job(self, job_id: str, query: str = "", headers: Mapping[str, str] | None = None) -> Follower:
        """Read a job's stream in the background."""
        return self.follow(f"/v1/fine_tuning/jobs/{job_id}/events?stream=true{query}", headers)

    def upload(self, content: bytes = TRAIN_ROW, *, name: str = "train.jsonl", **fields: str) -> str:
        """Upload a file. Returns its id."""
        response = self.client().post(
            "/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"} | fields
        )
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def submit(self, **changes: Any) -> str:
        """Create a job over the API. Returns its id."""
        body = {"model": MODEL, "training_file": changes.pop("training_file", None) or self.upload(), **changes}
        response = self.client().post("/v1/fine_tuning/jobs", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def run(self, **changes: Any) -> Run:
        """Create a job and claim it as a worker would."""
        job_id = self.submit(**changes)
        return self.claim(job_id)

    def claim(self, job_id: str) -> Run:
        """Claim the only queued job, by a host with room for it unless the test has announced one."""
        if reads.find_host(self.db, name=HOST) is None:
            register_host(self.db, HOST, available_bytes=2**36)
        claim = lifecycle.claim(self.db, owner=f"{HOST}/1", lease_s=LEASE_S)
        assert claim is not None
        assert claim.lease.job_id == job_id
        return Run(self.db, claim)

    def get(self, job_id: str) -> dict[str, Any]:
        """A job as the API shows it."""
        body: dict[str, Any] = self.client().get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json()
        return body


@dataclass
class RunningServer:
    """A server in a thread of its own."""

    server: Server
    thread: threading.Thread

    @classmethod
    def start(cls, settings: ServerSettings) -> RunningServer:
        server = Server(settings)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until_true(lambda: server.started or not thread.is_alive(), _DEADLINE_S, "the server to start")
        assert server.started
        return cls(server, thread)

    @property
    def port(self) -> int:
        return int(self.server.servers[0].sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Stop as SIGTERM would."""
        self.server.should_exit = True
        self.thread.join(_DEADLINE_S)
        assert not self.thread.is_alive(), "the server did not stop"


@pytest.fixture
def settings(database_url: str, broker_url: str, tmp_path: Path, known_shapes: KnownShapes) -> ServerSettings:
    """Settings of a server on a free port, with one base model, whose shapes it knows."""
    return make_settings(database_url, broker_url, data_dir=tmp_path, known_shapes=known_shapes)


def make_settings(database_url: str, broker_url: str, *, data_dir: Path, known_shapes: KnownShapes) -> ServerSettings:
    """The same over services of the test's own."""
    make_model(data_dir / "models" / MODEL)
    known_shapes.give(data_dir, MODEL_CONFIG)
    # Workers are played by the tests, and most of them have nothing to do with the check of files: see test_data.py.
    return ServerSettings(
        database_url=database_url, broker_url=broker_url, data_dir=data_dir, server_port=0, data_checks=False
    )


@pytest.fixture
def site(settings: ServerSettings, wait_until: WaitUntil) -> Iterator[Site]:
    """A server with a key. Costs about 0.2 s."""
    with running_site(settings, wait_until) as site:
        yield site


@contextmanager
def running_site(settings: ServerSettings, wait_until: WaitUntil) -> Iterator[Site]:
    """The same with settings of the test's own."""
    db = Database(settings.database_url)
    running = RunningServer.start(settings)
    url = f"http://127.0.0.1:{running.port}"
    site = Site(running.server, db, settings, url, keys.create_key(db, name="test"), wait_until)
    yield site
    for client in site.clients:
        client.close()
    running.stop()
    db.dispose()


def register_host(db: Database, name: str, *, available_bytes: int, run_overhead_bytes: int | None = None) -> None:
    """Announce a host, as its worker does: with a card, or, where a run takes more than its plan, with a CPU alone."""
    report = HostReport(
        name=name,
        incarnation="1",
        memory_bytes=64 * 2**30,
        available_bytes=available_bytes,
        run_overhead_bytes=run_overhead_bytes,
        device_kind="cuda" if run_overhead_bytes is None else "cpu",
        devices={},
    )
    host_registry.register_host(db, report)


def make_model(folder: Path) -> None:
    """A folder that the catalogue takes for a base model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")

"""Fixtures for every test: a real Postgres, a real Valkey, and waiting for a condition.

Nothing here is started unless a test asks for it, and each fixture says what it costs. Under pytest-xdist every worker
process has its own servers, so tests never share a database or a broker with one that runs beside them.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import pytest
import redis
import structlog

from jobs import migrate
from jobs.shape_cache import SHAPES_NAME, ShapeCache
from local.ports import reserve_port
from local.postgres import NOT_DURABLE, Postgres
from local.valkey import Valkey

T = TypeVar("T")

_POLL_S = 0.01
_TEMPLATE = "template_lomo"
_database_numbers = count(1)
_bucket_numbers = count(1)


# A file runs in one process, so that what its tests share is started once (`--dist loadfile`; xdist 3.8's groups are
# lost under pytest 9.2: pytest-xdist#1386). Those that take longest begin first, so that none is left over for one
# process alone: all that took more than 20 s on two cores.
_LONGEST = (
    "tests/e2e/openai_clients/test_clients.py",
    "tests/e2e/test_first_light.py",
    "tests/integration/server/test_chat.py",
    "tests/integration/server/test_data.py",
    "tests/browser/test_looks.py",
    "tests/unit/engine/test_out_of_memory.py",
    "tests/integration/worker/test_celery_worker.py",
    "tests/integration/local/test_up.py",
    "tests/unit/engine/test_memory_shapes.py",
    "tests/unit/engine/test_checkpoint_and_resume.py",
    "tests/e2e/test_kill.py",
    "tests/browser/test_job_page.py",
    "tests/integration/server/test_job_control.py",
    "tests/unit/engine/test_sigterm.py",
    "tests/integration/worker/test_pause.py",
    "tests/integration/server/test_event_stream.py",
    "tests/integration/local/test_stack.py",
    "tests/integration/server/test_duplicates.py",
    "tests/integration/cli/test_lomo.py",
    "tests/integration/worker/test_out_of_memory.py",
    "tests/unit/engine/test_gguf_export.py",
    "tests/unit/bench/test_bench_memory.py",
    "tests/unit/bench/test_fake_step.py",
    "tests/browser/test_memory.py",
    "tests/gpu/test_engine_on_device.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    ranks = {name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


class WaitUntil(Protocol):
    """The type of the `wait_until` fixture, for annotations."""

    def __call__(self, condition: Callable[[], T], timeout_s: float, what: str) -> T:
        """See `wait_until_true`."""
        ...


def wait_until_true(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """Return `condition()` as soon as it is true; fail the test with `what` if that takes longer than `timeout_s`.

    The condition is asked every 10 ms and a last time after the deadline. It is the only way in which tests wait: never
    sleep for as long as something "should" take.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        late = time.monotonic() > deadline
        if result := condition():
            return result
        if late:
            pytest.fail(f"waited {timeout_s:g} s in vain for: {what}")
        pause.wait(_POLL_S)


def pytest_sessionstart() -> None:
    """Set logging up for what is started before the first test: a server that the tests of a module share."""
    _log_through_logging()


@pytest.fixture(autouse=True)
def log_through_logging() -> Iterator[None]:
    """Keep structlog off `sys.stdout`, which pytest replaces for each test while threads of a server or a worker write
    to it: that race was seen to end in a segmentation fault. For each test anew, since some configure it themselves,
    and after it too, since what tests share goes on. Costs microseconds."""
    _log_through_logging()
    yield
    _log_through_logging()


def _log_through_logging() -> None:
    structlog.reset_defaults()
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer()], logger_factory=structlog.stdlib.LoggerFactory()
    )


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    """`wait_until(condition, timeout_s, what)`, see `wait_until_true`. Costs nothing."""
    return wait_until_true


class KnownShapes:
    """Shapes of the models that tests use: each is read once, which takes a process some 6 s, and copied into the data
    folders of the tests."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._lock_path = folder.with_suffix(".lock")
        self._cache = ShapeCache(folder)

    def give(self, data_dir: Path, *configs: Mapping[str, object]) -> None:
        """Put the shapes of models into a data folder, as if they had been planned there before."""
        for config in configs:
            self._give(data_dir, json.dumps(config).encode())

    def give_file(self, data_dir: Path, config: Path) -> None:
        """The same for a model's `config.json`."""
        self._give(data_dir, config.read_bytes())

    def _give(self, data_dir: Path, config: bytes) -> None:
        target = data_dir / SHAPES_NAME
        target.mkdir(parents=True, exist_ok=True)
        with self._lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._cache.read(config)
        path = self._cache.path_of(config)
        shutil.copy(path, target / path.name)


@pytest.fixture(scope="session")
def known_shapes(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> KnownShapes:
    """See `KnownShapes`. Costs 6 s per model, once; all of xdist's processes share what they have read."""
    base = tmp_path_factory.getbasetemp()
    return KnownShapes((base if worker_id == "master" else base.parent) / "known-shapes")


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """One embedded Postgres for the whole session of this (xdist) process, without fsync.

    Costs about 0.5 s idle and some seconds on a loaded machine, once; about 15 MB of memory (PSS, idle), 41 MB of disk.
    """
    folder = tmp_path_factory.mktemp("pg")
    server = Postgres(folder / "postgres", log_path=folder / "postgres.log", settings=NOT_DURABLE)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def template_database(postgres_server: Postgres) -> str:
    """Name of a database with the schema at Alembic's head, from which others are cloned. Costs about 1 s, once."""
    postgres_server.create_database(_TEMPLATE)
    migrate.upgrade(postgres_server.url(_TEMPLATE))
    return _TEMPLATE


@pytest.fixture
def database_url(postgres_server: Postgres, template_database: str) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database with the schema, for one test alone. Costs about 30 ms.

    It is dropped afterwards together with whoever is still connected to it.
    """
    with fresh_database(postgres_server, template_database) as url:
        yield url


@contextmanager
def fresh_database(server: Postgres, template: str) -> Iterator[str]:
    """The same for what several tests share."""
    name = f"test_{next(_database_numbers)}"
    server.create_database(name, template=template)
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
def empty_database_url(postgres_server: Postgres) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database without any table, for tests of the migrations. Costs about 30 ms."""
    name = f"test_{next(_database_numbers)}"
    postgres_server.create_database(name)
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """One embedded Valkey for the whole session of this (xdist) process. Costs about 0.1 s, once; 5 MB of memory."""
    folder = tmp_path_factory.mktemp("vk")
    server = Valkey(folder / "valkey", log_path=folder / "valkey.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def broker_url(valkey_server: Valkey) -> str:
    """Celery's URL of an empty broker. Costs one FLUSHALL, below 1 ms; what the test before left is gone."""
    with redis.Redis.from_url(valkey_server.client_url) as client:
        client.flushall()
    return valkey_server.broker_url


@dataclass(frozen=True)
class Bucket:
    """A bucket of a real object store's protocol, and its outages."""

    name: str
    endpoint: str
    client: Any
    """boto's, which knows nothing of ours."""
    monkeypatch: pytest.MonkeyPatch

    @property
    def url(self) -> str:
        """What `LOMO_STORAGE_URL` says."""
        return f"s3://{self.name}/files"

    def names(self) -> list[str]:
        """The keys of all objects."""
        listed = self.client.list_objects_v2(Bucket=self.name)
        return [each["Key"] for each in listed.get("Contents", [])]

    def put(self, key: str, content: bytes) -> None:
        """Write an object over one that is there, or a new one."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    @contextmanager
    def refusing_keys(self) -> Iterator[None]:
        """The store takes nobody's credentials."""
        set_actions = f"{self.endpoint}/moto-api/reset-auth"
        httpx.post(set_actions, content=b"0").raise_for_status()
        try:
            yield
        finally:
            httpx.post(set_actions, content=b"inf").raise_for_status()

    def go_away(self) -> None:
        """Nothing answers at the endpoint from now on."""
        self._connect_to(f"http://127.0.0.1:{reserve_port('127.0.0.1', 0)}")

    def come_back(self) -> None:
        """It does again."""
        self._connect_to(self.endpoint)

    def _connect_to(self, endpoint: str) -> None:
        self.monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        forget_object_stores()


def forget_object_stores() -> None:
    """Let fsspec connect anew, with the environment of now. What it forgets closes its connections."""
    file_system = importlib.import_module("s3fs").S3FileSystem
    file_system.clear_instance_cache()
    gc.collect()


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The endpoint of an S3 of this process's own (moto's, over HTTP). Costs 1.5 s, once."""
    server = importlib.import_module("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket, and an environment with which it is found. Costs 50 ms."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store)
    forget_object_stores()
    client = importlib.import_module("boto3").client("s3")
    name = f"bucket-{next(_bucket_numbers)}"
    client.create_bucket(Bucket=name)
    yield Bucket(name, object_store, client, monkeypatch)
    client.close()
    forget_object_stores()

"""The whole service over one data folder, as one process tree that starts and stops in order.

    lock the folder -> try the port -> Postgres -> Valkey -> schema -> server, worker and beat -> /readyz says 200

Everything is a child of this process (`local.process`), so that a crash of a part is repaired and the end of this
process, even by `kill -9`, is the end of all of them.
"""

from __future__ import annotations

import http.client
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

from local import services
from local.folder import DataFolder
from local.ports import local_url, reserve_port
from local.postgres import Postgres
from local.process import SupervisedProcess, run_to_end
from local.progress import Progress, Silent
from local.valkey import Valkey

_MIGRATE_TIMEOUT_S = 300.0  # 2 s from an empty database; a migration over many rows takes longer
_READY_TIMEOUT_S = 120.0  # 3 s on an idle machine: imports of server and worker
_PROBE_TIMEOUT_S = 5.0  # /readyz asks the database and the broker


class Service(Protocol):
    """A part of the stack."""

    @property
    def pid(self) -> int | None:
        """Process id; None while it is down."""
        ...

    def start(self) -> None:
        """Start it."""
        ...

    def stop(self) -> None:
        """Stop it and wait until it is gone."""
        ...


class Stack:
    """A running service: `with Stack(data_dir) as stack: ... stack.url, stack.admin_key ...`.

    `port` None or 0 means a free one. Entering raises LocalError (see `local.errors`) with nothing left running.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        progress: Progress | None = None,
    ) -> None:
        self._folder = DataFolder(data_dir)
        self._host = host
        self._port = port or 0
        self._progress = progress or Silent()
        self._services: dict[str, Service] = {}
        self._undo = ExitStack()

    @property
    def data_dir(self) -> Path:
        """The absolute path of the data folder."""
        return self._folder.path

    @property
    def port(self) -> int:
        """The server's TCP port."""
        return self._port

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return local_url(self._host, self._port)

    @property
    def admin_key_path(self) -> Path:
        """The file that holds the first API key."""
        return self._folder.admin_key

    @property
    def admin_key(self) -> str:
        """The first API key."""
        return self._folder.admin_key.read_text(encoding="ascii").strip()

    @property
    def logs_dir(self) -> Path:
        """The folder with one log per process."""
        return self._folder.logs

    def process(self, name: str) -> Service:
        """Return the part `postgres`, `valkey`, `server`, `worker` or `beat`."""
        return self._services[name]

    def __enter__(self) -> Stack:
        with ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop everything in reverse order. A second Ctrl-C meanwhile leaves out the wait for the part it hits."""
        with self._progress.stage("Stopping"):
            self._undo.close()

    def _start(self, undo: ExitStack) -> None:
        folder = self._folder
        folder.acquire()
        undo.callback(folder.release)
        self._port = reserve_port(self._host, self._port)
        folder.note_holder(self._port)

        tell = self._progress.note
        postgres = Postgres(folder.postgres, log_path=folder.logs / "postgres.log", tell=tell)
        with self._progress.stage("Starting Postgres"):
            self._add(undo, "postgres", postgres)
        valkey = Valkey(folder.valkey, log_path=folder.logs / "valkey.log", tell=tell)
        with self._progress.stage("Starting Valkey"):
            self._add(undo, "valkey", valkey)

        env = services.make_environment(
            folder,
            database_url=postgres.url(),
            broker_url=valkey.broker_url,
            host=self._host,
            port=self._port,
        )
        with self._progress.stage("Preparing the database"):
            run_to_end(services.migrate_spec(folder, env), timeout_s=_MIGRATE_TIMEOUT_S)
        with self._progress.stage("Starting server, worker and beat"):
            self._start_ours(undo, env=env)
        undo.callback(folder.remove_stack)
        folder.write_stack(
            {
                "pid": os.getpid(),
                "port": self._port,
                "url": self.url,
                "database_url": postgres.url(),
                "broker_url": valkey.broker_url,
            }
        )

    def _start_ours(self, undo: ExitStack, *, env: services.Environment) -> None:
        """Start our three processes side by side, because each spends seconds on its imports, and wait for them."""
        tell = self._progress.note
        worker = SupervisedProcess(services.worker_spec(self._folder, env), tell=tell)
        beat = SupervisedProcess(services.beat_spec(self._folder, env), tell=tell)

        def all_ready(pid: int) -> bool:
            """Ask the server; it may wait for the other two, and must not do so in vain."""
            worker.raise_if_failed()
            beat.raise_if_failed()
            return self._answers()

        server = SupervisedProcess(services.server_spec(self._folder, env), is_ready=all_ready, tell=tell)
        for process in (server, worker, beat):
            self._add(undo, process.spec.name, process)
        for process in (server, worker, beat):
            process.wait_ready(timeout_s=_READY_TIMEOUT_S)

    def _add(self, undo: ExitStack, name: str, service: Service) -> None:
        undo.callback(service.stop)  # before the start: one that fails half way has something to stop too
        self._services[name] = service
        service.start()

    def _answers(self) -> bool:
        """Ask the server whether it and what it needs are ready. The port was free, so whoever answers is ours."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):  # not listening yet
            return False
        finally:
            connection.close()

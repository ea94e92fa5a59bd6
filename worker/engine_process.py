"""The engine as a process: started in a session of its own with a chosen environment, ended as a group.

It must not outlive its worker, or it would hold the device and train for nobody. Three things see to that: a pipe whose
write end only the worker holds (the engine kills its group when it closes, however the worker ended), the kernel's
parent-death signal (which the engine asks for itself; it is bound to the thread that started it, so that thread has to
stay, as the runner's does), and the lease.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lomo_core.death_watch import PARENT_FD, PARENT_PID

ENGINE_LOG_NAME = "engine.log"

# What an engine may know of the worker's environment: where programs and libraries are, and how to compute. Never the
# database, the broker or a key: the engine reads files that users sent.
_PASSED_NAMES = re.compile(
    r"^(PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|LD_LIBRARY_PATH|VIRTUAL_ENV|XDG_CACHE_HOME"
    r"|(PYTHON|CUDA|NVIDIA|NCCL|TORCH|PYTORCH|TRITON|OMP|KMP|GOMP|MKL|OPENBLAS)\w*)$"
)
# For a download beside that: the hub's address, cache and token, and the way out of the network.
_PASSED_TO_HUB = re.compile(r"^(HF_\w+|\w+_proxy|SSL_CERT_\w+|REQUESTS_CA_BUNDLE)$", re.IGNORECASE)
# For the tools that draw runs: their own variables, keys among them, and the way out of the network.
_PASSED_TO_TRACKERS = re.compile(r"^((WANDB|MLFLOW)_\w+|\w+_proxy|SSL_CERT_\w+|REQUESTS_CA_BUNDLE)$", re.IGNORECASE)

# As the engine gives itself (figures in lomo_core/__main__.py): set here, it need not start itself once more.
_GLIBC_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}

_TAIL_BYTES = 8192  # the end of a log that is worth showing: a traceback has about 2 KB


def engine_environment(source: Mapping[str, str] | None = None, *, num_threads: int | None = None) -> dict[str, str]:
    """Variables for an engine, chosen from `source` (this process's own by default)."""
    source = os.environ if source is None else source
    chosen = {name: value for name, value in source.items() if _PASSED_NAMES.match(name)}
    if platform.libc_ver()[0] == "glibc":
        chosen |= _GLIBC_ALLOCATOR
    if num_threads is not None:
        chosen["LOMO_ENGINE_THREADS"] = str(num_threads)
    return {**chosen, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def hub_environment(source: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a download from the hub: the network is open, everything else as for an engine."""
    source = os.environ if source is None else source
    chosen = {name: value for name, value in source.items() if _PASSED_NAMES.match(name) or _PASSED_TO_HUB.match(name)}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**chosen, **quiet, "HF_HUB_OFFLINE": "0", "PYTHONUNBUFFERED": "1"}


def tracker_environment(source: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a process that tells a run to Weights & Biases or MLflow: what tells their makers of it is off."""
    source = os.environ if source is None else source
    chosen = {name: value for name, value in source.items() if _PASSED_TO_TRACKERS.match(name)}
    quiet = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**engine_environment(source), **chosen, **quiet}


class EngineProcess:
    """A child process, the leader of its own session and group. Its output goes to `folder/engine.log`.

    The child learns the read end of the death watch and its parent's number from its environment.
    """

    def __init__(
        self, command: Sequence[str], *, folder: Path, environment: Mapping[str, str], with_pipes: bool = False
    ) -> None:
        self.log_path = folder / ENGINE_LOG_NAME
        # Both ends are closed on exec (PEP 446) and Popen closes what it is not told to pass: so a sibling engine
        # inherits neither, and this one the read end alone. A write end that leaked would keep orphans alive.
        read_end, self._write_end = os.pipe()
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, self._write_end)
            try:
                self._process = self._start(
                    command, folder=folder, environment=environment, read_end=read_end, with_pipes=with_pipes
                )
            finally:
                os.close(read_end)
            on_failure.pop_all()

    @property
    def pid(self) -> int:
        """The child's process id, which is also its group's."""
        return self._process.pid

    @property
    def stdin(self) -> IO[bytes]:
        """The child's standard input, where it was started `with_pipes`; whoever asked for the pipe closes it."""
        return _piped(self._process.stdin)

    @property
    def stdout(self) -> IO[bytes]:
        """The child's standard output, where it was started `with_pipes`, and then not in the log."""
        return _piped(self._process.stdout)

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs. Kills the rest of its group."""
        if self._process.returncode is None and self._has_ended():
            # Until it is waited for, its number belongs to nobody else, so the group that is killed is its own.
            self._signal_group(signal.SIGKILL)
            self._process.wait()
            os.close(self._write_end)
        return self._process.returncode

    def terminate(self) -> None:
        """Ask the whole group to stop (SIGTERM)."""
        self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group at once (SIGKILL) and wait for the child's end."""
        if self._process.returncode is None:
            self._signal_group(signal.SIGKILL)
            self._process.wait()
            os.close(self._write_end)

    def log_tail(self) -> str:
        """The last lines of its output, at most 8 KiB."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _TAIL_BYTES))
            return log.read().decode("utf-8", errors="replace").strip()

    def _start(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        read_end: int,
        with_pipes: bool,
    ) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as output:
            return subprocess.Popen(
                list(command),
                cwd=folder,
                env={**environment, PARENT_FD: str(read_end), PARENT_PID: str(os.getpid())},
                pass_fds=(read_end,),
                stdin=subprocess.PIPE if with_pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if with_pipes else output,
                stderr=output,
                start_new_session=True,
            )

    def _has_ended(self) -> bool:
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self._process.poll() is not None
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process.returncode is not None:
            return
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            # Nobody is left to be told; macOS says EPERM of a group of zombies.
            return


def _piped(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("the process was started without pipes")
    return stream

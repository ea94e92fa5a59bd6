"""One supervised child process: start, readiness, restart with back-off, stop.

Each child has one thread, which forks it, waits for it (so that no zombie is left: a postmaster that is dead but not
reaped makes its own restart fail) and starts it again when it dies unasked. The thread lives as long as the child is
wanted. That matters: the kernel's parent-death signal, which makes `kill -9` of the supervisor end the children too,
fires when the forking *thread* ends (prctl(2)).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from local import launch
from local.errors import ProcessFailedError, log_tail

_FIRST_RESTART_DELAY_S = 0.1  # a worker killed by hand is to be back within about two seconds, its own start included
_MAX_RESTART_DELAY_S = 10.0  # a child that cannot start costs no more than a try every ten seconds
_STEADY_AFTER_S = 10.0  # a child that lived this long is taken for healthy: the next delay is the first one again
_READINESS_POLL_S = 0.02  # Valkey is up after 10 to 50 ms
_LEFTOVER_POLL_S = 0.05
_LEFTOVER_GRACE_S = 10.0  # Postgres' fast shutdown takes 0.1 s idle and was seen to take 2 s on a busy machine
_LEFTOVER_KILL_S = 5.0  # after SIGQUIT a backend does nothing more but exit
_KILLED_EXIT_S = 10.0  # the kernel's time to take down a killed process that still holds memory or disk
_MAX_LOG_BYTES = 16 * 1024**2  # a bound on what restarts pile up; one old file is kept beside the new one


@dataclass(frozen=True)
class ProcessSpec:
    """What to run, and how it is asked to end.

    `death_signal` is what the kernel sends when the supervisor is gone; `identity` is explained in `local.launch`.
    """

    name: str
    argv: Sequence[str | Path]
    env: Mapping[str, str]
    log_path: Path
    cwd: Path
    stop_signal: signal.Signals = signal.SIGTERM
    stop_grace_s: float = 10.0
    death_signal: signal.Signals = signal.SIGKILL
    identity: str = "same"


def always_ready(pid: int) -> bool:
    """Readiness of a child that has nothing to wait for: to be running is enough."""
    return pid > 0


def say_nothing(text: str) -> None:
    """Default listener of what a supervisor has to tell: nobody."""


def no_preparation(stopping: threading.Event) -> None:
    """Default of what is done before each start: nothing."""


class SupervisedProcess:
    """A child that is kept running until `stop`.

    `is_ready(pid)` is asked until it says yes; `before_start(stopping)` runs before every start, restarts included;
    `tell` gets a sentence for each unasked death.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        *,
        is_ready: Callable[[int], bool] = always_ready,
        before_start: Callable[[threading.Event], None] = no_preparation,
        tell: Callable[[str], None] = say_nothing,
    ) -> None:
        self.spec = spec
        self.restarts = 0
        self._is_ready = is_ready
        self._before_start = before_start
        self._tell = tell
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._was_ready = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._keep_running, name=f"supervise-{spec.name}", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the running child; None between a death and the restart."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    def start(self) -> None:
        """Start the child and return at once; `wait_ready` says when it can be used."""
        self._thread.start()

    def wait_ready(self, *, timeout_s: float) -> None:
        """Block until the child is ready; from then on it is restarted when it dies.

        Raises ProcessFailedError if it ends first or takes longer than `timeout_s`; the child is stopped then.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.raise_if_failed()
            pid = self.pid
            if pid is not None and self._is_ready(pid):
                self._was_ready = True
                return
            self._stopping.wait(_READINESS_POLL_S)
        self.stop()
        raise ProcessFailedError(self._describe(f"was not ready after {timeout_s:.0f} s"))

    def raise_if_failed(self) -> None:
        """Raise ProcessFailedError if the child has ended before it was ever ready. It is not started again then."""
        if self._failure is not None:
            raise ProcessFailedError(self._describe(self._failure))

    def stop(self) -> None:
        """Ask the child to end, kill it after its grace, and return when it is gone. May be called twice."""
        with self._lock:
            self._stopping.set()
            process = self._process
        if self._thread.ident is None:
            return
        if process is not None:
            process.send_signal(self.spec.stop_signal)
        self._thread.join(self.spec.stop_grace_s)
        if self._thread.is_alive() and process is not None:
            process.kill()
            self._thread.join(_KILLED_EXIT_S)

    def _keep_running(self) -> None:
        num_failures = 0
        while not self._stopping.is_set():
            started_s = time.monotonic()
            reason = self._run_once()
            if self._stopping.is_set():
                return
            if not self._was_ready:
                self._failure = reason
                return
            num_failures = 0 if time.monotonic() - started_s > _STEADY_AFTER_S else num_failures + 1
            self._tell(f"{self.spec.name} {reason}; starting it again (log: {self.spec.log_path})")
            if not self._stopping.wait(restart_delay_s(num_failures)):
                self.restarts += 1

    def _run_once(self) -> str:
        """Run the child to its end and say how it ended."""
        try:
            self._before_start(self._stopping)
            with self._lock:
                if self._stopping.is_set():
                    return "was stopped"
                self._process = process = spawn(self.spec)
        except (OSError, ProcessFailedError) as error:
            return f"could not be started: {error}"
        return describe_exit(process.wait())

    def _describe(self, reason: str) -> str:
        tail = log_tail(self.spec.log_path)
        where = f" The end of its log, {self.spec.log_path}:\n{tail}" if tail else f" Its log is {self.spec.log_path}."
        return f"{self.spec.name} {reason}.{where}"


def restart_delay_s(num_failures: int) -> float:
    """Return the wait before a restart, doubling with each failure in a row (0 for a child that ran long before)."""
    return min(_FIRST_RESTART_DELAY_S * 2.0 ** max(0, num_failures - 1), _MAX_RESTART_DELAY_S)


def spawn(spec: ProcessSpec) -> subprocess.Popen[bytes]:
    """Start `spec` once, unsupervised, bound to the life of the calling thread; output goes to its log.

    In a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone and it can stop the children
    in order.
    """
    _rotate(spec.log_path)
    with spec.log_path.open("ab") as log:
        return subprocess.Popen(
            launch_command(spec),
            env=dict(spec.env),
            cwd=spec.cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run_to_end(spec: ProcessSpec, *, timeout_s: float) -> None:
    """Run `spec` and wait for it. Raises ProcessFailedError unless it ends with 0 within `timeout_s`."""
    process = spawn(spec)
    try:
        reason = describe_exit(process.wait(timeout_s))
    except subprocess.TimeoutExpired as error:
        raise ProcessFailedError(f"{spec.name} was not done after {timeout_s:.0f} s. Log: {spec.log_path}") from error
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise ProcessFailedError(f"{spec.name} {reason}. The end of its log:\n{log_tail(spec.log_path)}")


def launch_command(spec: ProcessSpec) -> list[str]:
    """Return the command that starts `spec` through `local.launch`, for a child of this very process."""
    return [*_launch_prefix(spec.identity, spec.death_signal), "--", *(str(part) for part in spec.argv)]


def can_run_as(identity: str, *, through: Sequence[Path]) -> bool:
    """Tell whether `identity` (see `local.launch`) can be taken here and may pass all of `through`."""
    command = [*_launch_prefix(identity, signal.SIGKILL), "--check", *(str(path) for path in through)]
    return subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0


def describe_exit(returncode: int) -> str:
    """Say in words how a process ended; negative numbers are signals, as in `subprocess`."""
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


def end_leftovers(program: str, *, folder: Path, stopping: threading.Event) -> None:
    """Wait until no `program` works in `folder` any more; after a grace, make it quit.

    After `kill -9` of a supervisor its servers are still shutting down, and after `kill -9` of a postmaster its
    backends need a moment to notice. A second server over the same files would have to refuse to start. The caller
    holds the folder's lock, so nothing that is found belongs to a running stack.

    Raises ProcessFailedError if something stays.
    """
    for grace_s, parting_signal in ((_LEFTOVER_GRACE_S, signal.SIGQUIT), (_LEFTOVER_KILL_S, signal.SIGKILL)):
        deadline = time.monotonic() + grace_s
        while leftovers := list(_working_in(folder, program)):
            if time.monotonic() > deadline:
                _signal_all(leftovers, parting_signal)
                break
            if stopping.wait(_LEFTOVER_POLL_S):
                return
        else:
            return
    _, alive = psutil.wait_procs(list(_working_in(folder, program)), timeout=_KILLED_EXIT_S)
    if alive:
        pids = ", ".join(str(process.pid) for process in alive)
        raise ProcessFailedError(f"an earlier {program} still works in {folder} and cannot be ended (pid {pids})")


def _working_in(folder: Path, program: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.name() == program and process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                yield process
        except psutil.Error:  # gone meanwhile, or of another user and so not ours
            continue


def _signal_all(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _launch_prefix(identity: str, death_signal: signal.Signals) -> list[str]:
    return [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(int(death_signal)), identity]


def _rotate(log_path: Path) -> None:
    if log_path.exists() and log_path.stat().st_size > _MAX_LOG_BYTES:
        log_path.replace(log_path.with_name(log_path.name + ".1"))

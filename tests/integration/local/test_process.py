"""Supervision of one child: it comes back when it dies, ends when asked, and never outlives its supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from local import process as process_module
from local.errors import ProcessFailedError
from local.process import (
    ProcessSpec,
    SupervisedProcess,
    can_run_as,
    describe_exit,
    end_leftovers,
    restart_delay_s,
    run_to_end,
    spawn,
)

MakeSpec = Callable[..., ProcessSpec]

# Says that it is there, then waits for ever; an obedient one ends on request, a
# deaf one ignores the polite signal.
WAIT = "import signal; print('here', flush=True); signal.pause()"
OBEDIENT = f"import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3)); {WAIT}"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}"


@pytest.fixture
def make_spec(tmp_path) -> MakeSpec:
    """Makes specs of small Python programs. A start costs about 50 ms, the launcher included."""

    def make(program: str, **changes: object) -> ProcessSpec:
        fields = {
            "name": "child",
            "argv": [sys.executable, "-I", "-S", "-c", program],
            "env": os.environ,
            "log_path": tmp_path / "child.log",
            "cwd": tmp_path,
        }
        return ProcessSpec(**{**fields, **changes})

    return make


@pytest.fixture
def supervise(make_spec) -> Iterator[Callable[..., SupervisedProcess]]:
    """Starts supervised children that are stopped at the end of the test; ready when they have said "here"."""
    children: list[SupervisedProcess] = []

    def start(program: str, **options: object) -> SupervisedProcess:
        spec = make_spec(program, **options.pop("spec", {}))
        child = SupervisedProcess(spec, is_ready=lambda pid: said_here(spec.log_path), **options)
        children.append(child)
        child.start()
        return child

    yield start
    for child in children:
        child.stop()


def said_here(log_path: Path, times: int = 1) -> bool:
    """Tell whether the child has started up so many times."""
    return log_path.exists() and log_path.read_text().count("here") >= times


def is_running(pid: int) -> bool:
    """Tell whether a process with this id exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_killed_child_is_back_within_two_seconds_and_its_death_is_told(supervise, wait_until):
    told: list[str] = []
    child = supervise(WAIT, tell=told.append)
    child.wait_ready(timeout_s=20)
    killed = child.pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: child.pid not in {None, killed}, 2, "the restart of the child")
    wait_until(lambda: said_here(child.spec.log_path, times=2), 20, "the second start's output")
    assert child.restarts == 1
    assert told == [f"child was ended by SIGKILL; starting it again (log: {child.spec.log_path})"]
    assert not psutil.pid_exists(killed), "the dead child was not reaped"


def test_child_that_ends_by_itself_is_started_again(supervise, wait_until):
    told: list[str] = []
    child = supervise(OBEDIENT, tell=told.append)
    child.wait_ready(timeout_s=20)
    os.kill(child.pid, signal.SIGUSR1)
    wait_until(lambda: said_here(child.spec.log_path, times=2), 20, "the restart of the child")
    assert child.restarts == 1
    assert told[0].startswith("child ended with exit code 3; starting it again")


def test_delays_double_up_to_a_limit():
    assert [restart_delay_s(failures) for failures in (0, 1, 2, 3, 4)] == [0.1, 0.1, 0.2, 0.4, 0.8]
    assert restart_delay_s(50) == 10.0


def test_stop_ends_the_child_politely_and_for_good(supervise):
    told: list[str] = []
    child = supervise(WAIT, tell=told.append)
    child.wait_ready(timeout_s=20)
    pid = child.pid
    child.stop()
    assert child.pid is None
    assert not psutil.pid_exists(pid)
    assert (child.restarts, told) == (0, [])
    child.stop()


def test_stop_kills_a_child_that_does_not_listen(supervise):
    child = supervise(DEAF, spec={"stop_grace_s": 0.2})
    child.wait_ready(timeout_s=20)
    pid = child.pid
    child.stop()
    assert not psutil.pid_exists(pid)


def test_stop_ends_the_wait_before_a_restart(supervise, wait_until, monkeypatch):
    monkeypatch.setattr(process_module, "_FIRST_RESTART_DELAY_S", 3600.0)
    monkeypatch.setattr(process_module, "_MAX_RESTART_DELAY_S", 3600.0)
    told: list[str] = []
    child = supervise(WAIT, tell=told.append)
    child.wait_ready(timeout_s=20)
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: told, 20, "the death of the child")
    child.stop()
    assert child.restarts == 0


def test_stop_of_a_child_that_was_never_started_does_nothing(make_spec):
    SupervisedProcess(make_spec(WAIT)).stop()


def test_child_that_ends_before_it_is_ready_is_an_error_with_the_end_of_its_log(supervise):
    child = supervise("raise SystemExit('no such table: cheese')")
    with pytest.raises(ProcessFailedError, match=r"child ended with exit code 1\.(.|\n)*no such table: cheese"):
        child.wait_ready(timeout_s=20)
    assert child.restarts == 0


def test_child_that_is_not_ready_in_time_is_stopped_and_reported(make_spec):
    child = SupervisedProcess(make_spec(WAIT), is_ready=lambda pid: False)
    child.start()
    with pytest.raises(ProcessFailedError, match="child was not ready after 0 s"):
        child.wait_ready(timeout_s=0.1)
    assert child.pid is None


def test_program_that_is_not_there_is_named(make_spec):
    child = SupervisedProcess(make_spec("", argv=["/no/such/program"]), is_ready=lambda pid: False)
    child.start()
    with pytest.raises(ProcessFailedError, match="cannot execute /no/such/program: No such file"):
        child.wait_ready(timeout_s=20)


def test_ctrl_c_in_the_terminal_does_not_reach_the_children(supervise):
    child = supervise(WAIT)
    child.wait_ready(timeout_s=20)
    assert os.getpgid(child.pid) != os.getpgid(0)


def test_child_starts_with_default_signals(make_spec):
    # Python ignores SIGPIPE, and what is ignored stays so across exec: Postgres and its kind expect the default.
    spec = make_spec("", argv=["/bin/sh", "-c", "grep SigIgn /proc/$$/status"])
    run_to_end(spec, timeout_s=20)
    # Bits of signals 1 to 31; above are those that the C library keeps for itself, and they are inherited.
    assert int(spec.log_path.read_text().split()[1], 16) & 0x7FFF_FFFF == 0


SUPERVISOR = """
import os, pathlib, sys, threading
from local.process import ProcessSpec, SupervisedProcess
children = []
for number in range(3):
    spec = ProcessSpec(
        name="child", argv=[sys.executable, "-I", "-S", "-c", sys.argv[1]], env=os.environ,
        log_path=pathlib.Path("child.log"), cwd=pathlib.Path.cwd(),
    )
    children.append(SupervisedProcess(spec))
    children[-1].start()
    children[-1].wait_ready(timeout_s=20)
print(*(child.pid for child in children), flush=True)
threading.Event().wait()
"""


def test_kill_nine_of_the_supervisor_leaves_no_child(tmp_path, wait_until):
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, DEAF], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    with supervisor:
        pids = [int(pid) for pid in supervisor.stdout.readline().split()]
        wait_until(lambda: said_here(tmp_path / "child.log", times=3), 20, "three children that ignore SIGTERM")
        assert all(is_running(pid) for pid in pids)
        supervisor.kill()
    wait_until(lambda: not any(is_running(pid) for pid in pids), 5, "the end of the children")


def test_run_to_end_reports_a_failure_with_its_output(make_spec):
    with pytest.raises(ProcessFailedError, match=r"child ended with exit code 3(.|\n)*out of cheese"):
        run_to_end(make_spec("import sys; print('out of cheese'); sys.exit(3)"), timeout_s=20)
    with pytest.raises(ProcessFailedError, match="child was not done after 0 s"):
        run_to_end(make_spec(WAIT), timeout_s=0.1)


def test_large_log_is_set_aside_before_a_start(make_spec, monkeypatch):
    monkeypatch.setattr(process_module, "_MAX_LOG_BYTES", 10)
    spec = make_spec("print('new')")
    spec.log_path.write_text("old and too long\n")
    run_to_end(spec, timeout_s=20)
    assert spec.log_path.read_text() == "new\n"
    assert spec.log_path.with_name("child.log.1").read_text() == "old and too long\n"


@pytest.mark.parametrize("kind", ["userns", "drop"])
def test_identity_that_cannot_be_taken_is_found_out_beforehand(kind, tmp_path):
    unmapped = f"{kind}:-5:-5"  # no user has this number, root or not
    assert not can_run_as(unmapped, through=[tmp_path])
    assert can_run_as("same", through=[tmp_path])
    assert not can_run_as("same", through=[tmp_path / "missing"])


def test_leftover_of_an_earlier_run_is_waited_for_and_then_ended(tmp_path, make_spec, monkeypatch, wait_until):
    monkeypatch.setattr(process_module, "_LEFTOVER_GRACE_S", 0.1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    leftover = spawn(make_spec(WAIT))
    bystander = spawn(make_spec(WAIT, cwd=elsewhere))
    try:
        wait_until(lambda: said_here(tmp_path / "child.log", times=2), 20, "two children")
        reaper = threading.Thread(target=leftover.wait)  # what init does for a real orphan
        reaper.start()
        end_leftovers(psutil.Process(leftover.pid).name(), folder=tmp_path, stopping=threading.Event())
        reaper.join(20)
        assert leftover.returncode == -signal.SIGQUIT
        assert bystander.poll() is None
    finally:
        for process in (leftover, bystander):
            process.kill()
            process.wait()


def test_exits_are_described_in_words():
    assert describe_exit(-9) == "was ended by SIGKILL"
    assert describe_exit(2) == "ended with exit code 2"

"""The stack's order of starting and stopping, over real servers and the real schema; our three processes are stand-ins.

The stand-ins start in a twentieth of a second, and fail on request. The real ones are started in `test_up.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

import httpx
import psycopg
import pytest

from local import services
from local.errors import LocalError, ProcessFailedError
from local.stack import Stack

SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
    def log_message(self, *args):
        pass
address = (os.environ["LOMO_SERVER_HOST"], int(os.environ["LOMO_SERVER_PORT"]))
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""
IDLE = "import signal; signal.pause()"
BROKEN = "raise SystemExit('cannot find the cheese')"


class Recorder:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def stage(self, text: str):
        """Remember a stage that began."""
        self.stages.append(text)
        yield

    def note(self, text: str) -> None:
        """Remember a sentence."""
        self.notes.append(text)


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the program of `server`, `worker` or `beat`; all three are harmless from the start."""

    def replace(name: str, program: str) -> None:
        real = getattr(services, f"{name}_spec")
        command = [sys.executable, "-I", "-S", "-c", program]
        monkeypatch.setattr(
            services, f"{name}_spec", lambda folder, env: dataclasses.replace(real(folder, env), argv=command)
        )

    for name, program in (("server", SERVER), ("worker", IDLE), ("beat", IDLE)):
        replace(name, program)
    return replace


def is_ready(url: str) -> bool:
    """Tell whether the server says that it is ready."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_stack_is_ready_inside_and_gone_after(tmp_path, stand_in):
    recorder = Recorder()
    with Stack(tmp_path / "lomo", progress=recorder) as stack:
        assert is_ready(stack.url)
        facts = json.loads((stack.data_dir / "stack.json").read_text())
        assert (facts["pid"], facts["port"], facts["url"]) == (os.getpid(), stack.port, stack.url)
        with psycopg.connect(facts["database_url"].replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
            assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (1,)
        assert S_IMODE(stack.admin_key_path.stat().st_mode) == 0o600
        assert len(stack.admin_key) > 20
        pids = [stack.process(name).pid for name in ("postgres", "valkey", "server", "worker", "beat")]
        assert len(set(pids)) == 5
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (tmp_path / "lomo" / "stack.json").exists()
    assert recorder.stages == [
        "Starting Postgres",
        "Starting Valkey",
        "Preparing the database",
        "Starting server, worker and beat",
        "Stopping",
    ]
    assert recorder.notes == []


def test_second_start_finds_key_and_rows_of_the_first(tmp_path, stand_in):
    with Stack(tmp_path / "lomo") as stack:
        key = stack.admin_key
        with psycopg.connect(stack.process("postgres").conninfo("lomo")) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    with Stack(tmp_path / "lomo") as stack:
        assert stack.admin_key == key
        with psycopg.connect(stack.process("postgres").conninfo("lomo")) as connection:
            assert connection.execute("SELECT number FROM kept").fetchone() == (7,)
            assert connection.execute("SELECT count(*) FROM api_keys").fetchone() == (1,)


def test_every_part_that_is_killed_comes_back(tmp_path, stand_in, wait_until):
    recorder = Recorder()
    with Stack(tmp_path / "lomo", progress=recorder) as stack:
        for name in ("worker", "beat", "server", "valkey", "postgres"):
            killed = stack.process(name).pid
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda n=name, pid=killed: stack.process(n).pid not in {None, pid}, 10, f"the restart of {name}")
        wait_until(lambda: is_ready(stack.url), 10, "the server after its restart")
    assert [note.split()[0] for note in recorder.notes] == ["worker", "beat", "server", "valkey", "postgres"]


@pytest.mark.parametrize("name", ["server", "worker", "beat"])
def test_part_that_cannot_start_is_an_error_and_nothing_stays(tmp_path, stand_in, name):
    if name != "server":
        # Ready only after the broken part has ended: the real server, too, needs longer for its imports.
        pause = f"import os, time\nwhile not os.path.getsize('{name}.log'): time.sleep(0.01)\n"
        stand_in("server", pause + SERVER)
    stand_in(name, BROKEN)
    stack = Stack(tmp_path / "lomo")
    with pytest.raises(ProcessFailedError, match=rf"{name} ended with exit code 1\.(.|\n)*cannot find the cheese"):
        stack.__enter__()
    assert stack.process("postgres").pid is None
    assert stack.process("valkey").pid is None
    stand_in(name, SERVER if name == "server" else IDLE)
    with Stack(tmp_path / "lomo", port=stack.port):  # folder and port are free again
        pass


def test_children_know_their_stack_and_the_users_own_settings(tmp_path, stand_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOMO_MODEL_ROOTS", "models-of-mine:/models")
    monkeypatch.setenv("LOMO_LEASE_S", "12")
    monkeypatch.setenv("LOMO_DATABASE_URL", "postgresql+psycopg://elsewhere/other")
    stand_in("worker", f"import os; print(dict(os.environ), flush=True)\n{IDLE}")
    with Stack(tmp_path / "lomo") as stack:
        log = stack.logs_dir / "worker.log"
        env = eval(log.read_text())  # noqa: S307 - our own stand-in wrote it
        host = f"{stack.data_dir}/postgres"
        assert env["LOMO_DATABASE_URL"] == f"postgresql+psycopg://postgres@/lomo?host={host}&port=5432"
        assert env["LOMO_BROKER_URL"] == f"redis+socket://{stack.data_dir}/valkey/vk.sock?virtual_host=0"
        assert (env["LOMO_DATA_DIR"], env["LOMO_ADMIN_KEY_FILE"]) == (str(stack.data_dir), str(stack.admin_key_path))
        assert (env["LOMO_SERVER_HOST"], env["LOMO_SERVER_PORT"]) == ("127.0.0.1", str(stack.port))
        assert env["LOMO_MODEL_ROOTS"] == f"{tmp_path}/models-of-mine:/models"
        assert env["LOMO_LEASE_S"] == "12"


def test_two_stacks_live_side_by_side_but_not_over_one_folder(tmp_path, stand_in):
    with Stack(tmp_path / "one") as one, Stack(tmp_path / "two") as two:
        assert one.port != two.port
        assert is_ready(one.url)
        assert is_ready(two.url)
        assert one.admin_key != two.admin_key
        with pytest.raises(LocalError, match=f"pid {os.getpid()}, port {one.port}"):
            Stack(tmp_path / "one").__enter__()
        with pytest.raises(LocalError, match=f"Port {two.port} on 127.0.0.1 is already in use"):
            Stack(tmp_path / "three", port=two.port).__enter__()
        assert is_ready(one.url)

"""`python -m local up` as people run it: the whole real service in one process tree, started, broken and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.known_host import give_stack_calibration

pytestmark = pytest.mark.slow

# What a user's shell may hold for other databases and networks, and what must not reach the embedded ones.
OTHER_SETTINGS = {
    "PGDATA": "/nonexistent",
    "PGPORT": "1",
    "PGOPTIONS": "-c search_path=elsewhere",
    "LOMO_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none",
    "LOMO_BROKER_URL": "redis://127.0.0.1:1/0",
    "http_proxy": "http://127.0.0.1:1",
}
START_TIMEOUT_S = 120.0  # 5 s on an idle machine
STOP_TIMEOUT_S = 60.0  # 2 s idle


@dataclass
class Up:
    """A `lomo up` over `folder`, and what it has said so far."""

    folder: Path
    process: subprocess.Popen[bytes]
    output_path: Path

    @property
    def url(self) -> str:
        """The server's address, as `stack.json` has it."""
        return json.loads((self.folder / "stack.json").read_text())["url"]

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return self.output_path.read_text()

    def is_ready(self) -> bool:
        """Tell whether it has come up; an early end is a failure of the test."""
        assert self.process.poll() is None, self.output
        facts_path = self.folder / "stack.json"
        if not facts_path.exists() or json.loads(facts_path.read_text())["pid"] != self.process.pid:
            return False  # not up yet; the file may be that of a killed one
        return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == 200

    def api(self) -> httpx.Client:
        """A client with the admin key, which the caller closes."""
        key = (self.folder / "admin.key").read_text().strip()
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=20)

    def descendants(self) -> list[psutil.Process]:
        """Every process below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process | None:
        """The Celery worker, if it is running just now."""
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):  # a dead one that is just being reaped
                if "worker.app" in (command := child.cmdline()) and "worker" in command:
                    return child
        return None

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_TIMEOUT_S)


@pytest.fixture
def begin_up(tmp_path) -> Iterator[Callable[[str], Up]]:
    """Begins a `lomo up` over a folder of this name; those that still run at the end of the test are killed.

    Costs 5 s until it is ready, most of it imports, and about 500 MB of memory.
    """
    begun: list[Up] = []

    def begin(name: str) -> Up:
        give_stack_calibration(tmp_path / name)
        output_path = tmp_path / f"{name}-{len(begun)}.out"
        command = [sys.executable, "-m", "local", "up", "--data-dir", str(tmp_path / name), "--port", "0"]
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=tmp_path, env={**os.environ, **OTHER_SETTINGS}
            )
        begun.append(Up(tmp_path / name, process, output_path))
        return begun[-1]

    yield begin
    for up in begun:
        up.process.kill()  # its children follow it
        up.process.wait()


def is_running(process: psutil.Process) -> bool:
    """Tell whether a process is there and no zombie: nobody may be reaping orphans where the tests run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_services_live_side_by_side_and_keep_their_state(begin_up, wait_until):
    one, two = begin_up("one"), begin_up("two")
    for up in (one, two):
        wait_until(up.is_ready, START_TIMEOUT_S, f"`lomo up` over {up.folder}")
    assert one.url != two.url
    assert f"LOMO is up:  {one.url}/" in one.output
    assert f"Admin key:   {one.folder}/admin.key" in one.output

    third = begin_up("one")
    assert third.process.wait(START_TIMEOUT_S) == 1
    assert third.output == (
        f"error: The data folder {one.folder} is in use by another `lomo up` (pid {one.process.pid}, port "
        f"{httpx.URL(one.url).port}). Stop that one, or give this one a folder of its own with --data-dir.\n"
    )

    with one.api() as api:
        line = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
        sent = api.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", line)})
        assert sent.status_code == 200, sent.text
    with two.api() as api:
        assert api.get("/v1/files").json()["data"] == []
        api.headers["Authorization"] = f"Bearer {(one.folder / 'admin.key').read_text().strip()}"
        assert api.get("/v1/files").status_code == 401

    trees = [*one.descendants(), *two.descendants()]
    assert len(trees) >= 10
    assert one.end(signal.SIGINT) == 0, one.output
    assert two.end(signal.SIGTERM) == 0, two.output
    assert not [process for process in trees if is_running(process)]
    assert not (one.folder / "stack.json").exists()
    assert "Traceback" not in one.output + two.output

    again = begin_up("one")
    wait_until(again.is_ready, START_TIMEOUT_S, "the second start over the same folder")
    with again.api() as api:
        listed = api.get("/v1/files")
        assert listed.status_code == 200, f"{listed.text}\n{again.output}"
        assert [file["id"] for file in listed.json()["data"]] == [sent.json()["id"]]
        assert api.get(f"/v1/files/{sent.json()['id']}/content").content == line
    assert again.end(signal.SIGINT) == 0, again.output


def test_kills_are_survived_or_leave_nothing(begin_up, wait_until):
    up = begin_up("one")
    wait_until(up.is_ready, START_TIMEOUT_S, "`lomo up`")
    killed = up.worker()
    killed.kill()
    wait_until(lambda: up.worker() not in {None, killed}, 2, "a new worker")
    assert "worker was ended by SIGKILL; starting it again" in up.output

    tree = up.descendants()
    up.process.kill()
    up.process.wait()
    wait_until(lambda: not [process for process in tree if is_running(process)], 10, "the end of all children")

    again = begin_up("one")
    wait_until(again.is_ready, START_TIMEOUT_S, "a start over the folder of a killed one")
    assert again.end(signal.SIGINT) == 0, again.output


@pytest.mark.parametrize("stage", ["Starting Postgres", "Starting server, worker and beat"])
def test_ctrl_c_while_starting_leaves_nothing_and_harms_nothing(begin_up, wait_until, stage):
    up = begin_up("one")
    wait_until(lambda: stage in up.output, START_TIMEOUT_S, stage)
    tree = up.descendants()
    assert up.end(signal.SIGINT) == 0, up.output
    assert "Traceback" not in up.output
    assert not [process for process in tree if is_running(process)]

    again = begin_up("one")
    wait_until(again.is_ready, START_TIMEOUT_S, "a start after an interrupted one")

"""`lomo hosts`: the worker hosts as a table and as JSON."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from tests.support.scripted_server import JOB_ID, Response, ScriptedServer

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Lomo

GIB = 2**30


def host(name: str, **changes: Any) -> dict[str, Any]:
    """A live host with a card and one of two slots taken."""
    return {
        "object": "host",
        "name": name,
        "device_kind": "cuda",
        "devices": {"cpu": {"name": "AMD EPYC", "count": 8}, "gpus": [{"name": "NVIDIA L4"}, {"name": "NVIDIA L4"}]},
        "memory_bytes": 64 * GIB,
        "available_bytes": 20 * GIB,
        "free_bytes": 12 * GIB,
        "slots": 2,
        "running_jobs": [JOB_ID],
        "num_running": 1,
        "last_seen_at": int(time.time()) - 5,
        "is_alive": True,
        **changes,
    }


def test_hosts_are_listed(server: ScriptedServer, lomo: Lomo) -> None:
    silent = {"is_alive": False, "last_seen_at": int(time.time()) - 7300, "running_jobs": [], "num_running": 0}
    old = {"device_kind": None, "available_bytes": None, "free_bytes": None, "devices": {}, "running_jobs": []}
    body = {
        "object": "list",
        "data": [host("gpu1"), host("cpu1", device_kind="cpu", **silent), host("old", **old)],
    }
    server.on("GET", "/hosts", Response(body=body))
    heading, *lines = lomo("hosts").out.splitlines()
    columns = [heading.index(name) for name in ("HOST", "DEVICE", "FOR JOBS", "FREE", "RUNS", "SEEN", "JOBS")]
    # "JOBS" is found inside "FOR JOBS" first.
    columns[-1] = heading.rindex("JOBS")
    cells = [
        [line[start:end].strip() for start, end in zip(columns, [*columns[1:], None], strict=True)] for line in lines
    ]
    assert [row[:5] + row[6:] for row in cells] == [
        ["gpu1", "NVIDIA L4 (first of 2)", "20.0 GiB", "12.0 GiB", "1/2", JOB_ID],
        ["cpu1", "AMD EPYC", "20.0 GiB", "12.0 GiB", "0/2", "-"],
        ["old", "-", "-", "-", "1/2", "-"],
    ]
    assert [row[5].split(",")[0] for row in cells] == ["alive", "silent", "alive"]
    assert cells[1][5] == "silent, 2h ago"
    assert json.loads(lomo("hosts", "-o", "json").out) == body


def test_without_hosts_there_is_a_heading(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("GET", "/hosts", Response(body={"object": "list", "data": []}))
    assert lomo("hosts").out.split()[:2] == ["HOST", "DEVICE"]

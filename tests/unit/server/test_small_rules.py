"""Rules that need no server: names of files, hosts, frames, times, what a log may hold, and which routes are open."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from jobs.models import Job
from server import main
from server.describe import eta_s
from server.feeds import encode_frame
from server.logs import redact
from server.middleware import _without_port
from server.routes.files import display_name
from server.settings import ServerSettings

SETTINGS = ServerSettings(
    database_url="postgresql+psycopg://nobody@127.0.0.1:1/none",
    broker_url="redis://127.0.0.1:1/0",
    data_dir=Path("/nonexistent"),
)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("train.jsonl", "train.jsonl"),
        ("übung 数据 🙂.jsonl", "übung 数据 🙂.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\train.jsonl", "train.jsonl"),
        ("a\x00b\nc\x1b[31m", "a_b_c_[31m"),
        ("safe\u202egnp.exe", "safe_gnp.exe"),
        ("", "upload"),
        ("folder/", "upload"),
        ("x" * 300, "x" * 255),
    ],
)
def test_display_name(given: str, shown: str) -> None:
    assert display_name(given) == shown


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost:8000", "localhost"),
        ("LOCALHOST", "localhost"),
        ("[::1]:8000", "[::1]"),
        ("[::1]", "[::1]"),
        ("evil.test:80", "evil.test"),
        ("", ""),
    ],
)
def test_host_without_port(host: str, name: str) -> None:
    assert _without_port(host) == name


def test_frame() -> None:
    assert encode_frame('{"a":1}', event="metrics", seq=7) == b'id: 7\nevent: metrics\ndata: {"a":1}\n\n'
    assert encode_frame("{}", event="job") == b"event: job\ndata: {}\n\n"


def running_job(*, step: int, total_steps: int | None, since_step_s: float) -> Job:
    return Job(status="running", step=step, total_steps=total_steps, step_at=NOW - timedelta(seconds=since_step_s))


@pytest.mark.parametrize(
    ("step", "since_step_s", "expected"),
    [
        (10, 0.0, 180.0),
        (10, 0.5, 179.5),
        # A run that stands still does not come nearer to its end.
        (10, 3600.0, 178.0),
        # A worker whose clock is ahead.
        (10, -5.0, 180.0),
        (100, 1.0, 0.0),
    ],
)
def test_eta(step: int, since_step_s: float, expected: float) -> None:
    job = running_job(step=step, total_steps=100, since_step_s=since_step_s)
    assert eta_s(job, step_s=2.0, now=NOW) == pytest.approx(expected)


def test_no_eta_where_nothing_can_be_said() -> None:
    assert eta_s(running_job(step=1, total_steps=None, since_step_s=0), step_s=2.0, now=NOW) is None
    assert eta_s(running_job(step=1, total_steps=9, since_step_s=0), step_s=None, now=NOW) is None
    assert eta_s(Job(status="queued", step=1, total_steps=9, step_at=NOW), step_s=2.0, now=NOW) is None


def test_log_holds_no_secret() -> None:
    record = redact(
        None,
        "info",
        {
            "event": "key sk-lomo-0123456789ab-" + "s" * 43 + " failed",
            "error": "cannot reach postgresql://lomo:hunter2@db/lomo",
            "ms": 3,
        },
    )
    assert record == {
        "event": "key sk-lomo-0123456789ab[redacted] failed",
        "error": "cannot reach postgresql://[redacted]@db/lomo",
        "ms": 3,
    }


def test_settings_split_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOMO_ALLOWED_HOSTS", "lomo.example, gpu1 ,")
    settings = ServerSettings(database_url="x", broker_url="x", data_dir=Path("/x"))
    assert settings.allowed_hosts == ("lomo.example", "gpu1")


def test_a_route_without_authentication_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "PUBLIC", main.PUBLIC - {"GET /healthz"})
    with pytest.raises(RuntimeError, match="GET /healthz"):
        main.create_app(SETTINGS)


def test_the_public_list_names_existing_routes_only() -> None:
    names = {name for route in main.create_app(SETTINGS).routes for name in main._names(route)}
    assert names >= main.PUBLIC
    assert all(isinstance(route, APIRoute) or route.path == "/assets" for route in main.create_app(SETTINGS).routes)

"""`lomo hosts`: the worker hosts, their memory, and what runs there."""

from __future__ import annotations

from cli.client import Json
from cli.output import NOTHING, format_age, format_bytes, write_json, write_table
from cli.session import Session, with_session


@with_session
def list_hosts(*, session: Session) -> None:
    """List the worker hosts: the memory that jobs may take, what running ones leave of it, and the jobs."""
    with session.connect() as client:
        page = client.get("/hosts")
    if session.is_json:
        write_json(page)
        return
    rows = [
        (
            host["name"],
            device_name(host),
            format_bytes(host["available_bytes"]),
            format_bytes(host["free_bytes"]),
            f"{host['num_running']}/{host['slots']}",
            ("alive, " if host["is_alive"] else "silent, ") + format_age(host["last_seen_at"]),
            ", ".join(host["running_jobs"]) or NOTHING,
        )
        for host in page["data"]
    ]
    write_table(("HOST", "DEVICE", "FOR JOBS", "FREE", "RUNS", "SEEN", "JOBS"), rows, whole=("HOST", "RUNS", "SEEN"))


def device_name(host: Json) -> str:
    """What the host's engines compute on: its first card, or its CPU."""
    devices = host.get("devices") or {}
    cards = devices.get("gpus") or []
    if host["device_kind"] == "cuda" and cards:
        more = f" (first of {len(cards)})" if len(cards) > 1 else ""
        return f"{cards[0].get('name', 'GPU')}{more}"
    return str((devices.get("cpu") or {}).get("name") or host["device_kind"] or NOTHING)

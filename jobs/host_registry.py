"""Worker hosts as they report themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import func, update
from sqlalchemy.dialects.postgresql import insert as upsert

from jobs.db import Database
from jobs.models import Host


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What a worker host says of itself at its start; the fields are the columns of `Host`."""

    name: str
    incarnation: str
    memory_bytes: int
    available_bytes: int | None = None
    run_overhead_bytes: int | None = None
    device_kind: str | None = None
    devices: dict[str, Any]
    slots: int = 1
    """Jobs that it runs at once."""


def register_host(db: Database, report: HostReport) -> None:
    """Record a worker host at its start."""
    values = asdict(report)
    with db.transaction() as session:
        session.execute(
            upsert(Host)
            .values(**values)
            .on_conflict_do_update(
                index_elements=[Host.name],
                set_={**values, "started_at": func.now(), "last_seen_at": func.now()},
            )
        )


def see_host(db: Database, *, name: str, available_bytes: int | None = None) -> None:
    """Record that a worker host is alive, and what is free on its device where that was measured anew."""
    measured = {} if available_bytes is None else {"available_bytes": available_bytes}
    with db.transaction() as session:
        session.execute(update(Host).where(Host.name == name).values(last_seen_at=func.now(), **measured))

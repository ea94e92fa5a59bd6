"""The log's record of who changed what about tenants: one line for each change, never a secret."""

from __future__ import annotations

import structlog

from jobs.keys import Principal

log = structlog.get_logger("server.audit")


def note(event: str, caller: Principal, **what: object) -> None:
    """Write down a change that has been made; `what` are ids, names and figures."""
    log.info(
        event,
        by_key_id=caller.api_key_id,
        by_key_name=caller.key_name,
        by_organization_id=caller.organization_id,
        **what,
    )

"""Identifiers of the API: a prefix that tells the kind, and 96 random bits; ids of events are derived.

An event's id is made of its job's id and its sequence number, so that it needs no column and no lookup.
"""

from __future__ import annotations

import re
import secrets

_RANDOM_BYTES = 12  # 96 bits: no collision to be expected below 2^48 ids
# 18 of the 19 digits of a bigint.
_NUMBERED_ID = re.compile(r"(ftevent|ftlog)-([0-9a-f]{24})-([0-9]{1,18})")


def new_job_id() -> str:
    """`ftjob-` and 24 hexadecimal digits."""
    return f"ftjob-{secrets.token_hex(_RANDOM_BYTES)}"


def new_file_id() -> str:
    """`file-` and 24 hexadecimal digits."""
    return f"file-{secrets.token_hex(_RANDOM_BYTES)}"


def new_upload_id() -> str:
    """`upload_` and 24 hexadecimal digits."""
    return f"upload_{secrets.token_hex(_RANDOM_BYTES)}"


def new_part_id() -> str:
    """`part_` and 24 hexadecimal digits."""
    return f"part_{secrets.token_hex(_RANDOM_BYTES)}"


def new_checkpoint_id() -> str:
    """`ftckpt_` and 24 hexadecimal digits."""
    return f"ftckpt_{secrets.token_hex(_RANDOM_BYTES)}"


def new_webhook_endpoint_id() -> str:
    """`whe_` and 24 hexadecimal digits."""
    return f"whe_{secrets.token_hex(_RANDOM_BYTES)}"


def new_webhook_event_id() -> str:
    """`evt_` and 24 hexadecimal digits."""
    return f"evt_{secrets.token_hex(_RANDOM_BYTES)}"


def new_organization_id() -> str:
    """`org-` and 24 hexadecimal digits."""
    return f"org-{secrets.token_hex(_RANDOM_BYTES)}"


def new_project_id() -> str:
    """`proj_` and 24 hexadecimal digits."""
    return f"proj_{secrets.token_hex(_RANDOM_BYTES)}"


def event_id(job_id: str, seq: int) -> str:
    """The API's id of one event of a job."""
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{seq}"


def parse_event_id(job_id: str, text: str) -> int | None:
    """The sequence number in an event's id, or None where it is not an event of this job."""
    return _parse_numbered("ftevent", job_id, text)


def log_line_id(job_id: str, seq: int) -> str:
    """The API's id of one line of a job's log."""
    return f"ftlog-{job_id.removeprefix('ftjob-')}-{seq}"


def parse_log_line_id(job_id: str, text: str) -> int | None:
    """The number in a log line's id, or None where it is not a line of this job."""
    return _parse_numbered("ftlog", job_id, text)


def _parse_numbered(kind: str, job_id: str, text: str) -> int | None:
    match = _NUMBERED_ID.fullmatch(text)
    if match is None or match[1] != kind or f"ftjob-{match[2]}" != job_id:
        return None
    return int(match[3])


def tuned_model_id(*, base_model: str, suffix: str | None, job_id: str) -> str:
    """OpenAI's form: `ft:<base>:<organization>:<suffix>:<8 characters>`; the organization part is left empty here."""
    base = base_model.split(":")[1] if base_model.startswith("ft:") else base_model
    return f"ft:{base}::{suffix or ''}:{job_id.removeprefix('ftjob-')[:8]}"

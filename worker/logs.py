"""The worker's log: one JSON object per line on standard error, Celery's own lines included.

The event name is constant and the rest is key and value; `job_id` and `attempt` are bound once per job.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

# What Celery says about each message at INFO; a doorbell is not news, and rings come every few seconds.
_QUIET_LOGGERS = ("celery.app.trace", "celery.worker.strategy", "celery.worker.request", "celery.beat")


def configure_logs(level: int | str) -> None:
    """Send the logs of structlog and of the standard library to standard error as JSON lines."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)

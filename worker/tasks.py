"""The two Celery tasks. A message only says "look": what there is to do stands in the database."""

from __future__ import annotations

from celery import Celery
from structlog import get_logger

from jobs.dispatch import REAP_TASK, RING_TASK
from worker.node import Node
from worker.outage import NOT_READY, first_line

log = get_logger(__name__)


def register_tasks(app: Celery, node: Node) -> None:
    """Give the application its tasks, bound to this process's node."""

    @app.task(name=RING_TASK)  # type: ignore[untyped-decorator]  # celery has no types
    def ring() -> None:
        """A job may be waiting: claim and run until none is left."""
        try:
            node.work()
        except NOT_READY as error:
            log.warning("ring_without_database", error=first_line(error))
        except Exception:
            log.exception("ring_failed")

    @app.task(name=REAP_TASK)  # type: ignore[untyped-decorator]  # celery has no types
    def reap() -> None:
        """Find what lost messages and lost workers left behind."""
        try:
            node.reap()
        except NOT_READY as error:
            log.warning("reap_without_database", error=first_line(error))
        except Exception:
            log.exception("reap_failed")

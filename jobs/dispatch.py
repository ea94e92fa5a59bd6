"""The doorbell: Celery messages that say "look at the queue". They carry no job and no truth; losing one is harmless.

Settings follow what is known of Celery on Redis with long jobs: acknowledged at once (a message that outlives the
broker's visibility timeout would be delivered twice), no results, no revocation, a broker blip kills nothing.
"""

from __future__ import annotations

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

RING_TASK = "worker.ring"
REAP_TASK = "worker.reap"
JOBS_QUEUE = "jobs"
CONTROL_QUEUE = "control"

log = structlog.get_logger(__name__)


def make_celery(broker_url: str) -> Celery:
    """The Celery application of producer and worker alike."""
    app = Celery("lomo", broker=broker_url)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        task_default_queue=JOBS_QUEUE,
        task_routes={REAP_TASK: {"queue": CONTROL_QUEUE}},
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_connect_timeout": 3,
            # Must exceed the blocking read's wait, or an idle worker reconnects all the time.
            "socket_timeout": 30,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return app


def ring(app: Celery) -> bool:
    """Tell the workers that a job may be waiting. Returns whether the broker took it; the reaper rings again if not."""
    try:
        app.send_task(RING_TASK, retry=False, expires=3600)
    except OperationalError as error:
        log.warning("doorbell_failed", error=str(error))
        return False
    return True

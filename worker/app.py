"""The Celery application of worker and beat:

    python -m celery -A worker.app worker --pool=threads --concurrency=2 -Q jobs,control
    python -m celery -A worker.app beat

Reading the settings is all that an import does. A worker takes its lock and announces its host when it starts, and
tells its engines to stop when it is told to. Threads suffice for a pool, since each job is a process of its own: one
thread per slot waits for its engine, and one more serves the control queue.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, NoReturn

from celery import Celery, signals

from jobs import dispatch
from jobs.settings import SettingsError, load_settings
from worker.logs import configure_logs
from worker.node import Node, WorkerRefusedError
from worker.settings import WorkerSettings
from worker.tasks import register_tasks

_EXIT_CONFIGURATION = 2


def _refuse(reason: object) -> NoReturn:
    """End with one clear sentence. Celery would wrap any other exception into a traceback, or log it and go on."""
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    raise SystemExit(_EXIT_CONFIGURATION)


def _load_settings() -> WorkerSettings:
    try:
        return load_settings(WorkerSettings)
    except SettingsError as error:
        _refuse(error)


def _make_app(settings: WorkerSettings) -> Celery:
    celery = dispatch.make_celery(settings.broker_url)
    celery.conf.beat_schedule = {
        "reap": {
            "task": dispatch.REAP_TASK,
            "schedule": settings.reap_every_s,
            # A tick that nobody took in time is worthless: the next one says the same.
            "options": {"expires": settings.reap_every_s},
        }
    }
    # Beat sleeps in steps of this; its default of 300 s would make a restarted broker wait.
    celery.conf.beat_max_loop_interval = settings.reap_every_s
    return celery


settings = _load_settings()
app = _make_app(settings)
node = Node(settings, send_ring=lambda: dispatch.ring(app))
register_tasks(app, node)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]  # celery has no types
def _set_up_logging(loglevel: int | str | None = None, **_: Any) -> None:
    configure_logs(loglevel or "INFO")


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery has no types
def _start(sender: Any, **_: Any) -> None:
    if not sender.pool_cls.__module__.endswith(".thread"):
        _refuse("The worker runs jobs in threads: start it with --pool=threads.")
    if int(sender.concurrency or 0) <= settings.slots:
        needed = settings.slots + 1
        _refuse(f"The worker needs a thread per slot and one for control: start it with --concurrency={needed}.")
    try:
        node.start()
    except WorkerRefusedError as error:
        _refuse(error)
    # What is there now stays: to look through it again for garbage took 4 to 9 % of the CPU time of shipping a journal.
    gc.freeze()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]  # celery has no types
def _stop_jobs(**_: Any) -> None:
    """Runs inside the signal handler: it only sets a flag, at which the jobs' threads tell their engines to stop."""
    node.stopping.set()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]  # celery has no types
def _close(**_: Any) -> None:
    node.close()

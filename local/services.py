"""The commands of our own processes and the environment they get: the one place that knows both."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from local.folder import DataFolder
from local.process import ProcessSpec

Environment = Mapping[str, str]
"""The variables of a process."""

# Defaults of the worker's own settings (worker/settings.py), as far as they decide how it is started and stopped.
_DEFAULT_SLOTS = 1
_DEFAULT_ENGINE_GRACE_S = 50.0  # an engine's time to write its checkpoint
_WORKER_EXTRA_GRACE_S = 10.0  # after which the worker gives its jobs back
_STOP_GRACE_S = 10.0  # the server ends its streams, beat has nothing to do

_CELERY = (sys.executable, "-m", "celery", "-A", "worker.app")
_WORKER_OPTIONS = (
    *("--pool=threads", "--queues=jobs,control", "--without-gossip", "--without-mingle"),
    *("--loglevel=INFO", "--hostname=lomo@%h"),
)


def make_environment(folder: DataFolder, *, database_url: str, broker_url: str, host: str, port: int) -> Environment:
    """Return the environment of server, worker and beat: the caller's own, and where this stack's parts are.

    Our processes run with the log folder as working directory, so relative paths of the caller's are made absolute.
    """
    # Variables of libpq (PGOPTIONS, PGSERVICE, ...) are meant for another database.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    if roots := env.get("LOMO_MODEL_ROOTS"):
        env["LOMO_MODEL_ROOTS"] = ":".join(str(Path(root).absolute()) for root in roots.split(":") if root)
    return {
        **env,
        "LOMO_DATABASE_URL": database_url,
        "LOMO_BROKER_URL": broker_url,
        "LOMO_DATA_DIR": str(folder.path),
        "LOMO_ADMIN_KEY_FILE": str(folder.admin_key),
        "LOMO_SERVER_HOST": host,
        "LOMO_SERVER_PORT": str(port),
    }


def migrate_spec(folder: DataFolder, env: Environment) -> ProcessSpec:
    """Bring the schema to the newest version and write the first API key."""
    return _spec(folder, "migrate", [sys.executable, "-m", "jobs", "migrate"], env)


def server_spec(folder: DataFolder, env: Environment) -> ProcessSpec:
    """The HTTP API and the dashboard."""
    return _spec(folder, "server", [sys.executable, "-m", "server"], env)


def worker_spec(folder: DataFolder, env: Environment) -> ProcessSpec:
    """The Celery worker that runs the jobs of this machine."""
    # A thread waits in each job that runs, and one serves the control queue (the reaper).
    num_threads = int(_number(env, "LOMO_SLOTS", _DEFAULT_SLOTS)) + 1
    return _spec(
        folder,
        "worker",
        [*_CELERY, "worker", *_WORKER_OPTIONS, f"--concurrency={num_threads}"],
        env,
        stop_grace_s=_number(env, "LOMO_STOP_GRACE_S", _DEFAULT_ENGINE_GRACE_S) + _WORKER_EXTRA_GRACE_S,
    )


def beat_spec(folder: DataFolder, env: Environment) -> ProcessSpec:
    """Celery's clock, which rings for the reaper."""
    schedule = folder.path / "celerybeat-schedule"
    return _spec(folder, "beat", [*_CELERY, "beat", f"--schedule={schedule}", "--pidfile=", "--loglevel=INFO"], env)


def _spec(
    folder: DataFolder, name: str, argv: Sequence[str], env: Environment, *, stop_grace_s: float = _STOP_GRACE_S
) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        argv=argv,
        env=env,
        log_path=folder.logs / f"{name}.log",
        # Not the user's folder: `python -m` looks there first, and it may hold a package called `server`.
        cwd=folder.logs,
        stop_grace_s=stop_grace_s,
        # Without its supervisor it has lost its database and its broker; what a job needs is in its last checkpoint.
        death_signal=signal.SIGKILL,
    )


def _number(env: Environment, name: str, default: float) -> float:
    """Return a setting of the worker's that matters here too; a wrong one is the worker's to complain about."""
    try:
        return float(env.get(name, default))
    except ValueError:
        return default

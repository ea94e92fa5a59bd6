"""What each run takes on this host beside its plan: measured once by the engine, kept in the data folder.

On a CPU host that is the process around the run's tensors (lomo_core/memory/process.py). On a card nothing counts but
what is allocated there, and what its driver and libraries hold is not free when the host measures it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import threading
from pathlib import Path
from typing import Any

import structlog

from jobs.shape_cache import engine_versions
from lomo_core.config import CalibrationConfig
from lomo_core.errors import ConfigError
from lomo_core.memory.process import MOST_HOLES_BYTES, TYPICAL
from worker.engine_process import EngineProcess, engine_environment
from worker.settings import WorkerSettings

# Eight seconds on a quiet machine, most of it imports.
_PATIENCE_S = 120.0
_POLL_S = 0.05
_TYPICAL = CalibrationConfig(base_bytes=TYPICAL.base_bytes, libraries_bytes=TYPICAL.libraries_bytes)

log = structlog.get_logger(__name__)


def calibrate(settings: WorkerSettings, *, stopping: threading.Event) -> CalibrationConfig:
    """This host's figures: from its file, else measured by the engine; typical ones where the engine cannot tell, or
    the worker stops meanwhile."""
    path = calibration_path(settings)
    found = _read(path)
    try:
        if found is None:
            found = _measure(settings, path, stopping)
    except OSError as error:
        # A full disk, or no such engine: that is for the jobs to tell, and no reason not to announce the host.
        log.warning("calibration_not_possible", error=str(error))
    if found is None:
        log.warning("calibration_failed", used="typical figures")
    return found or _TYPICAL


def calibration_path(settings: WorkerSettings) -> Path:
    """The file that keeps this host's figures."""
    return settings.data_dir.absolute() / "calibration" / f"{settings.worker_name}-{_key(settings)}.json"


def run_overhead_bytes(calibration: CalibrationConfig) -> int:
    """The most that a run's process has beside its plan."""
    return calibration.base_bytes + calibration.libraries_bytes + MOST_HOLES_BYTES


def _measure(settings: WorkerSettings, path: Path, stopping: threading.Event) -> CalibrationConfig | None:
    """Ask the engine, and keep its answer; None where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    answer = _ask_engine(settings, path.parent, stopping)
    found = None if answer is None else _parse(answer)
    if found is not None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        part.replace(path)
        log.info("calibrated", base_bytes=found.base_bytes, libraries_bytes=found.libraries_bytes)
    return found


def _read(path: Path) -> CalibrationConfig | None:
    """What a file holds; None where there is none that can be used."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _ask_engine(settings: WorkerSettings, folder: Path, stopping: threading.Event) -> str | None:
    """The last line of what the engine prints; None where it failed, took too long or was not waited for."""
    environment = engine_environment(num_threads=settings.engine_threads)
    child = EngineProcess([*settings.engine_command, "calibrate"], folder=folder, environment=environment)
    waited = 0.0
    try:
        while (exit_code := child.poll()) is None and waited < _PATIENCE_S and not stopping.wait(_POLL_S):
            waited += _POLL_S
    finally:
        child.kill()
    *_, last = child.log_tail().splitlines() or [""]
    if exit_code == 0:
        return last
    log.warning("engine_cannot_calibrate", exit_code=exit_code, said=last)
    return None


def _parse(text: str) -> CalibrationConfig | None:
    try:
        raw: Any = json.loads(text)
        return CalibrationConfig(base_bytes=int(raw["base_bytes"]), libraries_bytes=int(raw["libraries_bytes"]))
    except (ValueError, KeyError, TypeError, ConfigError):
        return None


def _key(settings: WorkerSettings) -> str:
    """Other figures come with another engine, other libraries or another machine."""
    about = [platform.machine(), platform.release(), *settings.engine_command, str(settings.engine_threads)]
    about += engine_versions()
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]

"""Figures of the host as if its worker had measured them: that is a start of the engine, some 5 CPU seconds.

For tests that are about something else; `tests/e2e/test_first_light.py` and `tests/unit/engine/test_out_of_memory.py`
let them be measured.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lomo_core.memory.process import TYPICAL
from worker.calibration import calibration_path
from worker.settings import WorkerSettings


def give_calibration(settings: WorkerSettings) -> None:
    """Put typical figures where a worker with these settings looks for its own."""
    path = calibration_path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(TYPICAL)), encoding="utf-8")


def give_stack_calibration(data_dir: Path) -> None:
    """The same for the worker of a stack over this folder."""
    give_calibration(WorkerSettings(database_url="postgresql+psycopg://", broker_url="redis://", data_dir=data_dir))

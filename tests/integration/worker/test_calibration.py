"""A CPU host is measured once: by the engine, into a file; and without an engine that can tell, not at all."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import pytest

from lomo_core.config import CalibrationConfig
from lomo_core.memory.process import TYPICAL
from tests.support.fake_engine import CALIBRATION
from tests.support.worker_bench import Bench
from worker.calibration import calibrate

FIGURES = CalibrationConfig(**CALIBRATION)
TYPICAL_FIGURES = CalibrationConfig(base_bytes=TYPICAL.base_bytes, libraries_bytes=TYPICAL.libraries_bytes)


def ask(bench: Bench, **changes: Any) -> CalibrationConfig:
    return calibrate(bench.settings.model_copy(update=changes), stopping=threading.Event())


def test_the_engine_is_asked_once(bench: Bench) -> None:
    assert ask(bench) == FIGURES
    [path] = (bench.settings.data_dir / "calibration").glob("*.json")
    path.write_text(json.dumps({"base_bytes": 1, "libraries_bytes": 2}), encoding="utf-8")
    assert ask(bench) == CalibrationConfig(base_bytes=1, libraries_bytes=2)
    path.write_text("{", encoding="utf-8")
    assert ask(bench) == FIGURES, "a file that cannot be read is made anew"


def test_another_engine_is_measured_anew(bench: Bench) -> None:
    ask(bench)
    ask(bench, engine_threads=1)
    assert len(list((bench.settings.data_dir / "calibration").glob("*.json"))) == 2


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "print('no figures')", "print('{}')"])
def test_an_engine_that_cannot_tell_leaves_typical_figures(bench: Bench, code: str) -> None:
    assert ask(bench, engine_command=(sys.executable, "-c", code)) == TYPICAL_FIGURES
    assert list((bench.settings.data_dir / "calibration").glob("*.json")) == []


def test_no_engine_and_no_room_are_no_reason_not_to_start(bench: Bench) -> None:
    assert ask(bench, engine_command=("/no/such/engine",)) == TYPICAL_FIGURES
    (bench.settings.data_dir / "calibration").rename(bench.settings.data_dir / "gone")
    (bench.settings.data_dir / "calibration").write_bytes(b"a file where the folder should be")
    assert ask(bench) == TYPICAL_FIGURES


def test_a_worker_that_stops_does_not_wait(bench: Bench) -> None:
    stopping = threading.Event()
    stopping.set()
    hanging = (sys.executable, "-c", "import threading; threading.Event().wait()")
    settings = bench.settings.model_copy(update={"engine_command": hanging})
    assert calibrate(settings, stopping=stopping) == TYPICAL_FIGURES

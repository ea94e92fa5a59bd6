"""The cache of models' shapes: few may wait for the engine's process."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BusyError, InvalidRequestError
from jobs.shape_cache import ShapeCache


def test_who_finds_all_places_taken_is_told_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, go_on = threading.Event(), threading.Event()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        running.set()
        assert go_on.wait(60)
        return subprocess.CompletedProcess(command, 11, "", "there is no such model")

    monkeypatch.setattr("jobs.shape_cache.subprocess.run", run)
    cache = ShapeCache(tmp_path, most_waiting=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.read, b"{}")
        assert running.wait(60)
        with pytest.raises(BusyError):
            cache.read(b"[]")
        go_on.set()
        with pytest.raises(InvalidRequestError, match="no such model"):
            first.result()
    with pytest.raises(InvalidRequestError):  # the place is free again
        cache.read(b"[]")

"""The cache of models' shapes: few may wait for the engine's process."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BusyError, InvalidRequestError
from jobs.shape_cache import ShapeCache
from tests.support.shapes_by_hand import shapes_by_hand


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


def test_what_the_engine_refused_is_kept_and_what_killed_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is not refused for ever because a process was killed once, or the machine was slow."""
    ends: list[int | None] = [-9, None, 1, 11]
    num_runs = 0

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        nonlocal num_runs
        num_runs += 1
        end = ends.pop(0)
        if end is None:
            raise subprocess.TimeoutExpired(command, 90)
        return subprocess.CompletedProcess(command, end, "", "there is no such model")

    monkeypatch.setattr("jobs.shape_cache.subprocess.run", run)
    cache = ShapeCache(tmp_path)
    codes = []
    for _ in range(6):
        with pytest.raises(InvalidRequestError) as refused:
            cache.read(b"{}")
        codes.append(refused.value.code)
    assert num_runs == 4
    assert codes == ["invalid_model", "unforeseen_model", *["invalid_model"] * 4]


def test_the_folder_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shapes_by_hand().to_json()
    monkeypatch.setattr("jobs.shape_cache._MOST_FILES", 3)
    monkeypatch.setattr("jobs.shape_cache._ask_engine", lambda config: text)
    cache = ShapeCache(tmp_path)
    configs = [json.dumps({"vocab_size": size}).encode() for size in range(5)]
    for age, config in enumerate(configs):
        cache.read(config)
        os.utime(cache.path_of(config), (age, age))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(cache.path_of(c).name for c in configs[2:])

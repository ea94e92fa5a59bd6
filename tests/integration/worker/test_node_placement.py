"""A worker announces the memory that it measured, claims by it, and wakes the hosts that a job may fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import host_registry, reads
from jobs.db import Database
from jobs.host_registry import HostReport
from lomo_core.memory.process import MOST_HOLES_BYTES
from tests.support.fake_engine import CALIBRATION


def capacity_bytes(db: Database) -> int:
    room = reads.largest_room(db)
    assert room is not None
    return room.available_bytes


FINISH = [["steps", 1], ["finish"]]


def test_the_reaper_rings_once_for_each_host(bench: Any) -> None:
    """Any host may take a ring; the job may fit only one of them."""
    for name in ("host-a", "host-b", "host-c"):
        host_registry.register_host(bench.db, HostReport(name=name, incarnation="1", memory_bytes=1, devices={}))
    bench.submit(FINISH)
    bench.node().reap()
    assert len(bench.rings) == 3


def test_a_node_takes_only_what_fits_what_it_measured(bench: Any, wait_until: Any) -> None:
    """A real start: the host is announced with the memory that this machine has free, and claims by it."""
    node = bench.node()
    node.start()
    host = wait_until(lambda: reads.find_host(bench.db, name="host-a"), 30, "the host")
    assert host.incarnation == node.incarnation
    # By the engine's answer, and the most that a heap has in holes.
    assert host.run_overhead_bytes == sum(CALIBRATION.values()) + MOST_HOLES_BYTES
    capacity = host.available_bytes - host.run_overhead_bytes
    large, exact = (bench.submit(FINISH, planned_bytes=capacity + extra) for extra in (1, 0))
    node.work()
    assert [bench.job(job_id).status for job_id in (large, exact)] == ["queued", "succeeded"]


def write_driver(folder: Path, *, free_mib: int) -> None:
    """An nvidia-smi that knows one card; replaced in one go, since the worker may be about to run it."""
    draft = folder / "draft"
    draft.write_text(f"#!/bin/sh\necho '0, GPU-5a2f, 81559, {free_mib}, NVIDIA H100'\n", encoding="ascii")
    draft.chmod(0o755)
    draft.replace(folder / "nvidia-smi")


def test_an_idle_host_measures_anew_and_a_busy_one_does_not(
    bench: Any, wait_until: Any, in_background: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of a killed worker still holds the card when the next worker starts; then it lets go."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write_driver(tmp_path, free_mib=100)
    node = bench.node(slots=2, measure_every_s=0.05, heartbeat_s=0.05)
    node.start()
    host = wait_until(lambda: reads.find_host(bench.db, name="host-a"), 30, "the host")
    assert (host.device_kind, host.available_bytes) == ("cuda", 100 * 2**20)
    write_driver(tmp_path, free_mib=80000)
    wait_until(lambda: capacity_bytes(bench.db) == 80000 * 2**20, 30, "another measurement")
    job_id = bench.submit([["steps", 1], ["touch", "hanging"], ["wait", "go"], ["finish"]], planned_bytes=2**30)
    # The measurement holds all slots for a moment: then a look at the queue comes to nothing, and is rung for again.
    wait_until(lambda: in_background(node.work) and bench.job(job_id).status == "running", 30, "the claim")
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    write_driver(tmp_path, free_mib=5)
    assert node.measure_idle() is None
    bench.touch(job_id, "go")
    wait_until(lambda: capacity_bytes(bench.db) == 5 * 2**20, 30, "a measurement after the job")
    assert bench.job(job_id).status == "succeeded"


def test_a_ring_that_a_measurement_kept_from_the_queue_is_repeated(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = bench.node()
    job_id = bench.submit(FINISH)
    monkeypatch.setattr("worker.node.find_gpus", lambda: node.work() or [])  # a ring in the middle of it
    assert node.measure_idle() is not None
    assert (bench.job(job_id).status, len(bench.rings)) == ("queued", 1)
    node.work()
    assert bench.job(job_id).status == "succeeded"
    assert node.measure_idle() is not None

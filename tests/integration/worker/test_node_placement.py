"""A worker announces the memory that it measured, claims by it, and wakes the hosts that a job may fit."""

from __future__ import annotations

from typing import Any

from jobs import lifecycle, reads
from jobs.lifecycle import HostReport

FINISH = [["steps", 1], ["finish"]]


def test_the_reaper_rings_once_for_each_host(bench: Any) -> None:
    """Any host may take a ring; the job may fit only one of them."""
    for name in ("host-a", "host-b", "host-c"):
        lifecycle.register_host(bench.db, HostReport(name=name, incarnation="1", memory_bytes=1, devices={}))
    bench.submit(FINISH)
    bench.node().reap()
    assert len(bench.rings) == 3


def test_a_node_takes_only_what_fits_what_it_measured(bench: Any, wait_until: Any) -> None:
    """A real start: the host is announced with the memory that this machine has free, and claims by it."""
    node = bench.node()
    node.start()
    host = wait_until(lambda: reads.find_host(bench.db, name="host-a"), 30, "the host")
    assert host.incarnation == node.incarnation
    large, exact = (bench.submit(FINISH, planned_bytes=host.available_bytes + extra) for extra in (1, 0))
    node.work()
    assert [bench.job(job_id).status for job_id in (large, exact)] == ["queued", "succeeded"]

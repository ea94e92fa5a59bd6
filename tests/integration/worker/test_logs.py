"""What an engine prints comes into the database: by line, over attempts, and what a killed worker left."""

from __future__ import annotations

import signal
from typing import Any

from jobs import lifecycle, runlog
from tests.support.worker_bench import Bench


def logged(bench: Bench, job_id: str) -> list[tuple[int, int, str]]:
    lines = runlog.lines_since(bench.db, job_id=job_id, seq=0, limit=100_000)
    return [(line.seq, line.attempt, line.text) for line in lines]


def test_what_engines_print_is_kept_over_attempts(bench: Bench) -> None:
    first = [["print", "\x1b[31mwarning\x1b[0m"], ["print", "a\nb"], ["die", signal.SIGKILL]]
    job_id = bench.submit(first, [["print", "again"], ["steps", 1], ["finish"]])
    assert bench.work_until_ended(bench.node(), job_id).status == "succeeded"
    assert logged(bench, job_id) == [(1, 1, "warning"), (2, 1, "a"), (3, 1, "b"), (4, 2, "again")]


def test_lines_are_there_while_the_engine_runs(bench: Bench, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit([["print", "hello"], ["touch", "hanging"], ["wait", "go"], ["print", "bye"], ["finish"]])
    thread = in_background(bench.node().work)
    wait_until(lambda: logged(bench, job_id) == [(1, 1, "hello")], 30, "the first line")
    bench.touch(job_id, "go")
    thread.join(30)
    assert [text for _, _, text in logged(bench, job_id)] == ["hello", "bye"]


def test_the_end_of_a_flood_is_there_when_the_job_has_ended(bench: Bench) -> None:
    job_id = bench.submit([["print", "\n".join(f"line {number}" for number in range(30_000))], ["exit", 99]])
    bench.node(ship_every_s=3600.0).work()
    assert bench.job(job_id).status == "failed"
    assert logged(bench, job_id) == [
        (number + 1, 1, f"line {number}") for number in range(30_000 - runlog.MAX_LINES, 30_000)
    ]


def test_what_a_dead_worker_had_not_shipped_is_shipped_by_the_next(bench: Bench) -> None:
    job_id = bench.submit([["steps", 1], ["finish"]])
    dead = bench.node(worker_name="host-b")
    claim = lifecycle.claim(bench.db, owner=dead.owner, lease_s=60)
    assert claim is not None
    folder = bench.folder(job_id) / "attempt-1"
    folder.mkdir(parents=True)
    (folder / "engine.log").write_bytes(b"one\ntwo\nthree")
    runlog.ship(bench.db, claim.lease, ["one"], attempt=1, first_byte=0, next_byte=4)
    lifecycle.release(bench.db, claim.lease, reason="dead")
    assert bench.work_until_ended(bench.node(), job_id).status == "succeeded"
    assert logged(bench, job_id) == [(1, 1, "one"), (2, 1, "two"), (3, 1, "three")]

"""One job from claim to end, against real Postgres and an engine that plays a script."""

from __future__ import annotations

from typing import Any

FINISH = [["steps", 3], ["checkpoint"], ["steps", 2], ["finish"]]


def test_success(bench: Any) -> None:
    job_id = bench.submit(FINISH)
    bench.node().work()
    job = bench.job(job_id)
    assert job.status == "succeeded", bench.messages(job_id)
    assert (job.attempt, job.failures, job.step, job.trained_tokens) == (1, 0, 5, 160)
    assert bench.steps(job_id) == [1, 2, 3, 4, 5]

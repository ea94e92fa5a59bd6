"""A worker whose jobs' files lie in an object store: fetched, compared, waited for, and gone when the job has ended."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from jobs import files, reads
from jobs.deletion import delete_job
from jobs.models import File
from jobs.owner import Owner
from lomo_core.config import TrainConfig
from tests.support.worker_bench import MODEL, ORGANIZATION
from worker.node import Node

from ...conftest import Bucket, WaitUntil

FINISH = [["steps", 2], ["finish"]]


def store(bench: Any, bucket: Bucket, *attempts: Any, **options: Any) -> File:
    """A file in the bucket, whose engine plays these scripts."""
    content = (json.dumps({"attempts": attempts}) + "\n").encode()
    return files.store_file(
        bench.db,
        io.BytesIO(content),
        files_dir=bench.settings.files_dir,
        storage_url=bucket.url,
        owner=Owner(ORGANIZATION),
        filename="a.jsonl",
        purpose="fine-tune",
        **options,
    )


def submit(bench: Any, file: File, **options: Any) -> str:
    return str(bench.submit_spec({"model": MODEL, "training_file": file.id, "seed": 1, **options}))


@pytest.fixture
def node(bench: Any, bucket: Bucket) -> Node:
    """A worker that keeps results in the bucket, and is not patient with it."""
    made: Node = bench.node(storage_url=bucket.url, storage_patience_s=0.0)
    return made


def test_a_job_from_its_file_to_its_result(bench: Any, bucket: Bucket, node: Node) -> None:
    file = store(bench, bucket, FINISH)
    job_id = submit(bench, file, validation_file=file.id)
    assert bench.work_until_ended(node, job_id).status == "succeeded", bench.messages(job_id)
    run = TrainConfig.from_json((bench.folder(job_id) / "attempt-1" / "run.json").read_text(encoding="utf-8"))
    assert Path(run.data.train_path) == bench.folder(job_id) / "inputs" / file.id
    assert run.data.validation_path == run.data.train_path
    assert not (bench.folder(job_id) / "inputs").exists()
    [result] = reads.list_files(bench.db, owner=Owner(ORGANIZATION), limit=9, purpose="fine-tune-results").items
    assert sorted(bucket.names()) == sorted([f"files/{file.id}", f"files/{result.id}"])
    content = files.read_content(result, data_dir=bench.settings.data_dir)
    assert not isinstance(content, Path)
    assert b"".join(content).startswith(b"step,train_loss")
    assert list(bench.folder(job_id).rglob("*.csv")) == []
    # Whoever deletes the job deletes that, too.
    delete_job(bench.db, owner=Owner(ORGANIZATION), job_id=job_id, runs_dir=bench.settings.runs_dir)
    node.reap()
    assert bucket.names() == [f"files/{file.id}"]


def test_an_expired_file_serves_the_job_and_goes_after_it(bench: Any, bucket: Bucket, node: Node) -> None:
    file = store(bench, bucket, FINISH, expires_after_s=3600)
    job_id = submit(bench, file)
    with bench.db.transaction() as session:
        session.execute(text("UPDATE files SET expires_at = now()"))
    node.reap()
    assert bucket.names() == [f"files/{file.id}"]
    assert bench.work_until_ended(node, job_id).status == "succeeded", bench.messages(job_id)
    node.reap()
    assert f"files/{file.id}" not in bucket.names()


def test_a_store_that_comes_back_costs_an_attempt(bench: Any, bucket: Bucket) -> None:
    node = bench.node(storage_url=bucket.url, storage_patience_s=0.0, retry_backoff_s=600.0)
    file = store(bench, bucket, FINISH, FINISH)
    job_id = submit(bench, file)
    bucket.go_away()
    node.work()
    job = bench.job(job_id)
    assert (job.status, job.failures) == ("queued", 1)
    assert any("the object store does not answer as it should. The job is queued" in m for m in bench.messages(job_id))
    bucket.come_back()
    with bench.db.transaction() as session:
        session.execute(text("UPDATE jobs SET run_after = now()"))
    assert bench.work_until_ended(node, job_id).status == "succeeded", bench.messages(job_id)


def test_a_store_that_stays_away_fails_the_job_by_its_name(bench: Any, bucket: Bucket, node: Node) -> None:
    job_id = submit(bench, store(bench, bucket, FINISH))
    bucket.go_away()
    job = bench.work_until_ended(node, job_id, timeout_s=60)
    assert job.status == "failed"
    assert "the object store does not answer as it should. The job was lost 3 times" in job.error["message"]


def test_a_store_that_is_away_for_the_result_costs_no_model(
    bench: Any, bucket: Bucket, node: Node, in_background: Any, wait_until: WaitUntil
) -> None:
    job_id = submit(bench, store(bench, bucket, [["steps", 2], ["touch", "stepped"], ["wait", "go"], ["finish"]]))
    in_background(node.work)
    wait_until(lambda: bench.has_touched(job_id, "stepped"), 30, "the engine")
    bucket.go_away()
    bench.touch(job_id, "go")
    wait_until(lambda: bench.job(job_id).status == "succeeded", 60, "the job's end")
    [result] = reads.list_files(bench.db, owner=Owner(ORGANIZATION), limit=9, purpose="fine-tune-results").items
    path = files.read_content(result, data_dir=bench.settings.data_dir)
    assert isinstance(path, Path)
    assert path.read_text(encoding="utf-8").startswith("step,train_loss")


def test_a_cancel_ends_the_wait_for_the_store(
    bench: Any,
    bucket: Bucket,
    in_background: Callable[[Callable[[], None]], threading.Thread],
    wait_until: WaitUntil,
) -> None:
    job_id = submit(bench, store(bench, bucket, FINISH))
    bucket.go_away()
    in_background(bench.node(storage_url=bucket.url, storage_patience_s=1000.0).work)
    wait_until(lambda: bench.job(job_id).status == "running", 30, "the claim")
    bench.cancel(job_id)
    wait_until(lambda: bench.job(job_id).status == "cancelled", 30, "the job's end")
    assert list(bench.folder(job_id).rglob("*.partial")) == []


@pytest.mark.parametrize(("change", "code"), [("gone", "file_not_found"), ("other", "file_damaged")])
def test_an_object_that_is_not_the_file_fails_the_job_at_once(
    bench: Any, bucket: Bucket, node: Node, change: str, code: str
) -> None:
    file = store(bench, bucket, FINISH)
    job_id = submit(bench, file)
    if change == "gone":
        bucket.client.delete_object(Bucket=bucket.name, Key=f"files/{file.id}")
    else:
        bucket.put(f"files/{file.id}", b"x" * file.num_bytes)
    job = bench.work_until_ended(node, job_id)
    assert (job.status, job.error["code"], job.error["param"]) == ("failed", code, "training_file")
    assert job.attempt == 1
    assert not (bench.folder(job_id) / "inputs").exists()


def test_another_organizations_file_is_not_found(bench: Any, bucket: Bucket, node: Node) -> None:
    file = store(bench, bucket, FINISH)
    with bench.db.transaction() as session:
        session.execute(text("UPDATE files SET organization_id = 'org-other'"))
    job_id = submit(bench, file)
    assert bench.work_until_ended(node, job_id).error["code"] == "file_not_found"

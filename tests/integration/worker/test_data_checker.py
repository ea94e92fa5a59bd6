"""Checks of files by a worker's thread, in the engine's own process: its end, its limits, its cancelling."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import checking, files, lifecycle, submission
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec
from jobs.status import JobStatus
from tests.support.tiny_model import PLAIN_TEMPLATE, chat_rows, make_tiny_model
from tests.support.worker_bench import MODEL, ORGANIZATION
from worker import data_checker
from worker.data_checker import DataChecker

from ...conftest import Bucket

DEADLINE_S = 60
BAD = Path(__file__).parents[2] / "data" / "bad"
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a template. Costs some seconds, once."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / MODEL)


@pytest.fixture
def place_model(bench: Any, tiny_model: Path) -> Callable[..., None]:
    """Put the tiny model, with a template of the test's own, where the worker looks for it."""

    def place(template: str = PLAIN_TEMPLATE) -> None:
        folder = bench.settings.data_dir / "models" / MODEL
        for path in tiny_model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    return place


@pytest.fixture
def checker(bench: Any) -> DataChecker:
    """A worker's checker that calls the real engine."""
    settings = bench.settings.model_copy(update={"engine_command": (sys.executable, "-m", "lomo_core")})
    return DataChecker(
        bench.db,
        settings,
        owner="host-a/1",
        stopping=threading.Event(),
        send_ring=lambda: bench.rings.append(None),
    )


def submit(bench: Any, content: bytes, *, validation: bytes | None = None, **options: Any) -> str:
    """Create a job whose files are to be checked. Returns its id."""
    ids = {}
    for name, raw in (("training_file", content), ("validation_file", validation)):
        if raw is not None:
            ids[name] = bench.store("")
            (bench.settings.files_dir / ids[name]).write_bytes(raw)
    spec = JobSpec.model_validate({"model": MODEL, "seed": 1, **ids, **options})
    return submission.submit(
        bench.db,
        planned=PlannedJob(spec=spec, check_files=True),
        owner=Owner(ORGANIZATION),
        api_key_id=None,
        metadata={},
    ).id


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_good_files_are_measured_and_the_job_is_queued(
    bench: Any, checker: DataChecker, place_model: Callable[..., None]
) -> None:
    place_model()
    rows = chat_rows(28)  # all different
    job_id = submit(
        bench,
        lines([*rows, rows[3]]),
        validation=lines([rows[0], *chat_rows(29)[28:]]),
        n_epochs=3,
        batch_size=4,
        lomo={"max_seq_length": 32},
    )
    assert checker.check_next()
    assert bench.job(job_id).status == JobStatus.QUEUED
    assert bench.rings == [None]
    report = checking.find_job_report(bench.db, owner=Owner(ORGANIZATION), job_id=job_id)
    assert report is not None
    training = report["training_file"]
    assert (training["format"], training["num_rows"], training["num_errors"]) == ("chat", 29, 0)
    assert training["duplicates"] == [{"line": 29, "first_line": 4}]
    assert sum(bin_["count"] for bin_ in training["tokens"]["histogram"]) == 29
    assert 0 < training["tokens"]["num_truncated"] < 29
    assert training["tokens"]["longest"] == 32
    assert report["overlap"]["validation_lines"] == [1, 2]
    # 29 rows in batches of 4 are 8 steps.
    assert (report["estimate"]["steps"], report["estimate"]["duration_s"]) == (24, None)
    assert report["estimate"]["trained_tokens"] == 3 * training["tokens"]["trained"]
    levels = [event.level for event in bench.events(job_id)]
    # A duplicate, rows cut in both files, an overlap.
    assert levels == ["info", "info", "warn", "warn", "warn", "warn", "info"]
    assert not checker.check_next()


def test_a_wrong_row_ends_the_job_with_its_line(
    bench: Any, checker: DataChecker, place_model: Callable[..., None]
) -> None:
    place_model()
    job_id = submit(bench, (BAD / "05_wrong_role.jsonl").read_bytes())
    assert checker.check_next()
    job = bench.job(job_id)
    assert job.status == JobStatus.FAILED
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
    assert "line 3: " in job.error["message"]
    assert bench.rings == []


def test_a_template_that_never_ends_fails_the_job(
    bench: Any, checker: DataChecker, place_model: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_checker, "_START_CPU_S", 4)
    place_model(FOREVER)
    job_id = submit(bench, lines(chat_rows(1)))
    checker.check_next()
    error = bench.job(job_id).error
    assert error["code"] == "data_check_timeout"
    assert "template" in error["message"]


def test_a_model_without_a_template_is_named(
    bench: Any, checker: DataChecker, place_model: Callable[..., None]
) -> None:
    place_model("")
    job_id = submit(bench, lines(chat_rows(1)))
    checker.check_next()
    assert (bench.job(job_id).error["code"], bench.job(job_id).error["param"]) == ("invalid_model", "model")


def test_a_file_that_is_not_here_fails_the_job(bench: Any, checker: DataChecker) -> None:
    job_id = submit(bench, b"")
    (bench.settings.files_dir / bench.job(job_id).spec["training_file"]).unlink()
    checker.check_next()
    assert bench.job(job_id).error["code"] == "file_not_found"


def check_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if is_check(child)]


def is_check(child: psutil.Process) -> bool:
    try:
        return "check-data" in child.cmdline()
    except psutil.NoSuchProcess:
        return False  # one that has ended and is waited for in this moment


def test_a_cancelled_job_ends_its_check(
    bench: Any,
    checker: DataChecker,
    place_model: Callable[..., None],
    wait_until: Any,
    in_background: Callable[[Callable[[], object]], threading.Thread],
) -> None:
    place_model(FOREVER)
    job_id = submit(bench, lines(chat_rows(1)))
    thread = in_background(checker.check_next)
    wait_until(check_processes, DEADLINE_S, "the check to run")
    lifecycle.request_cancel(bench.db, owner=Owner(ORGANIZATION), job_id=job_id)
    wait_until(lambda: not thread.is_alive(), DEADLINE_S, "the end of the check")
    assert bench.job(job_id).status == JobStatus.CANCELLED
    assert not check_processes()


def test_a_stopping_worker_gives_its_check_back_and_a_busy_one_checks_on(
    bench: Any, place_model: Callable[..., None], wait_until: Any, in_background: Any
) -> None:
    """The only slot is taken all the while."""
    place_model(FOREVER)
    node = bench.node(engine_command=(sys.executable, "-m", "lomo_core"))
    slot = node._slots
    assert slot.acquire(blocking=False)
    job_id = submit(bench, lines(chat_rows(1)))
    in_background(node.checker.run)
    wait_until(check_processes, DEADLINE_S, "the check to run")
    node.stopping.set()
    wait_until(lambda: not check_processes(), DEADLINE_S, "the end of the check")
    found = wait_until(
        lambda: checking.claim_check(bench.db, owner="host-b/1", lease_s=60, max_failures=3), DEADLINE_S, "the check"
    )
    assert (found.job_id, found.number) == (job_id, 1)
    slot.release()


def test_files_in_an_object_store_are_fetched_for_the_check(
    bench: Any, checker: DataChecker, place_model: Callable[..., None], bucket: Bucket
) -> None:
    place_model()
    job_id = submit_stored(bench, bucket, lines(chat_rows(3)))
    assert checker.check_next()
    assert bench.job(job_id).status == JobStatus.QUEUED, bench.messages(job_id)
    assert list((bench.settings.data_dir / "checks").rglob("*")) == []


def test_a_check_whose_store_does_not_answer_says_so(bench: Any, checker: DataChecker, bucket: Bucket) -> None:
    job_id = submit_stored(bench, bucket, lines(chat_rows(3)))
    bucket.go_away()
    checker._settings = checker._settings.model_copy(update={"storage_patience_s": 0.0})
    assert checker.check_next()
    job = bench.job(job_id)
    assert (job.status, job.error["code"]) == (JobStatus.FAILED, "storage_unavailable")
    assert "the object store does not answer" in job.error["message"]


def test_a_worker_that_stops_gives_back_a_check_that_waits_for_the_store(
    bench: Any, checker: DataChecker, bucket: Bucket
) -> None:
    job_id = submit_stored(bench, bucket, lines(chat_rows(3)))
    bucket.go_away()
    checker._stopping.set()
    assert checker.check_next()
    assert bench.job(job_id).status == JobStatus.VALIDATING_FILES
    claim = checking.claim_check(bench.db, owner="host-b/1", lease_s=60, max_failures=1)
    assert claim is not None
    assert claim.number == 1


def submit_stored(bench: Any, bucket: Bucket, content: bytes) -> str:
    """Create a job whose file lies in a bucket and is to be checked. Returns its id."""
    file = files.store_file(
        bench.db,
        io.BytesIO(content),
        files_dir=bench.settings.files_dir,
        storage_url=bucket.url,
        owner=Owner(ORGANIZATION),
        filename="a.jsonl",
        purpose="fine-tune",
    )
    spec = JobSpec.model_validate({"model": MODEL, "seed": 1, "training_file": file.id})
    planned = PlannedJob(spec=spec, check_files=True)
    job = submission.submit(bench.db, planned=planned, owner=Owner(ORGANIZATION), api_key_id=None, metadata={})
    return job.id

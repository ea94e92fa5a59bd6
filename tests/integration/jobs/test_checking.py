"""The check of a job's files as rows: who may do it, what its report makes of the job, what a lost worker leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text

from jobs import checking, lifecycle, reads, submission
from jobs.checking import CheckClaim
from jobs.db import Database
from jobs.errors import LeaseLostError, NotFoundError
from jobs.job_details import read_details
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec
from jobs.status import JobStatus

ORGANIZATION = "org-test"
LEASE_S = 60.0


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database of its own (30 ms)."""
    db = Database(database_url)
    yield db
    db.dispose()


@pytest.fixture
def submit(db: Database) -> Callable[..., str]:
    """Create a job whose files are to be checked. Returns its id."""

    def submit(**changes: Any) -> str:
        spec = JobSpec.model_validate({"model": "base", "training_file": "file-t", "seed": 1, **changes})
        return submission.submit(
            db,
            planned=PlannedJob(spec=spec, check_files=True),
            owner=Owner(ORGANIZATION),
            api_key_id=None,
            metadata={},
        ).id

    return submit


def claim(db: Database, *, owner: str = "gpu1/1", max_failures: int = 3) -> CheckClaim | None:
    return checking.claim_check(db, owner=owner, lease_s=LEASE_S, max_failures=max_failures)


def must_claim(db: Database, *, owner: str = "gpu1/1") -> CheckClaim:
    found = claim(db, owner=owner)
    assert found is not None
    return found


def file_report(**changes: Any) -> dict[str, Any]:
    return {
        "format": "chat",
        "num_rows": 4,
        "num_errors": 0,
        "errors": [],
        "error_kinds": [],
        "num_untrained": 0,
        "num_duplicates": 0,
        "duplicates": [],
        "num_with_special_tokens": 0,
        "special_token_lines": [],
        "tokens": {"num_sequences": 4, "total": 100, "trained": 40, "num_truncated": 0},
        **changes,
    }


def report(training: dict[str, Any], **changes: Any) -> dict[str, Any]:
    estimate = {"steps": 2, "steps_per_epoch": 2, "tokens": 100, "trained_tokens": 40}
    return {
        "is_valid": not training["num_errors"],
        "training_file": training,
        "validation_file": None,
        "overlap": None,
        "estimate": None if training["num_errors"] else estimate,
        **changes,
    }


def events(db: Database, job_id: str) -> list[tuple[str, str | None, str]]:
    return [
        (event.level, event.status, event.message) for event in reads.events_since(db, job_id=job_id, seq=0, limit=100)
    ]


def status(db: Database, job_id: str) -> str:
    return reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job_id).status


def expire(db: Database) -> None:
    with db.transaction() as session:
        session.execute(text("UPDATE data_checks SET expires_at = now() - interval '1 second'"))


def test_a_checked_job_is_queued_and_only_then_claimed(db: Database, submit: Callable[..., str]) -> None:
    job_id = submit()
    assert status(db, job_id) == JobStatus.VALIDATING_FILES
    assert lifecycle.claim(db, owner="gpu1/1", lease_s=LEASE_S) is None
    check = must_claim(db)
    assert claim(db, owner="gpu2/1") is None, "one worker does it"
    assert checking.finish_check(db, check, report(file_report())) is JobStatus.QUEUED
    assert [(level, changed) for level, changed, _ in events(db, job_id)] == [
        ("info", None),
        ("info", "validating_files"),
        ("info", "queued"),
    ]
    assert claim(db) is None
    started = lifecycle.claim(db, owner="gpu1/1", lease_s=LEASE_S)
    assert started is not None
    assert started.lease.job_id == job_id


def test_a_wrong_row_fails_the_job_and_is_named(db: Database, submit: Callable[..., str]) -> None:
    job_id = submit()
    wrong = [{"line": line, "where": f"line {line}", "reason": "content is missing"} for line in range(3, 10)]
    found = file_report(num_errors=7, errors=wrong)
    assert checking.finish_check(db, must_claim(db), report(found)) is JobStatus.FAILED
    error = reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job_id).error
    assert error is not None
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "7 errors, the first of them" in error["message"]
    assert "line 3: content is missing; line 4" in error["message"]
    assert "line 8" not in error["message"]
    assert events(db, job_id)[-1][:2] == ("error", "failed")


def test_the_validation_file_is_named_where_it_is_the_one(db: Database, submit: Callable[..., str]) -> None:
    job_id = submit(validation_file="file-v")
    wrong = file_report(num_errors=1, errors=[{"line": 2, "where": "line 2", "reason": "it is empty"}])
    found = report(file_report(), validation_file=wrong, is_valid=False, estimate=None)
    checking.finish_check(db, must_claim(db), found)
    error = reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job_id).error
    assert error is not None
    assert error == {
        "code": "invalid_training_file",
        "param": "validation_file",
        "message": "The validation file cannot be used: line 2: it is empty.",
    }


def test_what_may_surprise_is_a_warning(db: Database, submit: Callable[..., str]) -> None:
    job_id = submit(validation_file="file-v")
    training = file_report(
        num_duplicates=1,
        duplicates=[{"line": 4, "first_line": 2}],
        num_with_special_tokens=2,
        special_token_lines=[1, 3],
        tokens={"num_sequences": 4, "total": 100, "trained": 40, "num_truncated": 3},
    )
    overlap = {"num_rows": 2, "validation_lines": [1, 5]}
    checking.finish_check(db, must_claim(db), report(training, validation_file=file_report(), overlap=overlap))
    warnings = [message for level, _, message in events(db, job_id) if level == "warn"]
    parts = (
        "1 row of the training file repeats earlier ones: line 4 repeats line 2.",
        "2 rows of the training file have special tokens of the model in a message's text (line 1, 3)",
        "2 rows of the validation file are in the training file, too (line 1, 5)",
        "3 of 4",
    )
    for part, message in zip(parts, sorted(warnings), strict=True):
        assert part in message
    assert status(db, job_id) == JobStatus.QUEUED


def test_a_cancelled_check_ends_nothing(db: Database, submit: Callable[..., str]) -> None:
    job_id = submit()
    check = must_claim(db)
    assert checking.renew_check(db, check, lease_s=LEASE_S)
    lifecycle.request_cancel(db, owner=Owner(ORGANIZATION), job_id=job_id)
    assert not checking.renew_check(db, check, lease_s=LEASE_S)
    with pytest.raises(LeaseLostError):
        checking.finish_check(db, check, report(file_report()))
    assert status(db, job_id) == JobStatus.CANCELLED
    assert claim(db) is None


def test_a_check_whose_worker_died_is_done_by_another(db: Database, submit: Callable[..., str]) -> None:
    submit()
    lost = must_claim(db)
    expire(db)
    check = must_claim(db, owner="gpu2/1")
    assert check.number == 2
    assert not checking.renew_check(db, lost, lease_s=LEASE_S)
    with pytest.raises(LeaseLostError):
        checking.finish_check(db, lost, report(file_report()))
    assert checking.finish_check(db, check, report(file_report())) is JobStatus.QUEUED


def test_a_restarted_worker_frees_its_own_check_alone(db: Database, submit: Callable[..., str]) -> None:
    submit(), submit()
    mine, other = must_claim(db, owner="gpu1/1"), must_claim(db, owner="gpu2/1")
    checking.release_dead_checks(db, host="gpu1", incarnation="2")
    assert must_claim(db, owner="gpu1/2").job_id == mine.job_id
    assert checking.renew_check(db, other, lease_s=LEASE_S)


def test_a_check_that_ends_workers_fails_its_job(db: Database, submit: Callable[..., str]) -> None:
    job_id = submit()
    for _ in range(3):
        assert claim(db) is not None
        expire(db)
    assert claim(db) is None
    error = reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job_id).error
    assert error is not None
    assert error["code"] == "data_check_failed"


def test_a_check_that_was_given_back_is_not_counted(db: Database, submit: Callable[..., str]) -> None:
    submit()
    checking.release_check(db, must_claim(db))
    assert must_claim(db).number == 1


def test_reports_belong_to_their_organization(db: Database, submit: Callable[..., str]) -> None:
    job_id = submit()
    assert checking.find_job_report(db, owner=Owner(ORGANIZATION), job_id=job_id) is None
    checking.finish_check(db, must_claim(db), report(file_report()))
    found = checking.find_job_report(db, owner=Owner(ORGANIZATION), job_id=job_id)
    assert found is not None
    assert found["training_file"] == file_report()
    with pytest.raises(NotFoundError):
        checking.find_job_report(db, owner=Owner("org-other"), job_id=job_id)


def test_the_time_is_estimated_by_the_speed_of_earlier_jobs(db: Database, submit: Callable[..., str]) -> None:
    ids = []
    for _ in range(2):
        ids.append(submit())
        checking.finish_check(db, must_claim(db), report(file_report()))
        started = lifecycle.claim(db, owner="gpu1/1", lease_s=LEASE_S)
        if started is not None and len(ids) == 1:
            with db.transaction() as session:
                session.execute(text("UPDATE jobs SET tokens_per_s = 50 WHERE id = :id"), {"id": ids[0]})
            lifecycle.succeed(db, started.lease, model_path="m", weights_sha256="ab", trained_tokens=1)
    found = read_details(db, job_ids=ids)
    assert [(found[job_id].checked or {})["estimate"]["duration_s"] for job_id in ids] == [None, 2.0]

"""The result file of a job: every step once, whole, in bounded memory, and gone when it is deleted."""

from __future__ import annotations

import csv
import hashlib
import tracemalloc
from pathlib import Path

import pytest
from sqlalchemy import text

from jobs import files, job_details, lifecycle, reads, step_metrics
from jobs.db import Database
from jobs.errors import LeaseLostError
from jobs.lifecycle import Claim
from jobs.owner import Owner
from jobs.step_metrics import COLUMNS, ResultFile

from .conftest import ORGANIZATION, POLICY, claim, submit

_METRICS = text("""
    INSERT INTO metrics SELECT :job_id, step, 1, now(), 0.5, CASE WHEN step <> 3 THEN 1.0::double precision / step END,
        CASE WHEN step <> 2 THEN 0.25 END, 0.01, 1, 100, 0.5, 0, 0, 0, 0, 0, 0
    FROM generate_series(1, :num_steps) step
""")
_EVALUATIONS = text("""
    INSERT INTO evaluations SELECT :job_id, step, now(), 8, 2.0::double precision / (step + 1), 0.5, NULL
    FROM generate_series(0, :num_steps, :every) step
""")


@pytest.fixture
def claimed(db: Database) -> Claim:
    """A running job."""
    submit(db)
    return claim(db)


def train(db: Database, job_id: str, *, num_steps: int, last_step: int | None = None, every: int = 4) -> None:
    """Put the figures of a run into the database."""
    with db.transaction() as session:
        session.execute(_METRICS, {"job_id": job_id, "num_steps": num_steps})
        session.execute(_EVALUATIONS, {"job_id": job_id, "num_steps": num_steps, "every": every})
        session.execute(
            text("UPDATE jobs SET step = :step WHERE id = :job_id"),
            {"job_id": job_id, "step": num_steps if last_step is None else last_step},
        )


def write(db: Database, job_id: str, folder: Path) -> ResultFile:
    path = folder / "runs" / job_id / "attempt-1" / step_metrics.FILE_NAME
    return step_metrics.write_step_metrics(db, job_id=job_id, path=path, data_dir=folder)


def test_every_step_has_a_row_that_reads_back_the_same(db: Database, claimed: Claim, tmp_path: Path) -> None:
    job_id = claimed.lease.job_id
    train(db, job_id, num_steps=7, last_step=5)
    result = write(db, job_id, tmp_path)
    content = (tmp_path / result.path).read_bytes()
    assert result.path == f"runs/{job_id}/attempt-1/step_metrics.csv"
    assert (result.num_bytes, result.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert content.decode().splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "0,,,2.0,0.5",
        "1,1.0,0.25,,",
        "2,0.5,,,",
        "3,,0.25,,",
        "4,0.25,0.25,0.4,0.5",
        "5,0.2,0.25,,",
    ]
    assert [path.name for path in (tmp_path / result.path).parent.iterdir()] == ["step_metrics.csv"]


def test_a_run_without_a_step_has_the_names_of_its_columns(db: Database, claimed: Claim, tmp_path: Path) -> None:
    result = write(db, claimed.lease.job_id, tmp_path)
    assert (tmp_path / result.path).read_text() == ",".join(COLUMNS) + "\n"


@pytest.mark.parametrize(("every", "num_evaluations"), [(1, 25_001), (7, 3572)])
def test_a_long_run_is_written_in_parts(
    db: Database, claimed: Claim, tmp_path: Path, every: int, num_evaluations: int
) -> None:
    """More steps than are held at once, and evaluations that reach further than a part of the steps."""
    job_id, num_steps = claimed.lease.job_id, 25_000
    train(db, job_id, num_steps=num_steps, every=every)
    path = tmp_path / write(db, job_id, tmp_path).path
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(num_steps + 1))
    assert [float(row["train_loss"]) for row in rows[4:]] == [1.0 / step for step in range(4, num_steps + 1)]
    evaluated = [(int(row["step"]), float(row["valid_loss"])) for row in rows if row["valid_loss"]]
    assert evaluated == [(step, 2.0 / (step + 1)) for step in range(0, num_steps + 1, every)]
    assert len(evaluated) == num_evaluations


def test_memory_does_not_grow_with_the_run(db: Database, claimed: Claim, tmp_path: Path) -> None:
    job_id = claimed.lease.job_id
    train(db, job_id, num_steps=60_000)
    write(db, job_id, tmp_path)
    tracemalloc.start()
    try:
        result = write(db, job_id, tmp_path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.num_bytes > 1.5 * 2**20
    # 10,000 rows of five numbers and their text; all 60,000 at once take more than 15 MiB.
    assert peak_bytes < 8 * 2**20, f"{peak_bytes / 2**20:.1f} MiB"


def succeed(db: Database, claimed: Claim, result: ResultFile) -> None:
    lifecycle.succeed(db, claimed.lease, model_path="m", weights_sha256="w", trained_tokens=1, result_file=result)


def test_it_is_a_file_of_the_organization_and_of_the_job(db: Database, claimed: Claim, tmp_path: Path) -> None:
    job_id = claimed.lease.job_id
    train(db, job_id, num_steps=3)
    result = write(db, job_id, tmp_path)
    assert reads.list_files(db, owner=Owner(ORGANIZATION), limit=10).items == []
    succeed(db, claimed, result)
    [file] = reads.list_files(db, owner=Owner(ORGANIZATION), limit=10, purpose="fine-tune-results").items
    assert (file.filename, file.num_bytes, file.sha256) == ("step_metrics.csv", result.num_bytes, result.sha256)
    other = submit(db).id
    details = job_details.read_details(db, job_ids=[other, job_id])
    assert (details[job_id].result_files, details[other].result_files) == ([file.id], [])
    path = files.stored_path(file, data_dir=tmp_path)
    assert path.read_text().count("\n") == 5
    files.delete_file(db, file, data_dir=tmp_path)
    assert not path.exists()
    assert job_details.read_details(db, job_ids=[job_id])[job_id].result_files == []


def test_who_has_lost_the_lease_publishes_nothing(db: Database, claimed: Claim, tmp_path: Path) -> None:
    result = write(db, claimed.lease.job_id, tmp_path)
    lifecycle.retry(db, claimed.lease, reason="lost", policy=POLICY)
    with pytest.raises(LeaseLostError):
        succeed(db, claimed, result)
    assert reads.list_files(db, owner=Owner(ORGANIZATION), limit=10).items == []

"""What an organization uses, and that of two requests at a quota's edge one passes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from jobs import files, lifecycle, organizations, quotas, uploads
from jobs.db import Database
from jobs.errors import QuotaError
from jobs.models import Checkpoint, Job, TunedModel
from jobs.owner import Owner
from jobs.placement import lock_next_job
from jobs.quotas import Usage
from jobs.settings import JobsSettings

from ...conftest import WaitUntil
from .conftest import LEASE_S, claim, submit

ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
FREE = "org-without-quotas"


@pytest.fixture
def organization(db: Database) -> Callable[..., str]:
    """Make an organization with the given quotas; returns its id."""

    def make(**limits: int) -> str:
        return organizations.create_organization(db, name="Team", quotas=limits).id

    return make


def use(db: Database, organization_id: str, data_dir: Path) -> Usage:
    return quotas.read_usage(db, organization_id=organization_id, data_dir=data_dir)


def store(db: Database, organization_id: str, folder: Path, content: bytes = ROW) -> None:
    files.store_file(
        db,
        BytesIO(content),
        files_dir=folder / "files",
        owner=Owner(organization_id),
        filename="x",
        purpose="user_data",
    )


def num_waiting_for_locks(db: Database) -> int:
    with db.read() as session:
        return session.scalars(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
        ).one()


def race(
    db: Database, wait_until: WaitUntil, first: Callable[[Session], object], second: Callable[[], Any]
) -> Future[Any]:
    """Let `first` do its work in a transaction that is still open when `second` begins; end it when `second` waits."""
    with ThreadPoolExecutor(1) as pool:
        with db.transaction() as session:
            first(session)
            later = pool.submit(second)
            wait_until(lambda: num_waiting_for_locks(db) == 1, 1.9, "the second to wait for the first")
        later.exception(10)
    return later


def test_queued_jobs(db: Database, organization: Callable[..., str]) -> None:
    team = organization(max_queued_jobs=2)
    submit(db, organization_id=team)
    submit(db, organization_id=team)
    with pytest.raises(QuotaError, match="has 2 jobs in the queue and may have 2") as caught:
        submit(db, organization_id=team)
    assert caught.value.code == "insufficient_quota"
    assert caught.value.details == {"quota": "max_queued_jobs", "used": 2, "limit": 2}
    claim(db)
    submit(db, organization_id=team)  # one of them runs by now
    with db.read() as session:
        assert len(session.scalars(select(Job).where(Job.organization_id == team)).all()) == 3


def test_of_two_submissions_at_the_edge_one_passes(
    db: Database, organization: Callable[..., str], wait_until: WaitUntil
) -> None:
    team, other = organization(max_queued_jobs=1), organization(max_queued_jobs=1)

    def first(session: Session) -> None:
        quotas.check_submission(session, organization_id=team, priority=0)
        project_id = organizations.default_project_id(session, team)
        session.add(Job(id="ftjob-first", organization_id=team, project_id=project_id, status="queued", spec={}))
        session.flush()
        # Nobody else's submission waits for it: with a lock it would fail after 2 s.
        submit(db, organization_id=other)
        submit(db, organization_id=FREE)

    second = race(db, wait_until, first, lambda: submit(db, organization_id=team))
    assert isinstance(second.exception(), QuotaError)


def test_many_submissions_at_once_fill_a_quota_exactly(db: Database, organization: Callable[..., str]) -> None:
    team = organization(max_queued_jobs=5)
    with ThreadPoolExecutor(8) as pool:
        tries = [pool.submit(submit, db, organization_id=team) for _ in range(16)]
    refused = [found.exception() for found in tries if found.exception() is not None]
    assert len(refused) == 11
    assert all(isinstance(error, QuotaError) for error in refused)


def test_priority(db: Database, organization: Callable[..., str]) -> None:
    team = organization(max_priority=-3)
    submit(db, organization_id=team, priority=-3)
    with pytest.raises(QuotaError, match="Priority -2 is above -3") as caught:
        submit(db, organization_id=team, priority=-2)
    assert caught.value.param == "lomo.priority"


def test_gpu_seconds_of_the_last_30_days(db: Database, organization: Callable[..., str], tmp_path: Path) -> None:
    team = organization(max_gpu_seconds=1000)
    submit(db, organization_id=team)
    lifecycle.cancelled(db, claim(db).lease)
    submit(db, organization_id=team)
    running = claim(db).lease.job_id
    with db.transaction() as session:
        # 300 s of the window and a day before it; a running one for 250 s, on two devices.
        session.execute(
            text(
                "UPDATE attempts SET started_at = now() - interval '31 days',"
                " ended_at = now() - interval '30 days' + interval '300 s' WHERE job_id <> :running"
            ),
            {"running": running},
        )
        session.execute(
            text("UPDATE attempts SET started_at = now() - interval '250 s' WHERE job_id = :running"),
            {"running": running},
        )
        session.execute(
            text("UPDATE jobs SET spec = jsonb_set(spec, '{lomo,devices}', '2') WHERE id = :running"),
            {"running": running},
        )
    assert use(db, team, tmp_path).gpu_seconds == pytest.approx(800, abs=5)
    submit(db, organization_id=team)
    with db.transaction() as session:
        session.execute(
            text("UPDATE attempts SET started_at = now() - interval '400 s' WHERE job_id = :running"),
            {"running": running},
        )
    with pytest.raises(QuotaError, match=r"used 110\d GPU seconds in the last 30 days and may use 1000"):
        submit(db, organization_id=team)
    with db.transaction() as session:
        # What another version stored must not break the sum: it counts as one device.
        session.execute(
            text("""UPDATE jobs SET spec = '{"lomo": {"devices": "auto"}}' WHERE id = :id"""), {"id": running}
        )
    assert use(db, team, tmp_path).gpu_seconds == pytest.approx(700, abs=5)


def test_running_jobs_are_handed_out_up_to_the_quota(db: Database, organization: Callable[..., str]) -> None:
    team = organization(max_running_jobs=1)
    first, second = (submit(db, organization_id=team, priority=9) for _ in range(2))
    other = submit(db, organization_id=FREE)
    started = claim(db, owner="a/1")
    assert started.lease.job_id == first.id
    assert claim(db, owner="b/1").lease.job_id == other.id, (
        "a job of higher priority, which may not run, holds nothing up"
    )
    assert lifecycle.claim(db, owner="c/1", lease_s=LEASE_S) is None
    lifecycle.cancelled(db, started.lease)
    assert claim(db, owner="c/1").lease.job_id == second.id


def test_none_may_run(db: Database, organization: Callable[..., str]) -> None:
    submit(db, organization_id=organization(max_running_jobs=0))
    assert lifecycle.claim(db, owner="a/1", lease_s=LEASE_S) is None


def test_two_hosts_that_claim_at_once_do_not_exceed_the_quota(
    db: Database, organization: Callable[..., str], wait_until: WaitUntil
) -> None:
    team = organization(max_running_jobs=1)
    submit(db, organization_id=team)
    submit(db, organization_id=team)
    last = submit(db, organization_id=FREE, priority=-1)

    def first(session: Session) -> None:
        job_id = lock_next_job(session, owner="a/1")
        assert job_id is not None
        session.execute(
            text(
                "UPDATE jobs SET status = 'running', lease_token = gen_random_uuid(), lease_owner = 'a/1',"
                " lease_expires_at = now() + interval '1 min' WHERE id = :id"
            ),
            {"id": job_id},
        )

    second = race(db, wait_until, first, lambda: lifecycle.claim(db, owner="b/1", lease_s=LEASE_S))
    assert second.result().lease.job_id == last.id, "the second one went on to another organization's job"


def test_stored_bytes(db: Database, organization: Callable[..., str], tmp_path: Path) -> None:
    settings = JobsSettings(database_url=db.url, broker_url="redis://", data_dir=tmp_path)
    team = organization(max_stored_bytes=1000)
    store(db, team, tmp_path, b"x" * 100)
    upload = uploads.create(db, owner=Owner(team), filename="x", purpose="user_data", num_bytes=200)
    submit(db, organization_id=team)
    lease = claim(db).lease
    folder = tmp_path / "runs" / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "weights").write_bytes(b"x" * 290)
    (folder / "config.json").write_bytes(b"x" * 10)
    with db.transaction() as session:
        session.add(
            Checkpoint(id="c", job_id=lease.job_id, attempt=1, step=1, path="x", manifest_sha256="", num_bytes=350)
        )
    lifecycle.succeed(db, lease, model_path="runs/model", weights_sha256="", trained_tokens=1)
    stored = use(db, team, tmp_path).stored
    assert (stored.files, stored.uploads, stored.models, stored.checkpoints, stored.total) == (100, 200, 300, 350, 950)
    with db.read() as session:
        assert session.scalars(select(TunedModel.num_bytes)).one() == 300

    message = "stores 950 bytes and may store 1000, so that there is no room for 51 more"
    before = sorted(path.name for path in (tmp_path / "files").iterdir())
    with pytest.raises(QuotaError, match=message):
        store(db, team, tmp_path, b"x" * 51)
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == before, "nothing is left of a refused file"
    with pytest.raises(QuotaError, match=message):
        uploads.create(db, owner=Owner(team), filename="x", purpose="user_data", num_bytes=51)
    store(db, team, tmp_path, b"x" * 50)
    uploads.cancel(db, settings, owner=Owner(team), upload_id=upload.id)
    store(db, team, tmp_path, b"x" * 200)
    with pytest.raises(QuotaError):
        store(db, team, tmp_path, b"x")


def test_an_upload_is_counted_once_when_it_becomes_a_file(
    db: Database, organization: Callable[..., str], tmp_path: Path
) -> None:
    settings = JobsSettings(database_url=db.url, broker_url="redis://", data_dir=tmp_path)
    team = organization(max_stored_bytes=len(ROW))
    upload = uploads.create(db, owner=Owner(team), filename="x", purpose="fine-tune", num_bytes=len(ROW))
    part = uploads.open_part(db, settings, owner=Owner(team), upload_id=upload.id)
    part.write(ROW)
    part_id = uploads.add_part(db, part).id
    part.discard()
    completion = uploads.Completion([part_id])
    uploads.complete(db, settings, owner=Owner(team), upload_id=upload.id, completion=completion)
    assert use(db, team, tmp_path).stored.total == len(ROW)


def test_of_two_files_at_the_edge_one_passes(
    db: Database, organization: Callable[..., str], wait_until: WaitUntil, tmp_path: Path
) -> None:
    team = organization(max_stored_bytes=100)

    def first(session: Session) -> None:
        quotas.check_storage(session, organization_id=team, num_bytes=60)
        session.execute(
            text(
                "INSERT INTO files (id, organization_id, project_id, filename, purpose, num_bytes, sha256)"
                " SELECT 'file-1', :team, id, 'x', 'user_data', 60, '' FROM projects WHERE organization_id = :team"
            ),
            {"team": team},
        )
        store(db, FREE, tmp_path)

    second = race(db, wait_until, first, lambda: store(db, team, tmp_path, b"x" * 60))
    assert isinstance(second.exception(), QuotaError)

"""Journal lines become events, metrics, evaluations and checkpoints, each once and in order."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from jobs import eventlog, lifecycle, reads, repository, series
from jobs.db import Database
from jobs.errors import LeaseLostError
from jobs.models import Job
from jobs.owner import Owner
from lomo_core import events as engine

from .conftest import ORGANIZATION, POLICY, claim, submit

MIB = 1 << 20


def step(number: int, *, loss: float = 1.0, peak: int = 100) -> engine.Step:
    return engine.Step(
        step=number,
        total_steps=1000,
        epoch=number / 1000,
        loss=loss,
        mean_token_accuracy=0.5,
        learning_rate=0.01,
        grad_norm=None,
        num_tokens=10,
        num_trained_tokens=10 * number,
        step_s=0.1,
        tokens_per_s=100.0,
        memory=engine.MemoryBytes(
            parameters_bytes=40,
            gradients_bytes=20,
            optimizer_bytes=0,
            activations_bytes=30,
            other_bytes=peak - 90,
            peak_bytes=peak,
        ),
    )


STARTED = engine.Started(
    step=0,
    total_steps=1000,
    num_parameters=5,
    num_train_rows=3,
    num_truncated_rows=1,
    num_trainable_tokens=9,
    device="cpu (x)",
    device_bytes=None,
)


def lines(*events: engine.Event, first: int = 0) -> list[eventlog.NumberedLine]:
    return [(first + n, engine.JournalLine(1_760_000_000.0 + n, event)) for n, event in enumerate(events)]


def relative(path: str) -> str:
    return path.removeprefix("/data/")


def now(db: Database, job: Job) -> Job:
    """The job's row as it is by now."""
    return reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id)


def test_a_batch_lands_everywhere_it_belongs(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    batch = lines(
        STARTED,
        step(1, loss=2.5, peak=200),
        step(2, loss=math.nan, peak=150),
        engine.Evaluation(step=2, num_rows=7, choice_accuracy=0.5),
        engine.Checkpoint(step=2, path="/data/runs/j/step-2", manifest_sha256="m", num_bytes=11, train_loss=2.5),
        engine.Message(level="warn", message="a NUL \0 and <b>markup</b>"),
    )
    assert eventlog.ship(db, lease, batch, attempt=1, relative=relative) == 6
    events = reads.events_since(db, job_id=job.id, seq=3, limit=100)
    assert [event.seq for event in events] == [4, 5, 6, 7, 8, 9]
    assert [event.type for event in events] == ["message", "metrics", "metrics", "metrics", "message", "message"]
    assert events[2].data is not None
    assert events[2].data["train_loss"] is None, "a loss that is not finite is null"
    assert events[5].message == "a NUL � and <b>markup</b>"
    columns = series.read_metrics(db, now(db, job), max_points=100)
    assert columns["step"] == [1, 2]
    assert columns["loss"] == [2.5, None]
    row = reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id)
    assert (row.step, row.total_steps, row.loss, row.trained_tokens) == (2, 1000, None, 20)
    assert row.memory is not None
    assert row.memory["peak_bytes"] == 200
    [checkpoint] = reads.list_checkpoints(db, owner=Owner(ORGANIZATION), job_id=job.id, limit=10).items
    assert checkpoint.path == "runs/j/step-2"
    [evaluation] = reads.list_evaluations(db, job_ids=[job.id])
    assert evaluation.choice_accuracy == 0.5


def test_a_memory_profile_is_a_sentence_with_its_figures(db: Database) -> None:
    job = submit(db)
    profile = engine.MemoryProfile(
        step=50,
        after_forward_bytes=210 << 20,
        after_backward_bytes=-4096,
        after_step_bytes=0,
        saved_bytes=198 << 20,
    )
    eventlog.ship(db, claim(db).lease, lines(step(50), profile), attempt=1, relative=relative)
    told = reads.events_since(db, job_id=job.id, seq=0, limit=99)[-1]
    assert (told.type, told.level) == ("message", "info")
    assert told.message == (
        "Step 50: 210 MiB alive after the forward pass (198 MiB kept for the backward pass), "
        "0 MiB after the backward pass"
    )
    assert told.data == {
        "step": 50,
        "after_forward_bytes": 210 << 20,
        "after_backward_bytes": -4096,
        "after_step_bytes": 0,
        "saved_bytes": 198 << 20,
    }


def test_a_rollback_is_told_and_takes_the_abandoned_checkpoints_with_it(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease

    def checkpoint(number: int) -> engine.Checkpoint:
        return engine.Checkpoint(step=number, path=f"/data/{number}", manifest_sha256="m", num_bytes=1, train_loss=None)

    first = lines(step(1), checkpoint(1), engine.Skipped(step=2, what="loss"), checkpoint(2))
    eventlog.ship(db, lease, first, attempt=1, relative=relative)
    second = lines(
        checkpoint(3),
        engine.RolledBack(step=1, first_skipped=2, last_skipped=7, checkpoint="step-1"),
        engine.Skipped(step=2, what="window"),
        engine.Skipped(step=3, what="overflow", loss_scale=512.0),
        engine.Sample(step=3, prompt="sun?", text="day\0", num_tokens=2),
        first=len(first),
    )
    eventlog.ship(db, lease, second, attempt=1, relative=relative)
    assert [row.step for row in reads.resume_candidates(db, job_id=job.id)] == [1]
    assert reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id).step == 3
    told = [
        (event.level, event.message)
        for event in reads.events_since(db, job_id=job.id, seq=0, limit=99)
        if event.line in (2, 5, 6, 7, 8)
    ]
    assert told == [
        ("warn", "Step 2 was skipped: its loss is not finite"),
        ("warn", "The run diverged and went back to step-1; steps 2 to 7 will be passed over"),
        ("info", "Step 2 was passed over: the run diverged there before"),
        ("info", "Step 3 was skipped: its gradient is too large for fp16; the loss scale is now 512"),
        ("info", "Step 3, asked 'sun?': day\ufffd"),
    ]


def test_the_best_evaluation_is_told_with_checkpoints_and_model(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    checkpoint = engine.Checkpoint(
        step=4, path="c", manifest_sha256="0", num_bytes=1, train_loss=None, valid_loss=1.5, best_step=2
    )
    finished = engine.Finished(
        step=4,
        model_path="m",
        weights_sha256="ab" * 32,
        num_trained_tokens=1,
        peak_bytes=1,
        seconds=3.0,
        model_step=2,
        best_step=2,
    )
    eventlog.ship(db, lease, lines(checkpoint, finished), attempt=1, relative=relative)
    *_, saved, written = reads.events_since(db, job_id=job.id, seq=0, limit=100)
    assert saved.data is not None
    assert saved.data["best_step"] == 2
    assert written.message == f"Model of step 2 written after 3 s, weights sha256 {'ab' * 6}"
    assert written.data is not None
    assert (written.data["model_step"], written.data["best_step"]) == (2, 2)


MEMORY = step(1, peak=530 * MIB).memory


def test_planned_and_measured_memory_are_told(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    planned = replace(MEMORY, peak_bytes=512 * MIB)
    started = replace(STARTED, planned=planned)
    verdict = engine.MemoryVerdict(step=7, planned=planned, measured=MEMORY, ratio=512 / 530)
    eventlog.ship(db, lease, lines(started, verdict), attempt=1, relative=relative)
    row = reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id)
    assert row.run is not None
    assert row.run["planned"] == asdict(planned)
    *_, told = reads.events_since(db, job_id=job.id, seq=0, limit=100)
    assert (told.level, told.message) == ("info", "Memory: planned 512 MiB, measured 530 MiB (0.97 of it).")
    assert told.data == {"step": 7, "planned": asdict(planned), "measured": asdict(MEMORY)}


def test_what_was_held_when_memory_ran_out_is_told_with_what_would_fit(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    suggestion = {"batch_size": 2, "activation_checkpointing": True, "peak_bytes": 500}
    failed = engine.Failed(code="out_of_memory", message="too much", memory=MEMORY, suggestion=suggestion)
    eventlog.ship(db, lease, lines(failed), attempt=1, relative=relative)
    *_, told = reads.events_since(db, job_id=job.id, seq=0, limit=100)
    assert told.message == "The engine ended: out_of_memory."
    assert told.data == {
        "code": "out_of_memory",
        "param": None,
        "memory": asdict(MEMORY),
        "suggestion": suggestion,
    }


def test_a_plan_is_not_taken_for_what_was_held(db: Database) -> None:
    """An attempt whose model could not be loaded tells its plan's figures; what the one before has measured stays."""
    job = submit(db)
    first = claim(db).lease
    eventlog.ship(db, first, lines(STARTED, step(1)), attempt=1, relative=relative)
    measured = reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id).memory
    assert measured is not None
    lifecycle.retry(db, first, reason="killed", policy=POLICY)
    second = claim(db).lease
    planned = replace(MEMORY, peak_bytes=7)
    failed = engine.Failed(code="out_of_memory", message="too much", memory=planned)
    eventlog.ship(db, second, lines(failed), attempt=2, relative=relative)
    assert reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id).memory == measured


def test_what_was_held_is_the_jobs_memory_once_the_attempt_has_started(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    held = replace(MEMORY, peak_bytes=7)
    failed = engine.Failed(code="out_of_memory", message="too much", memory=held)
    eventlog.ship(db, lease, lines(STARTED, step(1)), attempt=1, relative=relative)
    eventlog.ship(db, lease, lines(failed, first=2), attempt=1, relative=relative)
    assert reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id).memory == asdict(held)


def test_shipping_again_is_harmless_and_a_hole_is_refused(db: Database) -> None:
    submit(db)
    lease = claim(db).lease
    batch = lines(*(step(n) for n in range(1, 6)))
    assert eventlog.ship(db, lease, batch[:3], attempt=1, relative=relative) == 3
    assert eventlog.ship(db, lease, batch, attempt=1, relative=relative) == 2
    assert eventlog.ship(db, lease, batch, attempt=1, relative=relative) == 0
    assert eventlog.shipped_lines(db, job_id=lease.job_id, attempt=1) == 5
    with pytest.raises(AssertionError, match="journal line 5 is missing"):
        eventlog.ship(db, lease, lines(step(7), first=6), attempt=1, relative=relative)


def test_the_next_attempt_ships_what_a_killed_worker_left(db: Database) -> None:
    job = submit(db)
    old = claim(db).lease
    journal = lines(*(step(n) for n in range(1, 6)))
    eventlog.ship(db, old, journal[:2], attempt=1, relative=relative)
    lifecycle.retry(db, old, reason="killed", policy=POLICY)
    new = claim(db).lease
    with pytest.raises(LeaseLostError):
        eventlog.ship(db, old, journal, attempt=1, relative=relative)
    assert eventlog.ship(db, new, journal, attempt=1, relative=relative) == 3
    # The resumed attempt repeats steps 4 and 5: both stay as events, the metrics keep the newer ones.
    eventlog.ship(db, new, lines(step(4, loss=9.0), step(5, loss=9.0)), attempt=2, relative=relative)
    columns = series.read_metrics(db, now(db, job), max_points=100)
    assert columns["step"] == [1, 2, 3, 4, 5]
    assert columns["loss"] == [1, 1, 1, 9, 9]
    assert columns["attempt"] == [1, 1, 1, 2, 2]
    shipped = [(event.attempt, event.line) for event in reads.events_since(db, job_id=job.id, seq=0, limit=99)]
    assert [entry for entry in shipped if entry[1] is not None] == [(1, n) for n in range(5)] + [(2, 0), (2, 1)]


def test_a_chart_has_as_many_points_as_asked_and_keeps_the_spike(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    batch = lines(*(step(n, loss=50.0 if n == 777 else 1.0) for n in range(1, 1001)))
    eventlog.ship(db, lease, batch, attempt=1, relative=relative)
    columns = series.read_metrics(db, now(db, job), max_points=50)
    assert len(columns["step"]) <= 50
    assert columns["step"][-1] == 1000
    assert max(columns["loss_max"]) == 50.0
    window = series.read_metrics(db, now(db, job), max_points=50, first_step=770, last_step=780)
    assert window["step"] == list(range(770, 781))
    [curve] = series.loss_curves(db, job_ids=[job.id], num_points=20).values()
    assert 15 <= len(curve) <= 20


def test_a_lost_lease_writes_nothing(db: Database) -> None:
    job = submit(db)
    lease = claim(db).lease
    lifecycle.release_dead(db, host="host", incarnation="2", policy=POLICY)
    before = reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id).last_seq
    with pytest.raises(LeaseLostError):
        eventlog.ship(db, lease, lines(step(1)), attempt=1, relative=relative)
    assert reads.get_job(db, owner=Owner(ORGANIZATION), job_id=job.id).last_seq == before


def test_only_the_newest_checkpoints_stay_published(db: Database) -> None:
    job = submit(db)  # keep_checkpoints is 2

    def checkpoint(step: int) -> engine.Checkpoint:
        return engine.Checkpoint(step=step, path=f"/data/{step}", manifest_sha256="m", num_bytes=1, train_loss=None)

    lease = claim(db).lease
    eventlog.ship(db, lease, lines(*(checkpoint(n) for n in (10, 20, 30))), attempt=1, relative=relative)
    assert [row.step for row in reads.resume_candidates(db, job_id=job.id)] == [30, 20]
    lifecycle.retry(db, lease, reason="killed", policy=POLICY)
    again = claim(db).lease
    eventlog.ship(db, again, lines(checkpoint(30), checkpoint(40)), attempt=2, relative=relative)
    assert [(row.step, row.attempt) for row in reads.resume_candidates(db, job_id=job.id)] == [(40, 2), (30, 2)]


def test_an_outage_in_the_middle_of_a_batch_is_told_as_one_and_leaves_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(db)
    lease = claim(db).lease
    write = repository.copy_rows

    def write_to_a_closed_connection(session: Session, *args: Any) -> None:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with db.transaction() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        write(session, *args)

    monkeypatch.setattr(repository, "copy_rows", write_to_a_closed_connection)
    lines = [(0, engine.JournalLine(1.0, engine.Message(level="info", message="a line\0with a NUL")))]
    with pytest.raises(OperationalError):
        eventlog.ship(db, lease, lines, attempt=1, relative=str)
    monkeypatch.undo()
    assert eventlog.shipped_lines(db, job_id=lease.job_id, attempt=1) == 0
    assert eventlog.ship(db, lease, lines, attempt=1, relative=str) == 1
    assert reads.events_since(db, job_id=lease.job_id, seq=0, limit=100)[-1].message == "a line\ufffdwith a NUL"

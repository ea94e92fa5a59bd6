"""The event files that a job leaves, through kills, pauses and a disk that does not take them."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from jobs import deletion, eventlog, lifecycle
from jobs.models import Job
from jobs.owner import Owner
from lomo_core import events
from lomo_core.events import JournalLine
from tests.support.fake_engine import MEMORY
from tests.support.tensorboard_files import read_events, shown
from worker.journal_shipper import JournalReader
from worker.tensorboard import EventFile, event_path
from worker.tracked import Point, read_tracked

FINISH = [["steps", 3], ["checkpoint"], ["steps", 2], ["finish"]]


def test_a_jobs_figures_are_there_under_the_fields_names_and_go_with_it(bench: Any) -> None:
    job_id = bench.submit(FINISH)
    bench.node().work()
    job = bench.job(job_id)
    assert job.status == "succeeded", bench.messages(job_id)
    folder = bench.folder(job_id) / "tensorboard"
    assert shown(folder, "train/loss") == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75), (5, pytest.approx(0.6))]
    assert shown(folder, "memory/peak_bytes") == [(step, 135.0) for step in range(1, 6)]
    [_, first, *_] = read_events(event_path(bench.folder(job_id), attempt=1))
    assert {value.tag for value in first.summary.value} == {
        *(f"train/{name}" for name in ("loss", "token_accuracy", "learning_rate", "grad_norm")),
        *(f"train/{name}" for name in ("tokens_per_s", "step_s", "epoch")),
        *(f"memory/{name}_bytes" for name in ("parameters", "gradients", "optimizer", "activations", "other", "peak")),
    }
    assert first.wall_time > job.created_at.timestamp() - 1
    runs_dir = bench.settings.data_dir / "runs"
    deletion.delete_job(bench.db, owner=Owner(job.organization_id), job_id=job_id, runs_dir=runs_dir)
    assert not folder.exists()


def test_steps_done_again_after_a_kill_show_once(bench: Any) -> None:
    first = [["steps", 3], ["checkpoint"], ["steps", 2], ["die", signal.SIGKILL]]
    job_id = bench.submit(first, [["steps", 3], ["finish"]])
    job = bench.work_until_ended(bench.node(), job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    folder = bench.folder(job_id) / "tensorboard"
    assert [step for step, _ in shown(folder, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert len(read_events(event_path(bench.folder(job_id), attempt=1))) == 1 + 5


def test_a_paused_job_goes_on_where_it_was(bench: Any, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit([["steps", 2], ["touch", "there"]], [["steps", 2], ["finish"]])
    node = bench.node()
    thread = in_background(node.work)
    wait_until(lambda: bench.has_touched(job_id, "there"), 30, "the engine")
    bench.pause(job_id)
    thread.join(30)
    assert bench.job(job_id).status == "paused"
    bench.resume(job_id)
    assert bench.work_until_ended(node, job_id).status == "succeeded"
    assert [step for step, _ in shown(bench.folder(job_id) / "tensorboard", "train/loss")] == [1, 2, 3, 4]


def test_what_a_killed_worker_did_not_tell_is_told_by_the_next(bench: Any) -> None:
    job_id = bench.submit([["exit", 1]], [["steps", 1], ["finish"]])
    dead = bench.node()
    claim = lifecycle.claim(bench.db, owner="dead", lease_s=60)
    assert claim is not None
    folder = bench.folder(job_id) / "attempt-1"
    folder.mkdir(parents=True)
    write_journal(folder / "journal.jsonl", [started(0), *(step(number) for number in range(1, 5))])
    # It had told of two steps, half of the third, and shipped one.
    path = event_path(bench.folder(job_id), attempt=1)
    EventFile(path).write(read_tracked(JournalReader(folder / "journal.jsonl").read(4)))
    path.write_bytes(path.read_bytes()[:-20])
    lines = JournalReader(folder / "journal.jsonl").read(2)
    assert eventlog.ship(bench.db, claim.lease, lines, attempt=1, relative=str) == 2
    lifecycle.retry(bench.db, claim.lease, reason="dead", policy=dead.host.retry_policy)
    with bench.db.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=Job.created_at))
    bench.node().work()
    assert bench.job(job_id).status == "succeeded", bench.messages(job_id)
    assert len(read_events(path)) == 1 + 4
    # There was no checkpoint, so the second attempt began anew.
    assert [step for step, _ in shown(path.parent, "train/loss")] == [1]


def test_a_disk_that_takes_no_figures_costs_one_warning(bench: Any) -> None:
    job_id = bench.submit([["steps", 2], ["touch", "there"], *FINISH])
    bench.folder(job_id).mkdir(parents=True)
    (bench.folder(job_id) / "tensorboard").write_text("in the way", encoding="utf-8")
    bench.node().work()
    assert bench.job(job_id).status == "succeeded", bench.messages(job_id)
    warnings = [event.message for event in bench.events(job_id) if event.level == "warn"]
    assert [text.startswith("TensorBoard's file tensorboard/events.out.tfevents.") for text in warnings] == [True]


def test_a_rollback_and_evaluations(tmp_path: Path) -> None:
    rolled_back = events.RolledBack(step=1, first_skipped=2, last_skipped=2, checkpoint=None)
    evaluation = events.Evaluation(step=3, num_rows=1, valid_loss=0.5, seconds=1.0)
    told = [started(0), step(1), step(2), rolled_back, step(3), evaluation]
    write_journal(tmp_path / "journal.jsonl", told)
    path = event_path(tmp_path, attempt=1)
    EventFile(path).write(read_tracked(JournalReader(tmp_path / "journal.jsonl").read()))
    assert [number for number, _ in shown(path.parent, "train/loss")] == [1, 3]
    assert shown(path.parent, "eval/loss") == [(3, 0.5)]
    assert not shown(path.parent, "eval/choice_accuracy")


def write_journal(path: Path, told: list[events.Event]) -> None:
    path.write_bytes(b"".join(events.encode_line(JournalLine(1.7e9 + at, event)) for at, event in enumerate(told)))


def started(done: int) -> events.Event:
    return events.Started(
        step=done,
        total_steps=9,
        num_parameters=1,
        num_train_rows=1,
        num_truncated_rows=0,
        num_trainable_tokens=1,
        device="cpu",
        device_bytes=None,
    )


def step(number: int) -> events.Event:
    return events.Step(
        step=number,
        total_steps=9,
        epoch=number / 9,
        loss=float("nan") if number == 4 else 1.0,
        mean_token_accuracy=None,
        learning_rate=0.1,
        grad_norm=None,
        num_tokens=8,
        num_trained_tokens=8 * number,
        step_s=0.1,
        tokens_per_s=80.0,
        memory=MEMORY,
    )


@pytest.mark.parametrize(("given", "expected"), [(1e39, math.inf), (-1e39, -math.inf), (3.4028234663852886e38,) * 2])
def test_a_figure_beyond_single_precision_is_infinite(tmp_path: Path, given: float, expected: float) -> None:
    path = event_path(tmp_path, attempt=1)
    EventFile(path).write([Point(step=1, time_s=1.0, values={"train/grad_norm": given})])
    assert shown(path.parent, "train/grad_norm") == [(1, expected)]

"""One job from claim to end, against real Postgres and an engine that plays a script (tests/support/fake_engine.py)."""

from __future__ import annotations

import io
import json
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text, update

from jobs import eventlog, files, job_details, lifecycle, migrate, reads, uploads
from jobs.db import Database
from jobs.models import Job
from jobs.owner import Owner
from jobs.run_config import RUN_CONFIG_NAME
from local.postgres import NOT_DURABLE, Postgres
from lomo_core.config import TrainConfig
from tests.support.worker_bench import is_alive
from worker import runner
from worker.journal_shipper import JournalReader

FINISH = [["steps", 3], ["checkpoint"], ["steps", 2], ["finish"]]
STEPS_OF_FINISH = ["1,3.0,0.5,,", "2,1.5,0.5,,", "3,1.0,0.5,,", "4,0.75,0.5,,", "5,0.6,0.5,,"]
HANG = [["steps", 1], ["touch", "hanging"]]


def test_success(bench: Any) -> None:
    job_id = bench.submit(FINISH)
    bench.node().work()
    job = bench.job(job_id)
    assert job.status == "succeeded", bench.messages(job_id)
    assert (job.attempt, job.failures, job.step, job.trained_tokens) == (1, 0, 5, 160)
    assert bench.steps(job_id) == [1, 2, 3, 4, 5]
    model = reads.find_model(bench.db, owner=Owner(job.organization_id), model_id=job.fine_tuned_model)
    assert model is not None
    assert model.path == f"runs/{job_id}/attempt-1/model"
    assert (bench.settings.data_dir / model.path / "config.json").is_file()
    assert (bench.folder(job_id) / "attempt-1").stat().st_mode & 0o777 == 0o700
    assert read_result_file(bench, job_id).splitlines()[1:] == STEPS_OF_FINISH


def test_the_engine_gets_the_jobs_options_and_its_samples_come_back(bench: Any) -> None:
    script = [["steps", 1], ["sample"], ["finish"]]
    lomo = {"optimizer": "adalomo", "precision": "fp16", "sample_prompts": ["Why?", "How?"], "frozen": ["*.bias"]}
    job_id = bench.submit(script, training_format="plain", lomo=lomo)
    bench.node().work()
    assert bench.job(job_id).status == "succeeded", bench.messages(job_id)
    run = TrainConfig.from_json((bench.folder(job_id) / "attempt-1" / RUN_CONFIG_NAME).read_text(encoding="utf-8"))
    assert (run.precision, run.data.format, run.optimizer.rounding) == ("fp16", "plain", "stochastic")
    assert run.optimizer.frozen == (r"\A(?s:.*\.bias)\Z",)
    samples = [event.data for event in bench.events(job_id) if event.data and "prompt" in event.data]
    assert [(data["step"], data["prompt"], data["text"]) for data in samples] == [
        (1, "Why?", "re: Why?"),
        (1, "How?", "re: How?"),
    ]


def test_one_ring_runs_all_that_waits(bench: Any) -> None:
    job_ids = [bench.submit(FINISH) for _ in range(3)]
    bench.node().work()
    assert [bench.job(job_id).status for job_id in job_ids] == ["succeeded"] * 3


@pytest.mark.parametrize(
    ("script", "code", "param", "text"),
    [
        (
            [["fail", "invalid_hyperparameters", "lr is 0", "optimizer.learning_rate"], ["exit", 10]],
            "invalid_hyperparameters",
            "lomo.learning_rate",
            "lr is 0",
        ),
        ([["fail", "invalid_model", "no weights", "model_path"], ["exit", 11]], "invalid_model", "model", "no weights"),
        (
            [["fail", "invalid_training_file", "line 3", "data.train_path"], ["exit", 12]],
            "invalid_training_file",
            "training_file",
            "line 3",
        ),
        ([["exit", 14]], "out_of_memory", None, "too little memory"),
        ([["exit", 15]], "diverged", None, "no longer finite"),
        ([["exit", 16]], "disk_full", None, "disk is full"),
        ([["exit", 0]], "engine_error", None, "without writing a model"),
        ([["exit", 99]], "engine_error", None, "exit code 99"),
    ],
)
def test_an_error_of_the_engine_ends_the_job(
    bench: Any, script: list[Any], code: str, param: str | None, text: str
) -> None:
    job_id = bench.submit([["steps", 1], *script])
    bench.node().work()
    job = bench.job(job_id)
    assert job.status == "failed"
    assert (job.attempt, job.error["code"], job.error["param"]) == (1, code, param)
    assert text in job.error["message"]


def test_a_defect_of_the_engine_shows_the_end_of_its_output(bench: Any) -> None:
    job_id = bench.submit([["print", "x" * 20_000], ["print", "KeyError: 'lost'"], ["exit", 1]])
    bench.node().work()
    assert bench.job(job_id).error["code"] == "engine_error"
    shown = next(text for text in bench.messages(job_id) if text.startswith("The end of the engine's output"))
    assert "KeyError: 'lost'" in shown
    assert len(shown) < 9000


def test_a_line_that_is_no_event_holds_nothing_up(bench: Any) -> None:
    job_id = bench.submit([["steps", 1], ["raw", '{"time": 1}\n'], ["raw", "[1]\n"], ["steps", 1], ["finish"]])
    bench.node().work()
    assert bench.job(job_id).status == "succeeded"
    assert bench.steps(job_id) == [1, 2]
    assert sum("not an event" in text for text in bench.messages(job_id)) == 2


def test_a_killed_engine_is_tried_again_from_its_checkpoint(bench: Any) -> None:
    first = [["steps", 3], ["checkpoint"], ["steps", 1], ["raw", '{"time": 1, "ty'], ["die", signal.SIGKILL]]
    job_id = bench.submit(first, [["steps", 2], ["checkpoint"], ["finish"]])
    job = bench.work_until_ended(bench.node(), job_id)
    assert (job.status, job.attempt, job.failures, job.step) == ("succeeded", 2, 1, 5)
    assert bench.steps(job_id) == [1, 2, 3, 4, 4, 5]
    assert any("killed by signal 9 (SIGKILL" in text for text in bench.messages(job_id))
    # The first attempt's checkpoint is one of the two that the job keeps.
    assert (bench.folder(job_id) / "attempt-1" / "checkpoints" / "step-3").is_dir()
    assert sorted(path.name for path in (bench.folder(job_id) / "attempt-1").iterdir()) == [
        "checkpoints",
        "engine.log",
        "engine.pid",
        "journal.jsonl",
        "run.json",
    ]
    assert (bench.folder(job_id) / "attempt-2" / "checkpoints" / "step-5").is_dir()


def test_encoded_rows_stay_for_the_next_attempt_and_go_with_the_job(bench: Any) -> None:
    # Without the folder the engines could not write their files into it.
    first, second = [["touch", "tokens/1"], ["die", signal.SIGKILL]], [["touch", "tokens/2"], *FINISH]
    job_id = bench.submit(first, second)
    (bench.folder(job_id) / "tokens").mkdir(parents=True)
    job = bench.work_until_ended(bench.node(), job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert not (bench.folder(job_id) / "tokens").exists()
    for attempt in ("attempt-1", "attempt-2"):
        run = json.loads((bench.folder(job_id) / attempt / "run.json").read_text(encoding="utf-8"))
        assert run["data"]["cache_dir"] == str(bench.folder(job_id) / "tokens")


def test_an_engine_that_always_dies_is_given_up(bench: Any) -> None:
    job_id = bench.submit([["steps", 1], ["die", signal.SIGSEGV]])
    job = bench.work_until_ended(bench.node(), job_id)
    assert (job.status, job.attempt, job.error["code"]) == ("failed", 3, "engine_lost")
    assert "signal 11 (SIGSEGV)" in job.error["message"]


def test_a_cancelled_job_stops_with_all_it_started(bench: Any, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit([["child"], *HANG])
    thread = in_background(bench.node().work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    bench.cancel(job_id)
    thread.join(30)
    assert bench.job(job_id).status == "cancelled"
    assert not bench.is_engine_alive(job_id)
    assert not is_alive(int((bench.folder(job_id) / "attempt-1" / "child.pid").read_text(encoding="ascii")))
    # It was asked politely and left a checkpoint.
    assert "Checkpoint created at step 1" in bench.messages(job_id)
    assert not [event.message for event in bench.events(job_id) if event.level == "error"]


def test_an_engine_deaf_to_sigterm_is_killed_after_the_grace(bench: Any, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit([["ignore_sigterm"], *HANG])
    thread = in_background(bench.node(stop_grace_s=0.3).work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    bench.cancel(job_id)
    thread.join(30)
    assert bench.job(job_id).status == "cancelled"
    assert not bench.is_engine_alive(job_id)


def test_success_wins_over_a_late_cancel(bench: Any, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit([["ignore_sigterm"], ["steps", 1], ["touch", "hanging"], ["wait", "go"], ["finish"]])
    thread = in_background(bench.node().work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    bench.cancel(job_id)
    bench.touch(job_id, "go")
    thread.join(30)
    assert bench.job(job_id).status == "succeeded"


def test_a_stopping_worker_gives_its_job_back_and_the_next_one_goes_on(
    bench: Any, wait_until: Any, in_background: Any
) -> None:
    job_id = bench.submit([["steps", 2], ["touch", "hanging"]], [["steps", 1], ["finish"]])
    node = bench.node()
    thread = in_background(node.work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    node.stopping.set()
    thread.join(30)
    job = bench.job(job_id)
    assert (job.status, job.failures) == ("queued", 0)
    bench.node().work()
    job = bench.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 0)
    assert bench.steps(job_id) == [1, 2, 3]


def test_a_lost_lease_kills_the_engine_and_writes_nothing(bench: Any, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit(HANG)
    thread = in_background(bench.node().work)
    wait_until(lambda: bench.has_touched(job_id, "hanging") and bench.steps(job_id) == [1], 30, "the engine")
    before = bench.messages(job_id)
    with bench.db.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_token=uuid.uuid4(), lease_owner="thief/1"))
    thread.join(30)
    assert not thread.is_alive()
    assert not bench.is_engine_alive(job_id)
    assert bench.messages(job_id) == before
    job = bench.job(job_id)
    assert (job.status, job.lease_owner) == ("running", "thief/1")


def test_twenty_rings_claim_a_job_once(bench: Any, in_background: Any) -> None:
    job_id = bench.submit(FINISH)
    nodes = [bench.node(worker_name=f"host-{number}") for number in range(2)]
    threads = [in_background(nodes[number % 2].work) for number in range(20)]
    for thread in threads:
        thread.join(30)
    job = bench.job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 1)
    assert sum(text.startswith("Fine-tuning job started") for text in bench.messages(job_id)) == 1


def test_a_ring_while_all_slots_are_taken_is_not_lost(bench: Any, wait_until: Any, in_background: Any) -> None:
    first = bench.submit([["steps", 1], ["touch", "hanging"], ["wait", "go"], ["finish"]])
    node = bench.node()
    thread = in_background(node.work)
    wait_until(lambda: bench.has_touched(first, "hanging"), 30, "the engine")
    second = bench.submit(FINISH)
    node.work()  # returns at once
    assert bench.job(second).status == "queued"
    bench.touch(first, "go")
    thread.join(30)
    assert [bench.job(job_id).status for job_id in (first, second)] == ["succeeded", "succeeded"]


def test_a_ring_between_the_last_look_and_the_slots_release_is_not_lost(
    bench: Any, in_background: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, original, late = bench.node(), lifecycle.claim, []

    def claim(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if found is None and not late:
            late.append(bench.submit(FINISH))
            in_background(node.work).join(30)  # finds no free slot
        return found

    monkeypatch.setattr(lifecycle, "claim", claim)
    node.work()
    assert bench.job(late[0]).status == "succeeded"


def test_the_end_of_an_engine_ships_what_the_interval_would_have_held_back(bench: Any) -> None:
    job_id = bench.submit([["steps", 1200], ["finish"]])
    bench.node(ship_every_s=3600.0).work()
    assert bench.steps(job_id) == list(range(1, 1201))


def test_the_reaper_rings_for_what_waits(bench: Any) -> None:
    node = bench.node()
    node.reap()
    assert bench.rings == []
    bench.submit(FINISH)
    node.reap()
    assert len(bench.rings) == 1


def test_the_reaper_sweeps_away_uploads_whose_hour_is_over(bench: Any) -> None:
    settings = bench.node().settings
    upload = uploads.create(bench.db, owner=Owner("org"), filename="a", purpose="vision", num_bytes=9)
    incoming = uploads.open_part(bench.db, settings, owner=Owner("org"), upload_id=upload.id)
    bench.node().reap()
    incoming.write(b"x")
    uploads.add_part(bench.db, incoming)
    with bench.db.transaction() as session:
        session.execute(text("UPDATE uploads SET expires_at = now()"))
    bench.node().reap()
    assert list(settings.uploads_dir.iterdir()) == []


def test_the_reaper_removes_files_whose_time_is_over(bench: Any) -> None:
    settings = bench.node().settings
    files.store_file(
        bench.db,
        io.BytesIO(b"x"),
        files_dir=settings.files_dir,
        owner=Owner("org"),
        filename="a",
        purpose="vision",
        expires_after_s=3600,
    )
    bench.node().reap()
    assert len(list(settings.files_dir.iterdir())) == 1
    with bench.db.transaction() as session:
        session.execute(text("UPDATE files SET expires_at = now()"))
    bench.node().reap()
    assert list(settings.files_dir.iterdir()) == []


def test_the_reaper_requeues_what_a_silent_worker_held(bench: Any, wait_until: Any) -> None:
    job_id = bench.submit(FINISH)
    assert lifecycle.claim(bench.db, owner="gone/1", lease_s=0.1) is not None
    node = bench.node(lease_s=0.2, lease_grace_s=0.1)

    def requeued() -> bool:
        node.reap()
        return bool(bench.job(job_id).status == "queued")

    wait_until(requeued, 30, "the reaper")
    assert bench.work_until_ended(node, job_id).status == "succeeded"
    assert "The worker on gone has not been heard of" in " ".join(bench.messages(job_id))


def test_leftovers_of_a_dead_worker_are_shipped_exactly_once(bench: Any) -> None:
    """The dead worker shipped two of its engine's four lines; the file holds two more and a torn one."""
    job_id = bench.submit(FINISH, [["steps", 1], ["finish"]])
    dead = bench.node(worker_name="host-b")
    claim = lifecycle.claim(bench.db, owner=dead.owner, lease_s=60)
    assert claim is not None
    folder = bench.folder(job_id) / "attempt-1"
    folder.mkdir(parents=True)
    lines = [json.dumps({"time": 1.0, "type": "message", "level": "info", "message": f"line {n}"}) for n in range(4)]
    (folder / "journal.jsonl").write_text("\n".join(lines) + '\n{"time": 1.0, "ty', encoding="utf-8")
    ship_first_lines(bench, claim, folder / "journal.jsonl", count=2)
    lifecycle.retry(bench.db, claim.lease, reason="dead", policy=dead.host.retry_policy)
    with bench.db.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=Job.created_at))
    bench.node().work()
    assert bench.job(job_id).status == "succeeded"
    shipped = [text for text in bench.messages(job_id) if text.startswith("line ")]
    assert shipped == ["line 0", "line 1", "line 2", "line 3"]


def ship_first_lines(bench: Any, claim: Any, path: Path, *, count: int) -> None:
    """Ship the first lines of a journal, as a worker did that was killed then."""
    lines = JournalReader(path).read(count)
    assert eventlog.ship(bench.db, claim.lease, lines, attempt=1, relative=str) == count


def test_a_model_that_a_dead_worker_did_not_publish_is_taken(bench: Any) -> None:
    """The engine had finished; its worker died before it could say so. Nothing is trained again."""
    job_id = bench.submit(FINISH, [["exit", 1]])
    node = bench.node()
    fail_once = iter([RuntimeError("worker dies here")])
    original = lifecycle.succeed

    def succeed(*args: Any, **kwargs: Any) -> str:
        for error in fail_once:
            raise error
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "succeed", succeed)
        with pytest.raises(RuntimeError, match="worker dies here"):
            node.work()
    assert bench.job(job_id).status == "queued"
    job = bench.work_until_ended(node, job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert bench.engine_pid(job_id, attempt=2) is None
    model = reads.find_model(bench.db, owner=Owner(job.organization_id), model_id=job.fine_tuned_model)
    assert model is not None
    assert (bench.settings.data_dir / model.path).is_dir()
    # What the dead worker had written was published by nobody; the file is the second attempt's, with the same steps.
    assert read_result_file(bench, job_id).splitlines()[1:] == STEPS_OF_FINISH
    [file] = reads.list_files(bench.db, owner=Owner(job.organization_id), limit=10).items
    assert file.path == f"runs/{job_id}/attempt-2/step_metrics.csv"


def read_result_file(bench: Any, job_id: str) -> str:
    """The text of a job's only result file."""
    [file_id] = job_details.read_details(bench.db, job_ids=[job_id])[job_id].result_files
    file = reads.get_file(bench.db, owner=Owner(bench.job(job_id).organization_id), file_id=file_id)
    return files.stored_path(file, data_dir=bench.settings.data_dir).read_text(encoding="utf-8")


def test_a_disk_that_is_full_costs_the_result_file_and_not_the_model(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.submit(FINISH)
    # A device that takes no byte stands in for the disk.
    monkeypatch.setattr(runner, "write_step_metrics", lambda *_, **__: Path("/dev/full").write_text("x"))
    bench.node().work()
    job = bench.job(job_id)
    assert (job.status, job.fine_tuned_model is None) == ("succeeded", False)
    assert job_details.read_details(bench.db, job_ids=[job_id])[job_id].result_files == []
    [warning] = [event.message for event in bench.events(job_id) if event.level == "warn"]
    assert "disk is full" in warning
    assert "step_metrics.csv" in warning


def test_a_missing_model_or_file_fails_the_job_with_its_param(bench: Any) -> None:
    no_file = bench.submit(FINISH)
    for path in bench.settings.files_dir.iterdir():
        path.unlink()
    no_model = bench.submit(FINISH, model="absent")
    bench.node().work()
    assert [bench.job(job_id).error["param"] for job_id in (no_model, no_file)] == ["model", "training_file"]
    assert bench.job(no_model).error["code"] == "model_not_found"


def test_an_engine_knows_no_secret_and_holds_no_lifeline_of_its_sibling(
    bench: Any, wait_until: Any, in_background: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines at once: each must end when *its* lifeline is cut, whatever the other one still holds."""
    monkeypatch.setenv("LOMO_DATABASE_URL", "postgresql://canary")
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    job_ids = [bench.submit([["environment"], *HANG]) for _ in range(2)]
    node = bench.node(slots=2)
    threads = [in_background(node.work) for _ in range(2)]
    for job_id in job_ids:
        wait_until(lambda job_id=job_id: bench.has_touched(job_id, "hanging"), 30, "the engine")
    for job_id in job_ids:
        text = (bench.folder(job_id) / "attempt-1" / "environment.json").read_text(encoding="utf-8")
        assert "canary" not in text
        assert json.loads(text)["HF_HUB_OFFLINE"] == "1"
        assert pipes_of(bench.engine_pid(job_id)).isdisjoint(write_ends_of(os.getpid()))
    node.stopping.set()
    for thread in threads:
        thread.join(30)
    assert {bench.job(job_id).status for job_id in job_ids} == {"queued"}


def pipes_of(pid: int) -> set[tuple[str, str]]:
    """Every pipe end that a process holds for writing, as (pipe, direction)."""
    return {end for end in _pipe_ends(pid) if end[1] == "write"}


def write_ends_of(pid: int) -> set[tuple[str, str]]:
    """The same for this process: among them the lifelines of its engines."""
    ends = pipes_of(pid)
    assert ends
    return ends


def _pipe_ends(pid: int) -> set[tuple[str, str]]:
    ends = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
            flags = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text(encoding="ascii").split("flags:\t")[1].split()[0]
        except FileNotFoundError:
            continue
        if target.startswith("pipe:"):
            ends.add((target, "write" if int(flags, 8) & os.O_ACCMODE == os.O_WRONLY else "read"))
    return ends


@pytest.fixture
def own_postgres(tmp_path: Path) -> Any:
    """A Postgres of this test's own, to be stopped and started. Costs about a second."""
    server = Postgres(tmp_path / "pg", log_path=tmp_path / "pg.log", settings=NOT_DURABLE)
    server.start()
    yield server
    server.stop()


def use(server: Postgres, bench: Any, **changes: Any) -> None:
    """Let a bench work on this server."""
    migrate.upgrade(server.url())
    bench.db.dispose()
    bench.db = Database(server.url())
    bench.settings = bench.settings.model_copy(update={"database_url": server.url(), **changes})


def test_an_outage_of_the_database_loses_no_line(
    own_postgres: Postgres, bench: Any, wait_until: Any, in_background: Any
) -> None:
    # So short a lease runs out between any two renewals, and all the more in an outage.
    use(own_postgres, bench, lease_s=0.01)
    script = [["steps", 5], ["touch", "hanging"], ["wait", "away"], ["steps", 700], ["touch", "trained"]]
    job_id = bench.submit([*script, ["wait", "go"], ["steps", 5], ["finish"]])
    thread = in_background(bench.node().work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    own_postgres.stop()
    bench.touch(job_id, "away")
    wait_until(lambda: bench.has_touched(job_id, "trained"), 30, "training without a database")
    bench.touch(job_id, "go")
    own_postgres.start()
    thread.join(30)
    job = bench.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 1, 0)
    assert bench.steps(job_id) == list(range(1, 711))


def test_a_worker_that_stops_in_an_outage_leaves_its_job_to_the_next(
    own_postgres: Postgres, bench: Any, wait_until: Any, in_background: Any
) -> None:
    """It cannot give the job back, so it goes without; what its engine wrote is in the file."""
    use(own_postgres, bench)
    script = [["steps", 3], ["touch", "hanging"], ["wait", "away"], ["steps", 2], ["touch", "trained"]]
    job_id = bench.submit(script, [["steps", 1], ["finish"]])
    node = bench.node()
    thread = in_background(node.work)
    wait_until(lambda: bench.has_touched(job_id, "hanging") and bench.steps(job_id) == [1, 2, 3], 30, "the engine")
    own_postgres.stop()
    bench.touch(job_id, "away")
    wait_until(lambda: bench.has_touched(job_id, "trained"), 30, "training without a database")
    node.stopping.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not bench.is_engine_alive(job_id)
    own_postgres.start()
    assert bench.job(job_id).status == "running"

    successor = bench.node()
    successor.start()
    wait_until(lambda: bench.rings, 30, "the successor's announcement")
    job = bench.work_until_ended(successor, job_id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 1)
    # Its checkpoint was in the file alone: shipped by the successor first, then resumed from.
    assert bench.steps(job_id) == [1, 2, 3, 4, 5, 6]


def test_checkpoints_of_earlier_attempts_stay_until_there_are_enough_new_ones(
    bench: Any, wait_until: Any, in_background: Any
) -> None:
    first = [["steps", 1], ["checkpoint"], ["die", signal.SIGKILL]]
    second = [["steps", 1], ["checkpoint"], ["touch", "one"], ["wait", "go"], ["steps", 1], ["checkpoint"]]
    job_id = bench.submit(first, [*second, ["wait", "end"], ["finish"]], lomo={"keep_checkpoints": 2})
    node = bench.node()
    thread = in_background(lambda: bench.work_until_ended(node, job_id))
    wait_until(lambda: "Checkpoint created at step 2" in bench.messages(job_id), 30, "the first new checkpoint")
    assert (bench.folder(job_id) / "attempt-1" / "checkpoints" / "step-1").is_dir()
    bench.touch(job_id, "go")
    gone = bench.folder(job_id) / "attempt-1" / "checkpoints" / "step-1"
    wait_until(lambda: not gone.exists(), 30, "the deletion")
    bench.touch(job_id, "end")
    thread.join(30)
    assert bench.job(job_id).status == "succeeded"

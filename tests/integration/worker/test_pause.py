"""A running job is paused, gives its slot to another one, and goes on: with a scripted engine and with the real one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import reads, series
from jobs.checkpoint_names import checkpoint_name
from jobs.owner import Owner
from jobs.spec import JobSpec
from lomo_core.config import TrainConfig
from tests.conftest import KnownShapes
from tests.support.known_host import give_calibration
from tests.support.tiny_model import chat, make_tiny_model, write_jsonl
from tests.support.worker_bench import ORGANIZATION, Bench

HANG = [["steps", 2], ["touch", "hanging"]]
FINISH = [["steps", 1], ["finish"]]


def test_a_paused_job_leaves_a_checkpoint_and_its_slot(bench: Bench, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit(HANG, FINISH)
    node = bench.node()
    thread = in_background(node.work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    other = bench.submit(FINISH)
    bench.pause(job_id)
    # The same thread goes on with the next job: the only slot was free.
    thread.join(30)
    assert bench.job(other).status == "succeeded"
    job = bench.job(job_id)
    assert (job.status, job.attempt, job.failures, job.step) == ("paused", 1, 0, 2)
    assert not bench.is_engine_alive(job_id)
    [checkpoint] = reads.list_checkpoints(bench.db, owner=Owner(ORGANIZATION), job_id=job_id, limit=9).items
    assert checkpoint.step == 2
    assert bench.messages(job_id)[-1] == "The job is paused. Resumed, it goes on from its checkpoint at step 2."
    assert not [event.message for event in bench.events(job_id) if event.level == "error"]

    bench.node().work()
    assert bench.job(job_id).status == "paused", "nobody may claim it"
    bench.resume(job_id)
    node.work()
    job = bench.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 0)
    assert bench.steps(job_id) == [1, 2, 3]
    run = TrainConfig.from_json((bench.folder(job_id) / "attempt-2" / "run.json").read_text(encoding="utf-8"))
    assert run.resume_from == (str(bench.settings.data_dir / checkpoint.path),)


def test_a_run_that_ends_before_it_can_pause_has_succeeded(bench: Bench, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit([["ignore_sigterm"], ["steps", 1], ["touch", "hanging"], ["wait", "go"], ["finish"]])
    thread = in_background(bench.node().work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    bench.pause(job_id)
    bench.touch(job_id, "go")
    thread.join(30)
    assert bench.job(job_id).status == "succeeded"


def asks_to_pause(bench: Bench, job_id: str, caplog: pytest.LogCaptureFixture) -> bool:
    """Ask for a pause, until the worker has told the engine."""
    if bench.job(job_id).pause_requested_at is None:
        bench.pause(job_id)
    return "engine_told_to_stop" in caplog.text


def test_a_cancel_while_it_pauses_cancels_without_the_patience_of_a_pause(
    bench: Bench, wait_until: Any, in_background: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    job_id = bench.submit([["ignore_sigterm"], *HANG])
    thread = in_background(bench.node(stop_grace_s=0.3, pause_grace_s=3600.0).work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    wait_until(lambda: asks_to_pause(bench, job_id, caplog), 30, "the worker")
    bench.cancel(job_id)
    thread.join(30)
    assert bench.job(job_id).status == "cancelled"


def test_a_worker_that_stops_while_its_job_pauses_leaves_it_paused(
    bench: Bench, wait_until: Any, in_background: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    job_id = bench.submit([["ignore_sigterm"], *HANG])
    node = bench.node(stop_grace_s=0.3, pause_grace_s=3600.0)
    thread = in_background(node.work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    wait_until(lambda: asks_to_pause(bench, job_id, caplog), 30, "the worker")
    node.stopping.set()
    thread.join(30)
    assert (bench.job(job_id).status, bench.job(job_id).failures) == ("paused", 0)


def test_an_engine_that_never_pauses_is_killed_in_the_end(bench: Bench, wait_until: Any, in_background: Any) -> None:
    job_id = bench.submit([["ignore_sigterm"], ["steps", 1], ["checkpoint"], *HANG])
    thread = in_background(bench.node(pause_grace_s=0.3).work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    bench.pause(job_id)
    thread.join(30)
    assert bench.job(job_id).status == "paused"
    assert bench.messages(job_id)[-1] == "The job is paused. Resumed, it goes on from its checkpoint at step 1."


def test_a_pause_that_was_taken_back_in_time_is_only_another_attempt(
    bench: Bench, wait_until: Any, in_background: Any
) -> None:
    job_id = bench.submit([["ignore_sigterm"], *HANG, ["wait", "go"], ["exit", 17]], FINISH)
    node = bench.node()
    thread = in_background(node.work)
    wait_until(lambda: bench.has_touched(job_id, "hanging"), 30, "the engine")
    bench.pause(job_id)
    bench.resume(job_id)
    bench.touch(job_id, "go")
    thread.join(30)
    # Whether the worker had seen the request or not, an engine that ends by itself with 17 is tried again.
    job = bench.work_until_ended(node, job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)


@pytest.fixture
def values(bench: Bench, tmp_path: Path, known_shapes: KnownShapes) -> dict[str, Any]:
    """A job of 150 steps on a tiny model: seconds, so that it does not end before it is paused."""
    model = make_tiny_model(bench.settings.data_dir / "models" / "tiny")
    known_shapes.give_file(bench.settings.data_dir, model / "config.json")
    rows = [chat(f"What is {n} plus {n}?", f"It is {2 * n}.") for n in range(40)]
    text = write_jsonl(tmp_path / "rows.jsonl", rows).read_text(encoding="utf-8")
    lomo = {"max_steps": 150, "checkpoint_every_steps": 0, "optimizer": "adalomo", "max_seq_length": 64}
    return {
        "model": "tiny",
        "training_file": bench.store(text),
        "seed": 7,
        "n_epochs": 50,
        "batch_size": 1,
        "lomo": lomo,
    }


def losses(bench: Bench, job_id: str) -> list[tuple[int, float]]:
    job = reads.get_job(bench.db, owner=Owner(ORGANIZATION), job_id=job_id)
    columns = series.read_metrics(bench.db, job, max_points=2000)
    return list(zip(columns["step"], columns["loss"], strict=True))


@pytest.mark.slow
def test_a_job_that_was_paused_ends_as_one_that_was_not(
    bench: Bench, values: dict[str, Any], wait_until: Any, in_background: Any
) -> None:
    node = bench.node(engine_command=(sys.executable, "-m", "lomo_core"), engine_threads=1)
    give_calibration(node.settings)
    whole = bench.work_until_ended(node, bench.submit_spec(values), timeout_s=90)
    assert whole.status == "succeeded", bench.messages(whole.id)

    job_id = bench.submit_spec(values)
    thread = in_background(node.work)
    wait_until(lambda: bench.job(job_id).step >= 3, 60, "the first steps")
    bench.pause(job_id)
    thread.join(60)
    paused = bench.job(job_id)
    assert paused.status == "paused", bench.messages(job_id)
    assert 3 <= paused.step < 150
    [checkpoint] = reads.list_checkpoints(bench.db, owner=Owner(ORGANIZATION), job_id=job_id, limit=9).items
    assert checkpoint.step == paused.step
    folder = bench.settings.data_dir / checkpoint.path
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}

    # It is a model that another job can start from.
    name = checkpoint_name(JobSpec.model_validate(values), job_id=job_id, step=checkpoint.step)
    lomo = {**values["lomo"], "max_steps": 2}
    other = bench.work_until_ended(node, bench.submit_spec({**values, "model": name, "lomo": lomo}), timeout_s=90)
    assert (other.status, other.step) == ("succeeded", 2), bench.messages(other.id)

    bench.resume(job_id)
    resumed = bench.work_until_ended(node, job_id, timeout_s=90)
    assert (resumed.status, resumed.attempt) == ("succeeded", 2)
    assert resumed.weights_sha256 == whole.weights_sha256
    assert losses(bench, job_id) == losses(bench, whole.id)
    assert len(losses(bench, job_id)) == 150

"""Weights & Biases and MLflow, the real libraries, told of a job's figures; and what becomes of a job without them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from worker.tracked import Point
from worker.tracker_process import TrackerProcess

FINISH = [["steps", 3], ["finish"]]
WANDB = {"type": "wandb", "wandb": {"project": "tunes", "name": "first", "entity": "team", "tags": ["a", "b"]}}
pytestmark = pytest.mark.slow  # importing either library takes seconds


def warnings(bench: Any, job_id: str) -> list[str]:
    return [event.message for event in bench.events(job_id) if event.level == "warn"]


def wandb_records(path: Path) -> list[Any]:
    store, records = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        records.append(wandb_internal_pb2.Record.FromString(data))
    store.close()
    return records


def test_wandb_offline_leaves_a_run_that_can_be_synced(bench: Any) -> None:
    job_id = bench.submit(FINISH, integrations=[WANDB])
    bench.node().work()
    assert bench.job(job_id).status == "succeeded", bench.messages(job_id)
    assert warnings(bench, job_id) == []
    [path] = bench.folder(job_id).glob(f"wandb/offline-run-*-{job_id}/run-{job_id}.wandb")
    records = wandb_records(path)
    [run] = [record.run for record in records if record.HasField("run")][:1]
    assert (run.project, run.display_name, run.entity, list(run.tags)) == ("tunes", "first", "team", ["a", "b"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["job_id"], config["seed"], config["lomo"]["optimizer"]) == (job_id, 1, "lomo")
    rows = [history_row(record) for record in records if record.HasField("history")]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert rows[0]["memory/peak_bytes"] == 135
    assert any(record.HasField("exit") for record in records)


def test_each_attempt_is_a_run_and_the_jobs_are_a_group(bench: Any) -> None:
    nameless = {"type": "wandb", "wandb": {"project": "tunes"}}
    first = [["steps", 2], ["die", signal.SIGKILL]]
    job_id = bench.submit(first, FINISH, integrations=[nameless])
    assert bench.work_until_ended(bench.node(), job_id).status == "succeeded"
    runs = []
    for path in bench.folder(job_id).glob("wandb/offline-run-*/*.wandb"):
        records = wandb_records(path)
        run = next(record.run for record in records if record.HasField("run"))
        steps = [history_row(record)["step"] for record in records if record.HasField("history")]
        runs.append((run.run_id, run.display_name, run.run_group, steps))
    second = f"{job_id}-2"
    assert sorted(runs) == [(job_id, job_id, job_id, [1, 2]), (second, second, job_id, [1, 2, 3])]


def history_row(record: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


def test_wandb_without_its_key_costs_a_warning(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Nobody listens there.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    job_id = bench.submit(FINISH, integrations=[WANDB])
    bench.node(wandb_mode="online").work()
    assert bench.job(job_id).status == "succeeded"
    [warning] = warnings(bench, job_id)
    assert warning.startswith("Weights & Biases does not have all of the run's figures: ")
    assert "api" in warning.lower()


@pytest.mark.parametrize("case", ["off", "not installed"])
def test_a_worker_without_wandb_says_so(bench: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    if case == "not installed":
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    job_id = bench.submit(FINISH, integrations=[WANDB])
    bench.node(wandb_mode="off" if case == "off" else "offline").work()
    assert bench.job(job_id).status == "succeeded"
    [warning] = warnings(bench, job_id)
    assert ("LOMO_WANDB_MODE" if case == "off" else "pip install 'lomo-server[wandb]'") in warning
    assert not (bench.folder(job_id) / "wandb").exists()


def test_mlflow_gets_every_jobs_parameters_and_metrics(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlflow").as_uri()
    job_id = bench.submit(FINISH)
    bench.node(mlflow_tracking_uri=uri, mlflow_experiment="tunes").work()
    assert bench.job(job_id).status == "succeeded", bench.messages(job_id)
    assert warnings(bench, job_id) == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tunes")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["lomo.job_id"]) == (job_id, "FINISHED", job_id)
    assert (run.data.params["seed"], run.data.params["lomo.optimizer"]) == ("1", "lomo")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_an_mlflow_that_cannot_be_used_costs_a_warning(bench: Any) -> None:
    job_id = bench.submit(FINISH)
    bench.node(mlflow_tracking_uri="nonsense://nowhere").work()
    assert bench.job(job_id).status == "succeeded"
    [warning] = warnings(bench, job_id)
    assert warning.startswith("MLflow does not have all of the run's figures: ")


def test_a_tool_that_takes_nothing_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process reads from the pipe only what a kernel's buffer holds; the queue fills and figures are dropped."""
    monkeypatch.setattr("worker.tracker_process._COMMAND", ("/bin/sh", "-c", "exec tail -f /dev/null"))
    monkeypatch.setattr("worker.tracker_process._MAX_WAITING", 10)
    process = TrackerProcess("Deaf", {}, log_path=tmp_path / "deaf.log")
    point = Point(step=1, time_s=1.0, values={f"figure-{number}": 1.0 for number in range(100)})
    process.tell([point] * 1000)
    stopping = threading.Event()
    stopping.set()
    assert process.end(stopping) == ["Deaf did not take all of the run's figures in time: it lacks the last ones."]
    process._feeder.join(10)
    assert not process._feeder.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(process._process.pid, 0)

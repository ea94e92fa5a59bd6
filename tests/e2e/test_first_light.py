"""The whole service as a user meets it: `Stack` with real Postgres, Valkey, server, Celery worker and engine.

Every client is unmodified: the official `openai` package, curl, and the `lomo` command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from openai import BadRequestError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from local.stack import Stack
from tests.conftest import wait_until_true
from tests.support.tiny_model import chat_rows, choice_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.slow

JOB_TIMEOUT_S = 120.0  # 10 s on an idle machine, most of it the engine's imports
TERMINAL = {"succeeded", "failed", "cancelled"}
# With this, 100 thousand random parameters learn the four answers (loss 6.3 to 0.2 in 96 steps).
LEARNING = {"learning_rate": 0.1, "clip": {"mode": "group", "threshold": 1.0}, "precision": "fp32"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The service with a tiny model under the name `tiny`. Costs some 5 s to start and stop."""
    folder = tmp_path_factory.mktemp("lomo")
    with Stack(folder) as running:
        make_tiny_model(folder / "models" / "tiny")
        yield running


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key=stack.admin_key, max_retries=0) as opened:
        yield opened


def upload(client: OpenAI, path: Path) -> str:
    with path.open("rb") as file:
        return client.files.create(file=file, purpose="fine-tune").id


def finish(client: OpenAI, job_id: str) -> FineTuningJob:
    def ended() -> FineTuningJob | None:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in TERMINAL else None

    job = wait_until_true(ended, JOB_TIMEOUT_S, f"the end of {job_id}")
    assert job is not None
    return job


def lomo_command(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "LOMO_URL": stack.url,
        "LOMO_API_KEY_FILE": str(stack.admin_key_path),
    }
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        capture_output=True, text=True, env=environment, timeout=JOB_TIMEOUT_S, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(stack: Stack, client: OpenAI, tmp_path_factory: pytest.TempPathFactory) -> FineTuningJob:
    """One job from upload to success, with the official client."""
    folder = tmp_path_factory.mktemp("data")
    training_file = upload(client, write_jsonl(folder / "train.jsonl", chat_rows(64)))
    validation_file = upload(client, write_jsonl(folder / "held_back.jsonl", choice_rows(16)))
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        validation_file=validation_file,
        suffix="first-light",
        seed=7,
        metadata={"purpose": "test"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 16, "batch_size": 8}}},
        extra_body={"lomo": {**LEARNING, "checkpoint_every_steps": 50}},
    )
    assert job.status in {"validating_files", "queued", "running"}
    return finish(client, job.id)


def test_the_official_client_sees_a_job_through(client: OpenAI, tuned: FineTuningJob) -> None:
    assert tuned.status == "succeeded", tuned.error
    assert tuned.fine_tuned_model is not None
    assert tuned.fine_tuned_model.startswith("ft:tiny::first-light:")
    assert tuned.trained_tokens
    assert tuned.metadata == {"purpose": "test"}
    events = list(client.fine_tuning.jobs.list_events(tuned.id, limit=50))  # several pages
    seqs = [event.model_extra["seq"] for event in events if event.model_extra]
    assert seqs == list(range(len(seqs), 0, -1)), "newest first, without a gap"
    losses = [event.data["train_loss"] for event in reversed(events) if event.data and "train_loss" in event.data]  # type: ignore[index]
    assert len(losses) == 128
    assert sum(losses[-4:]) < 0.2 * sum(losses[:4]), "the model did not learn"
    checkpoints = client.fine_tuning.jobs.checkpoints.list(tuned.id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [100, 50]
    assert tuned.fine_tuned_model in [model.id for model in client.models.list()]
    lomo = (tuned.model_extra or {})["lomo"]
    before, after = lomo["evaluations"][0], lomo["evaluations"][-1]
    assert after["choice_accuracy"] > before["choice_accuracy"]


def test_memory_is_measured_by_category(tuned: FineTuningJob) -> None:
    lomo = (tuned.model_extra or {})["lomo"]
    measured = lomo["memory"]["measured"]
    assert measured["parameters_bytes"] == 4 * lomo["num_parameters"]
    assert 0 < measured["gradients_bytes"] < measured["parameters_bytes"]
    assert measured["optimizer_bytes"] == 0
    assert measured["activations_bytes"] > 0
    assert measured["peak_bytes"] == lomo["memory"]["measured_peak_bytes"] > measured["parameters_bytes"]


def test_memory_was_planned_and_the_plan_is_judged(client: OpenAI, tuned: FineTuningJob) -> None:
    memory = (tuned.model_extra or {})["lomo"]["memory"]
    planned, measured = memory["planned"], memory["measured"]
    for name in ("parameters", "optimizer"):
        assert planned[f"{name}_bytes"] == measured[f"{name}_bytes"]
    assert memory["planned_peak_bytes"] == planned["peak_bytes"]
    # The process as a whole; `make bench-memory` holds 20 settings against 10 %.
    assert 0.85 < planned["peak_bytes"] / measured["peak_bytes"] < 1.15
    messages = [event.message for event in client.fine_tuning.jobs.list_events(tuned.id, limit=50)]
    assert sum(message.startswith("Memory: planned ") for message in messages) == 1
    assert any("Planned memory: " in message for message in messages)


def test_a_batch_that_cannot_fit_is_refused_and_auto_runs_it(stack: Stack, client: OpenAI, tmp_path: Path) -> None:
    """The same tiny weights with positions for 16384 tokens: 256 such rows need a mask of 64 GiB alone."""
    folder = make_tiny_model(stack.data_dir / "models" / "tiny-long")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}), encoding="utf-8")
    file_id = upload(client, write_jsonl(tmp_path / "train.jsonl", chat_rows(8)))

    def create(batch_size: int | Literal["auto"], checkpointing: bool | Literal["auto"]) -> FineTuningJob:
        options = {**LEARNING, "max_seq_length": 16384, "activation_checkpointing": checkpointing}
        return client.fine_tuning.jobs.create(
            model="tiny-long",
            training_file=file_id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": batch_size}}},
            extra_body={"lomo": options},
        )

    with pytest.raises(BadRequestError) as refused:
        create(256, False)
    error = refused.value.body
    assert isinstance(error, dict)
    assert (error["code"], error["param"]) == ("wont_fit", None)
    assert "The nearest setting that fits: " in error["message"]
    assert error["plan"]["peak_bytes"] > error["host"]["available_bytes"]
    assert error["nearest"]["peak_bytes"] <= error["host"]["available_bytes"]
    job = finish(client, create("auto", "auto").id)
    assert job.status == "succeeded", job.error
    lomo = (job.model_extra or {})["lomo"]
    assert lomo["auto"] == ["batch_size", "activation_checkpointing"]
    assert job.hyperparameters.batch_size in (1, 2, 4)


def test_plain_transformers_loads_the_result(tuned: FineTuningJob) -> None:
    model_path = (tuned.model_extra or {})["lomo"]["model_path"]
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; path = sys.argv[1]\n"
        "tokenizer = AutoTokenizer.from_pretrained(path); model = AutoModelForCausalLM.from_pretrained(path)\n"
        "chat = [{'role': 'user', 'content': 'what goes with moon?'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=8, do_sample=False)\n"
        "print(tokenizer.decode(out[0, ids['input_ids'].shape[1]:], skip_special_tokens=True))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, model_path],
        capture_output=True, text=True, env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-1000:]
    assert result.stdout.strip() == "night"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_follows_the_stream_to_done(stack: Stack, tuned: FineTuningJob) -> None:
    url = f"{stack.url}/v1/fine_tuning/jobs/{tuned.id}/events?stream=true"
    command = ["curl", "-sS", "-N", "-m", "30", "-H", f"Authorization: Bearer {stack.admin_key}", url]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("data: [DONE]")
    ids = [int(line.removeprefix("id: ")) for line in result.stdout.splitlines() if line.startswith("id: ")]
    assert ids == list(range(1, len(ids) + 1))
    resumed = subprocess.run(
        [*command, "-H", f"Last-Event-ID: {len(ids) - 2}"], capture_output=True, text=True, check=True
    )
    assert [line for line in resumed.stdout.splitlines() if line.startswith("id: ")] == [
        f"id: {len(ids) - 1}",
        f"id: {len(ids)}",
    ]


def test_the_command_line_trains_from_a_tuned_model(stack: Stack, tuned: FineTuningJob, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "more.jsonl", chat_rows(16))
    result = lomo_command(
        stack, "jobs", "create", "--model", str(tuned.fine_tuned_model), "--training-file", str(path),
        "--optimizer", "adalomo", "--max-steps", "2", "--follow", "-o", "json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    job = json.loads(result.stdout)
    assert job["status"] == "succeeded"
    assert job["lomo"]["memory"]["measured"]["optimizer_bytes"] > 0
    assert "Step 2/2" in result.stderr or "2/2" in result.stderr


def test_a_bad_row_ends_the_job_with_its_line(stack: Stack, tmp_path: Path) -> None:
    rows = chat_rows(3)
    rows[1] = {"messages": [{"role": "user", "content": "no answer to this"}]}
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    result = lomo_command(stack, "jobs", "create", "--model", "tiny", "--training-file", str(path), "--follow")
    assert result.returncode == 1
    assert "line 2" in result.stderr.lower()
    assert "Traceback" not in result.stderr


def test_a_running_job_is_cancelled(client: OpenAI, tmp_path: Path) -> None:
    training_file = upload(client, write_jsonl(tmp_path / "train.jsonl", chat_rows(64)))
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        hyperparameters={"n_epochs": 50, "batch_size": 1},
        extra_body={"lomo": LEARNING},
    )

    def trains() -> bool:
        found = client.fine_tuning.jobs.retrieve(job.id)
        assert found.status in {"validating_files", "queued", "running"}, found.error
        return bool((found.model_extra or {})["lomo"]["step"])

    wait_until_true(trains, JOB_TIMEOUT_S, "the first step")
    client.fine_tuning.jobs.cancel(job.id)
    assert finish(client, job.id).status == "cancelled"

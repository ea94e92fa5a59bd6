"""Three generations of the official client, each in an environment of its own, over every endpoint it knows."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from openai import OpenAI

from tests.conftest import wait_until_true

from .conftest import Service
from .journey import LEGS

pytestmark = pytest.mark.slow

VERSIONS = ("1.109.1", "2.8.0", "3.54.0")
JOURNEY_TIMEOUT_S = 400.0  # 30 s on an idle machine
JOURNEY = Path(__file__).with_name("journey.py")
SYNC = Path(__file__).with_name("sync_wandb.py")


def run(command: list[str], environment: dict[str, str]) -> str:
    """What a program prints. Fails with all of it where the program does."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=JOURNEY_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_every_endpoint(service: Service, environment_with: Callable[..., Path], version: str) -> None:
    programs = environment_with(f"openai-{version}", f"openai=={version}")
    runs = service.stack.data_dir / "runs"
    before = set(runs.glob("*/wandb/offline-run-*/*.wandb"))
    lines = run([str(programs / "python"), str(JOURNEY), str(service.data)], service.environment()).splitlines()
    assert lines[:-1] == list(LEGS)
    assert json.loads(lines[-1])["version"] == version
    # What the job with `integrations` has left behind, to be sent with `wandb sync`.
    assert len(set(runs.glob("*/wandb/offline-run-*/*.wandb")) - before) == 1


@pytest.mark.parametrize("version", ["1.109.1", "2.8.0"])
def test_the_command_of_older_clients(service: Service, environment_with: Callable[..., Path], version: str) -> None:
    """`openai api ...`, which 3.x has no more."""
    openai = str(environment_with(f"openai-{version}", f"openai=={version}") / "openai")
    train = str(service.data / "train.jsonl")
    environment = service.environment()
    file = json.loads(run([openai, "api", "files.create", "-f", train, "-p", "fine-tune"], environment))
    given = ["-m", "tiny", "-F", file["id"], "-H", '{"n_epochs": 1}', "-s", "old"]
    created = run([openai, "api", "fine_tuning.jobs.create", *given], environment)
    job = json.loads(created)
    assert (job["object"], job["hyperparameters"]["n_epochs"]) == ("fine_tuning.job", 1)

    def succeeded() -> bool:
        retrieved = json.loads(run([openai, "api", "fine_tuning.jobs.retrieve", "-i", job["id"]], environment))
        assert retrieved["status"] not in {"failed", "cancelled"}, retrieved["error"]
        return bool(retrieved["status"] == "succeeded")

    wait_until_true(succeeded, 120.0, "the end of the job")
    listed = run([openai, "api", "fine_tuning.jobs.list"], environment)
    assert job["id"] in listed
    events = run([openai, "api", "fine_tuning.jobs.list_events", "-i", job["id"]], environment)
    assert "The job has successfully completed" in events


def test_wandb_reads_a_finished_job(service: Service, environment_with: Callable[..., Path], tmp_path: Path) -> None:
    """`WandbLogger.sync`, unmodified, into a folder: the figures of every step are in the run that it writes."""
    job_id = _finished_job(service, environment_with)
    # The last version whose log-in does not ask W&B's server first, where a key is given.
    programs = environment_with("wandb", "wandb==0.22.3", "openai==2.8.0", "pandas>=2,<4")
    folder = tmp_path / "wandb"
    folder.mkdir()
    nobody = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    printed = run(
        [str(programs / "python"), str(SYNC), job_id],
        service.environment(WANDB_DIR=str(folder), WANDB_SILENT="true", **nobody),
    )
    logged = json.loads(printed.splitlines()[-1])
    trained = [row for row in logged["history"] if "train_loss" in row]
    assert [row["_step"] for row in trained] == list(range(1, len(trained) + 1))
    assert len(trained) == 32
    assert trained[-1]["train_loss"] < trained[0]["train_loss"]
    assert logged["summary"]["fine_tuned_model"].startswith("ft:tiny::journey:")
    assert logged["summary"]["status"] == "succeeded"


def _finished_job(service: Service, environment_with: Callable[..., Path]) -> str:
    """A job that a journey has left; where none has been yet, one is made."""
    with OpenAI(base_url=f"{service.stack.url}/v1", api_key=service.stack.admin_key) as client:
        for job in client.fine_tuning.jobs.list():
            if (job.fine_tuned_model or "").startswith("ft:tiny::journey:"):
                return job.id
    programs = environment_with(f"openai-{VERSIONS[-1]}", f"openai=={VERSIONS[-1]}")
    lines = run([str(programs / "python"), str(JOURNEY), str(service.data)], service.environment()).splitlines()
    return str(json.loads(lines[-1])["job"])

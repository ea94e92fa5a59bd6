"""The command against the real server; the runs are told to it as a worker tells them, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import main
from jobs import host_registry, keys, lifecycle
from jobs.db import Database
from jobs.file_check import MAX_LINE_BYTES
from jobs.host_registry import HostReport
from lomo_core import events as engine
from server.settings import ServerSettings

from ...conftest import KnownShapes, WaitUntil
from ..server.conftest import (
    HOST,
    LEASE_S,
    MODEL,
    MODEL_CONFIG,
    TRAIN_ROW,
    Run,
    RunningServer,
    make_model,
    register_host,
)

ROOT = Path(__file__).parents[3]
DEADLINE_S = 30


@dataclass
class Background:
    """A command that runs beside the test; its output goes to files."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)


class Place:
    """A server that can be restarted, and the command set up for it."""

    def __init__(self, settings: ServerSettings, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.db = Database(settings.database_url)
        self.folder = folder
        self.running = RunningServer.start(settings)
        self._settings = settings.model_copy(update={"server_port": self.running.port})
        self._capsys = capsys
        self.key_file = folder / "key"
        self.key_file.write_text(keys.create_key(self.db, name="test") + "\n", encoding="ascii")
        self.env = {"LOMO_URL": f"http://127.0.0.1:{self.running.port}", "LOMO_API_KEY_FILE": str(self.key_file)}

    def restart(self) -> None:
        """Bring the server back on its port."""
        self.running = RunningServer.start(self._settings)

    def lomo(self, *arguments: str) -> tuple[int, str, str]:
        """Run the command in this process. Returns its exit code, stdout and stderr."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        return int(exit_info.value.code or 0), *self._capsys.readouterr()

    def data(self, *arguments: str) -> dict:
        """Run the command, which must succeed, and decode its JSON."""
        code, out, err = self.lomo(*arguments, "-o", "json")
        assert code == 0, err
        return json.loads(out)

    def background(self, *arguments: str) -> Background:
        """Start the command in a process of its own."""
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", *arguments],
                cwd=ROOT,
                env={**os.environ, **self.env},
                stdout=out,
                stderr=err,
            )
        return Background(process, self.folder)

    def write(self, content: bytes = TRAIN_ROW, name: str = "train.jsonl") -> str:
        """A file to upload."""
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def claim(self) -> Run | None:
        """Take the queued job, if there is one by now, as a host with room for it."""
        register_host(self.db, HOST, available_bytes=2**36)
        claim = lifecycle.claim(self.db, owner=f"{HOST}/1", lease_s=LEASE_S)
        return claim and Run(self.db, claim)


@pytest.fixture
def place(
    database_url: str,
    broker_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    known_shapes: KnownShapes,
) -> Iterator[Place]:
    """A server with one base model. Costs about 0.2 s."""
    make_model(tmp_path / "data" / "models" / MODEL)
    known_shapes.give(tmp_path / "data", MODEL_CONFIG)
    settings = ServerSettings(
        data_checks=False, database_url=database_url, broker_url=broker_url, data_dir=tmp_path / "data", server_port=0
    )
    place = Place(settings, capsys, tmp_path)
    for name in ("LOMO_API_KEY", "LOMO_PROJECT", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    yield place
    place.running.stop()
    place.db.dispose()


def create(place: Place, *arguments: str) -> str:
    """Create a job from a file. Returns its id."""
    code, out, err = place.lomo("jobs", "create", "--model", MODEL, "--training-file", place.write(), *arguments)
    assert code == 0, err
    return out.strip()


def test_a_job_from_its_file_to_its_model_with_a_restart_between(place: Place, wait_until: WaitUntil) -> None:
    following = place.background(
        *("jobs", "create", "--model", MODEL, "--training-file", place.write(), "--suffix", "docs", "--follow")
    )
    run = wait_until(place.claim, DEADLINE_S, "the job to be queued")
    run.start(total_steps=4)
    run.step(1, total_steps=4)
    wait_until(lambda: "step 1/4" in following.err, DEADLINE_S, "the first step to be shown")

    place.running.stop()
    run.step(2, total_steps=4)
    run.message("said while the server was away")
    wait_until(lambda: "trying again" in following.err, DEADLINE_S, "the loss of the server to be told")
    place.restart()
    wait_until(lambda: "said while" in following.err, DEADLINE_S, "the stream to go on")

    run.step(3, 4, total_steps=4)
    name = run.succeed()
    assert following.wait() == 0
    assert following.out == f"{run.job_id}\n"
    assert f"Succeeded. The tuned model: {name}" in following.err
    assert "step 4/4" in following.err
    assert following.err.count("said while the server was away") == 1
    assert following.err.count("Queued.") == 1

    assert place.lomo("jobs", "follow", run.job_id)[:2] == (0, f"{name}\n")
    assert name in place.lomo("models", "list")[1]
    assert place.data("models", "get", name)["id"] == name


def test_a_failed_job_is_exit_code_1_with_its_reason(place: Place) -> None:
    job_id = create(place)
    run = place.claim()
    run.start()
    run.fail("The loss is not finite.")
    code, out, err = place.lomo("jobs", "follow", job_id, "-o", "json")
    assert code == 1
    assert err.splitlines()[-1] == "The job failed: The loss is not finite."
    assert json.loads(out)["error"]["code"] == "diverged"


def test_cancel_while_following(place: Place, wait_until: WaitUntil) -> None:
    job_id = create(place)
    run = place.claim()
    following = place.background("jobs", "follow", job_id)
    wait_until(lambda: "started on" in following.err, DEADLINE_S, "the start to be shown")
    assert place.lomo("jobs", "cancel", job_id) == (0, f"{job_id}\n", "Its worker has been asked to stop.\n")
    assert "(cancel requested)" in place.lomo("jobs", "get", job_id)[1]
    lifecycle.cancelled(place.db, run.claim.lease)
    assert following.wait() == 1
    assert following.out == ""
    assert following.err.splitlines()[-1] == "The job was cancelled."
    code, _, err = place.lomo("jobs", "cancel", job_id)
    assert code == 1
    assert "has already been cancelled" in err


def test_a_queued_job_is_cancelled_at_once(place: Place) -> None:
    job_id = create(place)
    assert place.lomo("jobs", "cancel", job_id)[2] == "Cancelled.\n"


def test_every_engine_option_is_taken_by_the_server(place: Place) -> None:
    # fmt: off
    job_id = create(
        place, "--seed", "7", "--suffix", "docs", "--n-epochs", "2", "--batch-size", "3",
        "--learning-rate-multiplier", "0.5", "--metadata", "team=nlp", "--optimizer", "adalomo",
        "--learning-rate", "0.001", "--schedule", "cosine", "--warmup-ratio", "0.1", "--weight-decay", "0.01",
        "--clip-mode", "value", "--clip-threshold", "0.5", "--precision", "fp32", "--rounding", "nearest",
        "--no-activation-checkpointing", "--max-seq-length", "64", "--no-packing", "--train-on", "all",
        "--devices", "1", "--nodes", "1", "--offload", "none", "--checkpoint-every-steps", "5",
        "--keep-checkpoints", "3", "--eval-every-steps", "4", "--max-steps", "9", "--priority", "1",
            "--clip-exact", "auto", "--frozen", "*.embed*", "--frozen", "*norm*", "--sample-prompts", "Why?",
            "--sample-max-new-tokens", "5", "--no-keep-best", "--final-model", "last",
            "--lomo", 'param_groups=[{"pattern": "*.bias", "weight_decay": 0.5}]',
    )
    # fmt: on
    job = place.data("jobs", "get", job_id)
    assert (job["seed"], job["user_provided_suffix"], job["metadata"]) == (7, "docs", {"team": "nlp"})
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 0.5}
    assert job["lomo"].items() >= {
        "optimizer": "adalomo", "learning_rate": 0.001, "schedule": "cosine", "warmup_ratio": 0.1,
        "weight_decay": 0.01, "clip": {"mode": "value", "threshold": 0.5, "exact": "auto"},
        "precision": "fp32", "rounding": "nearest",
        "frozen": ["*.embed*", "*norm*"], "sample_prompts": ["Why?"], "sample_max_new_tokens": 5, "final_model": "last",
        "param_groups": [{"pattern": "*.bias", "learning_rate_scale": 1.0, "weight_decay": 0.5}], "keep_best": False,
        "activation_checkpointing": False, "max_seq_length": 64, "packing": False, "train_on": "all", "devices": 1,
        "nodes": 1, "offload": "none", "checkpoint_every_steps": 5, "keep_checkpoints": 3, "eval_every_steps": 4,
        "max_steps": 9, "priority": 1,
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--lomo", "learning_rat=1"], "learning_rat"),
        (["--optimizer", "adam"], "lomo"),
        (["--model", "none"], "none"),
        (["--training-file", "file-000000000000000000000000"], "file-000000000000000000000000"),
        (["--suffix", ""], "suffix"),
    ],
)
def test_a_refusal_is_one_sentence(place: Place, arguments: list[str], part: str) -> None:
    code, out, err = place.lomo(
        *("jobs", "create", "--model", MODEL, "--training-file", place.write(), "--lomo", "max_steps=1", *arguments)
    )
    assert (code, out) == (1, "")
    error = err.splitlines()[-1]
    assert error.startswith("error: ")
    assert part in error


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (TRAIN_ROW + b"{", "Line 2 is not valid JSON"),
        (b"", "empty"),
        (b'{"text": "' + b"a" * (MAX_LINE_BYTES + 1) + b'"}', "longer than 4 MiB"),
    ],
)
def test_a_refused_file_names_its_line(place: Place, content: bytes, part: str) -> None:
    code, out, err = place.lomo("files", "upload", place.write(content))
    assert (code, out) == (1, "")
    assert part in err
    assert "[invalid_file_format]" in err


def test_files(place: Place) -> None:
    code, out, _ = place.lomo("files", "upload", place.write(name="data ä.jsonl"))
    file_id = out.strip()
    assert code == 0
    assert place.data("files", "get", file_id)["filename"] == "data ä.jsonl"
    assert "data ä.jsonl" in place.lomo("files", "list")[1]
    target = place.folder / "copy"
    assert place.lomo("files", "content", file_id, "--to", str(target))[0] == 0
    assert target.read_bytes() == TRAIN_ROW
    assert place.lomo("files", "delete", file_id)[:2] == (0, f"{file_id}\n")
    assert place.data("files", "list")["data"] == []
    assert place.lomo("files", "get", file_id)[0] == 1


def test_lists_go_beyond_a_page(place: Place) -> None:
    file_id = place.lomo("files", "upload", place.write())[1].strip()
    command = ("jobs", "create", "--model", MODEL, "--training-file", file_id)
    created = [place.lomo(*command)[1].strip() for _ in range(3)]
    assert [job["id"] for job in place.data("jobs", "list", "--limit", "2")["data"]] == created[:0:-1]
    run = place.claim()
    run.start(total_steps=250)
    run.step(*range(1, 251), total_steps=250)
    events = place.data("jobs", "events", run.job_id, "--limit", "230")["data"]
    assert [event["seq"] for event in events] == list(range(events[0]["seq"], events[0]["seq"] - 230, -1))
    lines = place.lomo("jobs", "events", run.job_id, "--limit", "2")[1].splitlines()
    assert [line.split()[2] for line in lines] == ["249/250:", "250/250:"]


def test_a_job_in_the_middle_of_its_run(place: Place) -> None:
    job_id = create(place)
    run = place.claim()
    run.start()
    run.say(engine.Evaluation(step=0, num_rows=9, choice_accuracy=0.36))
    run.step(*range(1, 11))
    run.say(engine.Checkpoint(step=10, path="x/y", manifest_sha256="00", num_bytes=5, train_loss=1.5))
    assert place.lomo("jobs", "list")[1].splitlines()[1].split()[:3] == [job_id, "running", "10/100"]
    shown = place.lomo("jobs", "get", job_id)[1]
    assert "step 0: choice accuracy 0.360" in shown
    assert place.lomo("jobs", "checkpoints", job_id)[1].splitlines()[1].split()[1:3] == ["10", "1.5"]
    metrics = place.lomo("jobs", "metrics", job_id, "--max-points", "5")[1].splitlines()
    assert 2 <= len(metrics) <= 6
    assert place.data("jobs", "metrics", job_id)["columns"]["step"] == list(range(1, 11))


def test_hosts_and_a_plan_held_against_them(place: Place) -> None:
    assert place.data("hosts") == {"object": "list", "data": []}
    report = HostReport(
        name="desk",
        incarnation="1",
        memory_bytes=64 << 30,
        available_bytes=16 << 30,
        device_kind="cuda",
        devices={"cpu": {"name": "AMD EPYC", "count": 8}, "gpus": [{"name": "NVIDIA L4"}]},
        slots=2,
    )
    host_registry.register_host(place.db, report)
    lines = place.lomo("hosts")[1].splitlines()
    assert lines[1].split()[:8] == ["desk", "NVIDIA", "L4", "16.0", "GiB", "16.0", "GiB", "0/2"]
    code, out, err = place.lomo("plan", "--model", MODEL, "--batch-size", "2", "--max-seq-length", "32")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["model", f"{MODEL}:"]
    assert "on desk" in lines[-1]
    assert "fits: needs" in lines[-1]
    assert "has 16.0 GiB" in lines[-1]


def test_what_the_plan_chose_is_told(place: Place) -> None:
    register_host(place.db, HOST, available_bytes=2**36)
    flags = ("--batch-size", "auto", "--activation-checkpointing", "auto", "--devices", "auto", "--offload", "auto")
    job_id = create(place, *flags)
    auto = ["batch_size", "activation_checkpointing", "devices", "offload"]
    assert place.data("jobs", "get", job_id)["lomo"]["auto"] == auto
    fields = dict(line.split("  ", maxsplit=1) for line in place.lomo("jobs", "get", job_id)[1].splitlines())
    assert fields["chosen by plan"].split(", ")[0].strip() == "batch_size=4"
    assert "activation_checkpointing=false" in fields["chosen by plan"]
    assert fields["planned peak"].strip().endswith("iB")


def test_a_job_that_no_host_can_hold_is_refused_with_its_table(place: Place) -> None:
    register_host(place.db, HOST, available_bytes=2**24)
    command = ("jobs", "create", "--model", MODEL, "--training-file", place.write(), "--batch-size", "64")
    code, out, err = place.lomo(*command)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("error: This run does not fit"))
    assert lines[start].endswith("[wont_fit]")
    assert [line.split()[0] for line in lines[start + 1 : start + 7]] == [
        *("parameters", "gradients", "optimizer", "activations", "other", "peak")
    ]
    assert lines[start + 7].startswith("The nearest setting that fits: batch_size")


def test_a_wrong_key(place: Place) -> None:
    place.key_file.write_text("sk-lomo-wrong", encoding="ascii")
    code, out, err = place.lomo("jobs", "list")
    assert (code, out) == (1, "")
    assert "--api-key-file" in err
    assert err.count("\n") == 1


def test_a_refusal_before_the_end_of_an_upload_is_heard(place: Place) -> None:
    """The server answers before it has read everything; what counts is its answer, not that sending failed."""
    path = place.write(b"")
    os.truncate(path, 64 << 20)
    place.key_file.write_text("sk-lomo-wrong", encoding="ascii")
    code, out, err = place.lomo("files", "upload", path)
    assert (code, out) == (1, "")
    assert "This API key is not valid" in err


def test_health_tells_what_is_missing(place: Place) -> None:
    code, out, _ = place.lomo("health")
    fields = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 1, "there is no worker"
    assert fields["ready"] == "no"
    assert {"database", "worker"} <= fields.keys()

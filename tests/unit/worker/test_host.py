"""What a host says of itself, what stays of its attempts, and its settings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from worker.gpus import Gpu, describe_devices, find_gpus, host_memory_bytes, parse_gpus
from worker.retention import attempt_folder, prune_superseded
from worker.settings import WorkerSettings


def test_cards_are_read_from_the_drivers_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA GB10, [N/A]'\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_gpus() == [Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20), Gpu("NVIDIA GB10", 0)]
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n", encoding="ascii")
    assert find_gpus() == []
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == []


def test_nothing_of_a_driver_is_no_card() -> None:
    assert parse_gpus("") == []


def test_a_host_has_memory_and_processors() -> None:
    assert host_memory_bytes() > 2**26
    cpu = describe_devices()["cpu"]
    assert cpu["count"] >= 1
    assert cpu["name"]


def test_weights_of_superseded_attempts_go_and_their_stories_stay(tmp_path: Path) -> None:
    folders = [attempt_folder(tmp_path, job_id="j", attempt=number) for number in (1, 2, 3, 10)]
    for folder in folders:
        for name in (
            *("checkpoints/step-1", "checkpoints/.tmp-step-2-x", "checkpoints/step-3"),
            *("model", ".tmp-model-1", "best"),
        ):
            (folder / name).mkdir(parents=True)
        (folder / "journal.jsonl").touch()
    prune_superseded(tmp_path / "j", attempt=3, published={folders[1] / "model", folders[1] / "checkpoints" / "step-3"})
    left = [
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != "checkpoints")
        for folder in folders
    ]
    everything = [
        ".tmp-model-1",
        "best",
        "checkpoints/.tmp-step-2-x",
        "checkpoints/step-1",
        "checkpoints/step-3",
        "journal.jsonl",
        "model",
    ]
    kept = ["best", "checkpoints/step-3", "journal.jsonl", "model"]
    assert left == [["journal.jsonl"], kept, everything, everything]


def make_settings(**changes: object) -> WorkerSettings:
    return WorkerSettings.model_validate({"database_url": "d", "broker_url": "b", "data_dir": "/d", **changes})


def test_settings_have_defaults_of_this_host() -> None:
    settings = make_settings()
    assert settings.worker_name
    assert settings.engine_command == (sys.executable, "-m", "lomo_core")
    assert make_settings(engine_command="nice -n 5 'my python' -m lomo_core").engine_command[2:4] == ("5", "my python")


@pytest.mark.parametrize(
    "change",
    [
        {"worker_name": "a/b"},
        {"worker_name": ""},
        {"slots": 0},
        {"ship_every_s": 0},
        {"heartbeat_s": 21, "lease_s": 60},
    ],
)
def test_a_wrong_setting_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_settings(**change)

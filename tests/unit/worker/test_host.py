"""What a host says of itself, what stays of its attempts, and its settings."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from worker import gpus
from worker.gpus import (
    Gpu,
    describe_devices,
    find_gpus,
    first_visible,
    host_available_bytes,
    host_memory_bytes,
    measure_device,
    parse_gpus,
)
from worker.retention import attempt_folder, prune_superseded
from worker.settings import WorkerSettings

H100 = Gpu(0, "GPU-5a2f", "NVIDIA H100 80GB HBM3", 81559 * 2**20, 81079 * 2**20)
L4 = Gpu(1, "GPU-77c0", "NVIDIA L4", 23034 * 2**20, 100 * 2**20)
UNIFIED = Gpu(2, "GPU-91be", "NVIDIA GB10", 0, 0)


def test_cards_are_read_from_the_drivers_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --query-gpu=index,uuid,memory.total,memory.free,name ] || exit 2\n'
        "echo '0, GPU-5a2f, 81559, 81079, NVIDIA H100 80GB HBM3'\n"
        "echo '1, GPU-77c0, 23034, 100, NVIDIA L4'\n"
        "echo '2, GPU-91be, [N/A], [N/A], NVIDIA GB10'\n",
        encoding="ascii",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_gpus() == [H100, L4, UNIFIED]
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n", encoding="ascii")
    assert find_gpus() == []
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == []


def test_nothing_of_a_driver_is_no_card() -> None:
    assert parse_gpus("") == []
    assert parse_gpus("No devices were found\n") == []
    assert parse_gpus("3, GPU-1, [Insufficient Permissions], [N/A], A, of B\n") == [Gpu(3, "GPU-1", "A, of B", 0, 0)]


@pytest.mark.parametrize(
    ("visible", "gpu"),
    [
        (None, H100),
        ("1,0", L4),
        ("GPU-77", L4),
        ("MIG-8c1f", H100),
        ("", None),
        ("-1", None),
        ("7", None),
    ],
)
def test_the_engines_card_is_the_first_that_it_sees(
    visible: str | None, gpu: Gpu | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_visible([H100, L4], visible) == gpu
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = measure_device([H100, L4])
    assert device.kind == ("cpu" if gpu is None else "cuda")
    assert gpu is None or device.available_bytes == gpu.free_bytes


def test_a_card_without_memory_of_its_own_has_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device = measure_device([UNIFIED])
    assert device.kind == "cuda"
    assert device.available_bytes > 2**26
    assert measure_device([]).kind == "cpu"
    assert first_visible([], None) is None


def test_a_host_has_memory_and_processors() -> None:
    assert 2**26 < host_available_bytes() <= host_memory_bytes()
    cpu = describe_devices([])["cpu"]
    assert cpu["count"] >= 1
    assert cpu["name"]
    assert describe_devices([L4])["gpus"] == [
        {
            "index": 1,
            "uuid": "GPU-77c0",
            "name": "NVIDIA L4",
            "memory_bytes": 23034 * 2**20,
            "free_bytes": 100 * 2**20,
        }
    ]


V2 = {
    "memory.max": "67108864\n",
    "memory.current": "50331648\n",
    "memory.stat": "anon 1\nfile 9\nactive_file 4\ninactive_file 16777216\n",
}
V1 = {
    "memory.limit_in_bytes": "67108864\n",
    "memory.usage_in_bytes": "50331648\n",
    "memory.stat": "cache 9\ninactive_file 1\ntotal_inactive_file 16777216\n",
}


@pytest.mark.parametrize(
    ("folder", "files", "limit_mib", "left_mib"),
    [
        (".", V2, 64, 32),
        ("memory", V1, 64, 32),
        # What stays when files are dropped is above the limit: the kernel is about to kill.
        (".", {**V2, "memory.current": "134217728"}, 64, 0),
        ("memory", {name: text for name, text in V1.items() if name != "memory.stat"}, 64, 16),
        (".", {"memory.max": "67108864"}, 64, 64),
        # More files are inactive than are charged (the two are read one after the other).
        (".", {**V2, "memory.current": "1"}, 64, 64),
    ],
)
def test_a_containers_limit_and_what_it_has_used_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, files: dict[str, str], limit_mib: int, left_mib: int
) -> None:
    write_cgroup(tmp_path, folder, files, monkeypatch)
    assert host_memory_bytes() == limit_mib * 2**20
    assert host_available_bytes() == left_mib * 2**20


@pytest.mark.parametrize("files", [{}, {**V2, "memory.max": "max\n"}])
def test_without_a_limit_the_machine_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    write_cgroup(tmp_path, ".", files, monkeypatch)
    assert host_memory_bytes() == psutil.virtual_memory().total
    assert host_available_bytes() > 2**26


def write_cgroup(root: Path, folder: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out a control group's files, where this process looks for its own."""
    (root / folder).mkdir(exist_ok=True)
    for name, text in files.items():
        (root / folder / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(gpus, "_CGROUP_V2", root)
    monkeypatch.setattr(gpus, "_CGROUP_V1", root / "memory")


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

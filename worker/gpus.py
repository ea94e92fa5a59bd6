"""What a host has: memory, processors, graphics cards. Asked of the system and of `nvidia-smi`, never of torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import structlog

from worker.engine_process import engine_environment

# Where a container's limit and its present usage stand, by version of the control groups (kernel documentation,
# cgroup-v2 "memory.max", cgroup-v1 "memory"). Usage counts files that were read, too, which the kernel drops when
# memory is asked for; less those that are inactive it is what Docker and Kubernetes call a container's memory.
_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = _CGROUP_V2 / "memory"
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_SMI_TIMEOUT_S = 20.0  # a card without persistence mode takes some seconds to wake

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics card. Its memory is 0 where it has none of its own, or the driver does not tell."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """Where this host's engines compute, and the memory that was free there."""

    kind: Literal["cuda", "cpu"]
    available_bytes: int


@dataclass(frozen=True, slots=True)
class _Cgroup:
    """A container's memory as the kernel tells it."""

    limit_bytes: int
    used_bytes: int


def host_memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit where that is lower."""
    return min([psutil.virtual_memory().total, *(cgroup.limit_bytes for cgroup in _find_cgroups())])


def host_available_bytes() -> int:
    """Memory that a new process could take now without swapping: the machine's, or what a container's limit leaves."""
    left = [max(0, cgroup.limit_bytes - cgroup.used_bytes) for cgroup in _find_cgroups()]
    return min([psutil.virtual_memory().available, *left])


def describe_devices(gpus: Sequence[Gpu]) -> dict[str, Any]:
    """The host's processors and cards: `{"cpu": {"name", "count"}, "gpus": [{"index", "uuid", "name", "memory_bytes",
    "free_bytes"}]}`."""
    cpu = {"name": _cpu_name(), "count": _cpu_count()}
    return {"cpu": cpu, "gpus": [asdict(gpu) for gpu in gpus]}


def measure_device(gpus: Sequence[Gpu]) -> Device:
    """What is free on the device that an engine started now would compute on (`lomo_core.model.pick_device`): the first
    card that it sees, else the host. A card without memory of its own uses the host's."""
    gpu = first_visible(gpus, engine_environment().get("CUDA_VISIBLE_DEVICES"))
    if gpu is None:
        return Device("cpu", host_available_bytes())
    return Device("cuda", gpu.free_bytes if gpu.memory_bytes else host_available_bytes())


def first_visible(gpus: Sequence[Gpu], visible: str | None) -> Gpu | None:
    """The card that CUDA numbers 0 under this value of `CUDA_VISIBLE_DEVICES` (None: not set), or None.

    Numbers are taken in the driver's order, which is CUDA's own where all cards are alike. The driver's list tells no
    slice of a card (`MIG-...`): the first card's memory stands for it, as an upper bound.
    """
    if visible is None:
        return next(iter(gpus), None)
    first = visible.split(",")[0].strip()
    if first.startswith("MIG-"):
        return next(iter(gpus), None)
    if first.startswith("GPU-"):
        return next((gpu for gpu in gpus if gpu.uuid.startswith(first)), None)
    return next((gpu for gpu in gpus if str(gpu.index) == first), None)


def find_gpus() -> list[Gpu]:
    """The NVIDIA cards that the driver shows; none where there is no driver or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("gpus_unknown", error=str(error))
        return []
    return parse_gpus(result.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """Read `index, uuid, total MiB, free MiB, name` lines of nvidia-smi; in place of a number there may be `[N/A]`."""
    gpus = []
    for line in text.splitlines():
        index, *rest = (field.strip() for field in line.split(",", 4))
        if index.isdecimal() and len(rest) == 4:
            uuid, total, free, name = rest
            gpus.append(Gpu(int(index), uuid, name, _read_mib(total), _read_mib(free)))
    return gpus


def _read_mib(text: str) -> int:
    return int(text) * 2**20 if text.isdecimal() else 0


def _find_cgroups() -> list[_Cgroup]:
    """The limits that this process is under, those of both versions where both are mounted."""
    found = [
        _read_cgroup(_CGROUP_V2, limit="memory.max", usage="memory.current", inactive="inactive_file"),
        _read_cgroup(
            _CGROUP_V1,
            limit="memory.limit_in_bytes",
            usage="memory.usage_in_bytes",
            inactive="total_inactive_file",
        ),
    ]
    return [cgroup for cgroup in found if cgroup is not None]


def _read_cgroup(folder: Path, *, limit: str, usage: str, inactive: str) -> _Cgroup | None:
    """A control group of these file names; None where there is none, or no limit (`max`)."""
    limit_bytes = _read_number(folder / limit)
    if limit_bytes is None:
        return None
    used_bytes = _read_number(folder / usage) or 0
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:  # gVisor has none
        lines = []
    inactive_bytes = sum(int(line.split()[1]) for line in lines if line.split()[0] == inactive)
    return _Cgroup(limit_bytes, max(0, used_bytes - inactive_bytes))


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _cpu_name() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")

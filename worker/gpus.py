"""What a host has: memory, processors, graphics cards. Asked of the system and of `nvidia-smi`, never of torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import structlog

# Where a container's limit stands, by version of the control groups (kernel documentation, cgroup-v2 "memory.max").
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_SMI_TIMEOUT_S = 20.0  # a card without persistence mode takes some seconds to wake

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One graphics card."""

    name: str
    memory_bytes: int


def host_memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its container's limit where that is lower."""
    return min([psutil.virtual_memory().total, *(limit for path in _CGROUP_LIMITS for limit in _read_limit(path))])


def describe_devices() -> dict[str, Any]:
    """The host's processors and cards: `{"cpu": {"name", "count"}, "gpus": [{"name", "memory_bytes"}]}`."""
    cpu = {"name": _cpu_name(), "count": _cpu_count()}
    return {"cpu": cpu, "gpus": [asdict(gpu) for gpu in find_gpus()]}


def find_gpus() -> list[Gpu]:
    """The NVIDIA cards that the driver shows; none where there is no driver or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("gpus_unknown", error=str(error))
        return []
    return parse_gpus(result.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """Read `name, MiB` lines of nvidia-smi; a card without memory of its own gives `[N/A]`: 0 bytes."""
    gpus = []
    for line in text.splitlines():
        name, _, mib = line.rpartition(",")
        if name:
            gpus.append(Gpu(name.strip(), int(mib) * 2**20 if mib.strip().isdecimal() else 0))
    return gpus


def _read_limit(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return []
    return [int(text)] if text.isdecimal() and int(text) > 0 else []


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _cpu_name() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")

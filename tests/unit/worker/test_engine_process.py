"""The engine as a process: what it is told, what it is not, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from worker.engine_process import EngineProcess, engine_environment, hub_environment, tracker_environment

SECRETS = {
    "LOMO_DATABASE_URL": "canary",
    "LOMO_BROKER_URL": "canary",
    "LOMO_ADMIN_KEY_FILE": "canary",
    "PGPASSWORD": "canary",
    "REDIS_URL": "canary",
    "HF_TOKEN": "canary",
    "AWS_SECRET_ACCESS_KEY": "canary",
    "OPENAI_API_KEY": "canary",
    "LD_PRELOAD": "canary",
    "MY_PATH": "canary",
}
NEEDED = {
    "PATH": "/bin",
    "HOME": "/home/u",
    "LC_ALL": "C.UTF-8",
    "PYTHONPATH": "/p",
    "CUDA_VISIBLE_DEVICES": "1",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "OMP_NUM_THREADS": "2",
    "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
}


def test_an_engine_gets_what_it_needs_and_no_secret() -> None:
    chosen = engine_environment({**SECRETS, **NEEDED}, num_threads=3)
    assert "canary" not in chosen.values()
    assert chosen.items() >= NEEDED.items()
    assert (chosen["HF_HUB_OFFLINE"], chosen["LOMO_ENGINE_THREADS"]) == ("1", "3")
    assert "LOMO_ENGINE_THREADS" not in engine_environment({})


def test_a_download_gets_the_hubs_token_and_the_proxy_alone() -> None:
    open_network = {"HF_TOKEN": "hub", "HF_ENDPOINT": "http://hub", "https_proxy": "http://p", "NO_PROXY": "x"}
    chosen = hub_environment({**SECRETS, **NEEDED, **open_network})
    assert "canary" not in chosen.values()
    assert chosen.items() >= open_network.items()
    assert chosen["HF_HUB_OFFLINE"] == "0"


def test_a_tracker_knows_its_own_key_and_no_other() -> None:
    own = {"WANDB_API_KEY": "k", "MLFLOW_TRACKING_PASSWORD": "p", "https_proxy": "http://proxy:3128"}
    chosen = tracker_environment({**SECRETS, **NEEDED, **own})
    assert "canary" not in chosen.values()
    assert chosen.items() >= own.items()
    assert not own.keys() & engine_environment({**NEEDED, **own}).keys()


def start(folder: Path, code: str) -> EngineProcess:
    return EngineProcess([sys.executable, "-c", code], folder=folder, environment=engine_environment())


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


FORKING = """
import os, sys, threading
child = os.fork()
if child == 0:
    threading.Event().wait()
print(child, flush=True)
"""


def test_an_end_takes_the_rest_of_the_group_with_it(tmp_path: Path, wait_until: Any) -> None:
    engine = start(tmp_path, FORKING + "sys.exit(7)")
    assert wait_until(engine.poll, 30, "the end") == 7
    child = int(engine.log_tail())
    wait_until(lambda: is_gone(child), 30, "the grandchild's end")
    assert engine.poll() == 7  # asking again is harmless, and so is killing what is gone
    engine.kill()
    engine.terminate()


def test_killing_takes_the_whole_group(tmp_path: Path, wait_until: Any) -> None:
    engine = start(tmp_path, FORKING + "threading.Event().wait()")
    child = int(wait_until(engine.log_tail, 30, "the grandchild"))
    engine.kill()
    assert engine.poll() == -signal.SIGKILL
    wait_until(lambda: is_gone(child), 30, "the grandchild's end")


def test_it_has_a_session_of_its_own(tmp_path: Path, wait_until: Any) -> None:
    engine = start(tmp_path, "import os; print(os.getsid(0), os.getcwd())")
    assert wait_until(lambda: engine.poll() == 0, 30, "the end")
    assert engine.log_tail() == f"{engine.pid} {tmp_path}"
    assert engine.pid != os.getsid(0)


def test_the_log_is_read_from_its_end(tmp_path: Path, wait_until: Any) -> None:
    engine = start(tmp_path, "print('a' * 100_000); print('the end')")
    assert wait_until(lambda: engine.poll() == 0, 30, "the end")
    tail = engine.log_tail()
    assert len(tail) <= 8192
    assert tail.endswith("the end")


def test_a_program_that_is_not_there_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counting, not walking
    with pytest.raises(FileNotFoundError):
        EngineProcess(["/nonexistent/engine"], folder=tmp_path, environment={})
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

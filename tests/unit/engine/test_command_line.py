"""The engine as a process: exit codes, one-line errors, the journal's last word, and ending with the parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lomo_core import __main__ as command_line
from lomo_core import death_watch
from lomo_core.config import TrainConfig
from lomo_core.errors import ConfigError, DataError, EngineError, ModelError
from lomo_core.events import Failed, Finished
from tests.support.engine_runs import MakeConfig, Start, events_of, read_events, write_run
from tests.support.tiny_model import choice_rows, write_jsonl

WaitUntil = Callable[[Callable[[], object], float, str], object]


def failure(config: TrainConfig) -> Failed:
    (event,) = events_of(config.run_dir, Failed)
    return event


def call(*arguments: str | Path, environment: dict[str, str] | None = None) -> int:
    """The command in this process."""
    return command_line.main([str(argument) for argument in arguments], environment if environment is not None else {})


@pytest.fixture(autouse=True)
def _keep_the_signal_handler() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield None
    signal.signal(signal.SIGTERM, before)


def test_a_specification_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"run_dir": 1}', encoding="utf-8")
    assert call("train", path) == ConfigError.exit_code
    assert call("train", tmp_path / "none.json") == ConfigError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run_dir must be str, not 1"
    assert lines[1].startswith("the run's specification none.json cannot be read")


def test_a_users_error_is_one_line_and_an_event(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    write_jsonl(tmp_path / "train.jsonl", [])
    assert call("train", write_run(config)) == DataError.exit_code
    assert capsys.readouterr().err == "the file is empty: it needs at least one row\n"
    assert failure(config) == Failed(
        code="invalid_training_file", message="the file is empty: it needs at least one row", param="training_file"
    )


def test_an_unexpected_error_leaves_its_traceback(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(command_line, "_set_up_torch", broken)
    config = make_config()
    assert call("train", write_run(config)) == EngineError.exit_code
    assert "Traceback" in capsys.readouterr().err
    assert failure(config).code == "engine_error"
    assert "KeyError: 'a defect'" in failure(config).message


def test_training_evaluating_and_inspecting(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(max_steps=1)
    environment: dict[str, str] = {"LOMO_ENGINE_THREADS": "1"}
    assert call("train", write_run(config), environment=environment) == 0
    assert environment["HF_HUB_OFFLINE"] == "1"
    (finished,) = events_of(config.run_dir, Finished)
    assert read_events(config.run_dir)[-1] == finished
    data = write_jsonl(tmp_path / "choices.jsonl", choice_rows(4))
    assert call("evaluate", "--model", finished.model_path, "--data", data, "--max-seq-length", 64) == 0
    assert call("inspect", "--model", finished.model_path) == 0
    output = capsys.readouterr()
    evaluation, facts = map(json.loads, output.out.splitlines())
    assert evaluation["num_rows"] == 4 and 0 <= evaluation["choice_accuracy"] <= 1
    assert facts["num_parameters"] == 106_816
    assert output.err == ""


def test_inspecting_a_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", "--model", tmp_path / "none") == ModelError.exit_code
    assert capsys.readouterr().err == "there is no model folder 'none': check the model's name\n"


def test_inspecting_loads_no_torch(tiny_model: Path) -> None:
    code = (
        "import sys; from lomo_core.__main__ import main\n"
        f"assert main(['inspect', '--model', {str(tiny_model)!r}], {{}}) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_the_process_is_silent_and_ends_with_its_code(
    make_config: MakeConfig, start_engine: Start, tmp_path: Path
) -> None:
    config = make_config(max_steps=1)
    process = start_engine("train", write_run(config))
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    bad = make_config(run="bad")
    write_jsonl(tmp_path / "train.jsonl", [{"messages": []}])
    process = start_engine("train", write_run(bad))
    _, stderr = process.communicate()
    assert process.returncode == DataError.exit_code
    assert "Traceback" not in stderr and "line 1: messages is empty" in stderr


def test_the_allocators_environment_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda _path, _argv, environment: calls.append(environment))
    monkeypatch.setattr(command_line.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    command_line.restart_with_allocator_environment()
    assert int(calls[0]["MALLOC_MMAP_THRESHOLD_"]) == 8 * 2**20
    assert int(calls[0]["MALLOC_TRIM_THRESHOLD_"]) == 32 * 2**20
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    command_line.restart_with_allocator_environment()
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    monkeypatch.setattr(command_line.platform, "libc_ver", lambda: ("", ""))
    command_line.restart_with_allocator_environment()
    assert len(calls) == 1


WATCHED = (
    "from lomo_core.death_watch import start_death_watch; start_death_watch(); print('ready', flush=True); input()"
)


def watched(**options: Any) -> subprocess.Popen[str]:
    """A process that only watches its parent."""
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def test_the_engine_ends_when_the_pipe_closes() -> None:
    reading, writing = os.pipe()
    with watched(pass_fds=[reading], env={**os.environ, death_watch.PARENT_FD: str(reading)}) as process:
        os.close(reading)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert process.poll() is None
        os.close(writing)
        assert process.wait() == -signal.SIGKILL


def test_the_engine_ends_where_its_parent_is_another_one() -> None:
    with watched(env={**os.environ, death_watch.PARENT_PID: str(os.getpid() + 1)}) as process:
        assert process.wait() == -signal.SIGKILL


def test_the_engine_ends_with_its_parent(wait_until: WaitUntil) -> None:
    parent_code = (
        "import os, subprocess, sys\n"
        f"code = {WATCHED!r}\n"
        "environment = {**os.environ, 'LOMO_ENGINE_PARENT_PID': str(os.getpid())}\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,\n"
        "                         text=True, env=environment, start_new_session=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent_code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not is_running(child), 20, "the orphaned engine's end")


def is_running(pid: int) -> bool:
    """Whether a process exists that is not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_no_watch_without_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(death_watch.PARENT_FD, raising=False)
    monkeypatch.delenv(death_watch.PARENT_PID, raising=False)
    death_watch.start_death_watch()

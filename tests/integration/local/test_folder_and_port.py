"""What `python -m local up` refuses, before it starts anything, in one sentence and with exit code 1."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from stat import S_IMODE

import pytest

from local.errors import DataDirError, FolderBusyError, PortError
from local.folder import DataFolder
from local.ports import local_url, reserve_port


@pytest.fixture
def folder(tmp_path) -> Iterator[DataFolder]:
    """A data folder whose lock this test holds."""
    held = DataFolder(tmp_path / "lomo")
    held.acquire()
    yield held
    held.release()


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port of 127.0.0.1 on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def up(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m local up` to its end, which has to be a refusal."""
    command = [sys.executable, "-m", "local", "up", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_folder_is_made_private_with_all_its_parts(folder):
    parts = ("postgres", "valkey", "files", "runs", "models", "logs")
    assert sorted(path.name for path in folder.path.iterdir()) == sorted([*parts, "lock"])
    assert {S_IMODE((folder.path / name).stat().st_mode) for name in (".", *parts)} == {0o700}


def test_folder_that_was_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    folder = DataFolder(tmp_path)
    folder.acquire()
    folder.release()
    assert S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert S_IMODE(folder.postgres.stat().st_mode) == 0o700


def test_folder_open_to_everybody_is_refused_and_left_alone(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(DataDirError, match="Every user of this machine may write into"):
        DataFolder(tmp_path).acquire()
    assert S_IMODE(tmp_path.stat().st_mode) == 0o777
    assert list(tmp_path.iterdir()) == []


def test_lock_is_free_again_after_release(folder):
    folder.note_holder(8123)
    with pytest.raises(FolderBusyError, match=rf"in use by another `lomo up` \(pid {os.getpid()}, port 8123\)"):
        DataFolder(folder.path).acquire()
    folder.release()
    again = DataFolder(folder.path)
    again.acquire()
    with pytest.raises(FolderBusyError, match=r"in use by another `lomo up`\. Stop that one"):
        DataFolder(folder.path).acquire()
    again.release()


def test_stack_json_is_private_and_goes_away(folder):
    folder.write_stack({"pid": 1})
    folder.write_stack({"pid": 2})
    assert json.loads(folder.stack_json.read_text()) == {"pid": 2}
    assert S_IMODE(folder.stack_json.stat().st_mode) == 0o600
    folder.remove_stack()
    assert not folder.stack_json.exists()


def test_stack_json_of_a_killed_holder_does_not_outlast_the_next_lock(folder):
    folder.write_stack({"pid": 1})
    folder.release()
    again = DataFolder(folder.path)
    again.acquire()
    assert not folder.stack_json.exists()
    again.release()


def test_up_on_a_held_folder_names_the_holder(folder):
    folder.note_holder(8123)
    refused = up("--data-dir", folder.path, "--port", "0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"error: The data folder {folder.path} is in use by another `lomo up` (pid {os.getpid()}, port 8123). "
        "Stop that one, or give this one a folder of its own with --data-dir.\n"
    )


def test_up_on_a_busy_port_says_so_and_starts_nothing(tmp_path, busy_port):
    refused = up("--data-dir", tmp_path / "lomo", "--port", str(busy_port))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"error: Port {busy_port} on 127.0.0.1 is already in use. Choose another one with --port.\n"
    )
    assert list((tmp_path / "lomo" / "postgres").iterdir()) == []


def test_up_on_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused = up("--data-dir", tmp_path / "file" / "lomo", "--port", "0")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: The data folder {tmp_path}/file/lomo cannot be used: Not a directory")
    assert refused.stderr.endswith("Choose another one with --data-dir.\n")


def test_free_port_is_found_and_a_taken_or_absurd_one_refused(busy_port):
    assert 1024 <= reserve_port("127.0.0.1", 0) <= 65535
    with pytest.raises(PortError, match=f"Port {busy_port} on 127.0.0.1 is already in use"):
        reserve_port("127.0.0.1", busy_port)
    with pytest.raises(PortError, match="Set --host and --port"):
        reserve_port("192.0.2.1", 8000)  # TEST-NET-1, an address that no machine has (RFC 5737)
    with pytest.raises(PortError, match="no address not an address"):
        reserve_port("not an address", 8000)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),  # noqa: S104 - never listened on
        ("::1", "http://[::1]:8000"),
        ("gpu.example", "http://gpu.example:8000"),
    ],
)
def test_url_is_one_that_this_machine_can_open(host, url):
    assert local_url(host, 8000) == url

"""The data folder of an embedded stack: what lies in it, who may use it, and what is running over it.

    DIR/postgres, DIR/valkey       the servers' files and their sockets
    DIR/files, DIR/runs            uploads; one folder per job
    DIR/models                     base models, one folder each
    DIR/logs                       one log per process
    DIR/admin.key                  the first API key (0600)
    DIR/stack.json                 while the stack is up: its pid, port and addresses (0600)
    DIR/lock                       held (flock) by the one `lomo up` that runs over the folder

An flock rather than a pid file: the kernel gives it up at the end of its holder, however that end came.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from local.errors import DataDirError, FolderBusyError

_SUBFOLDERS = ("postgres", "valkey", "files", "runs", "models", "logs")


class DataFolder:
    """The paths below one data folder, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.postgres, self.valkey, self.files, self.runs, self.models, self.logs = (
            self.path / name for name in _SUBFOLDERS
        )
        self.admin_key = self.path / "admin.key"
        self.stack_json = self.path / "stack.json"
        self._lock_path = self.path / "lock"
        self._lock_fd: int | None = None

    def make(self) -> None:
        """Make the folder and what is missing in it, closed to others. Raises DataDirError if it cannot be used."""
        try:
            self._make()
        except OSError as error:
            raise self._unusable(error) from error

    def acquire(self) -> None:
        """Make the folder and take its lock until `release` or the end of this process.

        Raises DataDirError if it cannot be used and FolderBusyError if another process holds it.
        """
        self.make()
        try:
            self._lock_fd = self._locked()
        except OSError as error:
            raise self._unusable(error) from error
        self.remove_stack()  # a killed holder left it

    def release(self) -> None:
        """Give up the lock. The file stays: removing it would let two processes hold two locks of one name."""
        if self._lock_fd is not None:
            os.ftruncate(self._lock_fd, 0)
            os.close(self._lock_fd)
            self._lock_fd = None

    def note_holder(self, port: int) -> None:
        """Write into the lock file who holds it, for the sentence that a second `lomo up` says."""
        self._lock_path.write_text(json.dumps({"pid": os.getpid(), "port": port}), encoding="ascii")

    def write_stack(self, facts: Mapping[str, object]) -> None:
        """Replace `stack.json` in one step."""
        partial = self.stack_json.with_name(".stack.json.partial")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.stack_json)

    def remove_stack(self) -> None:
        """Remove `stack.json`: the stack is no longer up."""
        self.stack_json.unlink(missing_ok=True)

    def _make(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.stat().st_mode & stat.S_IWOTH:
            # Somebody else could put a link in place of a sub-folder. It is not ours to chmod: it may be /tmp.
            raise DataDirError(
                f"Every user of this machine may write into {self.path}, so it cannot hold a server's data. "
                "Choose a folder of your own with --data-dir."
            )
        for name in _SUBFOLDERS:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)

    def _unusable(self, error: OSError) -> DataDirError:
        where = f" ({error.filename})" if error.filename else ""
        return DataDirError(
            f"The data folder {self.path} cannot be used: {error.strerror or error}{where}. "
            "Choose another one with --data-dir."
        )

    def _locked(self) -> int:
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0)
            os.close(descriptor)
            raise FolderBusyError(
                f"The data folder {self.path} is in use by another `lomo up`{_describe_holder(holder)}. "
                "Stop that one, or give this one a folder of its own with --data-dir."
            ) from error
        os.ftruncate(descriptor, 0)
        return descriptor


def _describe_holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f" (pid {holder['pid']}, port {holder['port']})"
    except (ValueError, KeyError, TypeError):  # it has the lock and is about to write who it is
        return ""

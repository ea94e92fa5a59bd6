"""Where the unix sockets of Postgres and Valkey lie.

A socket's path may have 107 bytes and no more (sun_path in unix(7), 108 with the closing zero), and it travels inside
URLs and connection strings in which a comma, a blank or a percent sign would mean something else. A folder that cannot
be used for either reason is replaced by a private one with a short name.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path

from local.errors import SocketPathError

MAX_SOCKET_PATH_BYTES = 107
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")


def socket_folder(preferred: Path, *, socket_name: str) -> Path:
    """Return a folder of mode 0700 that can hold `socket_name`: `preferred` itself, or a short one in the temp folder.

    `preferred` must exist. Raises SocketPathError if neither will do.
    """
    if _fits(preferred / socket_name):
        return preferred
    # The name depends on the folder and the user alone, so a restart finds the same one.
    digest = hashlib.sha256(f"{os.geteuid()}:{preferred}".encode()).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"lomo-{digest}"
    if not _fits(short / socket_name):
        raise SocketPathError(
            f"The path {preferred} is too long for a unix socket (at most {MAX_SOCKET_PATH_BYTES} bytes), and so is "
            f"{short}. Choose a shorter --data-dir, or set TMPDIR to a short path."
        )
    _make_private(short)
    return short


def remove_socket_folder(folder: Path, *, preferred: Path) -> None:
    """Remove what `socket_folder` made, if it made one and nothing is left in it."""
    if folder != preferred and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES and _PLAIN_PATH.fullmatch(str(path)) is not None


def _make_private(folder: Path) -> None:
    """Make `folder`, or make sure that the one that is there is ours: the temp folder is open to everybody."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise SocketPathError(
            f"{folder} should be a private folder of this user but is not; look at it, remove it and start again."
        )

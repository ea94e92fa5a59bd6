"""Telling that a disk has run full from every other error of writing. Torch-free."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from lomo_core.errors import DiskFullError


@contextmanager
def disk_full_named(what: str) -> Iterator[None]:
    """Turn a full disk inside of the block into `DiskFullError`; `what` could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(f"the disk is full: {what} could not be written, make room") from error

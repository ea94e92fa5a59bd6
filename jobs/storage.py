"""The object store that the bytes of files may lie in: S3, or what speaks its protocol, by way of fsspec.

An object has the file's id below `LOMO_STORAGE_URL`, and the file's row names it by its whole URL, so that a change of
the setting loses nothing. Without the setting this module is not used, and fsspec not imported; credentials and the
endpoint are the environment's, as boto and fsspec read it. Everything moves in parts of a few MiB, whatever its size.
No transaction is open during a call (`db.py`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog

from jobs.errors import FileDamagedError, NotFoundError, StorageError

SCHEME = "s3://"
# S3 takes parts from 5 MiB on, and 10,000 of them: 80 GiB, ten times the largest upload. Two are on their way at once.
# Measured with a file of 300 MiB: sending it takes 32 MiB of memory, fetching it 27.
_PART_BYTES = 8 * 1024 * 1024
_PARTS_AT_ONCE = 2
# A store that does not answer costs each request this: two tries of 3 s to connect, and of 30 s in which nothing comes.
_CONFIG = {"connect_timeout": 3, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 2}}

log = structlog.get_logger(__name__)


def object_url(storage_url: str, file_id: str) -> str:
    """Where a file's bytes are to lie."""
    return f"{storage_url}/{file_id}"


def is_object(path: str | None) -> bool:
    """Whether a file's `path` names an object of a store, and not a file of the data folder."""
    return path is not None and path.startswith(SCHEME)


def put(source: Path, url: str) -> None:
    """Send a file to the store. It is there as a whole, or not at all.

    Raises:
        StorageError: the store does not answer, or does not want it.
    """
    with _told(url, "write"):
        store, key = _connect(url)
        store.put_file(str(source), key, chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)


def read(url: str, *, num_bytes: int) -> Iterator[bytes]:
    """The bytes of an object, in parts. Nothing is asked of the store before the first is taken.

    Raises:
        NotFoundError: the object is gone.
        StorageError: the store does not answer, or refuses.
    """
    for start in range(0, num_bytes, _PART_BYTES):
        end = min(start + _PART_BYTES, num_bytes)
        with _told(url, "read"):
            store, key = _connect(url)
            part: bytes = store.cat_file(key, start=start, end=end)
        if len(part) != end - start:
            raise FileDamagedError(f"The object {url.rpartition('/')[2]} in the store is shorter than the file was.")
        yield part


def fetch(url: str, target: Path, *, num_bytes: int, sha256: str, heed: Callable[[], None] = lambda: None) -> None:
    """Copy an object to `target`, whole and compared with its digest. `heed` is called after each part; what it raises
    ends the copy.

    Raises:
        FileDamagedError: the object is not what was put there.
        NotFoundError: it is gone.
        StorageError: the store does not answer, or refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Two attempts at a job may be at it, of which one does not know yet that it is over.
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    digest = hashlib.sha256()
    try:
        with unfinished.open("wb") as file:
            for part in read(url, num_bytes=num_bytes):
                digest.update(part)
                file.write(part)
                heed()
        if digest.hexdigest() != sha256:
            raise FileDamagedError(
                f"The object {target.name} in the store is not what was uploaded: its digest differs."
            )
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Remove an object; one that is gone is as well.

    Raises:
        StorageError: the store does not answer, or refuses.
    """
    with _told(url, "delete"):
        store, key = _connect(url)
        store.rm_file(key)


def _connect(url: str) -> tuple[Any, str]:
    """The store that fsspec keeps for this process, and the key in it. Connects to nothing yet."""
    # Only where a store is used: it takes 0.7 s and 23 MiB.
    from fsspec.core import url_to_fs  # noqa: PLC0415

    store, key = url_to_fs(url, config_kwargs=_CONFIG, use_listings_cache=False)
    return store, str(key)


@contextmanager
def _told(url: str, verb: str) -> Iterator[None]:
    """Tell what the store, or the way to it, raises, in words of ours; the details are for the log."""
    from aiohttp import ClientError as ConnectionBrokenError  # noqa: PLC0415 - as above
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError  # noqa: PLC0415

    try:
        yield
    except (OSError, BotoCoreError, ClientError, ConnectionBrokenError) as error:
        code = _code(error)
        name = url.rpartition("/")[2]
        if code == "NoSuchKey":
            raise NotFoundError(f"The bytes of {name} are no longer in the object store.", param="file_id") from error
        log.warning("storage_failed", url=url, verb=verb, error=f"{type(error).__name__}: {error}")
        if isinstance(error, PermissionError | NoCredentialsError):
            reason = "refuses access: whoever runs the server must check its credentials"
        elif code == "NoSuchBucket":
            reason = "has no such bucket: whoever runs the server must check LOMO_STORAGE_URL"
        else:
            reason = "does not answer as it should"
        raise StorageError(f"Could not {verb} {name}: the object store {reason}.") from error


def _code(error: BaseException) -> str | None:
    """S3's own code of an error; s3fs makes an OSError of most, and keeps the original as its cause."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def is_installed() -> bool:
    """Whether the library for S3 is there: it is an extra of the package."""
    return find_spec("s3fs") is not None

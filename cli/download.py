"""Writing a download to a file: a broken one never looks like a whole one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cli.errors import UsageError


def save(chunks: Iterable[bytes], path: Path) -> None:
    """Write the chunks beside `path`, and rename them into place once all are there.

    Raises:
        UsageError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)

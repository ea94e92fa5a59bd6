"""Uploading a file so that a person sees it move: a bar in a terminal once it takes longer than a moment."""

from __future__ import annotations

import re
import time
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cli.client import ApiClient, Json
from cli.errors import UsageError
from cli.output import format_bytes, format_seconds, make_talk, printable

_FILE_ID = re.compile(r"^file-[0-9A-Za-z_-]+$")
_SHOW_AFTER_S = 2.0  # a bar that only flashes up is noise


def upload(client: ApiClient, path: Path, *, purpose: str) -> Json:
    """Send a file and return it as the server describes it; tells about it on stderr.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        reason = "it is not a regular file" if path.exists() else "there is no such file"
        raise UsageError(f"cannot upload {path}: {reason}")
    num_bytes = path.stat().st_size
    talk = make_talk()
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=talk, transient=True)
    task = progress.add_task("Uploading", total=num_bytes)
    started = time.monotonic()

    def advance(count: int) -> None:
        progress.advance(task, count)
        if talk.is_terminal and not progress.live.is_started and time.monotonic() - started > _SHOW_AFTER_S:
            progress.start()

    try:
        file = client.upload(path, purpose=purpose, on_read=advance)
    finally:
        if progress.live.is_started:
            progress.stop()
    took = time.monotonic() - started
    duration = f" in {format_seconds(took)}" if took > 1 else ""
    name, file_id = printable(path.name), printable(str(file["id"]))
    talk.print(f"Uploaded {name} ({format_bytes(num_bytes)}){duration} as {file_id}.", markup=False)
    return file


def resolve_file(client: ApiClient, text: str) -> str:
    """Return the id of a file given as an id or as a path; a path is uploaded first (`./file-x` is always a path).

    Raises:
        UsageError: it is neither.
    """
    if _FILE_ID.match(text):
        return text
    return str(upload(client, Path(text).expanduser(), purpose="fine-tune")["id"])

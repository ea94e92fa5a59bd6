"""One row of a file as a run would see it, made by the engine in a process of its own, which is bounded in every way.

A chat template is a program of whoever made the model's folder: it may loop for ever, or fill the memory. The process
ends itself by the kernel's limits on CPU time and memory, and is killed when it takes too long on the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.errors import BusyError, InvalidRequestError
from lomo_core.data.check_config import CheckConfig
from lomo_core.errors import EXIT_CODES, DataError, EngineError

# 1.5 s are the start (transformers, without torch); a row takes milliseconds, finding the millionth of a file some
# seconds.
MOST_CPU_S = 10
# On the clock, where the machine is busy with runs: 12 s were measured beside two busy cores.
_MOST_S = 30.0
# The start takes 0.18 GiB.
_MOST_BYTES = 1 << 30
# Each takes a core for some seconds, and one of the server's threads.
_MOST_AT_ONCE = 2
_MAX_MESSAGE_CHARS = 500


class PreviewPlaces:
    """Places for two previews at a time. Threads may share it."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(_MOST_AT_ONCE)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a place: for all that a preview costs, also the copy of a file that lies in an object store.

        Raises:
            BusyError: two others are being made.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError(f"{_MOST_AT_ONCE} previews are being made already: ask again in a few seconds.")
        try:
            yield
        finally:
            self._places.release()


def limited(config: dict[str, Any]) -> CheckConfig:
    """The specification of a preview with its limits."""
    return CheckConfig(**config, most_cpu_s=MOST_CPU_S, most_bytes=_MOST_BYTES)


def preview_row(config: CheckConfig) -> dict[str, Any]:
    """The row `config.row` of a file; its fields are those of `lomo_core.data.preview`.

    Raises:
        InvalidRequestError: there is no such row, it is wrong, or the template does not take it or does not end.
    """
    # The service's own settings hold the database's password.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOMO_")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preview.json"
        path.write_text(config.to_json(), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "lomo_core", "preview", str(path)]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=_MOST_S, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise _endless() from error
    if result.returncode == 0:
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer
    if result.returncode < 0:
        raise _endless()
    kind = EXIT_CODES.get(result.returncode, EngineError)
    if kind is EngineError:
        raise InvalidRequestError(
            "The row could not be shown: the model's chat template needs too much memory, or cannot be run.",
            code="preview_failed",
            param="model",
        )
    message = " ".join(result.stderr.split())[:_MAX_MESSAGE_CHARS].rstrip(".")
    code, param = ("invalid_row", "row") if kind is DataError else (kind.code, "model")
    raise InvalidRequestError(f"{message[:1].upper()}{message[1:]}.", code=code, param=param)


def _endless() -> InvalidRequestError:
    return InvalidRequestError(
        f"The row could not be shown within {MOST_CPU_S} s of computing time: the model's chat template may never end, "
        "or the row is too far down a large file.",
        code="preview_timeout",
        param="model",
    )

"""The shapes of a model for planning its memory: made once per configuration by the engine, kept as a file.

Reading them takes torch, so a process of its own does it (`python -m lomo_core shapes`); what comes back is JSON, and
the arithmetic on it needs no torch. One process at a time: each takes some seconds of a core and 500 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jobs.errors import BusyError, InvalidRequestError
from lomo_core.errors import EXIT_CODES, ModelError, UnforeseenModelError
from lomo_core.memory.model_shapes import FORMAT, ModelShapes

SHAPES_NAME = "shapes"
"""Of the cache's folder in the data folder, which server and workers share."""
# Five seconds on a quiet machine, whatever the model's size; a configuration of absurd size is given up after these.
_PATIENCE_S = 90.0
_MAX_MESSAGE_CHARS = 500
# Requests that may wait for a process, the one that has it included: each holds one of the server's 40 threads (anyio's
# default), which others need.
_MOST_WAITING = 4
# What decides the shapes beside the configuration.
_PACKAGES = ("torch", "transformers")
# Keys of a configuration that say where it comes from: a tuned model's differ from its base's in these alone.
_IRRELEVANT = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})
# Of models in this process's memory: a file of some 50 KB takes 3 ms to read.
_MOST_KEPT = 64
# Of files in the folder: whoever may plan could fill a disk, 50 KB every 6 s. A service has tens of models.
_MOST_FILES = 1000


class _EngineDiedError(InvalidRequestError):
    """The process gave no answer: it was killed, took too long or met a defect. The next time it may."""


class ShapeCache:
    """Shapes by configuration, in a folder and the most recent ones in memory. Threads may share it."""

    def __init__(self, folder: Path, *, most_waiting: int = _MOST_WAITING) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(most_waiting)
        self._kept: OrderedDict[str, ModelShapes | InvalidRequestError] = OrderedDict()

    def path_of(self, config: bytes) -> Path:
        """Where the shapes of a configuration are once they have been read."""
        return self._folder / f"{_key(config)}.json"

    def read(self, config: bytes) -> ModelShapes:
        """The shapes of the model that a `config.json` describes.

        Raises:
            InvalidRequestError: it describes no model (`invalid_model`), or one whose memory cannot be foreseen
                (`unforeseen_model`); the text says why.
            BusyError: several other models are waited for already.
        """
        path = self.path_of(config)
        found = self._find(path)
        if found is None:
            found = self._make(config, path)
        if isinstance(found, InvalidRequestError):
            raise InvalidRequestError(found.message, code=found.code, param=found.param)
        return found

    def _find(self, path: Path) -> ModelShapes | InvalidRequestError | None:
        found = self._kept.get(path.name) or _read(path)
        if found is not None:
            self._keep(path, found)
        return found

    def _keep(self, path: Path, found: ModelShapes | InvalidRequestError) -> None:
        if isinstance(found, _EngineDiedError):
            return
        self._kept.pop(path.name, None)
        self._kept[path.name] = found  # the last one is the most recent
        while len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)

    def _make(self, config: bytes, path: Path) -> ModelShapes | InvalidRequestError:
        if not self._places.acquire(blocking=False):
            raise BusyError("Other models are being read, a few seconds each: ask again in a minute.", param="model")
        try:
            with self._lock:
                found = self._find(path)
                if found is None:
                    found = self._ask_engine(config, path)
                    self._keep(path, found)
                return found
        finally:
            self._places.release()

    def _ask_engine(self, config: bytes, path: Path) -> ModelShapes | InvalidRequestError:
        """Have a process make the shapes, and keep them. That a model has none is kept in memory alone."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            file = Path(folder) / "config.json"
            file.write_bytes(config)
            try:
                text = _ask_engine(file)
            except InvalidRequestError as error:
                return error
            shapes = ModelShapes.from_json(text)
            part = Path(folder) / "shapes.json"
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        self._prune()
        return shapes

    def _prune(self) -> None:
        """Delete the oldest files beyond the limit; who needs one again has it made again."""
        newest_first = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first[_MOST_FILES:]:
            path.unlink(missing_ok=True)


def _ask_engine(config: Path) -> str:
    command = [sys.executable, "-P", "-m", "lomo_core", "shapes", "--config", str(config)]
    # The service's own settings hold the database's password.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOMO_")}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise _EngineDiedError(
            f"The model's memory could not be foreseen within {_PATIENCE_S:.0f} s.",
            code=UnforeseenModelError.code,
            param="model",
        ) from error
    if result.returncode == 0:
        return result.stdout
    if result.returncode not in (ModelError.exit_code, UnforeseenModelError.exit_code):
        # 3 GiB did not suffice (a configuration of absurd size), or something killed it.
        raise _EngineDiedError("The model cannot be built from its configuration.", code=ModelError.code, param="model")
    message = " ".join(result.stderr.split())[:_MAX_MESSAGE_CHARS].rstrip(".")
    code = EXIT_CODES[result.returncode].code
    raise InvalidRequestError(f"{message[:1].upper()}{message[1:]}.", code=code, param="model")


def _key(config: bytes) -> str:
    about = [str(FORMAT), *engine_versions()]
    return hashlib.sha256("\n".join(about).encode() + b"\n" + _relevant(config)).hexdigest()


def _relevant(config: bytes) -> bytes:
    """Of a configuration what may decide its shapes, in one order; as it is where it is no JSON object."""
    try:
        raw: Any = json.loads(config)
    except (ValueError, RecursionError):
        return config
    if not isinstance(raw, dict):
        return config
    return json.dumps({key: value for key, value in raw.items() if key not in _IRRELEVANT}, sort_keys=True).encode()


@cache
def engine_versions() -> list[str]:
    """Libraries that decide an engine's memory, as installed beside this process; a server may be without them. Looking
    takes 4 ms, and a process is started anew after they have changed."""
    return [f"{package} {_version(package)}" for package in _PACKAGES]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _read(path: Path) -> ModelShapes | None:
    """What is kept there; a file that another version wrote is made anew."""
    try:
        return ModelShapes.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

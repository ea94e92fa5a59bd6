"""The shapes of a model for planning its memory: made once per configuration by the engine, kept as a file.

Reading them takes torch, so a process of its own does it (`python -m lomo_core shapes`); what comes back is JSON, and
the arithmetic on it needs no torch. One process at a time: each takes some seconds of a core and 500 MB.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jobs.errors import BusyError, InvalidRequestError
from jobs.spec import LomoOptions
from lomo_core.errors import ModelError
from lomo_core.memory.model_shapes import FORMAT, ModelShapes
from lomo_core.memory.plan import Setting

# A configuration has a few KB; the largest on record list quantised layers and have 500.
MAX_CONFIG_BYTES = 1 << 20
# Five seconds on a quiet machine, whatever the model's size; a configuration of absurd size is given up after these.
_PATIENCE_S = 90.0
_MAX_MESSAGE_CHARS = 500
# Requests that may wait for a process, the one that has it included: each holds one of the server's 40 threads (anyio's
# default), which others need.
_MOST_WAITING = 4
# What decides the shapes beside the configuration.
_PACKAGES = ("torch", "transformers")


class ShapeCache:
    """Shapes by configuration, in a folder."""

    def __init__(self, folder: Path, *, most_waiting: int = _MOST_WAITING) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(most_waiting)

    def read(self, config: bytes) -> ModelShapes:
        """The shapes of the model that a `config.json` describes.

        Raises:
            InvalidRequestError: it describes none whose memory can be foreseen; the text says why.
            BusyError: several other models are waited for already.
        """
        path = self._folder / f"{_key(config)}.json"
        found = _read(path)
        if found is not None:
            return found
        if not self._places.acquire(blocking=False):
            raise BusyError("Other models are being read, a few seconds each: ask again in a minute.", param="model")
        try:
            with self._lock:
                found = _read(path)
                return self._make(config, path) if found is None else found
        finally:
            self._places.release()

    def _make(self, config: bytes, path: Path) -> ModelShapes:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            file = Path(folder) / "config.json"
            file.write_bytes(config)
            text = _ask_engine(file)
            shapes = ModelShapes.from_json(text)
            part = Path(folder) / "shapes.json"
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        return shapes


def to_setting(options: LomoOptions, *, batch_size: int) -> Setting:
    """What of a job's options decides its memory. Rows are taken to be of different lengths, each token to have a loss,
    and the exact norm to come from a second backward pass: the most that the engine may choose."""
    needs_norm = options.precision == "fp16" or options.clip.mode == "norm"
    return Setting(
        optimizer=options.optimizer,
        precision=options.precision,
        batch_size=batch_size,
        seq_length=options.max_seq_length,
        activation_checkpointing=options.activation_checkpointing,
        norm="second_backward" if needs_norm and options.optimizer in ("lomo", "adalomo") else "one_pass",
        rounding=options.rounding or "stochastic",
    )


def _ask_engine(config: Path) -> str:
    command = [sys.executable, "-P", "-m", "lomo_core", "shapes", "--config", str(config)]
    # The service's own settings hold the database's password.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOMO_")}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidRequestError(
            f"The model's memory could not be foreseen within {_PATIENCE_S:.0f} s.", code="invalid_model", param="model"
        ) from error
    if result.returncode == 0:
        return result.stdout
    message = "The model cannot be built from its configuration"
    if result.returncode == ModelError.exit_code:
        message = " ".join(result.stderr.split())[:_MAX_MESSAGE_CHARS].rstrip(".")
    raise InvalidRequestError(f"{message[:1].upper()}{message[1:]}.", code=ModelError.code, param="model")


def _key(config: bytes) -> str:
    about = [str(FORMAT), *(f"{name} {_version(name)}" for name in _PACKAGES)]
    return hashlib.sha256("\n".join(about).encode() + b"\n" + config).hexdigest()


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

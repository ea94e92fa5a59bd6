"""Checkpoints: folders that are whole or absent, verified before use, and usable as models.

`checkpoints/step-<n>/` is a Hugging Face folder (weights, config, tokenizer) with three files more:
`optimizer.safetensors` (moments, if any), `trainer_state.json` (everything small) and `MANIFEST.json` (name, size and
SHA-256 of each file). It is written beside its place as `.tmp-...`, each file is put on disk, and the rename is what
makes it exist. Nothing random has to be saved: noise, order and dropout are functions of (seed, step).

safetensors has no checksum of its own (a flipped bit loads without an error), hence the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lomo_core.errors import CheckpointError, DiskFullError
from lomo_core.optim.fused import FusedOptimizer

MANIFEST_NAME = "MANIFEST.json"
STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.safetensors"
_STEP_FOLDER = re.compile(r"step-(\d+)")
# Beside the tensors: tokenizer, configs, file system overhead.
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """What a run needs to go on, beside weights and moments."""

    step: int
    """Steps done."""
    run_sha256: str
    """Of everything that decides the run's numbers: configuration, data, base model."""
    num_trained_tokens: int
    optimizer_step: int
    optimizer_seed: int
    versions: dict[str, str]
    """Of the libraries that computed it; for people."""


@dataclass(frozen=True, slots=True)
class SavedFolder:
    """A folder just written."""

    path: Path
    manifest_sha256: str
    num_bytes: int


def save_checkpoint(
    path: Path, *, model: Any, tokenizer: Any, optimizer: FusedOptimizer, state: TrainerState
) -> SavedFolder:
    """Write one checkpoint.

    Raises:
        DiskFullError: there is not enough space; nothing is left behind.
    """

    def fill(folder: Path) -> None:
        _save_model(folder, model=model, tokenizer=tokenizer)
        moments = _flat_moments(optimizer)
        if moments:
            save_file(moments, folder / OPTIMIZER_NAME)
        (folder / STATE_NAME).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")

    return _write_folder(path, fill, step=state.step, num_bytes=_tensor_bytes(model, optimizer))


def save_final_model(path: Path, *, model: Any, tokenizer: Any, step: int) -> SavedFolder:
    """Write the tuned model; one left by an earlier attempt is replaced.

    Raises:
        DiskFullError: there is not enough space; nothing is left behind.
    """

    def fill(folder: Path) -> None:
        _save_model(folder, model=model, tokenizer=tokenizer)

    return _write_folder(path, fill, step=step, num_bytes=_tensor_bytes(model, None))


def verify_checkpoint(path: Path, *, run_sha256: str) -> TrainerState:
    """Check every file of a checkpoint against its manifest, and that it belongs to this run.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or of another run.
    """
    _verify_manifest(path)
    state = _read_json(path / STATE_NAME)
    try:
        found = TrainerState(**state)
    except TypeError as error:
        raise CheckpointError(f"its {STATE_NAME} has other fields than expected: {error}") from error
    if found.run_sha256 != run_sha256:
        raise CheckpointError("it belongs to a run with other settings, data or base model")
    return found


def load_optimizer(path: Path, optimizer: FusedOptimizer, state: TrainerState) -> None:
    """Restore the optimizer from a verified checkpoint."""
    moments: dict[int, dict[str, Tensor]] = {}
    if (path / OPTIMIZER_NAME).exists():
        for key, moment in load_file(path / OPTIMIZER_NAME).items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = moment
    optimizer.load_state_dict(
        {
            "state": moments,
            "param_groups": optimizer.state_dict()["param_groups"],
            "step": state.optimizer_step,
            "seed": state.optimizer_seed,
            "loss_scale": None,
            "previous_grad_norm": None,
        }
    )


def checkpoint_folders(parent: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not parent.is_dir():
        return []
    found = [(int(match[1]), path) for path in parent.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def prune_checkpoints(parent: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted write has left."""
    for leftover in parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in checkpoint_folders(parent)[:-keep]:
        _delete(path)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _save_model(folder: Path, *, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _flat_moments(optimizer: FusedOptimizer) -> dict[str, Tensor]:
    """Moments as `<parameter index>.<name>`, contiguous."""
    states: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": moment.contiguous() for index, state in states.items() for name, moment in state.items()}


def _tensor_bytes(model: Any, optimizer: FusedOptimizer | None) -> int:
    tensors: Iterable[Tensor] = [*model.parameters(), *(_flat_moments(optimizer).values() if optimizer else ())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _write_folder(path: Path, fill: Callable[[Path], None], *, step: int, num_bytes: int) -> SavedFolder:
    """Fill a folder beside `path`, put it on disk, and rename it into place."""
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < num_bytes + _SPARE_BYTES:
        raise DiskFullError(
            f"saving needs {_mib(num_bytes + _SPARE_BYTES)} but only {_mib(free)} are free: make room on the disk"
        )
    temporary = parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        fill(temporary)
        saved = _write_manifest(temporary, step=step)
        _replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise DiskFullError(f"the disk is full: {path.name} could not be written, make room") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SavedFolder(path, saved.manifest_sha256, saved.num_bytes)


def _write_manifest(folder: Path, *, step: int) -> SavedFolder:
    """Hash and fsync every file, then write the manifest over them."""
    files = []
    for path in sorted(folder.iterdir()):
        files.append({"name": path.name, "size": path.stat().st_size, "sha256": sha256_of_file(path)})
        _fsync(path)
    raw = json.dumps({"step": step, "files": files}, indent=2).encode()
    manifest = folder / MANIFEST_NAME
    manifest.write_bytes(raw)
    _fsync(manifest)
    _fsync(folder)
    total = len(raw) + sum(int(str(file["size"])) for file in files)
    return SavedFolder(folder, hashlib.sha256(raw).hexdigest(), total)


def _replace(temporary: Path, path: Path) -> None:
    """Rename into place; an older folder there is moved out of the way first, and deleted last."""
    old = None
    if path.exists():
        old = path.parent / f".tmp-old-{uuid.uuid4().hex[:8]}"
        path.rename(old)
    temporary.rename(path)
    _fsync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _delete(path: Path) -> None:
    """Delete a checkpoint so that half of it is never taken for a whole one."""
    trash = path.parent / f".tmp-old-{uuid.uuid4().hex[:8]}"
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _verify_manifest(folder: Path) -> None:
    manifest = _read_json(folder / MANIFEST_NAME)
    files = manifest.get("files")
    if not isinstance(files, list) or not files:
        raise CheckpointError(f"its {MANIFEST_NAME} lists no files")
    for file in files:
        name = str(file.get("name"))
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != file.get("size"):
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes instead of {file.get('size')}")
        if sha256_of_file(path) != file.get("sha256"):
            raise CheckpointError(f"{name} is damaged (its SHA-256 differs from the manifest's)")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path.name} is not valid JSON") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path.name} does not hold a JSON object")
    return raw


def _fsync(path: Path) -> None:
    """Put a file or a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"

"""Models by name. A base model is the name of a folder under one of the configured roots, or the name of a tuned model
or of a checkpoint, or, where allowed, an id of the Hugging Face hub. A request never holds a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import checkpoint_names, reads
from jobs.db import Database
from jobs.errors import InvalidRequestError, NotFoundError
from jobs.owner import Owner
from jobs.settings import JobsSettings

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# A configuration has a few KB; the largest on record list quantised layers and have 500.
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files come from: a folder here, or (exactly one of the two) the hub."""

    path: Path | None = None
    hub_id: str | None = None


def resolve_model(db: Database, settings: JobsSettings, *, owner: Owner, name: str) -> ModelSource:
    """Find the model that a request names.

    Raises:
        InvalidRequestError: no such model (`model_not_found`), or its folder holds no model (`invalid_model`).
    """
    if name.startswith("ft:"):
        path = _find_tuned(db, owner=owner, name=name)
        if path is not None:
            folder = settings.data_dir / path
            if not folder.is_dir():
                raise InvalidRequestError(
                    f"The folder of the model {name!r} is no longer on this server: take another model, or bring "
                    f"{folder} back.",
                    code="model_not_found",
                    param="model",
                )
            _check_folder(folder, name)
            return ModelSource(path=folder)
    elif _NAME.fullmatch(name) and ".." not in name:
        for root in settings.base_model_roots:
            folder = (root / name).resolve()
            if folder.is_dir() and folder.is_relative_to(root.resolve()):
                _check_folder(folder, name)
                return ModelSource(path=folder)
        if settings.allows_hub_model(name):
            return ModelSource(hub_id=name)
    raise InvalidRequestError(
        f"The model {name!r} does not exist. GET /v1/models lists the models of this server.",
        code="model_not_found",
        param="model",
    )


def resolve_served_model(db: Database, settings: JobsSettings, *, owner: Owner, name: str) -> Path:
    """Find the folder of a model that can answer: a base model of this server, a tuned one, or a checkpoint.

    Raises:
        NotFoundError: there is none, or its files are not here (a model that only the hub has, a pruned checkpoint).
        InvalidRequestError: its folder holds no model.
    """
    try:
        folder = resolve_model(db, settings, owner=owner, name=name).path
    except InvalidRequestError as error:
        if error.code != "model_not_found":
            raise
        raise NotFoundError(error.message, code=error.code, param="model") from error
    if folder is None or not folder.is_dir():
        raise NotFoundError(
            f"The files of {name!r} are not on this server: only what lies in its folders can be used like this.",
            code="model_not_found",
            param="model",
        )
    return folder


def _find_tuned(db: Database, *, owner: Owner, name: str) -> str | None:
    """Where a tuned model, or a checkpoint by the name of one, lies below the data folder.

    Raises:
        InvalidRequestError: the checkpoint's job is known, but has replaced the checkpoint by newer ones.
    """
    tuned = reads.find_model(db, owner=owner, model_id=name)
    if tuned is not None:
        return tuned.path
    found = checkpoint_names.find(db, owner=owner, name=name)
    if found is None:
        return None
    if found.path is None:
        raise InvalidRequestError(
            f"The checkpoint {name!r} is gone: its job keeps the newest ones only. "
            f"GET /v1/fine_tuning/jobs/{found.job_id}/checkpoints lists them.",
            code="model_not_found",
            param="model",
        )
    return found.path


def read_config(folder: Path, *, name: str) -> bytes:
    """The `config.json` of a model's folder, for planning its memory.

    Raises:
        InvalidRequestError: it cannot be read, or is too large to be one.
    """
    try:
        with (folder / "config.json").open("rb") as stream:
            raw = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidRequestError(
            f"The folder of {name} holds no readable config.json.", code="invalid_model", param="model"
        ) from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidRequestError(
            f"The config.json of {name} has more than {MAX_CONFIG_BYTES} bytes.", code="invalid_model", param="model"
        )
    return raw


def base_models(settings: JobsSettings) -> Iterator[tuple[str, Path]]:
    """Every base model by name, the first root winning where two hold the same name."""
    seen: set[str] = set()
    for root in settings.base_model_roots:
        if not root.is_dir():
            continue
        for config in sorted((*root.glob("*/config.json"), *root.glob("*/*/config.json"))):
            name = config.parent.relative_to(root).as_posix()
            if name not in seen and _NAME.fullmatch(name):
                seen.add(name)
                yield name, config.parent


def _check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be a model; the engine looks closer before it loads anything."""
    missing = None
    if not (folder / "config.json").is_file():
        missing = "config.json"
    elif not any(folder.glob("*.safetensors")):
        missing = "weights in *.safetensors"
    if missing is not None:
        raise InvalidRequestError(
            f"The folder of the model {name!r} holds no {missing}: put a complete Hugging Face model folder there.",
            code="invalid_model",
            param="model",
        )

"""Settings that every process of the service shares, read once from `LOMO_*` environment variables.

Server and worker each extend this class by their own. Nothing else in the service reads the environment.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from jobs.storage import is_installed

# A bucket's name as S3 has them, and a prefix without anything that a URL would have to escape.
_STORAGE_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_.=-]+)*")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""A model's id on the Hugging Face hub: owner and name."""

Settings = TypeVar("Settings", bound=BaseSettings)


class SettingsError(Exception):
    """The environment lacks a setting or holds a wrong one; the text names the variables."""


class JobsSettings(BaseSettings):
    """Where the truth, the doorbell and the files are, and how long a lease lasts."""

    model_config = SettingsConfigDict(env_prefix="LOMO_", frozen=True)

    database_url: str
    """SQLAlchemy URL of Postgres with the psycopg driver: `postgresql+psycopg://user:password@host/database`."""
    broker_url: str
    """Celery's broker: `redis://host:6379/0` or `redis+socket:///path/vk.sock?virtual_host=0`."""
    data_dir: Path
    """Uploaded files (unless a store keeps them), run folders and tuned models; shared between server and workers."""
    storage_url: str = ""
    """`s3://bucket` or `s3://bucket/prefix`: the object store that keeps the bytes of files. Empty: `data_dir` does."""
    model_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Colon-separated folders that hold base models, one folder each; `data_dir/models` is always one."""
    hub_models: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated ids of the Hugging Face hub that may be named as a base and are then downloaded by the worker:
    `owner/name`, `owner/*` for all of an owner's, `*` for any. Empty: none."""
    admin_key_file: Path | None = None
    """Where `python -m jobs migrate` writes the first API key (mode 0600) if nobody has one to administer with."""

    lease_s: float = Field(default=60.0, gt=0)
    """How long a claim holds without a renewal."""
    lease_grace_s: float = Field(default=15.0, ge=0)
    """How long past its end a lease is left alone before the job is requeued."""
    heartbeat_s: float = Field(default=10.0, gt=0)
    """Interval of lease renewals; at most a third of `lease_s`, so that one lost renewal is harmless."""
    reap_every_s: float = Field(default=5.0, gt=0)
    """Interval of the reaper, which also rings for queued jobs whose message was lost."""
    max_failures: int = Field(default=3, ge=1)
    """Lost workers and killed engines a job may see before it fails."""
    retry_backoff_s: float = Field(default=2.0, ge=0)
    """Wait before the first retry after a killed engine or a lost worker; doubles with each further one."""

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return tuple(Path(part) for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("hub_models", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("hub_models")
    @classmethod
    def _are_hub_ids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            # What stands for all of an owner's names is looked at with one of them.
            if name != "*" and not HUB_ID.fullmatch(re.sub(r"/\*$", "/x", name)):
                raise ValueError(f"{name!r} is none of owner/name, owner/* and *")
        return value

    @field_validator("storage_url")
    @classmethod
    def _can_be_used(cls, value: str) -> str:
        if not value:
            return value
        url = value.rstrip("/")
        if not _STORAGE_URL.fullmatch(url):
            raise ValueError("must be s3://bucket or s3://bucket/prefix, or empty for the data folder")
        if not is_installed():
            raise ValueError("needs the library for S3: pip install 'lomo-server[s3]'")
        return url

    def allows_hub_model(self, name: str) -> bool:
        """Whether a name is an id of the hub that may be named as a base."""
        owner = name.partition("/")[0]
        return HUB_ID.fullmatch(name) is not None and not {name, f"{owner}/*", "*"}.isdisjoint(self.hub_models)

    @property
    def named_hub_models(self) -> tuple[str, ...]:
        """Those of the hub that are allowed by their whole name, and so can be listed."""
        return tuple(name for name in self.hub_models if not name.endswith("*"))

    @property
    def base_model_roots(self) -> tuple[Path, ...]:
        """Every folder whose sub-folders are base models by name."""
        return (self.data_dir / "models", *self.model_roots)

    @property
    def files_dir(self) -> Path:
        """Uploaded files, named by their ids."""
        return self.data_dir / "files"

    @property
    def uploads_dir(self) -> Path:
        """One folder per pending upload, with its parts."""
        return self.data_dir / "uploads"

    @property
    def runs_dir(self) -> Path:
        """One folder per job, one below it per attempt."""
        return self.data_dir / "runs"


def load_settings(cls: type[Settings]) -> Settings:
    """Read a process's settings from its environment.

    Raises:
        SettingsError: a variable is missing or wrong.
    """
    try:
        return cls()
    except ValidationError as error:
        lines = [f"LOMO_{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in error.errors()]
        raise SettingsError("the settings are not complete:\n  " + "\n  ".join(lines)) from error

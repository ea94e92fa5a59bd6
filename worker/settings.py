"""Settings of the worker, beside those it shares with the server: which host it is and how it treats its engines."""

from __future__ import annotations

import shlex
import socket
import sys
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from jobs.settings import JobsSettings


class WorkerSettings(JobsSettings):
    """One worker serves one host; two hosts have two names."""

    worker_name: str = Field(
        default_factory=socket.gethostname, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", strict=True
    )
    """The host's name, as users see it and as leases hold it (before a slash, hence none in it)."""
    slots: int = Field(default=1, ge=1, le=64)
    """Jobs at once. They share the host's device, so more than one is for small models on a large one."""
    heartbeat_s: float = Field(default=2.0, gt=0)
    """As for every process, but shorter here, because it is also how late a cancel is seen."""
    stop_grace_s: float = Field(default=50.0, ge=0)
    """Time an engine has between SIGTERM and SIGKILL to write its checkpoint. Below the 60 s after which `lomo up` and
    compose kill the worker itself, so that the job can still be given back."""
    pause_grace_s: float = Field(default=600.0, ge=0)
    """The same for a job that is to be paused, where nobody is in a hurry and the checkpoint is all that matters:
    30 GB at 100 MB/s, slow for a disk, take 300 s."""
    ship_every_s: float = Field(default=0.2, gt=0)
    """Interval in which the engine's journal is read: what a live log lags behind. A batch costs about 5 ms."""
    measure_every_s: float = Field(default=60.0, gt=0)
    """Interval in which an idle host measures its device's free memory anew. No job is claimed meanwhile, and a driver
    that has to wake the card takes seconds."""
    chat_idle_s: float = Field(default=60.0, ge=0)
    """How long a model that answers chats stays loaded after its last one."""
    storage_patience_s: float = Field(default=300.0, ge=0)
    """How long a worker waits for an object store that does not answer, before the attempt at the job counts as
    failed. As an attempt that dies is repeated twice, an outage of 15 minutes fails no run."""
    engine_command: Annotated[tuple[str, ...], NoDecode] = (sys.executable, "-m", "lomo_core")
    """How the engine is started, as a shell would split it: for one in another environment, or below a profiler."""
    engine_threads: int | None = Field(default=None, ge=1)
    """CPU threads of an engine; None leaves it to PyTorch (all cores)."""

    wandb_mode: Literal["off", "offline", "online"] = "offline"
    """What becomes of jobs that ask for Weights & Biases. Offline: a run folder in the job's folder, for `wandb sync`.
    Online needs WANDB_API_KEY in the worker's environment."""
    mlflow_tracking_uri: str = ""
    """Where MLflow is told of every job; empty: nowhere."""
    mlflow_experiment: str = Field(default="lomo", min_length=1, max_length=256)
    """MLflow's name for what holds the runs."""

    @field_validator("heartbeat_s")
    @classmethod
    def _fits_the_lease(cls, value: float, info: ValidationInfo) -> float:
        lease_s = info.data.get("lease_s")
        if lease_s is not None and 3 * value > lease_s:
            raise ValueError(f"must be at most a third of LOMO_LEASE_S, which is {lease_s:g}, and not {value:g}")
        return value

    @field_validator("engine_command", mode="before")
    @classmethod
    def _split_command(cls, value: object) -> object:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

"""Settings of the server's process, on top of those that it shares with the workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from jobs.settings import JobsSettings


class ServerSettings(JobsSettings):
    """Where the server listens, whom it answers, and how much it takes on at once."""

    server_host: str = "127.0.0.1"
    """Address to listen on; `0.0.0.0` for every interface, behind a proxy that speaks TLS."""
    server_port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Comma-separated names in the Host header that are answered besides localhost; `*` for every name."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    database_pool_size: int = Field(default=10, ge=1)
    """Connections to Postgres kept open; five more may be opened under load."""
    max_connections: int = Field(default=1500, ge=1)
    """Open connections beyond which new ones are answered 503; above `max_streams`, so that streams leave room."""
    requests_per_minute: int = Field(default=6000, ge=1)
    """Requests of one API key; so many at once, too. 100 a second are far more than a client needs."""
    failed_logins_per_minute: int = Field(default=120, ge=1)
    """Requests of one address with a key that is not valid, beyond which it is answered 429. Nobody can guess a key;
    this keeps who tries from costing a query each time."""
    max_streams: int = Field(default=1000, ge=1)
    """Open event streams in all (500 on one process were measured at 139 MB and 52 ms median latency)."""
    max_streams_per_key: int = Field(default=100, ge=1)
    """Open event streams of one API key."""
    max_upload_bytes: int = Field(default=8 * 2**30, ge=1)
    """Size of a file that is uploaded in parts (8 GB are OpenAI's); while it is joined it needs twice that on disk."""
    webhook_private_addresses: bool = False
    """Whether webhooks may go to private addresses and by plain http: only where every tenant may reach what this
    server can."""
    data_checks: bool = True
    """Whether a worker looks through the files of a job before it is queued. Without, a wrong row is found by the run
    itself, after its model has been loaded."""
    integrations: Annotated[tuple[Literal["wandb"], ...], NoDecode] = ("wandb",)
    """Comma-separated types of integrations that a job may ask for. Empty: none, so that no figures leave the house."""
    server_stop_grace_s: int = Field(default=5, ge=1)
    """How long requests may take to end when the server is told to stop; streams end at once."""

    @field_validator("allowed_hosts", "integrations", mode="before")
    @classmethod
    def _split_lists(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

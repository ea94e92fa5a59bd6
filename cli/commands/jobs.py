"""`lomo jobs`: create, clone, watch and end fine-tuning jobs; what else can be done to them: `job_control.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.auto import command_with_switches
from cli.client import ApiClient, Json
from cli.errors import UsageError
from cli.follow import SUCCEEDED, Follower, describe_end
from cli.job_options import (
    SWITCHES,
    given_values,
    option_parameters,
    parse_engine_options,
    parse_metadata,
    place_values,
    read_config,
)
from cli.output import (
    NOTHING,
    format_age,
    format_bytes,
    format_number,
    format_seconds,
    format_time,
    say,
    write_fields,
    write_json,
    write_json_line,
    write_table,
)
from cli.session import Session, with_parameters, with_session
from cli.sse import Patience, iterate
from cli.upload import resolve_file
from cli.view import event_line

JOBS = "/fine_tuning/jobs"
"""Below `/v1`."""

_TABLE_POINTS = 20  # fits a screen
_INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="Like ftjob-...")]
Limit = Annotated[int, typer.Option(min=1, help="How many at most.")]


@dataclass(frozen=True, slots=True)
class BodyOptions:
    """What `jobs create` was given about the job itself."""

    model: str | None
    training_file: str | None
    validation_file: str | None
    metadata: list[str]
    lomo: list[str]
    config: Path | None
    table: dict[str, Any]
    """Values of `cli.job_options.JOB_OPTIONS`."""

    def make_body(self, client: ApiClient, *, required: Sequence[str] = ("model", "training_file")) -> Json:
        """Build the request's body; files given by their paths are uploaded, last, when all else is known to be right.

        Raises:
            UsageError: something is missing or cannot be read.
        """
        named = {"model": self.model, "training_file": self.training_file, "validation_file": self.validation_file}
        values: list[tuple[tuple[str, ...], Any]] = [((key,), text) for key, text in named.items() if text is not None]
        values += given_values(self.table)
        values += parse_engine_options(self.lomo)
        values += [(("metadata", key), text) for key, text in parse_metadata(self.metadata).items()]
        body = place_values(read_config(self.config) if self.config else {}, values)
        for name in required:
            if not body.get(name):
                raise UsageError(f"a job needs --{name.replace('_', '-')} (or {name!r} in the file of --config)")
        for name in ("training_file", "validation_file"):
            if isinstance(body.get(name), str):
                body[name] = resolve_file(client, body[name])
        return body


def _with_body_options(command: Callable[..., None]) -> Callable[..., None]:
    return with_parameters(command, option_parameters(), argument="table", build=lambda values: values)


@app.command("create", cls=command_with_switches(*SWITCHES))
@with_session
@_with_body_options
def create_job(  # noqa: PLR0913 - an argument table
    *,
    model: Annotated[str | None, typer.Option(help="Base or fine-tuned model to start from.")] = None,
    training_file: Annotated[
        str | None, typer.Option(metavar="ID|PATH", help="A file's id, or a path: then it is uploaded first.")
    ] = None,
    validation_file: Annotated[str | None, typer.Option(metavar="ID|PATH", help="Likewise.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Repeatable.")] = None,
    lomo: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any engine option, e.g. clip.mode=none. Repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="The request's body; options win over it.")
    ] = None,
    follow: Annotated[bool, typer.Option(help="Stay until the job has ended, and show its progress.")] = False,
    table: dict[str, Any],
    session: Session,
) -> None:
    """Create a job; its id is printed. With --follow the exit code is 0 only if the job succeeds."""
    options = BodyOptions(model, training_file, validation_file, metadata or [], lomo or [], config, table)
    with session.connect() as client:
        _tell_created(client, client.post(JOBS, options.make_body(client)), session, follow=follow)


@app.command("clone", cls=command_with_switches(*SWITCHES))
@with_session
@_with_body_options
def clone_job(  # noqa: PLR0913 - an argument table
    job_id: JobId,
    *,
    model: Annotated[str | None, typer.Option(help="Another model to start from.")] = None,
    training_file: Annotated[str | None, typer.Option(metavar="ID|PATH", help="Other data.")] = None,
    validation_file: Annotated[str | None, typer.Option(metavar="ID|PATH", help="Likewise.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="In place of the job's.")] = None,
    lomo: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any engine option. Repeatable.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="What changes, as a request's body; options win over it.")
    ] = None,
    follow: Annotated[bool, typer.Option(help="Stay until the job has ended, and show its progress.")] = False,
    table: dict[str, Any],
    session: Session,
) -> None:
    """Create a job like another one, its seed included, but for the options given here; its id is printed."""
    options = BodyOptions(model, training_file, validation_file, metadata or [], lomo or [], config, table)
    with session.connect() as client:
        job = client.post(f"{JOBS}/{job_id}/clone", options.make_body(client, required=()))
        _tell_created(client, job, session, follow=follow)


def _tell_created(client: ApiClient, job: Json, session: Session, *, follow: bool) -> None:
    if not session.is_json:
        typer.echo(job["id"])
    elif not follow:
        write_json(job)
    if follow:
        _follow(client, job["id"], session)
    elif not session.is_json:
        say(f"Created. See it run: lomo jobs follow {job['id']}")


@app.command("list")
@with_session
def list_jobs(*, limit: Limit = 20, session: Session) -> None:
    """List jobs, newest first."""
    with session.connect() as client:
        page = client.list(JOBS, limit=limit)
    if session.is_json:
        write_json(page)
        return
    rows = [
        (job["id"], job["status"], _progress(job), format_age(job["created_at"]), job["model"]) for job in page["data"]
    ]
    write_table(("ID", "STATUS", "STEP", "CREATED", "MODEL"), rows, whole=("ID", "STATUS", "STEP"))
    if page["has_more"]:
        say(f"There are more: --limit {limit * 5} shows them.")


@app.command("get")
@with_session
def get_job(job_id: JobId, *, session: Session) -> None:
    """Show one job."""
    with session.connect() as client:
        job = client.get(f"{JOBS}/{job_id}")
    if session.is_json:
        write_json(job)
    else:
        write_fields(_fields(job))


@app.command("cancel")
@with_session
def cancel_job(job_id: JobId, *, session: Session) -> None:
    """Cancel a job; a running one ends within seconds."""
    with session.connect() as client:
        job = client.post(f"{JOBS}/{job_id}/cancel")
    if session.is_json:
        write_json(job)
        return
    typer.echo(job["id"])
    say("Cancelled." if job["status"] == "cancelled" else "Its worker has been asked to stop.")


@app.command("events")
@with_session
def list_events(
    job_id: JobId,
    *,
    limit: Limit = 100,
    follow: Annotated[bool, typer.Option(help="All of them, and go on until the job has ended.")] = False,
    session: Session,
) -> None:
    """Show a job's newest events, oldest first; as JSON with --follow, one per line."""
    with session.connect() as client:
        if follow:
            for frame in iterate(client, f"{JOBS}/{job_id}/events?stream=true", Patience(on_wait=say)):
                event = json.loads(frame.data)
                write_json_line(event) if session.is_json else typer.echo(event_line(event))
            return
        page = client.list(f"{JOBS}/{job_id}/events", limit=limit)
    if session.is_json:
        write_json(page)
        return
    for event in reversed(page["data"]):
        typer.echo(event_line(event))


@app.command("checkpoints")
@with_session
def list_checkpoints(job_id: JobId, *, limit: Limit = 20, session: Session) -> None:
    """List a job's checkpoints, newest first."""
    with session.connect() as client:
        page = client.list(f"{JOBS}/{job_id}/checkpoints", limit=limit)
    if session.is_json:
        write_json(page)
        return
    rows = [
        (
            item["id"],
            str(item["step_number"]),
            format_number(item["metrics"].get("train_loss")),
            format_number(item["metrics"].get("valid_loss")),
            format_age(item["created_at"]),
            item["fine_tuned_model_checkpoint"],
        )
        for item in page["data"]
    ]
    write_table(("ID", "STEP", "LOSS", "VALID LOSS", "CREATED", "MODEL"), rows)


@app.command("metrics")
@with_session
def show_metrics(
    job_id: JobId,
    *,
    max_points: Annotated[
        int | None, typer.Option(min=1, max=2000, help="Steps are thinned out to so many: 20, as JSON 1000.")
    ] = None,
    session: Session,
) -> None:
    """Show a job's figures by step: loss, learning rate, speed, memory."""
    points = max_points or (None if session.is_json else _TABLE_POINTS)
    with session.connect() as client:
        body = client.get(f"{JOBS}/{job_id}/metrics", {"max_points": points})
    if session.is_json:
        write_json(body)
        return
    columns = body["columns"]
    names = ("loss", "mean_token_accuracy", "learning_rate", "grad_norm", "tokens_per_s")
    rows = [
        (
            str(step),
            *(format_number(columns[name][index]) for name in names),
            format_bytes(columns["peak_bytes"][index]),
        )
        for index, step in enumerate(columns["step"])
    ]
    write_table(("STEP", "LOSS", "ACCURACY", "RATE", "GRAD NORM", "TOKENS/S", "PEAK"), rows, whole=())


@app.command("follow")
@with_session
def follow_job(job_id: JobId, *, session: Session) -> None:
    """Show a job's progress until it has ended; the exit code is 0 only if it succeeded.

    Ctrl-C ends the watching, not the job.
    """
    with session.connect() as client:
        job = _follow(client, job_id, session)
    if not session.is_json:
        typer.echo(job["fine_tuned_model"])


def _follow(client: ApiClient, job_id: str, session: Session) -> Json:
    """Follow a job to its end and return it.

    Raises:
        typer.Exit: it did not succeed (1), or Ctrl-C was pressed (130).
    """
    try:
        job = Follower(client, job_id).run()
    except KeyboardInterrupt as error:
        say(f"\nThe job goes on.\n  Watch again:  lomo jobs follow {job_id}\n  End it:       lomo jobs cancel {job_id}")
        raise typer.Exit(_INTERRUPTED) from error
    if session.is_json:
        write_json(job)
    say(describe_end(job))
    if job["status"] != SUCCEEDED:
        raise typer.Exit(1)
    return job


def _status(job: Json) -> str:
    lomo = job.get("lomo") or {}
    asked = [what for what in ("cancel", "pause") if lomo.get(f"{what}_requested")]
    return f"{job['status']} ({asked[0]} requested)" if asked else str(job["status"])


def _progress(job: Json) -> str:
    lomo = job.get("lomo") or {}
    total = lomo.get("total_steps")
    return f"{lomo.get('step') or 0}/{total}" if total else NOTHING


def _fields(job: Json) -> list[tuple[str, str]]:
    lomo = job.get("lomo") or {}
    error = job.get("error") or {}
    memory = lomo.get("memory") or {}
    fields = {
        "id": job["id"],
        "status": _status(job),
        "error": error.get("message"),
        "model": job["model"],
        "fine-tuned model": job["fine_tuned_model"],
        "model folder": lomo.get("model_path"),
        "training file": job["training_file"],
        "validation file": job.get("validation_file"),
        "created": format_time(job["created_at"]),
        "started": format_time(lomo.get("started_at")),
        "finished": format_time(job.get("finished_at")),
        "host": lomo.get("host"),
        "attempt": lomo.get("attempt"),
        "place in queue": lomo.get("queue_position"),
        "waiting for": lomo.get("waiting_for"),
        "hyperparameters": _pairs(job["hyperparameters"]),
        "optimizer": _pairs({key: lomo.get(key) for key in ("optimizer", "learning_rate", "schedule", "precision")}),
        "chosen by plan": _chosen(job),
        "seed": job["seed"],
        "step": _progress(job),
        "loss": format_number(lomo.get("loss")),
        "speed": f"{lomo['tokens_per_second']:,.0f} tokens/s" if lomo.get("tokens_per_second") else None,
        "time left": format_seconds(lomo.get("eta_s")),
        "planned peak": format_bytes(memory.get("planned_peak_bytes")),
        "measured peak": _measured(memory),
        "evaluations": _evaluations(lomo.get("evaluations") or []),
        "weights sha256": lomo.get("weights_sha256"),
        "metadata": _pairs(job.get("metadata") or {}),
    }
    return [(name, str(value)) for name, value in fields.items() if value not in {None, "", NOTHING}]


def _measured(memory: Json) -> str:
    """The measured peak, and what share of it was planned."""
    planned, measured = memory.get("planned_peak_bytes"), memory.get("measured_peak_bytes")
    ratio = f" (planned / measured {planned / measured:.2f})" if planned and measured else ""
    return f"{format_bytes(measured)}{ratio}"


def _chosen(job: Json) -> str:
    """The options that were given as "auto", with the values that the plan has chosen."""
    values = {**job["hyperparameters"], **(job.get("lomo") or {})}
    return _pairs({name: _plain(values.get(name)) for name in values.get("auto") or []})


def _plain(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _pairs(values: Json) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)


def _evaluations(evaluations: list[Json]) -> str:
    """One line per evaluation: its step and the figures it has."""
    names = {"valid_loss": "loss", "valid_mean_token_accuracy": "token accuracy", "choice_accuracy": "choice accuracy"}
    return "\n".join(
        f"step {item['step']}: "
        + ", ".join(f"{name} {item[key]:.3f}" for key, name in names.items() if item.get(key) is not None)
        for item in evaluations
    )

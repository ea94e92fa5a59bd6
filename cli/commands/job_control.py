"""More of `lomo jobs` (pause, resume, delete, logs), and `lomo queue`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cli.client import Json
from cli.commands.jobs import JOBS, JobId, Limit, app
from cli.output import (
    NOTHING,
    format_bytes,
    format_time,
    printable,
    say,
    write_json,
    write_json_line,
    write_table,
)
from cli.session import Session, with_session
from cli.sse import Patience, iterate


@app.command("pause")
@with_session
def pause_job(job_id: JobId, *, session: Session) -> None:
    """Pause a job; a running one leaves a checkpoint, and its slot, within seconds."""
    with session.connect() as client:
        job = client.post(f"{JOBS}/{job_id}/pause")
    if session.is_json:
        write_json(job)
        return
    typer.echo(job["id"])
    say("Paused." if job["status"] == "paused" else "Its worker has been asked to pause it.")


@app.command("resume")
@with_session
def resume_job(job_id: JobId, *, session: Session) -> None:
    """Let a paused job go on from its last checkpoint."""
    with session.connect() as client:
        job = client.post(f"{JOBS}/{job_id}/resume")
    if session.is_json:
        write_json(job)
        return
    typer.echo(job["id"])
    say("Queued." if job["status"] == "queued" else "The pause was taken back: the job goes on.")


@app.command("delete")
@with_session
def delete_job(job_id: JobId, *, session: Session) -> None:
    """Delete a job that has ended, with its models and all that is known of it; its id is printed."""
    with session.connect() as client:
        result = client.delete(f"{JOBS}/{job_id}")
    if session.is_json:
        write_json(result)
        return
    typer.echo(result["id"])
    say(f"Deleted: {format_bytes(result['bytes_freed'])} are free again.")


@app.command("logs")
@with_session
def show_logs(
    job_id: JobId,
    *,
    limit: Limit = 100,
    follow: Annotated[bool, typer.Option(help="All of it, and go on until the job has ended.")] = False,
    session: Session,
) -> None:
    """Show the last lines that a job's engine printed; as JSON with --follow, one object per line."""
    with session.connect() as client:
        if follow:
            for frame in iterate(client, f"{JOBS}/{job_id}/logs?stream=true", Patience(on_wait=say)):
                line = json.loads(frame.data)
                write_json_line(line) if session.is_json else typer.echo(_plain(line))
            return
        page = client.list(f"{JOBS}/{job_id}/logs", limit=limit)
    if session.is_json:
        write_json(page)
        return
    for line in reversed(page["data"]):
        typer.echo(_plain(line))


@with_session
def show_queue(*, limit: Limit = 100, session: Session) -> None:
    """Show your queued jobs: their places, and when they may start."""
    with session.connect() as client:
        queue = client.get("/queue", {"limit": min(limit, 1000)})
    if session.is_json:
        write_json(queue)
        return
    rows = [
        (
            str(item["position"]),
            item["job_id"],
            str(item["jobs_ahead"]),
            format_time(item["predicted_start"]),
            item["waiting_for"] or NOTHING,
        )
        for item in queue["data"]
    ]
    write_table(("PLACE", "ID", "AHEAD", "STARTS", "WAITS FOR"), rows, whole=("PLACE", "ID", "STARTS"))
    say(f"{queue['num_queued']} queued and {queue['num_running']} running, of all organizations.")


def _plain(line: Json) -> str:
    return printable(line["text"].expandtabs())

"""`lomo files`: data sets on the server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.download import save
from cli.output import format_age, format_bytes, format_time, say, write_fields, write_json, write_table
from cli.session import Session, with_session
from cli.upload import upload

app = typer.Typer(no_args_is_help=True, help="Data sets and results.")

FileId = Annotated[str, typer.Argument(metavar="FILE_ID", help="Like file-...")]


@app.command("upload")
@with_session
def upload_file(
    path: Annotated[Path, typer.Argument(help="JSON lines, one training example per line.")],
    *,
    purpose: Annotated[str, typer.Option(help="What the file is for.")] = "fine-tune",
    session: Session,
) -> None:
    """Upload a file; its id is printed."""
    with session.connect() as client:
        file = upload(client, path, purpose=purpose)
    if session.is_json:
        write_json(file)
    else:
        typer.echo(file["id"])


@app.command("list")
@with_session
def list_files(
    *,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    purpose: Annotated[str | None, typer.Option(help="Only those with this purpose.")] = None,
    session: Session,
) -> None:
    """List files, newest first."""
    with session.connect() as client:
        page = client.list("/files", limit=limit, query={"purpose": purpose})
    if session.is_json:
        write_json(page)
        return
    rows = [
        (item["id"], item["filename"], format_bytes(item["bytes"]), item["purpose"], format_age(item["created_at"]))
        for item in page["data"]
    ]
    write_table(("ID", "FILENAME", "SIZE", "PURPOSE", "CREATED"), rows)


@app.command("get")
@with_session
def get_file(file_id: FileId, *, session: Session) -> None:
    """Show one file."""
    with session.connect() as client:
        file = client.get(f"/files/{file_id}")
    if session.is_json:
        write_json(file)
        return
    names = ("id", "filename", "purpose", "status")
    write_fields(
        [
            *((name, str(file[name])) for name in names),
            ("size", format_bytes(file["bytes"])),
            ("created", format_time(file["created_at"])),
        ]
    )


@app.command("content")
@with_session
def get_content(
    file_id: FileId,
    *,
    to: Annotated[Path | None, typer.Option(metavar="PATH", help="Write here instead of to stdout.")] = None,
    session: Session,
) -> None:
    """Download a file's bytes, to stdout unless --to says otherwise."""
    with session.connect() as client:
        chunks = client.download(f"/files/{file_id}/content")
        if to is None:
            for chunk in chunks:
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            return
        save(chunks, to)
    say(f"Wrote {to}.")


@app.command("delete")
@with_session
def delete_file(file_id: FileId, *, session: Session) -> None:
    """Delete a file; its id is printed."""
    with session.connect() as client:
        result = client.delete(f"/files/{file_id}")
    if session.is_json:
        write_json(result)
    else:
        typer.echo(result["id"])

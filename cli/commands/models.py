"""`lomo models`: what a job can start from."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.output import format_age, write_fields, write_json, write_table
from cli.session import Session, with_session

app = typer.Typer(no_args_is_help=True, help="Base models and fine-tuned models.")


@app.command("list")
@with_session
def list_models(*, session: Session) -> None:
    """List the models that a job can be created from."""
    with session.connect() as client:
        page = client.get("/models")
    if session.is_json:
        write_json(page)
        return
    rows = [(item["id"], item["owned_by"], format_age(item["created"])) for item in page["data"]]
    write_table(("ID", "OWNED BY", "CREATED"), rows)


@app.command("get")
@with_session
def get_model(model: Annotated[str, typer.Argument(help="Its id.")], *, session: Session) -> None:
    """Show one model."""
    with session.connect() as client:
        found = client.get(f"/models/{model}")
    if session.is_json:
        write_json(found)
    else:
        write_fields([(name, str(value)) for name, value in found.items()])

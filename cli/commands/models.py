"""`lomo models`: what a job can start from; and `lomo export`, which takes a tuned model away."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.download import save
from cli.output import format_age, say, write_fields, write_json, write_table
from cli.session import Session, with_session


class ExportFormat(StrEnum):
    """What a model is taken away as."""

    TAR = "tar"
    GGUF = "gguf"


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


@app.command("delete")
@with_session
def delete_model(model: Annotated[str, typer.Argument(help="Its id, like ft:...")], *, session: Session) -> None:
    """Delete a fine-tuned model and its files; its id is printed."""
    with session.connect() as client:
        result = client.delete(f"/models/{model}")
    if session.is_json:
        write_json(result)
    else:
        typer.echo(result["id"])


def export_model(
    model: Annotated[str, typer.Argument(help="A tuned model (ft:...) or a checkpoint.")],
    *,
    form: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.TAR,
    to: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The file to write.  [default: model.tar or model.gguf]")
    ] = None,
    session: Session,
) -> None:
    """Download a tuned model: as a tar of its Hugging Face folder, or as one GGUF file.

    After `tar xf model.tar`, the folder `model` is what `vllm serve model` takes; `llama-cli -m model.gguf` takes the
    GGUF file.
    """
    path = to or Path(f"model.{form.value}")
    with session.connect() as client:
        save(client.download(f"/models/{model}/export?format={form.value}"), path)
    say(f"Wrote {path}.")

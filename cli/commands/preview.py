"""`lomo preview`: one row of an uploaded file as a run would see it, its trained parts marked."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any

import typer

from cli.client import Query
from cli.output import printable, write_fields, write_json
from cli.session import Session


def preview(
    file_id: Annotated[str, typer.Argument(metavar="FILE_ID", help="Like file-...")],
    *,
    model: Annotated[str, typer.Option(help="The model whose chat template and tokenizer are used.")],
    row: Annotated[int, typer.Option(min=1, help="Which row, from 1.")] = 1,
    max_seq_length: Annotated[int, typer.Option(min=8, help="Tokens of the longest row.")] = 512,
    train_on: Annotated[str, typer.Option(help="assistant or all.")] = "assistant",
    session: Session,
) -> None:
    """Show one row of a file as a run would see it: what is between >> and << is what is learnt."""
    query: Query = {"model": model, "row": row, "max_seq_length": max_seq_length, "train_on": train_on}
    with session.connect() as client:
        shown = client.get(f"/files/{file_id}/preview", query)
    if session.is_json:
        write_json(shown)
        return
    cut = " (its beginning is cut)" if shown["is_truncated"] else ""
    write_fields(
        [
            ("place", f"{shown['where']} of {file_id}"),
            ("format", shown["format"]),
            ("tokens", f"{shown['num_tokens']}, {shown['num_trained']} of them trained{cut}"),
        ]
    )
    typer.echo(printable(mark(shown["tokens"])))


def mark(tokens: list[dict[str, Any]]) -> str:
    """The text of tokens, with marks around what is trained."""
    parts = []
    for is_trained, run in groupby(tokens, key=lambda token: bool(token["trained"])):
        text = "".join(token["text"] for token in run)
        parts.append(f">>{text}<<" if is_trained else text)
    return "".join(parts)

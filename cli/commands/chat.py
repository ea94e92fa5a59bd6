"""`lomo chat`: talk to a model of the server, or to two of them side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import httpx
import typer

from cli.client import ApiClient, Json, unreachable
from cli.errors import ApiError, UnreachableError
from cli.output import printable, say, write_json
from cli.session import Session
from cli.sse import DONE, FrameParser

# Before its first word the server may wait a minute for a worker, and that load a model for five.
_SILENCE_S = 400.0


@dataclass(frozen=True, slots=True)
class _Options:
    """How answers are drawn."""

    max_tokens: int | None
    temperature: float | None
    seed: int | None
    system: str | None

    def body(self, model: str, messages: list[Json]) -> Json:
        """A request for one answer."""
        given = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: Json = {"model": model, "messages": [*system, *messages]}
        return body | {name: value for name, value in given.items() if value is not None}


def chat(  # noqa: PLR0913 - the options of a command
    model: Annotated[str, typer.Argument(help="A base model, a tuned one (ft:...) or a checkpoint.")],
    prompt: Annotated[str | None, typer.Argument(help="What to say; without it, each line of stdin is said.")] = None,
    *,
    beside: Annotated[str | None, typer.Option(metavar="MODEL", help="Ask this model too.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 for the likeliest; 1 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None,
    session: Session,
) -> None:
    """Talk to a model of the server.

    With --beside, the same is asked of a second model and both answers are shown.
    """
    options = _Options(max_tokens, temperature, seed, system)
    models = [model] if beside is None else [model, beside]
    histories: list[list[Json]] = [[] for _ in models]
    with session.connect() as client:
        for text in _prompts(prompt):
            for name, history in zip(models, histories, strict=True):
                history.append({"role": "user", "content": text})
                if session.is_json:
                    answer = client.post("/chat/completions", options.body(name, history))
                    write_json(answer)
                    reply = str(answer["choices"][0]["message"]["content"])
                else:
                    if beside is not None:
                        typer.echo(f"[{printable(name)}]")
                    reply = _say(client, options.body(name, history))
                history.append({"role": "assistant", "content": reply})


def _prompts(prompt: str | None) -> Iterator[str]:
    """The one given, or the lines of stdin; a person at a terminal is shown that it is their turn."""
    if prompt is not None:
        yield prompt
        return
    is_person = sys.stdin.isatty()
    if is_person:
        say("Ctrl-D ends.")
    while True:
        if is_person:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _say(client: ApiClient, body: Json) -> str:
    """Print an answer as it is written, and return it whole."""
    pieces: list[str] = []
    for piece in _pieces(client, body):
        pieces.append(piece)
        # A model may write anything, also what a terminal would take for a command.
        typer.echo(printable(piece.replace("\t", "    ")), nl=False)
    typer.echo("")
    return "".join(pieces)


def _pieces(client: ApiClient, body: Json) -> Iterator[str]:
    """The texts of a stream.

    Raises:
        ApiError: the server refuses, or ends the answer with an error.
        UnreachableError: the connection broke.
    """
    parser = FrameParser()
    with client.stream("/chat/completions", body={**body, "stream": True}, read_timeout_s=_SILENCE_S) as response:
        try:
            for chunk in response.iter_bytes():
                for frame in parser.feed(chunk):
                    if frame.data == DONE:
                        return
                    yield from _texts(json.loads(frame.data))
        except httpx.HTTPError as error:
            raise unreachable(error, client.connection) from error
    raise UnreachableError(f"the server at {client.connection.root_url} broke the answer off")


def _texts(chunk: Json) -> Iterator[str]:
    if error := chunk.get("error"):
        raise ApiError(str(error["message"]), status=200, code=error.get("code"))
    for choice in chunk["choices"]:
        if text := choice["delta"].get("content"):
            yield text

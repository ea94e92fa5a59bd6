"""What every command needs, as options of every command: the server, the key, the form of the output.

`lomo --url X jobs list` and `lomo jobs list --url X` are the same. The options are added to a command's signature, from
which typer reads them, so that no command repeats them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.client import ApiClient
from cli.connection import find_connection
from cli.output import Format

Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The server (else LOMO_URL, OPENAI_BASE_URL)."),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="PATH",
        help="File that holds the API key (else LOMO_API_KEY, LOMO_API_KEY_FILE, OPENAI_API_KEY).",
    ),
]
OutputFormat = Annotated[
    Format | None,
    typer.Option("--output", "-o", help="Form of the data on stdout: table by default."),
]


@dataclass(frozen=True, slots=True)
class Session:
    """One call of the command."""

    url: str | None = None
    api_key_file: Path | None = None
    output: Format | None = None
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_json(self) -> bool:
        """Whether stdout is to hold JSON."""
        return self.output is Format.JSON

    def over(self, outer: Session) -> Session:
        """These options, and where one was not given, that of `outer`."""
        return Session(
            self.url or outer.url, self.api_key_file or outer.api_key_file, self.output or outer.output, outer.env
        )

    @contextmanager
    def connect(self) -> Iterator[ApiClient]:
        """Open a client of the chosen server.

        Raises:
            UsageError: see `find_connection`.
        """
        with ApiClient(find_connection(url=self.url, api_key_file=self.api_key_file, env=self.env)) as client:
            yield client


def with_session(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the options above; it receives them as its keyword argument `session`."""

    def build(values: dict[str, Any]) -> Session:
        context: typer.Context = values.pop("context")
        outer = context.find_root().obj or Session()
        return Session(**values).over(outer)

    parameters = [
        _parameter("context", typer.Context, default=inspect.Parameter.empty),
        _parameter("url", Url),
        _parameter("api_key_file", ApiKeyFile),
        _parameter("output", OutputFormat),
    ]
    return with_parameters(command, parameters, argument="session", build=build)


def with_parameters(
    command: Callable[..., None],
    parameters: Sequence[inspect.Parameter],
    *,
    argument: str,
    build: Callable[[dict[str, Any]], object],
) -> Callable[..., None]:
    """Replace the keyword argument `argument` of a command by `parameters`, from whose values `build` makes it."""
    names = [parameter.name for parameter in parameters]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        own = {name: values.pop(name) for name in names}
        command(**values, **{argument: build(own)})

    signature = inspect.signature(command, eval_str=True)
    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != argument
    ]
    changed = signature.replace(parameters=[*kept, *parameters])
    vars(wrapper)["__signature__"] = changed
    wrapper.__annotations__ = {name: parameter.annotation for name, parameter in changed.parameters.items()}
    return wrapper


def _parameter(name: str, annotation: object, *, default: object = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

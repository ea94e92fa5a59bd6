"""The `lomo` command: its groups of sub-commands, `up`, `health`, and the one place that prints errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from cli.auto import command_with_switches
from cli.commands import files, jobs, keys, models, orgs
from cli.commands.chat import chat
from cli.commands.hosts import list_hosts
from cli.commands.job_control import show_queue
from cli.commands.plan import plan
from cli.commands.preview import preview
from cli.errors import CliError
from cli.output import printable, say, write_fields, write_json
from cli.session import ApiKeyFile, OutputFormat, Session, Url, with_session

_OK = 200

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of long options at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(orgs.app, name="orgs")
app.add_typer(orgs.projects, name="projects")
app.command("chat")(with_session(chat))
app.command("export")(with_session(models.export_model))
app.command("hosts")(list_hosts)
app.command("queue")(show_queue)
app.command("preview")(with_session(preview))
app.command("plan", cls=command_with_switches("checkpointing"))(with_session(plan))


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lomo {version('lomo-server')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    *,
    url: Url = None,
    api_key_file: ApiKeyFile = None,
    output: OutputFormat = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune language models on a LOMO server: upload data, create jobs, follow them, use the result."""
    del show_version
    context.obj = Session(url, api_key_file, output, os.environ)


@app.command()
def up(
    *,
    data_dir: Annotated[Path, typer.Option(help="Folder for everything the service keeps.")] = Path("var/lomo"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Run the whole service on this machine.

    Database, broker, server and worker, in the foreground; Ctrl-C ends them.
    """
    # Becomes that process, so that Ctrl-C and signals reach it alone. -P: a folder `local` of the user's is not ours.
    arguments = ["--data-dir", str(data_dir), "--port", str(port), "--host", host]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "local", "up", *arguments])  # noqa: S606 - meant


@app.command()
@with_session
def health(*, session: Session) -> None:
    """Tell whether the server is ready for jobs.

    The exit code is 0 only if it is.
    """
    with session.connect() as client:
        status, body = client.probe("/readyz")
        url = client.connection.root_url
    ready = status == _OK
    if session.is_json:
        write_json(body)
    else:
        checks = body.get("checks")
        found = checks.items() if isinstance(checks, dict) else ()
        write_fields(
            [("server", url), ("ready", "yes" if ready else "no"), *((name, str(value)) for name, value in found)]
        )
    if not ready:
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 fine, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        app(arguments, prog_name="lomo")
    except CliError as error:
        say(f"error: {printable(str(error))}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

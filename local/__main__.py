"""`python -m local up`: the whole service on this machine, in the foreground. `lomo up` becomes this process."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from local.demo import run as run_demo
from local.errors import LocalError
from local.progress import ConsoleProgress
from local.stack import Stack

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_EXIT_INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended

DataDir = Annotated[Path, typer.Option(help="Folder for everything the service keeps; made if it is not there.")]


@app.callback()
def main() -> None:
    """Run the LOMO job server on this machine: Postgres, Valkey, server, worker and beat in one process tree."""


@app.command()
def up(
    data_dir: DataDir = Path("var/lomo"),
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port of the server; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Start the service and keep it running until Ctrl-C (or SIGTERM)."""
    _interrupt_on_signals()
    progress = ConsoleProgress()
    try:
        with Stack(data_dir, port=port, host=host, progress=progress) as stack:
            progress.note(f"\nLOMO is up:  {stack.url}/")
            progress.note(f"Admin key:   {stack.admin_key_path}")
            progress.note(f"Logs:        {stack.logs_dir}")
            progress.note("Stop it with Ctrl-C.")
            threading.Event().wait()
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except (LocalError, OSError) as error:  # OSError: a full disk, a folder that was taken away
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def demo(
    data_dir: DataDir = Path("var/lomo"),
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port of the server; 0 takes a free one.")] = 0,
) -> None:
    """Fine-tune a small pretrained model on real data through the whole service, then stop it."""
    _interrupt_on_signals()
    try:
        exit_code = run_demo(data_dir, port=port)
    except KeyboardInterrupt:
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    except (LocalError, OSError) as error:  # OSError: a full disk, a folder that was taken away
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(exit_code)


def _interrupt_on_signals() -> None:
    """Let every polite signal end `up` in the same way, as KeyboardInterrupt in the main thread."""
    signal.signal(signal.SIGINT, _interrupt)  # a shell starts background jobs with SIGINT ignored
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means what it says
        signal.signal(signal.SIGHUP, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    app(prog_name="lomo")

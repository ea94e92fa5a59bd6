"""`lomo plan`: the memory that a run will take, of a server's model by the server, of a configuration on this machine.

Without a server the figures come from `lomo_core`: from its arithmetic for the paper's tables, and from `python -m
lomo_core plan` in a process of its own for a model's configuration, since that takes torch.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.auto import AUTO, INTEGER_METAVAR, SWITCH_METAVAR, parse_integer, parse_switch
from cli.client import Json
from cli.errors import CliError, UsageError
from cli.output import format_bytes, write_fields, write_json, write_table
from cli.session import Session
from lomo_core.memory import paper


class Table(StrEnum):
    """A table of arXiv 2306.09782v2."""

    TABLE1 = "table1"
    TABLE2 = "table2"


_CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "transient", "buffers", "peak")

_ACCOUNT = """\
LLaMA-7B, batch 8, 512 tokens. Activations without checkpointing are what transformers 4.28 kept in 2023. Beside it,
today's eager attention keeps no copy of the scores for its mask, and scaled dot product attention no scores at all.
The paper's totals without checkpointing are 1.00 above the sums of their columns."""


def plan(  # noqa: PLR0913 - the options of a command
    *,
    model: Annotated[str | None, typer.Option(help="A model of the server, held against its hosts.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A model's config.json, or its folder; computed here, without a server.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="lomo, adalomo, sgd or adamw.")] = "lomo",
    precision: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    batch_size: Annotated[
        str | None,
        typer.Option(
            parser=parse_integer,
            metavar=INTEGER_METAVAR,
            help="Rows per step; by default 1 with --config, auto with --model: as many as fit, at most 4.",
        ),
    ] = None,
    max_seq_length: Annotated[int, typer.Option(min=1, help="Tokens of the longest row.")] = 512,
    checkpointing: Annotated[
        str | None,
        typer.Option(
            parser=parse_switch,
            metavar=SWITCH_METAVAR,
            help="Activation checkpointing (--no-checkpointing); auto, with --model: where it is needed.",
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Devices that share the weights; with --config.")] = 1,
    table: Annotated[
        Table | None, typer.Option("--paper", help="Print a table of the LOMO paper beside the plan instead.")
    ] = None,
    session: Session,
) -> None:
    """Tell how much memory a run will take, by category, before it runs.

    By a model's configuration alone, or by its name on a server, which also tells on which of its hosts the run fits.
    """
    if table is not None:
        _write_paper(table, is_json=session.is_json)
        return
    if (model is None) == (config is None):
        raise CliError("Give a server's model by --model, or a config.json by --config, or --paper table1 or table2.")
    settings = Settings(
        optimizer, precision, batch_size, max_seq_length, True if checkpointing is None else checkpointing
    )
    found = settings.ask_engine(config, ranks) if config is not None else settings.ask_server(model, ranks, session)
    if session.is_json:
        write_json(found)
    else:
        write_fields(_fields(found))


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a run's options decides its memory, as given."""

    optimizer: str
    precision: str
    batch_size: int | str | None
    max_seq_length: int
    checkpointing: bool | str

    def ask_engine(self, config: Path, ranks: int) -> Json:
        """Plan a configuration on this machine.

        Raises:
            UsageError: something is left to choose, for which there is no host here.
            CliError: the engine refused, in its words.
        """
        if AUTO in (self.batch_size, self.checkpointing):
            raise UsageError("auto is what fits a server's hosts: give --model, or a value in its place")
        batch = 1 if self.batch_size is None else self.batch_size
        return _ask_engine(
            ["--config", str(config), "--optimizer", self.optimizer, "--precision", self.precision]
            + ["--batch-size", str(batch), "--max-seq-length", str(self.max_seq_length), "--num-ranks", str(ranks)]
            + ([] if self.checkpointing else ["--no-activation-checkpointing"])
        )

    def ask_server(self, model: str | None, ranks: int, session: Session) -> Json:
        """Plan a model of the server.

        Raises:
            UsageError: several devices, which a server has no use for.
            ApiError: the server refused.
        """
        if ranks != 1:
            raise UsageError("--ranks goes with --config: a server's runs have one device each")
        body = {
            "model": model,
            "hyperparameters": {} if self.batch_size is None else {"batch_size": self.batch_size},
            "lomo": {
                "optimizer": self.optimizer,
                "precision": self.precision,
                "max_seq_length": self.max_seq_length,
                "activation_checkpointing": self.checkpointing,
            },
        }
        with session.connect() as client:
            return client.post("/plan", body)


def _fields(found: Json) -> list[tuple[str, str]]:
    """The same table for both; a server tells what it chose, and of each host whether the run fits there."""
    name = f"{found['model']}: " if found.get("model") else ""
    chosen = {key: str(found.get(key)).lower() for key in found.get("auto") or ()}
    fields = [
        ("model", f"{name}{found['architecture']}, {found['num_parameters'] / 1e6:,.1f} M parameters"),
        ("chosen", ", ".join(f"{key}={value}" for key, value in chosen.items())),
        *((category, format_bytes(found[f"{category}_bytes"])) for category in _CATEGORIES),
        ("largest in", found["peak_phase"]),
        *((f"peak with {other}", format_bytes(peak)) for other, peak in found["beside"].items()),
        *((f"on {fit['host']}", _fit(fit)) for fit in found.get("fits") or ()),
    ]
    if found.get("fits") == []:
        fields.append(("on a host", "not known: no live host has measured its memory"))
    return [(field, value) for field, value in fields if value]


def _fit(fit: Json) -> str:
    verdict = "fits" if fit["ok"] else "does not fit"
    return f"{verdict}: needs {format_bytes(fit['needed_bytes'])}, has {format_bytes(fit['device_bytes'])}"


def _ask_engine(arguments: list[str]) -> Json:
    command = [sys.executable, "-P", "-m", "lomo_core", "plan", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        *_, last = result.stderr.strip().splitlines() or [f"the engine ended with code {result.returncode}"]
        raise CliError(last)
    found: Json = json.loads(result.stdout)
    return found


def _write_paper(table: Table, *, is_json: bool) -> None:
    if table is Table.TABLE1:
        cells, today = paper.table1(), paper.activations_today()
        if is_json:
            write_json({"cells": [dataclasses.asdict(cell) for cell in cells], "activations_today_gib": today})
            return
        columns = ("OPTIMIZER", "CHECKPOINTING", "CATEGORY", "PAPER GIB", "PLAN GIB", "ERROR")
        write_table(
            columns,
            [
                (
                    cell.optimizer,
                    "yes" if cell.activation_checkpointing else "no",
                    cell.category,
                    f"{cell.paper_gib:.2f}",
                    f"{cell.plan_gib:.2f}",
                    _error(cell.plan_gib, cell.paper_gib),
                )
                for cell in cells
            ],
        )
        typer.echo(f"\n{_ACCOUNT}")
        for attention, gib in today.items():
            typer.echo(f"today, {attention:<6} {gib:6.2f} GiB")
        return
    rows = paper.table2()
    if is_json:
        write_json({"rows": [dataclasses.asdict(row) for row in rows]})
        return
    write_table(
        ("MODEL", "CARDS", "PAPER GIB", "PLAN GIB", "ERROR", "FITS 24 GIB"),
        [
            (
                row.model,
                str(row.num_cards),
                f"{row.paper_gib:.2f}",
                f"{row.plan_gib:.2f}",
                _error(row.plan_gib, row.paper_gib),
                "yes" if row.fits else "no",
            )
            for row in rows
        ],
        whole=("MODEL",),
    )


def _error(ours: float, theirs: float) -> str:
    return f"{ours / theirs - 1:+.1%}" if theirs else "0"

"""`lomo plan`: the memory that a run will take, computed on this machine; no server is asked.

The figures come from `lomo_core`: from its arithmetic for the paper's tables, and from `python -m lomo_core plan` in a
process of its own for a model's configuration, since that takes torch.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.errors import CliError
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
    config: Annotated[Path | None, typer.Option(help="A model's config.json, or its folder.")] = None,
    optimizer: Annotated[str, typer.Option(help="lomo, adalomo, sgd or adamw.")] = "lomo",
    precision: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 1,
    max_seq_length: Annotated[int, typer.Option(min=1, help="Tokens of the longest row.")] = 512,
    checkpointing: Annotated[bool, typer.Option(help="Activation checkpointing.")] = True,
    ranks: Annotated[int, typer.Option(min=1, help="Devices that share the weights.")] = 1,
    table: Annotated[
        Table | None, typer.Option("--paper", help="Print a table of the LOMO paper beside the plan instead.")
    ] = None,
    session: Session,
) -> None:
    """Tell how much memory a run will take, by category, before it runs. Needs no server."""
    if table is not None:
        _write_paper(table, is_json=session.is_json)
        return
    if config is None:
        raise CliError("Give a model's config.json by --config, or --paper table1 or table2.")
    found = _ask_engine(
        ["--config", str(config), "--optimizer", optimizer, "--precision", precision]
        + ["--batch-size", str(batch_size), "--max-seq-length", str(max_seq_length), "--num-ranks", str(ranks)]
        + ([] if checkpointing else ["--no-activation-checkpointing"])
    )
    if session.is_json:
        write_json(found)
        return
    write_fields(
        [
            ("model", f"{found['architecture']}, {found['num_parameters'] / 1e6:,.1f} M parameters"),
            *((name, format_bytes(found[f"{name}_bytes"])) for name in _CATEGORIES),
            ("largest in", found["peak_phase"]),
            *((f"peak with {name}", format_bytes(peak)) for name, peak in found["beside"].items()),
        ]
    )


def _ask_engine(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "lomo_core", "plan", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        *_, last = result.stderr.strip().splitlines() or [f"the engine ended with code {result.returncode}"]
        raise CliError(last)
    found: dict[str, Any] = json.loads(result.stdout)
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

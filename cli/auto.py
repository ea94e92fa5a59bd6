"""Options that may be "auto": the server chooses their value by the plan of the run's memory.

typer has flags and options with a value, but no flag that may have a value. So a switch that takes "auto" is an option
with a value, and its command (`command_with_switches`) first writes out the flags: `--packing` and `--no-packing` mean
`--packing true` and `--packing false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

AUTO = "auto"
INTEGER_METAVAR = "<int|auto>"
SWITCH_METAVAR = "<true|false|auto>"
_SWITCH: dict[str, bool | str] = {AUTO: AUTO, "true": True, "yes": True, "false": False, "no": False}


def parse_integer(text: str) -> int | str:
    """A whole number, or "auto".

    Raises:
        typer.BadParameter: it is neither.
    """
    if text.lower() == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor auto") from error


def parse_switch(text: str) -> bool | str:
    """True, false, or "auto".

    Raises:
        typer.BadParameter: it is none of them.
    """
    try:
        return _SWITCH[text.lower()]
    except KeyError as error:
        raise typer.BadParameter(f"{text!r} is neither true, false nor auto") from error


def command_with_switches(*names: str) -> type[TyperCommand]:
    """A class for a command whose options `names` are parsed by `parse_switch`, and may be given as flags, too."""

    class CommandWithSwitches(TyperCommand):
        """A command that writes out the flags of its switches."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            """Read the arguments."""
            return super().parse_args(ctx, write_out(args, names))

    return CommandWithSwitches


def write_out(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments with a value after each switch: `--x` becomes `--x true`, `--no-x` becomes `--x false`."""
    written: list[str] = []
    left = list(arguments)
    while left and left[0] != "--":
        word = left.pop(0)
        name = word.removeprefix("--no-") if word.startswith("--no-") else word.removeprefix("--")
        if name not in names or word == name:
            written.append(word)
        elif word.startswith("--no-"):
            written += [f"--{name}", "false"]
        else:
            has_value = bool(left) and left[0].lower() in _SWITCH
            written += [word, left.pop(0) if has_value else "true"]
    return written + left

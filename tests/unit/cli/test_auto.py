"""Options that may be "auto": what is written, and what is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cli.auto import write_out
from tests.support.scripted_server import Response, ScriptedServer, make_job

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Lomo

CREATE = ("jobs", "create", "--model", "m", "--training-file", "file-a")


def sent(server: ScriptedServer) -> dict[str, Any]:
    """What the last request set of the engine's options and the hyperparameters."""
    body = server.requests[-1].json
    hyperparameters = body.get("method", {}).get("supervised", {}).get("hyperparameters", {})
    return {**hyperparameters, **body.get("lomo", {})}


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--batch-size", "auto"], {"batch_size": "auto"}),
        (["--batch-size=8"], {"batch_size": 8}),
        (["--activation-checkpointing"], {"activation_checkpointing": True}),
        (["--no-activation-checkpointing"], {"activation_checkpointing": False}),
        (["--activation-checkpointing", "auto"], {"activation_checkpointing": "auto"}),
        (["--activation-checkpointing=AUTO"], {"activation_checkpointing": "auto"}),
        (["--activation-checkpointing", "false"], {"activation_checkpointing": False}),
        (["--activation-checkpointing", "--packing"], {"activation_checkpointing": True, "packing": True}),
        (["--no-activation-checkpointing", "--activation-checkpointing"], {"activation_checkpointing": True}),
        (["--devices", "auto", "--offload", "auto"], {"devices": "auto", "offload": "auto"}),
        (["--devices", "1"], {"devices": 1}),
    ],
)
def test_numbers_and_switches_may_be_auto(
    server: ScriptedServer, lomo: Lomo, arguments: list[str], values: dict[str, Any]
) -> None:
    server.on("POST", "/fine_tuning/jobs", Response(body=make_job()))
    assert lomo(*CREATE, *arguments).code == 0
    assert sent(server) == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--batch-size", "automatic"],
            "Invalid value for '--batch-size': 'automatic' is neither a whole",
        ),
        (["--batch-size", "1.5"], "'1.5' is neither a whole number nor auto"),
        (["--activation-checkpointing=maybe"], "'maybe' is neither true, false nor auto"),
        (["--no-activation-checkpointing", "auto"], "unexpected extra argument"),
        (["--packing", "auto"], "unexpected extra argument"),
    ],
)
def test_what_is_neither_is_wrong_usage(server: ScriptedServer, lomo: Lomo, arguments: list[str], message: str) -> None:
    code, _, err = lomo(*CREATE, *arguments)
    assert code == 2
    assert message in err
    assert server.requests == []


def test_flags_are_written_out_up_to_the_end_of_options() -> None:
    assert write_out(["--x", "auto", "--no-x", "--x", "--y", "x", "--", "--x"], ["x"]) == [
        *("--x", "auto", "--x", "false", "--x", "true", "--y", "x", "--", "--x"),
    ]
    assert write_out([], ["x"]) == []

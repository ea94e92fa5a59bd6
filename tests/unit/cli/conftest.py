"""Running the command in this process, against a scripted server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from cli.main import main
from tests.support.scripted_server import KEY, ScriptedServer


class Result(NamedTuple):
    """What a call of the command left."""

    code: int
    out: str
    err: str


Lomo = Callable[..., Result]
"""The type of the `lomo` fixture."""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A scripted server. Costs about 10 ms."""
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


@pytest.fixture
def lomo(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lomo:
    """Run the command in this process against the scripted server: `lomo("jobs", "list")`."""
    for name in ("LOMO_API_KEY_FILE", "LOMO_PROJECT", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOMO_URL", server.url)
    monkeypatch.setenv("LOMO_API_KEY", KEY)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        code = exit_info.value.code
        return Result(int(code or 0), *capsys.readouterr())

    return run

"""Running the engine in tests and reading what it said."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lomo_core.config import TrainConfig
from lomo_core.events import JOURNAL_NAME, Event, decode_line
from lomo_core.journal import Journal
from lomo_core.stop import StopRequest
from lomo_core.trainer import Trainer

T = TypeVar("T", bound=Event)

MakeConfig = Callable[..., TrainConfig]
Start = Callable[..., "subprocess.Popen[str]"]


def read_events(run_dir: str | Path) -> list[Event]:
    """The events of a run's journal so far; an unfinished last line is left out."""
    path = Path(run_dir) / JOURNAL_NAME
    raw = path.read_bytes() if path.exists() else b""
    return [decode_line(line).event for line in raw[: raw.rfind(b"\n") + 1].splitlines()]


def events_of(run_dir: str | Path, cls: type[T]) -> list[T]:
    """The events of one type."""
    return [event for event in read_events(run_dir) if isinstance(event, cls)]


def run_here(config: TrainConfig, *, stop: StopRequest | None = None) -> list[Event]:
    """Run a configuration in this process and return its events."""
    journal = Journal(config.run_dir)
    try:
        Trainer(config, journal, stop or StopRequest()).run()
    finally:
        journal.close()
    return read_events(config.run_dir)


class StopWhen(StopRequest):
    """Asks to stop as soon as a condition holds."""

    def __init__(self, condition: Callable[[], object]) -> None:
        super().__init__()
        self._condition = condition

    def raise_if_requested(self) -> None:
        """As the real one, after a look at the condition."""
        self.is_requested = self.is_requested or bool(self._condition())
        super().raise_if_requested()


def write_run(config: TrainConfig) -> Path:
    """Write the specification where the engine process reads it."""
    path = Path(config.run_dir).with_suffix(".json")
    path.write_text(config.to_json(), encoding="utf-8")
    return path


def rewrite_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    body = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}), encoding="utf-8")

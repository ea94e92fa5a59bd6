"""A running service, and environments with the clients that are pointed at it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from local.stack import Stack
from tests.conftest import KnownShapes
from tests.support.known_host import give_stack_calibration
from tests.support.tiny_model import chat_rows, make_tiny_model, write_jsonl

INSTALL_TIMEOUT_S = 300.0  # 9 s for the client alone, 20 s with wandb and pandas


@dataclass(frozen=True, slots=True)
class Service:
    """The service under test, and data to train its model `tiny` on."""

    stack: Stack
    data: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Variables as a user sets them for the official client; nothing else of this process's own."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.data),
            "OPENAI_BASE_URL": f"{self.stack.url}/v1",
            "OPENAI_API_KEY": self.stack.admin_key,
            **more,
        }


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, known_shapes: KnownShapes) -> Iterator[Service]:
    """Costs some 5 s to start and stop."""
    data = tmp_path_factory.mktemp("clients")
    write_jsonl(data / "train.jsonl", chat_rows(64))
    write_jsonl(data / "held_back.jsonl", chat_rows(16))
    give_stack_calibration(data / "lomo")
    with Stack(data / "lomo") as running:
        model = make_tiny_model(running.data_dir / "models" / "tiny")
        known_shapes.give_file(running.data_dir, model / "config.json")
        yield Service(running, data)


@pytest.fixture(scope="session")
def environment_with() -> Callable[..., Path]:
    """Makes a virtual environment with some packages, beside this one's own, once; returns its folder of programs."""

    def make(name: str, *packages: str) -> Path:
        folder = Path(sys.prefix) / "clients" / name
        programs = folder / "bin"
        stamp = folder / "installed"
        if not stamp.exists() or stamp.read_text() != " ".join(packages):
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(folder)],
                [str(programs / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages],
            ):
                subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S)
            stamp.write_text(" ".join(packages))
        return programs

    return make

"""docs/operations.md names every setting, no other, and their defaults as they are."""

from __future__ import annotations

import re
from pathlib import Path

from server.settings import ServerSettings
from worker.settings import WorkerSettings

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
ROW = re.compile(r"^\| `LOMO_(\w+)` \| ([^|]*) \| ([^|]*) \|", re.MULTILINE)
FIELDS = {**ServerSettings.model_fields, **WorkerSettings.model_fields}


def test_the_table_names_every_setting_and_no_other() -> None:
    names = [name.lower() for name, _, _ in ROW.findall(PAGE.read_text(encoding="utf-8"))]
    assert len(names) == len(set(names))
    assert set(names) == set(FIELDS)


def test_the_table_says_whose_a_setting_is() -> None:
    for name, owners, _ in ROW.findall(PAGE.read_text(encoding="utf-8")):
        server, worker = (name.lower() in cls.model_fields for cls in (ServerSettings, WorkerSettings))
        if owners == "all":
            assert server, name
            assert worker, name
        else:
            assert ("server" in owners, "workers" in owners) == (server, worker), name


def test_the_tables_numbers_are_the_defaults() -> None:
    for name, owners, default in ROW.findall(PAGE.read_text(encoding="utf-8")):
        classes = [ServerSettings] if owners in {"all", "server"} else [WorkerSettings]
        if owners == "server, workers":
            classes = [ServerSettings, WorkerSettings]
        told = re.findall(r"`(\d+(?:\.\d+)?)`", default)
        found = [cls.model_fields[name.lower()].default for cls in classes]
        numbers = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
        assert [float(text) for text in told] == [float(value) for value in numbers], name


def test_what_is_required_is_told_to_be() -> None:
    told = {
        name.lower()
        for name, _, default in ROW.findall(PAGE.read_text(encoding="utf-8"))
        if default.strip() == "required"
    }
    assert told == {name for name, field in FIELDS.items() if field.is_required()}

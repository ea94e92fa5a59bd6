"""Settings from the environment: which models of the hub may be named."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.settings import JobsSettings


def settings(monkeypatch: pytest.MonkeyPatch, hub_models: str) -> JobsSettings:
    monkeypatch.setenv("LOMO_HUB_MODELS", hub_models)
    return JobsSettings(database_url="x", broker_url="x", data_dir=Path("/x"))


@pytest.mark.parametrize(
    ("allowed", "name", "is_allowed"),
    [
        ("", "owner/name", False),
        ("owner/name", "owner/name", True),
        ("owner/name", "owner/name2", False),
        ("owner/name", "other/name", False),
        (" other/model, owner/* ", "owner/anything-1.5B", True),
        ("owner/*", "owner2/name", False),
        ("*", "any/model", True),
        ("*", "local-model", False),
        ("*", "../etc", False),
        ("*", "a/b/c", False),
        ("*", "owner/name\n", False),
    ],
)
def test_models_of_the_hub_are_denied_unless_listed(
    monkeypatch: pytest.MonkeyPatch, allowed: str, name: str, is_allowed: bool
) -> None:
    assert settings(monkeypatch, allowed).allows_hub_model(name) is is_allowed


def test_only_whole_names_can_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, "a/one,b/*,c/two,*").named_hub_models == ("a/one", "c/two")


@pytest.mark.parametrize("wrong", ["name", "*/name", "a/b/c", "a/b*", "https://huggingface.co/a/b", "a/**"])
def test_what_is_no_id_of_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    with pytest.raises(ValidationError, match="is none of owner/name"):
        settings(monkeypatch, f"owner/name,{wrong}")

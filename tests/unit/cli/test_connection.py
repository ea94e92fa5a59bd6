"""Which server and which key: completion of addresses, precedence, and what is said when something is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.connection import DEFAULT_URL, find_connection, normalise_url
from cli.errors import UsageError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("localhost:8000", "http://localhost:8000/v1"),
        ("gpu-host", "http://gpu-host/v1"),
        ("https://example.org/lomo", "https://example.org/lomo/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ("  http://localhost:8000\n", "http://localhost:8000/v1"),
    ],
)
def test_a_url_is_completed(given: str, expected: str) -> None:
    assert normalise_url(given) == expected


@pytest.mark.parametrize(
    "given", ["", "ftp://host", "http://", "http://host:x", "http://host:99999", "http://u:p@host", "http://host?a=b"]
)
def test_what_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="URL"):
        normalise_url(given)


def test_options_win_over_the_environment_and_lomo_over_openai(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-file\n", encoding="utf-8")
    env = {
        "LOMO_URL": "http://lomo",
        "OPENAI_BASE_URL": "http://openai",
        "LOMO_API_KEY": "sk-lomo",
        "OPENAI_API_KEY": "sk-openai",
        "LOMO_API_KEY_FILE": str(file),
    }
    option = find_connection(url="http://option", api_key_file=file, env=env)
    assert (option.url, option.api_key) == ("http://option/v1", "sk-file")

    lomo = find_connection(url=None, api_key_file=None, env=env)
    assert (lomo.url, lomo.api_key) == ("http://lomo/v1", "sk-lomo")

    del env["LOMO_API_KEY"]
    assert find_connection(url=None, api_key_file=None, env=env).api_key == "sk-file"

    openai = {name: env[name] for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY")}
    found = find_connection(url=None, api_key_file=None, env=openai)
    assert (found.url, found.api_key) == ("http://openai/v1", "sk-openai")


def test_the_project_is_of_our_own_variable_alone() -> None:
    for env, project in (
        ({"LOMO_PROJECT": " proj_1\n", "OPENAI_PROJECT_ID": "proj_2"}, "proj_1"),
        ({"OPENAI_PROJECT_ID": "proj_2"}, None),
        ({"LOMO_PROJECT": ""}, None),
    ):
        assert find_connection(url=None, api_key_file=None, env=env).project == project
    for wrong in ("proj 1", "proj_\xe9", " "):
        with pytest.raises(UsageError, match="LOMO_PROJECT does not hold"):
            find_connection(url=None, api_key_file=None, env={"LOMO_PROJECT": wrong})


def test_without_anything_the_local_server_and_no_key() -> None:
    connection = find_connection(url=None, api_key_file=None, env={})
    assert connection.url == DEFAULT_URL
    assert connection.root_url == "http://127.0.0.1:8000"
    assert connection.is_loopback
    with pytest.raises(UsageError, match=r"LOMO_API_KEY.*--api-key-file.*lomo up"):
        _ = connection.required_key


def test_the_key_is_not_in_the_representation() -> None:
    connection = find_connection(url=None, api_key_file=None, env={"LOMO_API_KEY": "sk-lomo-secret"})
    assert "secret" not in repr(connection)


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", "schl\u00fcssel".encode(), b"a\nb", b"\xff\xfe"])
def test_a_file_without_a_key_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=str(file)):
        find_connection(url=None, api_key_file=file, env={})


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the API key from .*none: No such file"):
        find_connection(url=None, api_key_file=tmp_path / "none", env={})

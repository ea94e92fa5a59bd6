"""`lomo keys`, `lomo orgs` and `lomo projects` against the real server."""

from __future__ import annotations

import pytest

from jobs import keys
from jobs.scopes import ALL

from .test_lomo import Place
from .test_lomo import place as place  # noqa: PLC0414 - a fixture, used by its name


@pytest.fixture
def admin(place: Place) -> Place:
    """The same, with the key of whoever runs the service."""
    place.key_file.write_text(keys.create_key(place.db, name="admin", scopes=ALL) + "\n", encoding="ascii")
    return place


def value(place: Place, *arguments: str) -> str:
    """The value that a command prints, alone on stdout."""
    code, out, err = place.lomo(*arguments)
    assert code == 0, err
    assert "cannot be shown again" in err
    assert out.strip() not in err
    return out.strip()


def use(place: Place, token: str) -> int:
    """The exit code of a command with another key."""
    file = place.folder / "other.key"
    file.write_text(token)
    return place.lomo("jobs", "list", "--api-key-file", str(file))[0]


def test_a_key_from_its_creation_to_its_end(admin: Place) -> None:
    token = value(admin, "keys", "create", "ci", "--scope", "jobs:read", "--expires-in", "90d")
    key_id = token.split("-")[2]
    assert use(admin, token) == 0
    [found] = [key for key in admin.data("keys", "list")["data"] if key["id"] == key_id]
    assert (found["scopes"], found["expires_at"] - found["created_at"]) == (["jobs:read"], 90 * 86_400)
    table = admin.lomo("keys", "list")[1]
    assert f"{key_id}  ci" in table
    assert token not in table
    changed = admin.data("keys", "update", key_id, "--scope", "jobs:read", "--scope", "chat", "--name", "bot")
    assert (changed["name"], changed["scopes"]) == ("bot", ["chat", "jobs:read"])
    rotated = value(admin, "keys", "rotate", key_id, "--grace", "1h")
    assert (use(admin, token), use(admin, rotated)) == (0, 0)
    assert admin.lomo("keys", "revoke", key_id)[:2] == (0, f"{key_id}\n")
    assert key_id not in admin.lomo("keys", "list")[1]
    code, _, err = admin.lomo("keys", "revoke", key_id)
    assert (code, "has no key" in err) == (2, True)


def test_a_tenant_from_the_organization_to_its_project_and_key(admin: Place) -> None:
    code, out, _ = admin.lomo("orgs", "create", "Team", "--max-queued-jobs", "2", "--max-stored", "5GiB")
    assert code == 0
    organization = out.strip()
    assert admin.data("orgs", "get", organization)["quotas"]["max_stored_bytes"] == 5 * 2**30
    changed = admin.data(
        "orgs", "update", organization, "--max-queued-jobs", "none", "--max-gpu-time", "100h", "--max-priority", "-5"
    )
    quotas = changed["quotas"]
    assert (quotas["max_queued_jobs"], quotas["max_gpu_seconds"], quotas["max_priority"]) == (None, 360_000, -5)
    assert "5.0 GiB" in admin.lomo("orgs", "list")[1]
    assert "4d04h" in admin.lomo("orgs", "get", organization)[1]
    usage = admin.lomo("orgs", "usage", organization)[1]
    assert "0 B of 5.0 GiB" in usage

    admin.key_file.write_text(value(admin, "orgs", "key", organization))
    assert organization in admin.lomo("orgs", "usage")[1]
    code, _, err = admin.lomo("orgs", "list")
    assert (code, "whoever runs this service" in err) == (1, True)
    project = admin.lomo("projects", "create", "Search")[1].strip()
    assert "Search" in admin.lomo("projects", "list")[1]
    token = value(admin, "keys", "create", "ci", "--project", project)
    assert use(admin, token) == 0
    assert [key["id"] for key in admin.data("keys", "list", "--project", project)["data"]] == [token.split("-")[2]]
    assert admin.data("projects", "archive", project)["status"] == "archived"
    assert project not in admin.lomo("projects", "list")[1]
    assert project in admin.lomo("projects", "list", "--archived")[1]
    second = value(admin, "keys", "create", "second", "--admin")
    assert use(admin, second) == 0


def test_an_empty_organization_is_deleted(admin: Place) -> None:
    organization = admin.lomo("orgs", "create", "Short")[1].strip()
    assert admin.lomo("orgs", "delete", organization)[:2] == (0, f"{organization}\n")
    code, _, err = admin.lomo("orgs", "delete", "org-local")
    assert (code, "cannot be deleted" in err) == (1, True)


def test_wrong_usage_and_a_key_without_the_scope(place: Place) -> None:
    for arguments in (
        ("keys", "create", "x", "--admin", "--scope", "jobs:read"),
        ("keys", "create", "x", "--expires-in", "soon"),
        ("orgs", "create", "x", "--max-stored", "5GB"),
    ):
        assert place.lomo(*arguments)[0] == 2, arguments
    code, _, err = place.lomo("keys", "list")
    assert (code, "lacks the scope admin" in err) == (1, True)

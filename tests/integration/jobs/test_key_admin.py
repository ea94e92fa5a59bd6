"""Rotation, expiry and revocation of keys; organizations and projects as rows; what a migration makes of old keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text

from jobs import key_admin, keys, migrate, organizations
from jobs.db import Database
from jobs.errors import InvalidRequestError, InvalidStateError, NotFoundError
from jobs.key_admin import KeyChange, KeyPlace, KeyRequest
from jobs.keys import DEFAULT_ORGANIZATION
from jobs.models import ApiKey
from jobs.scopes import ALL, ORDINARY, Scope, parse_scopes, read_scopes

from .conftest import submit

HERE = KeyPlace(organization_id="org-a")


@pytest.fixture
def key(db: Database) -> tuple[ApiKey, str]:
    """A key of an organization, and its token."""
    with db.transaction() as session:
        organizations.ensure_organization(session, HERE.organization_id)
    request = KeyRequest(organization_id=HERE.organization_id, name="ci", scopes=frozenset({Scope.JOBS_READ}))
    return key_admin.create(db, request)


def set_back(db: Database, column: str) -> None:
    """Let a time of all keys come."""
    with db.transaction() as session:
        session.execute(text(f"UPDATE api_keys SET {column} = now()"))  # noqa: S608 - named in the tests


def test_a_key_is_what_was_asked_for(db: Database, key: tuple[ApiKey, str]) -> None:
    row, token = key
    principal = keys.authenticate(db, token)
    assert principal is not None
    assert principal.scopes == {Scope.JOBS_READ}
    assert (principal.project_id, principal.valid_until, principal.is_operator) == (row.project_id, None, False)
    assert token not in repr(keys.Secret.new()), "a secret does not show itself"


def test_a_rotated_key_has_two_secrets_for_a_while(db: Database, key: tuple[ApiKey, str]) -> None:
    row, old = key
    rotated, new = key_admin.rotate(db, HERE, row.id, grace_s=3600)
    assert (rotated.id, new == old) == (row.id, False)
    before, after = keys.authenticate(db, old), keys.authenticate(db, new)
    assert before is not None
    assert after is not None
    assert before.valid_until == rotated.previous_expires_at
    assert after.valid_until is None
    set_back(db, "previous_expires_at")
    assert keys.authenticate(db, old) is None
    assert keys.authenticate(db, new) is not None


def test_a_second_rotation_ends_the_oldest_secret_at_once(db: Database, key: tuple[ApiKey, str]) -> None:
    row, first = key
    _, second = key_admin.rotate(db, HERE, row.id)
    _, third = key_admin.rotate(db, HERE, row.id)
    assert [keys.authenticate(db, token) is not None for token in (first, second, third)] == [False, True, True]


def test_a_rotation_without_grace(db: Database, key: tuple[ApiKey, str]) -> None:
    row, old = key
    rotated, new = key_admin.rotate(db, HERE, row.id, grace_s=0)
    assert rotated.previous_sha256 is None
    assert keys.authenticate(db, old) is None
    assert keys.authenticate(db, new) is not None


def test_sessions_end_with_the_secret_that_they_were_opened_with(db: Database, key: tuple[ApiKey, str]) -> None:
    row, old = key
    before = keys.authenticate(db, old)
    assert before is not None
    opened_before = keys.open_session(db, before)
    _, new = key_admin.rotate(db, HERE, row.id, grace_s=3600)
    in_grace, after = keys.authenticate(db, old), keys.authenticate(db, new)
    assert in_grace is not None
    assert after is not None
    opened_in_grace, opened_after = keys.open_session(db, in_grace), keys.open_session(db, after)
    with db.transaction() as session:
        # An hour later.
        session.execute(text("UPDATE browser_sessions SET expires_at = expires_at - interval '3601 s'"))
    found = [keys.authenticate_session(db, token) for token in (opened_before, opened_in_grace, opened_after)]
    assert [principal is not None for principal in found] == [False, False, True]


def test_an_expired_key_is_nobody_and_stays_so(db: Database, key: tuple[ApiKey, str]) -> None:
    request = KeyRequest(organization_id="org-a", name="short", scopes=ORDINARY, lifetime_s=60)
    row, token = key_admin.create(db, request)
    principal = keys.authenticate(db, token)
    assert principal is not None
    assert principal.valid_until == row.expires_at
    session_token = keys.open_session(db, principal)
    set_back(db, "expires_at")
    assert keys.authenticate(db, token) is None
    assert keys.authenticate_session(db, session_token) is None
    with pytest.raises(InvalidStateError, match="has expired"):
        key_admin.rotate(db, HERE, row.id)
    assert [found.id for found in key_admin.list_keys(db, HERE, limit=9).items] == [key[0].id, row.id]


def test_a_revoked_key_is_gone(db: Database, key: tuple[ApiKey, str]) -> None:
    row, token = key
    key_admin.revoke(db, HERE, row.id)
    assert keys.authenticate(db, token) is None
    assert key_admin.list_keys(db, HERE, limit=9).items == []
    for change in (key_admin.get, key_admin.rotate, key_admin.revoke):
        with pytest.raises(NotFoundError):
            change(db, HERE, row.id)


def test_a_key_is_changed(db: Database, key: tuple[ApiKey, str]) -> None:
    row, token = key
    wanted = KeyChange(name="new", scopes=frozenset({Scope.CHAT}), lifetime_s=60)
    changed = key_admin.change(db, HERE, row.id, wanted)
    assert (changed.name, changed.scopes) == ("new", ["chat"])
    principal = keys.authenticate(db, token)
    assert principal is not None
    assert (principal.key_name, principal.scopes, principal.valid_until) == ("new", {Scope.CHAT}, changed.expires_at)
    same = key_admin.change(db, HERE, row.id, KeyChange())
    assert (same.name, same.scopes, same.expires_at) == ("new", ["chat"], changed.expires_at)
    set_back(db, "expires_at")
    with pytest.raises(InvalidStateError, match="has expired"):
        key_admin.change(db, HERE, row.id, wanted)


def test_the_last_operator_cannot_become_an_ordinary_key(db: Database) -> None:
    key_id = keys.create_key(db, name="one", scopes=ALL).split("-")[2]
    place = KeyPlace(organization_id=DEFAULT_ORGANIZATION)
    with pytest.raises(InvalidStateError, match="the last key"):
        key_admin.change(db, place, key_id, KeyChange(scopes=ORDINARY))
    assert set(key_admin.change(db, place, key_id, KeyChange(scopes=ALL - {Scope.CHAT})).scopes) == ALL - {Scope.CHAT}
    keys.create_key(db, name="two", scopes=ALL)
    assert set(key_admin.change(db, place, key_id, KeyChange(scopes=ORDINARY)).scopes) == ORDINARY


def test_another_place_has_no_such_key(db: Database, key: tuple[ApiKey, str]) -> None:
    row, token = key
    keys.create_key(db, name="foreign", organization_id="org-b")
    other = organizations.create_project(db, organization_id="org-a", name="Other").id
    foreign_places = (
        KeyPlace(organization_id="org-b"),
        KeyPlace(organization_id="org-b", project_id=row.project_id),
        KeyPlace(organization_id="org-a", project_id=other),
        KeyPlace(organization_id="org-a", admin_only=True),
    )
    for place in foreign_places:
        for change in (key_admin.get, key_admin.rotate, key_admin.revoke):
            with pytest.raises(NotFoundError):
                change(db, place, row.id)
    assert keys.authenticate(db, token) is not None


def test_the_last_key_of_an_installation_stays(db: Database) -> None:
    tokens = [keys.create_key(db, name=name, scopes=ALL) for name in ("one", "two")]
    place = KeyPlace(organization_id=DEFAULT_ORGANIZATION)
    ids = [token.split("-")[2] for token in tokens]
    with ThreadPoolExecutor(2) as pool:
        tries = [pool.submit(key_admin.revoke, db, place, key_id) for key_id in ids]
    refused = [found.exception() for found in tries if found.exception() is not None]
    assert [type(error) for error in refused] == [InvalidStateError]
    assert sum(keys.authenticate(db, token) is not None for token in tokens) == 1


def test_an_installation_that_nobody_can_administer_gets_a_key(db: Database, tmp_path: Path) -> None:
    keys.create_key(db, name="ordinary")
    path = tmp_path / "admin.key"
    assert keys.ensure_admin_key(db, path)
    principal = keys.authenticate(db, path.read_text().strip())
    assert principal is not None
    assert principal.is_operator
    assert not keys.ensure_admin_key(db, path)
    set_back(db, "revoked_at")
    assert keys.ensure_admin_key(db, path)


def test_archiving_a_project_ends_its_keys(db: Database) -> None:
    with db.transaction() as session:
        default = organizations.ensure_organization(session, "org-a")
    project = organizations.create_project(db, organization_id="org-a", name="Old")
    request = KeyRequest(organization_id="org-a", project_id=project.id, name="x", scopes=ORDINARY)
    _, token = key_admin.create(db, request)
    archived = organizations.archive_project(db, organization_id="org-a", project_id=project.id)
    assert archived.archived_at is not None
    again = organizations.archive_project(db, organization_id="org-a", project_id=project.id)
    assert again.archived_at == archived.archived_at
    assert keys.authenticate(db, token) is None
    with pytest.raises(InvalidStateError, match="is archived"):
        key_admin.create(db, request)
    with pytest.raises(InvalidStateError, match="default project"):
        organizations.archive_project(db, organization_id="org-a", project_id=default)
    with pytest.raises(NotFoundError):
        organizations.archive_project(db, organization_id="org-b", project_id=project.id)
    listed = organizations.list_projects(db, organization_id="org-a", limit=9)
    assert [found.id for found in listed.items] == [default]
    both = organizations.list_projects(db, organization_id="org-a", limit=1, after=default, include_archived=True)
    assert [found.id for found in both.items] == [project.id]


def test_only_an_empty_organization_is_deleted(db: Database) -> None:
    token = keys.create_key(db, name="x", organization_id="org-a")
    submit(db, organization_id="org-a")
    with pytest.raises(InvalidStateError, match="still has jobs"):
        organizations.delete_organization(db, "org-a")
    assert keys.authenticate(db, token) is not None
    with db.transaction() as session:
        session.execute(text("DELETE FROM jobs"))
    organizations.delete_organization(db, "org-a")
    assert keys.authenticate(db, token) is None
    with pytest.raises(NotFoundError):
        organizations.delete_organization(db, "org-a")
    with pytest.raises(InvalidStateError, match="runs this service"):
        organizations.delete_organization(db, DEFAULT_ORGANIZATION)


def test_organizations_are_made_once(db: Database) -> None:
    def ensure(_: int) -> str:
        with db.transaction() as session:
            return organizations.ensure_organization(session, "org-new")

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ensure, range(8)))) == 1


def test_scopes_by_name() -> None:
    assert parse_scopes(["jobs:read", "admin"]) == {Scope.JOBS_READ, Scope.ADMIN}
    assert read_scopes(["jobs:read", "of a later version"]) == {Scope.JOBS_READ}
    for names, reason in ((["jobs:read", "jobs"], "no scope 'jobs'"), ([], "at least one")):
        with pytest.raises(InvalidRequestError, match=reason):
            parse_scopes(names)


def test_old_keys_keep_what_they_could_do(empty_database_url: str) -> None:
    config = migrate.alembic_config(empty_database_url)
    command.upgrade(config, "0005")
    db = Database(empty_database_url)
    with db.transaction() as session:
        session.execute(
            text(
                "INSERT INTO api_keys (id, organization_id, name, secret_sha256, created_at) VALUES"
                " ('a', 'org-local', 'admin', '', '2026-01-01'), ('b', 'org-local', 'admin', '', '2026-02-01'),"
                " ('c', 'org-other', 'admin', '', '2025-01-01')"
            )
        )
        session.execute(
            text(
                "INSERT INTO files (id, organization_id, filename, purpose, num_bytes, sha256)"
                " VALUES ('file-1', 'org-files', 'x', 'user_data', 1, '')"
            )
        )
    migrate.upgrade(empty_database_url)
    with db.read() as session:
        rows = session.query(ApiKey).order_by(ApiKey.id).all()
        scopes = [read_scopes(row.scopes) for row in rows]
        assert [set(found) for found in scopes] == [set(ALL), set(ORDINARY), set(ORDINARY)]
        assert [organizations.default_project_id(session, row.organization_id) for row in rows] == [
            row.project_id for row in rows
        ]
        assert organizations.default_project_id(session, "org-files").startswith("proj_")
    db.dispose()

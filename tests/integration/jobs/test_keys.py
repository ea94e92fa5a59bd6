"""Keys and sessions: only the right token is somebody, and only its hash is kept."""

from __future__ import annotations

import stat
from pathlib import Path

from sqlalchemy import text

from jobs import keys
from jobs.db import Database


def test_a_token_is_somebody_and_any_other_is_nobody(db: Database) -> None:
    token = keys.create_key(db, name="ci", organization_id="org-a")
    principal = keys.authenticate(db, token)
    assert principal is not None
    assert (principal.organization_id, principal.key_name) == ("org-a", "ci")
    flipped = token[:-1] + ("A" if token[-1] != "A" else "B")
    for wrong in (flipped, token[:-1], token + "x", "", "sk-lomo-", "\0", token.upper(), f"{token}\n"):
        assert keys.authenticate(db, wrong) is None
    with db.transaction() as session:
        stored = session.execute(text("SELECT * FROM api_keys")).one()
        session.execute(text("UPDATE api_keys SET revoked_at = now()"))
    # Not what follows its last "-": the secret is drawn from an alphabet that has one, and may end in it.
    assert token[-16:] not in str(stored), "the secret itself was stored"
    assert keys.authenticate(db, token) is None


def test_the_first_key_is_written_once_for_its_owner_only(db: Database, tmp_path: Path) -> None:
    path = tmp_path / "admin.key"
    assert keys.ensure_admin_key(db, path)
    token = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.authenticate(db, token.strip()) is not None
    assert not keys.ensure_admin_key(db, path)
    assert path.read_text() == token


def test_a_session_lasts_until_it_is_closed_expired_or_its_key_revoked(db: Database) -> None:
    token = keys.create_key(db, name="me")
    principal = keys.authenticate(db, token)
    assert principal is not None
    first, second = keys.open_session(db, principal), keys.open_session(db, principal)
    assert keys.authenticate_session(db, first) == principal
    assert keys.authenticate_session(db, first + "x") is None
    keys.close_session(db, first)
    assert keys.authenticate_session(db, first) is None
    assert keys.authenticate_session(db, second) == principal
    with db.transaction() as session:
        session.execute(text("UPDATE browser_sessions SET expires_at = now()"))
    assert keys.authenticate_session(db, second) is None
    third = keys.open_session(db, principal)
    with db.transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM browser_sessions")) == 1, "expired sessions are swept"
        session.execute(text("UPDATE api_keys SET revoked_at = now()"))
    assert keys.authenticate_session(db, third) is None

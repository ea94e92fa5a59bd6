"""Where a browser's request may come from, and how long a credential is remembered."""

from __future__ import annotations

from typing import cast

import pytest
from starlette.requests import Request

from jobs import keys
from jobs.db import Database
from jobs.keys import Principal
from server.auth import REMEMBER_S, Authenticator, Credential, check_origin, find_credential
from server.errors import ApiError

PRINCIPAL = Principal("org-local", "0123456789ab", "test", "proj_test")
NO_DATABASE = cast(Database, None)


def make_request(**headers: str) -> Request:
    """A request with these headers; underscores become hyphens."""
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw})


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"authorization": "Bearer sk-lomo-1"}, Credential("key", "sk-lomo-1")),
        ({"authorization": "bearer  sk-lomo-1 "}, Credential("key", "sk-lomo-1")),
        ({"authorization": "Basic abc"}, None),
        ({"cookie": "lomo_session=abc; other=1"}, Credential("session", "abc")),
        ({"authorization": "Bearer sk-lomo-1", "cookie": "lomo_session=abc"}, Credential("key", "sk-lomo-1")),
        ({"cookie": "lomo_session="}, None),
        ({}, None),
    ],
)
def test_find_credential(headers: dict[str, str], expected: Credential | None) -> None:
    assert find_credential(make_request(**headers)) == expected


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "none"}, True),
        ({"sec_fetch_site": "same-site"}, False),
        ({"sec_fetch_site": "cross-site"}, False),
        ({"sec_fetch_site": "cross-site", "origin": "http://localhost:8000"}, False),
        ({"origin": "http://localhost:8000"}, True),
        ({"origin": "http://localhost:8001"}, False),
        ({"origin": "http://evil.test"}, False),
        ({"origin": "null"}, False),
        ({}, False),
    ],
)
def test_unsafe_request_with_cookie_must_come_from_our_pages(headers: dict[str, str], *, allowed: bool) -> None:
    request = make_request(host="localhost:8000", **headers)
    if allowed:
        check_origin(request, method="POST", required=True)
    else:
        with pytest.raises(ApiError) as caught:
            check_origin(request, method="DELETE", required=True)
        assert (caught.value.status, caught.value.code) == (403, "cross_site_request")
    check_origin(request, method="GET", required=True)


def test_login_from_a_script_needs_no_origin() -> None:
    check_origin(make_request(host="localhost"), method="POST", required=False)
    with pytest.raises(ApiError):
        check_origin(make_request(host="localhost", origin="http://evil.test"), method="POST", required=False)


def test_valid_credentials_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Principal | None] = [PRINCIPAL, None]
    now = 100.0
    monkeypatch.setattr(keys, "authenticate", lambda _db, _token: answers.pop(0))
    authenticator = Authenticator(NO_DATABASE, clock=lambda: now)
    credential = Credential("key", "sk-lomo-1")
    assert authenticator.find(credential) == PRINCIPAL
    now += REMEMBER_S - 0.1
    assert authenticator.find(credential) == PRINCIPAL
    assert len(answers) == 1
    now += 0.2
    assert authenticator.find(credential) is None


def test_after_a_change_of_its_organizations_keys_a_credential_is_looked_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Principal | None] = [PRINCIPAL, None]
    monkeypatch.setattr(keys, "authenticate", lambda _db, _token: answers.pop(0))
    authenticator = Authenticator(NO_DATABASE)
    credential = Credential("key", "sk-lomo-1")
    authenticator.find(credential)
    authenticator.doubt("org-another")
    assert authenticator.recall(credential) == PRINCIPAL
    authenticator.doubt(PRINCIPAL.organization_id)
    assert authenticator.recall(credential) is None
    assert authenticator.knows(credential), "its address may still be listened to"
    assert authenticator.find(credential) is None
    assert not authenticator.knows(credential)


def test_refusals_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Principal | None] = [None, PRINCIPAL]
    monkeypatch.setattr(keys, "authenticate", lambda _db, _token: answers.pop(0))
    authenticator = Authenticator(NO_DATABASE)
    assert authenticator.find(Credential("key", "sk-lomo-1")) is None
    assert authenticator.find(Credential("key", "sk-lomo-1")) == PRINCIPAL


def test_a_key_and_a_session_of_the_same_text_are_not_confused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "authenticate", lambda _db, _token: PRINCIPAL)
    monkeypatch.setattr(keys, "authenticate_session", lambda _db, _token: None)
    authenticator = Authenticator(NO_DATABASE)
    assert authenticator.find(Credential("key", "same")) == PRINCIPAL
    assert authenticator.find(Credential("session", "same")) is None

"""Closed by default: every route without a key, other organizations, other sites, other hosts, the login."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import text

from jobs import keys
from jobs.db import Database
from server import auth, main

from .conftest import Site

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}


def paths(site: Site) -> list[str]:
    routes = main.create_app(site.settings).routes
    return sorted({re.sub(r"\{[^}]*\}", "x", route.path) for route in routes if isinstance(route, APIRoute)})


@pytest.mark.parametrize("credential", [{}, {"Authorization": "Bearer sk-lomo-0"}, {"Cookie": "lomo_session=x"}])
def test_every_route_without_a_key(site: Site, credential: dict[str, str]) -> None:
    client = site.client("", headers=credential)
    open_routes = []
    for path in paths(site):
        for method in METHODS:
            response = client.request(method, path, headers=SAME_ORIGIN)
            assert response.status_code < 500 or path == "/readyz", (method, path)
            assert response.headers["x-request-id"]
            if response.status_code == 401 and path != "/login":
                assert response.headers["www-authenticate"] == "Bearer"
                assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"
            elif response.status_code not in {401, 405}:
                open_routes.append(f"{method} {path}")
    assert sorted(open_routes) == ["GET /", "GET /healthz", "GET /login", "GET /openapi.json", "GET /readyz"]


def test_another_organization_sees_nothing(site: Site) -> None:
    run = site.run()
    run.succeed()
    file_id = site.upload()
    foreign = site.client(keys.create_key(site.db, name="foreign", organization_id="org-foreign"))
    job = f"/v1/fine_tuning/jobs/{run.job_id}"
    model = site.get(run.job_id)["fine_tuned_model"]
    for path in (
        job,
        f"{job}/events",
        f"{job}/events?stream=true",
        f"{job}/checkpoints",
        f"{job}/metrics",
        f"/v1/files/{file_id}",
        f"/v1/files/{file_id}/content",
        f"/v1/models/{model}",
        f"/v1/fine_tuning/jobs?after={run.job_id}",
        f"/v1/files?after={file_id}",
    ):
        assert foreign.get(path).status_code == 404, path
    assert foreign.post(f"{job}/cancel").status_code == 404
    assert foreign.delete(f"/v1/files/{file_id}").status_code == 404
    assert foreign.get("/v1/fine_tuning/jobs").json()["data"] == []
    assert foreign.get("/v1/files").json()["data"] == []
    assert [entry["id"] for entry in foreign.get("/v1/models").json()["data"]] == ["tiny"]
    body = {"model": "tiny", "training_file": file_id}
    refused = foreign.post("/v1/fine_tuning/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "file_not_found")
    own = foreign.post("/v1/files", files={"file": ("x.jsonl", b"{}\n")}, data={"purpose": "fine-tune"}).json()
    refused = foreign.post("/v1/fine_tuning/jobs", json={"model": model, "training_file": own["id"]})
    assert refused.json()["error"]["code"] == "model_not_found"


def test_a_revoked_key_is_refused_when_it_is_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client = site.client()
    assert client.get("/v1/models").status_code == 200
    with site.db.transaction() as session:
        session.execute(text("UPDATE api_keys SET revoked_at = now()"))
    assert client.get("/v1/models").status_code == 200, "within the 10 s of memory"
    authenticator = site.server.services.authenticator
    monkeypatch.setattr(authenticator, "_clock", lambda clock=authenticator._clock: clock() + auth.REMEMBER_S)
    assert client.get("/v1/models").status_code == 401


def log_in(site: Site) -> httpx.Client:
    """A browser's client with a session."""
    client = site.client("")
    response = client.post("/login", data={"api_key": f" {site.key}\n"}, headers=SAME_ORIGIN)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie
    return client


def test_login_and_logout(site: Site) -> None:
    visitor = site.client("")
    assert visitor.get("/").headers["location"] == "/login"
    wrong = visitor.post("/login", data={"api_key": "sk-lomo-<b>"})
    assert wrong.status_code == 401
    assert "This API key is not valid" in wrong.text
    assert "<b>" not in wrong.text.replace("<body", "")
    assert visitor.post("/login").status_code == 401

    client = log_in(site)
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert client.get("/v1/models").status_code == 200
    assert client.post("/logout", headers=SAME_ORIGIN).headers["location"] == "/login"
    assert client.get("/v1/models").status_code == 401


def test_the_old_cookie_is_worthless_after_logout(site: Site) -> None:
    client = log_in(site)
    cookie = client.cookies["lomo_session"]
    client.post("/logout", headers=SAME_ORIGIN)
    assert site.client("", cookies={"lomo_session": cookie}).get("/v1/models").status_code == 401


def test_cookie_is_secure_behind_tls(site: Site) -> None:
    headers = SAME_ORIGIN | {"X-Forwarded-Proto": "https"}
    response = site.client("").post("/login", data={"api_key": site.key}, headers=headers)
    assert "Secure" in response.headers["set-cookie"]


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        (SAME_ORIGIN, True),
        ({"Origin": "{url}"}, True),
        ({}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": "https://evil.test"}, False),
        ({"Origin": "null"}, False),
    ],
)
def test_unsafe_requests_with_the_cookie(site: Site, headers: dict[str, str], *, allowed: bool) -> None:
    client = log_in(site)
    job_id = site.submit()
    sent = {name: value.format(url=site.url) for name, value in headers.items()}
    requests = [
        ("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel"),
        ("DELETE", "/v1/files/file-none"),
        ("POST", "/v1/fine_tuning/jobs"),
        ("POST", "/v1/files"),
        ("POST", "/logout"),
    ]
    for method, path in requests:
        response = client.request(method, path, headers=sent)
        assert (response.status_code != 403) is allowed, (method, path, response.text)
    # A key in a header is never sent by another site's page.
    assert site.client().delete("/v1/files/file-none", headers={"Origin": "https://evil.test"}).status_code == 404


def test_login_from_another_site_is_refused(site: Site) -> None:
    response = site.client("").post("/login", data={"api_key": site.key}, headers={"Sec-Fetch-Site": "cross-site"})
    assert response.status_code == 403


def test_hosts(site: Site) -> None:
    port = urlsplit(site.url).port
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert site.client(headers={"Host": host}).get("/v1/models").status_code == 200, host
    for host in ("evil.test", f"evil.test:{port}", "localhost.evil.test", "127.0.0.1.evil.test", ""):
        for path in ("/", "/login", "/v1/models", "/assets/js/main.js"):
            response = site.client(headers={"Host": host}).get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_host"), host
        assert site.client(headers={"Host": host}).get("/healthz").status_code == 200


def test_security_headers_everywhere(site: Site) -> None:
    for path in ("/", "/login", "/assets/none.js", "/v1/models", "/v1/none", "/healthz"):
        headers = site.client().get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';"), path
        assert headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"req_[0-9a-f]{24}", headers["x-request-id"])
        assert "server" not in headers


def test_assets(site: Site) -> None:
    client = site.client("")
    response = client.get("/assets/index.html")
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-cache")
    again = client.get("/assets/index.html", headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304
    for path in ("../main.py", "..%2fmain.py", "%2e%2e/main.py", "%252e%252e/main.py", "/etc/passwd", "..\\main.py"):
        assert client.get(f"/assets/{path}").status_code == 404, path


def test_a_database_that_loses_its_keys_answers_401(site: Site) -> None:
    other = Database(site.settings.database_url)
    with other.transaction() as session:
        session.execute(text("DELETE FROM api_keys"))
    other.dispose()
    assert site.client().get("/v1/files").status_code == 401

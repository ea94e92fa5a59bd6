"""Organizations, projects and keys over HTTP: who may do what, what is shown once, and what is written down."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import structlog
from fastapi.routing import APIRoute
from sqlalchemy import text

from jobs import key_admin, keys, organizations
from jobs.key_admin import KeyPlace, KeyRequest
from jobs.keys import DEFAULT_ORGANIZATION
from jobs.scopes import ALL, OF_TENANTS, ORDINARY, Scope
from server import main
from server.scopes import PUBLIC, find_scope

from .conftest import TRAIN_ROW, RunningServer, Site

PROJECTS, ADMIN_KEYS = "/v1/organization/projects", "/v1/organization/admin_api_keys"
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}


def key_with(site: Site, scopes: frozenset[Scope], organization_id: str = DEFAULT_ORGANIZATION) -> str:
    return keys.create_key(site.db, name="test", organization_id=organization_id, scopes=scopes)


@pytest.fixture
def admin(site: Site) -> httpx.Client:
    """A client of whoever runs the service."""
    return site.client(key_with(site, ALL))


@pytest.fixture
def tenant(site: Site, admin: httpx.Client) -> httpx.Client:
    """A client of another organization's administrator."""
    organization = ok(admin.post("/v1/organizations", json={"name": "Tenant"}))
    key = ok(admin.post(f"/v1/organizations/{organization['id']}/admin_api_keys", json={"name": "first"}))
    return site.client(key["value"])


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def guarded_routes(site: Site) -> Iterator[tuple[str, str, Scope | None]]:
    """Method, path (its parameters filled with something) and scope of every route that needs a key."""
    for route in main.create_app(site.settings).routes:
        if isinstance(route, APIRoute):
            for method in route.methods:
                if f"{method} {route.path}" not in PUBLIC:
                    yield method, re.sub(r"\{[^}]*\}", "x", route.path), find_scope(method, route.path)


@pytest.mark.parametrize("state", ["none", "revoked", "expired", "rotated"])
def test_every_route_without_a_valid_key(site: Site, state: str) -> None:
    token = key_with(site, ALL)
    place, key_id = KeyPlace(organization_id=DEFAULT_ORGANIZATION), token.split("-")[2]
    match state:
        case "none":
            token = ""
        case "revoked":
            key_with(site, ALL)  # the last one cannot be
            key_admin.revoke(site.db, place, key_id)
        case "expired":
            with site.db.transaction() as session:
                session.execute(text("UPDATE api_keys SET expires_at = now()"))
        case "rotated":
            key_admin.rotate(site.db, place, key_id, grace_s=3600)
            with site.db.transaction() as session:
                session.execute(text("UPDATE api_keys SET previous_expires_at = now()"))
    client = site.client(token)
    routes = list(guarded_routes(site))
    assert len(routes) > 40
    for method, path, _ in routes:
        refused = client.request(method, path)
        assert refused.status_code == 401, (method, path)
        assert method == "HEAD" or error(refused) == (401, "invalid_api_key"), (method, path)


def test_every_route_with_every_scope_but_its_own(site: Site) -> None:
    clients = {scope: site.client(key_with(site, ALL - {scope})) for scope in Scope}
    for method, path, scope in guarded_routes(site):
        if scope is None:
            continue
        refused = clients[scope].request(method, path)
        assert refused.status_code == 403, (method, path)
        if method == "HEAD":  # which has no body
            continue
        assert error(refused) == (403, "insufficient_scope"), (method, path)
        assert refused.json()["error"]["scope"] == scope
        assert f"lacks the scope {scope}" in refused.json()["error"]["message"]


def test_every_route_with_its_own_scope_alone(site: Site) -> None:
    clients = {scope: site.client(key_with(site, frozenset({scope}))) for scope in Scope}
    for method, path, scope in guarded_routes(site):
        if scope is not None:
            response = clients[scope].request(method, path)
            assert response.status_code in {200, 400, 404}, (method, path, response.text)


def test_a_tenant_does_not_manage_organizations(site: Site, tenant: httpx.Client) -> None:
    tried = 0
    for method, path, _ in guarded_routes(site):
        if path.startswith("/v1/organizations"):
            tried += 1
            assert error(tenant.request(method, path)) == (403, "operator_only"), (method, path)
    assert tried == 7
    assert error(tenant.get("/metrics")) == (403, "insufficient_scope")


def test_scopes_of_the_dashboard_are_its_keys(site: Site) -> None:
    client = site.client("")
    client.post("/login", data={"api_key": key_with(site, frozenset({Scope.JOBS_READ}))}, headers=SAME_ORIGIN)
    assert client.get("/v1/fine_tuning/jobs").status_code == 200
    assert error(client.get("/v1/files")) == (403, "insufficient_scope")
    assert client.post("/logout", headers=SAME_ORIGIN).status_code == 303


def test_a_key_is_shown_once_and_does_what_its_scopes_say(site: Site, admin: httpx.Client) -> None:
    project = ok(admin.post(PROJECTS, json={"name": " Search "}))
    assert (project["object"], project["name"], project["status"]) == ("organization.project", "Search", "active")
    path = f"{PROJECTS}/{project['id']}/api_keys"
    body = {"name": "ci", "scopes": ["jobs:read"], "expires_in_seconds": 3600}
    made = ok(admin.post(path, json=body))
    assert made["redacted_value"] == f"sk-lomo-{made['id']}-..."
    assert made["expires_at"] - made["created_at"] == 3600
    [listed] = ok(admin.get(path))["data"]
    assert listed == ok(admin.get(f"{path}/{made['id']}"))
    assert listed == {name: value for name, value in made.items() if name != "value"}
    assert made["value"] not in admin.get(path).text
    client = site.client(made["value"])
    assert client.get("/v1/fine_tuning/jobs").status_code == 200
    assert error(client.get("/v1/files")) == (403, "insufficient_scope")
    assert ok(admin.get(f"{path}/{made['id']}"))["last_used_at"] is not None
    default = ok(admin.post(path, json={"name": "all"}))
    assert set(default["scopes"]) == set(ORDINARY)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": " "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["jobs:all"]}, "scopes"),
        ({"name": "x", "expires_in_seconds": 0}, "expires_in_seconds"),
        ({"name": "x", "expires_in": 9}, "expires_in"),
    ],
)
def test_what_is_no_key(admin: httpx.Client, body: dict[str, Any], param: str) -> None:
    project = ok(admin.get(PROJECTS))["data"][0]["id"]
    refused = admin.post(f"{PROJECTS}/{project}/api_keys", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_tenant_cannot_give_what_is_not_its_own(tenant: httpx.Client) -> None:
    project = ok(tenant.get(PROJECTS))["data"][0]["id"]
    path = f"{PROJECTS}/{project}/api_keys"
    refused = tenant.post(path, json={"name": "x", "scopes": ["metrics:read"]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "scopes")
    assert set(ok(tenant.post(path, json={"name": "x"}))["scopes"]) == set(OF_TENANTS)
    assert set(ok(tenant.post(ADMIN_KEYS, json={"name": "x"}))["scopes"]) == set(OF_TENANTS) | {"admin"}


def test_rotation_over_http(site: Site, admin: httpx.Client) -> None:
    project = ok(admin.get(PROJECTS))["data"][0]["id"]
    path = f"{PROJECTS}/{project}/api_keys"
    made = ok(admin.post(path, json={"name": "ci"}))
    old = site.client(made["value"])
    assert old.get("/v1/models").status_code == 200
    rotated = ok(admin.post(f"{path}/{made['id']}/rotate"))
    assert rotated["value"] != made["value"]
    day_s = rotated["previous_expires_at"] - rotated["created_at"]
    assert 86_400 <= day_s <= 86_430, "a day, unless something else is said"
    new = site.client(rotated["value"])
    assert (old.get("/v1/models").status_code, new.get("/v1/models").status_code) == (200, 200)
    last = ok(admin.post(f"{path}/{made['id']}/rotate", json={"grace_s": 0}))
    assert [client.get("/v1/models").status_code for client in (old, new, site.client(last["value"]))] == [
        401,
        401,
        200,
    ]
    assert error(admin.post(f"{path}/{made['id']}/rotate", json={"grace_s": -1})) == (400, "invalid_value")


def test_what_is_taken_away_over_http_is_gone_at_once(site: Site, admin: httpx.Client) -> None:
    def make_key(path: str) -> tuple[str, httpx.Client]:
        made = ok(admin.post(path, json={"name": "ci"}))
        client = site.client(made["value"])
        assert client.get("/v1/models").status_code == 200  # remembered from now on
        return f"{path}/{made['id']}", client

    project = ok(admin.post(PROJECTS, json={"name": "short-lived"}))["id"]
    key, client = make_key(f"{PROJECTS}/{project}/api_keys")
    ok(admin.post(key, json={"scopes": ["jobs:read"]}))
    assert error(client.get("/v1/models")) == (403, "insufficient_scope")
    ok(admin.delete(key))
    assert error(client.get("/v1/models")) == (401, "invalid_api_key")
    _, client = make_key(f"{PROJECTS}/{project}/api_keys")
    ok(admin.post(f"{PROJECTS}/{project}/archive"))
    assert error(client.get("/v1/models")) == (401, "invalid_api_key")
    key, client = make_key(ADMIN_KEYS)
    ok(admin.delete(key))
    assert error(client.get("/v1/models")) == (401, "invalid_api_key")


def test_a_change_over_http(site: Site, admin: httpx.Client, tenant: httpx.Client) -> None:
    project = ok(admin.get(PROJECTS))["data"][0]["id"]
    made = ok(admin.post(f"{PROJECTS}/{project}/api_keys", json={"name": "ci"}))
    path = f"{PROJECTS}/{project}/api_keys/{made['id']}"
    changed = ok(admin.post(path, json={"name": "new", "scopes": ["files:read"], "expires_in_seconds": 60}))
    assert (changed["name"], changed["scopes"]) == ("new", ["files:read"])
    assert ok(admin.get(path)) == changed
    assert error(site.client(made["value"]).get("/v1/models")) == (403, "insufficient_scope")
    assert error(admin.post(path, json={"scopes": []})) == (400, "invalid_value")
    assert error(tenant.post(path, json={"name": "mine"})) == (404, "not_found")
    own = ok(tenant.get(ADMIN_KEYS))["data"][0]
    refused = tenant.post(f"{PROJECTS}/{own['project_id']}/api_keys/{own['id']}", json={"scopes": ["metrics:read"]})
    assert error(refused) == (400, "invalid_value")


def test_revocation_over_http(site: Site, admin: httpx.Client) -> None:
    project = ok(admin.get(PROJECTS))["data"][0]["id"]
    path = f"{PROJECTS}/{project}/api_keys"
    made = ok(admin.post(path, json={"name": "ci"}))
    gone = ok(admin.delete(f"{path}/{made['id']}"))
    assert gone == {"object": "organization.project.api_key.deleted", "id": made["id"], "deleted": True}
    assert site.client(made["value"]).get("/v1/models").status_code == 401
    assert error(admin.delete(f"{path}/{made['id']}")) == (404, "not_found")
    [own] = ok(admin.get(ADMIN_KEYS))["data"]
    assert error(admin.delete(f"{ADMIN_KEYS}/{own['id']}")) == (400, "invalid_state")


def test_another_organizations_projects_and_keys_are_not_there(admin: httpx.Client, tenant: httpx.Client) -> None:
    project = ok(admin.get(PROJECTS))["data"][0]["id"]
    key = ok(admin.post(f"{PROJECTS}/{project}/api_keys", json={"name": "ci"}))["id"]
    own_project = ok(tenant.get(PROJECTS))["data"][0]["id"]
    for place in (project, own_project):
        for method, path in (("GET", key), ("DELETE", key), ("POST", f"{key}/rotate")):
            response = tenant.request(method, f"{PROJECTS}/{place}/api_keys/{path}")
            assert error(response) == (404, "not_found"), (method, place)
    assert error(tenant.get(f"{PROJECTS}/{project}")) == (404, "not_found")
    assert error(tenant.post(f"{PROJECTS}/{project}", json={"name": "mine"})) == (404, "not_found")
    assert error(tenant.post(f"{PROJECTS}/{project}/archive")) == (404, "not_found")
    assert error(tenant.get(f"{PROJECTS}/{project}/api_keys")) == (404, "not_found")
    assert error(tenant.get(f"{PROJECTS}?after={project}")) == (404, "not_found")
    for method, path in (("GET", key), ("DELETE", key), ("POST", f"{key}/rotate")):
        assert error(tenant.request(method, f"{ADMIN_KEYS}/{path}")) == (404, "not_found")
    assert project not in tenant.get(PROJECTS).text


def test_organizations(admin: httpx.Client) -> None:
    made = ok(admin.post("/v1/organizations", json={"name": "Team", "quotas": {"max_queued_jobs": 3}}))
    assert made["quotas"] == {
        "max_queued_jobs": 3,
        "max_running_jobs": None,
        "max_gpu_seconds": None,
        "max_stored_bytes": None,
        "max_priority": None,
    }
    path = f"/v1/organizations/{made['id']}"
    changed = ok(admin.post(path, json={"quotas": {"max_stored_bytes": 9, "max_queued_jobs": None}, "name": "Group"}))
    assert (changed["name"], changed["quotas"]["max_stored_bytes"], changed["quotas"]["max_queued_jobs"]) == (
        "Group",
        9,
        None,
    )
    assert ok(admin.post(path, json={})) == changed == ok(admin.get(path))
    assert ok(admin.get(f"{path}/usage"))["stored_bytes"]["limit"] == 9
    page = ok(admin.get("/v1/organizations?limit=1"))
    assert (page["data"][0]["id"], page["has_more"]) == (DEFAULT_ORGANIZATION, True)
    rest = ok(admin.get(f"/v1/organizations?after={page['last_id']}"))
    assert [item["id"] for item in rest["data"]] == [made["id"]]
    refused = admin.post(path, json={"quotas": {"max_stored_bytes": -1}})
    assert refused.json()["error"]["param"] == "quotas.max_stored_bytes"
    assert ok(admin.delete(path)) == {"object": "organization.deleted", "id": made["id"], "deleted": True}
    for method in ("GET", "POST", "DELETE"):
        assert error(admin.request(method, path)) == (404, "not_found")
    assert error(admin.post(f"{path}/admin_api_keys", json={"name": "x"})) == (404, "not_found")


def test_over_quota(site: Site, admin: httpx.Client) -> None:
    own = f"/v1/organizations/{DEFAULT_ORGANIZATION}"
    file_id = site.upload()
    ok(admin.post(own, json={"quotas": {"max_queued_jobs": 1, "max_priority": 5, "max_stored_bytes": len(TRAIN_ROW)}}))
    body = {"model": "tiny", "training_file": file_id}
    client = site.client()
    ok(client.post("/v1/fine_tuning/jobs", json=body))
    refused = client.post("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 429
    assert refused.headers["x-should-retry"] == "false"
    assert refused.json()["error"] == {
        "message": "Your organization has 1 jobs in the queue and may have 1: wait for one to start, or cancel one.",
        "type": "insufficient_quota",
        "code": "insufficient_quota",
        "param": None,
        "quota": "max_queued_jobs",
        "used": 1,
        "limit": 1,
    }
    urgent = client.post("/v1/fine_tuning/jobs", json=body | {"lomo": {"priority": 6}})
    assert error(urgent) == (429, "insufficient_quota")
    assert urgent.json()["error"]["param"] == "lomo.priority"
    full = client.post("/v1/files", files={"file": ("x.txt", b"x")}, data={"purpose": "user_data"})
    assert error(full) == (429, "insufficient_quota")
    upload = {"filename": "x", "purpose": "user_data", "bytes": 1, "mime_type": "x/y"}
    assert error(client.post("/v1/uploads", json=upload)) == (429, "insufficient_quota")
    usage = ok(client.get("/v1/organization/usage"))
    assert usage["queued_jobs"] == {"used": 1, "limit": 1}
    assert (usage["stored_bytes"]["used"], usage["stored_bytes"]["files"]) == (len(TRAIN_ROW), len(TRAIN_ROW))
    assert (usage["max_priority"], usage["gpu_seconds"]) == (5, {"used": 0, "limit": None})


def test_a_job_says_that_it_waits_for_its_organizations_quota(site: Site, admin: httpx.Client) -> None:
    ok(admin.post(f"/v1/organizations/{DEFAULT_ORGANIZATION}", json={"quotas": {"max_running_jobs": 1}}))
    site.run()
    waiting = site.submit()
    assert site.get(waiting)["lomo"]["waiting_for"] == "quota: your organization runs 1 jobs, as many as it may."


def test_the_official_client_does_not_repeat_what_is_over_quota(site: Site, admin: httpx.Client) -> None:
    ok(admin.post(f"/v1/organizations/{DEFAULT_ORGANIZATION}", json={"quotas": {"max_queued_jobs": 0}}))
    file_id = site.upload()
    requests: list[httpx.Request] = []
    transport = httpx.Client(event_hooks={"request": [requests.append]})
    site.clients.append(transport)
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, http_client=transport)
    with pytest.raises(openai.RateLimitError, match="may have 0") as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert (caught.value.code, len(requests)) == ("insufficient_quota", 1)


def test_headers_that_name_the_organization_and_the_project(site: Site) -> None:
    principal = keys.authenticate(site.db, site.key)
    assert principal is not None
    own = {"OpenAI-Organization": principal.organization_id, "OpenAI-Project": principal.project_id}
    for headers in ({}, own, {"OpenAI-Organization": "", "OpenAI-Project": ""}):
        assert site.client(headers=headers).get("/v1/models").status_code == 200
    other = organizations.create_project(site.db, organization_id=DEFAULT_ORGANIZATION, name="Other").id
    for header, value in (("organization", "org-foreign"), ("project", other), ("project", "proj_none")):
        refused = site.client(headers={f"OpenAI-{header}": value}).get("/v1/models")
        assert error(refused) == (401, f"mismatched_{header}")


def test_jobs_and_files_carry_their_keys_project(site: Site, admin: httpx.Client) -> None:
    project = organizations.create_project(site.db, organization_id=DEFAULT_ORGANIZATION, name="Other").id
    request = KeyRequest(organization_id=DEFAULT_ORGANIZATION, project_id=project, name="x", scopes=ORDINARY)
    _, token = key_admin.create(site.db, request)
    other = site.client(token)
    own_job = site.submit()
    file = ok(other.post("/v1/files", files={"file": ("x.jsonl", TRAIN_ROW)}, data={"purpose": "fine-tune"}))
    job = ok(other.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"]}))
    assert (file["project_id"], job["lomo"]["project_id"]) == (project, project)
    upload = {"filename": "x", "purpose": "user_data", "bytes": 1, "mime_type": "x/y"}
    upload_id = ok(other.post("/v1/uploads", json=upload))["id"]
    part = ok(other.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}))["id"]
    in_parts = ok(other.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]}))["file"]
    assert in_parts["project_id"] == project
    listed = ok(admin.get(f"/v1/fine_tuning/jobs?project_id={project}"))["data"]
    assert [item["id"] for item in listed] == [job["id"]]
    listed = ok(admin.get(f"/v1/files?project_id={project}&order=asc"))["data"]
    assert [item["id"] for item in listed] == [file["id"], in_parts["id"]]
    assert error(other.get(f"/v1/fine_tuning/jobs/{own_job}")) == (404, "not_found")
    refused = other.get(f"/v1/fine_tuning/jobs?stream=true&project_id={project}")
    assert error(refused) == (400, "invalid_value")


def test_the_official_clients_administration(site: Site) -> None:
    client = openai.OpenAI(
        base_url=f"{site.url}/v1",
        api_key=site.key,
        admin_api_key=key_with(site, ALL),
        _strict_response_validation=True,
        max_retries=0,
    )
    projects = client.admin.organization.projects
    made = projects.create(name="Search")
    assert [project.name for project in projects.list(limit=1)] == ["Default project", "Search"]
    assert projects.update(made.id, name="Find").name == "Find"
    assert projects.retrieve(made.id).status == "active"
    key = ok(site.client(client.admin_api_key).post(f"{PROJECTS}/{made.id}/api_keys", json={"name": "ci"}))
    assert [found.id for found in projects.api_keys.list(made.id)] == [key["id"]]
    assert projects.api_keys.retrieve(key["id"], project_id=made.id).redacted_value == key["redacted_value"]
    assert projects.api_keys.update(key["id"], project_id=made.id, scopes=["chat"]).scopes == ["chat"]
    assert projects.api_keys.delete(key["id"], project_id=made.id).deleted
    assert projects.archive(made.id).status == "archived"
    assert [project.id for project in projects.list(include_archived=True)][1] == made.id
    admin_keys = client.admin.organization.admin_api_keys
    created = admin_keys.create(name="second", expires_in_seconds=60)
    assert [found.id for found in admin_keys.list()][1] == created.id
    assert admin_keys.retrieve(created.id).name == "second"
    assert admin_keys.delete(created.id).deleted
    client.close()


def test_every_change_is_written_down_without_its_secret(site: Site, admin: httpx.Client) -> None:
    with structlog.testing.capture_logs() as logs:
        organization = ok(admin.post("/v1/organizations", json={"name": "Team"}))["id"]
        ok(admin.post(f"/v1/organizations/{organization}", json={"quotas": {"max_queued_jobs": 1}}))
        project = ok(admin.post(PROJECTS, json={"name": "P"}))["id"]
        ok(admin.post(f"{PROJECTS}/{project}", json={"name": "Q"}))
        path = f"{PROJECTS}/{project}/api_keys"
        key = ok(admin.post(path, json={"name": "ci"}))
        rotated = ok(admin.post(f"{path}/{key['id']}/rotate", json={"grace_s": 60}))
        ok(admin.post(f"{path}/{key['id']}", json={"scopes": ["chat"]}))
        ok(admin.delete(f"{path}/{key['id']}"))
        ok(admin.post(f"{PROJECTS}/{project}/archive"))
        ok(admin.delete(f"/v1/organizations/{organization}"))
    lines = [line for line in logs if "by_key_id" in line]
    assert [line["event"] for line in lines] == [
        "organization_created",
        "organization_changed",
        "project_created",
        "project_renamed",
        "api_key_created",
        "api_key_rotated",
        "api_key_changed",
        "api_key_revoked",
        "project_archived",
        "organization_deleted",
    ]
    assert lines[1]["max_queued_jobs"] == 1
    assert {line["by_organization_id"] for line in lines} == {DEFAULT_ORGANIZATION}
    for value in (key["value"], rotated["value"]):
        assert value.rsplit("-", 1)[-1] not in str(logs)
    assert {line["key_id"] for line in lines[4:8]} == {key["id"]}


def test_requests_are_counted_and_bounded(site: Site) -> None:
    running = RunningServer.start(site.settings.model_copy(update={"requests_per_minute": 3}))
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as client:
        client.headers["Authorization"] = f"Bearer {site.key}"
        first = client.get("/v1/models")
        assert first.headers["x-ratelimit-limit-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-reset-requests"] == "20s"
        assert client.get("/v1/files/none").headers["x-ratelimit-remaining-requests"] == "1", "errors have them, too"
        ok(client.get("/v1/models"))
        refused = client.get("/v1/models")
        assert error(refused) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert 0 < int(refused.headers["retry-after-ms"]) <= 20_000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert client.get("/healthz").status_code == 200
        other = client.get("/v1/models", headers={"Authorization": f"Bearer {key_with(site, ORDINARY)}"})
        assert other.status_code == 200
    running.stop()


def test_wrong_keys_of_an_address_are_bounded(site: Site) -> None:
    known, stranger = key_with(site, ORDINARY), key_with(site, ORDINARY)
    running = RunningServer.start(site.settings.model_copy(update={"failed_logins_per_minute": 2}))
    wrong = f"sk-lomo-0123456789ab-{'x' * 43}"
    with httpx.Client(base_url=f"http://127.0.0.1:{running.port}") as client:

        def get(token: str) -> httpx.Response:
            return client.get("/v1/models", headers={"Authorization": f"Bearer {token}"})

        ok(get(known))
        assert [get(wrong).status_code for _ in range(3)] == [401, 401, 429]
        refused = get(wrong)
        assert error(refused) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.post("/login", data={"api_key": wrong}).status_code == 429
        assert get(stranger).status_code == 429, "nobody knows yet that it is right"
        ok(get(known))
        assert client.get("/v1/models").status_code == 401, "without a key nothing is looked up"
    running.stop()

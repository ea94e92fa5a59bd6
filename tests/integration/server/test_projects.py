"""Projects over HTTP: what is one project's is not there for another's keys, and all of it for an administrator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import text

from jobs import key_admin, organizations
from jobs.key_admin import KeyRequest
from jobs.keys import DEFAULT_ORGANIZATION, create_key
from jobs.scopes import ALL, ORDINARY
from server import main, sse

from .conftest import MODEL, TRAIN_ROW, Follower, Run, Site, make_model
from .test_tuned_models import write_manifest

JOBS = "/v1/fine_tuning/jobs"
WEBHOOK = {"name": "n", "url": "https://example.com", "event_types": ["fine_tuning.job.succeeded"]}
UPLOAD = {"filename": "x", "purpose": "user_data", "bytes": 1, "mime_type": "x/y"}

# Every route that takes an id of what a project owns, with what makes it a request that its owner could send.
REQUESTS: dict[str, dict[str, Any]] = {
    **{f"GET {JOBS}/{{job_id}}{rest}": {} for rest in ("", "/events", "/logs", "/checkpoints", "/metrics")},
    f"GET {JOBS}/{{job_id}}/data_report": {},
    **{f"POST {JOBS}/{{job_id}}/{action}": {} for action in ("cancel", "pause", "resume", "clone")},
    f"DELETE {JOBS}/{{job_id}}": {},
    **{f"GET /v1/files/{{file_id}}{rest}": {} for rest in ("", "/content", "/report")},
    "HEAD /v1/files/{file_id}/content": {},
    "GET /v1/files/{file_id}/preview": {"params": {"row": 1, "model": MODEL}},
    "DELETE /v1/files/{file_id}": {},
    "POST /v1/uploads/{upload_id}/parts": {"files": {"data": b"x"}},
    "POST /v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part-1"]}},
    "POST /v1/uploads/{upload_id}/cancel": {},
    "GET /v1/models/{model:path}": {},
    "GET /v1/models/{model:path}/export": {"params": {"format": "tar"}},
    "DELETE /v1/models/{model:path}": {},
    "GET /v1/webhook_endpoints/{endpoint_id}": {},
    "POST /v1/webhook_endpoints/{endpoint_id}": {"json": {"name": "mine"}},
    "DELETE /v1/webhook_endpoints/{endpoint_id}": {},
    "POST /v1/webhook_endpoints/{endpoint_id}/rotate_secret": {},
    "POST /v1/webhook_endpoints/{endpoint_id}/test": {"json": {"event_type": "fine_tuning.job.failed"}},
}
STREAMS = [f"GET {JOBS}/{{job_id}}/{feed}" for feed in ("events", "logs", "metrics")]


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def ids(response: httpx.Response) -> list[str]:
    return [item["id"] for item in ok(response)["data"]]


@dataclass
class Other:
    """A second project of the organization, and a client with a key of it."""

    site: Site
    project_id: str
    key: str
    client: httpx.Client

    def upload(self) -> str:
        form = {"files": {"file": ("x.jsonl", TRAIN_ROW)}, "data": {"purpose": "fine-tune"}}
        return str(ok(self.client.post("/v1/files", **form))["id"])

    def submit(self, **changes: Any) -> str:
        body = {"model": MODEL, "training_file": changes.pop("training_file", None) or self.upload(), **changes}
        return str(ok(self.client.post(JOBS, json=body))["id"])


@pytest.fixture
def other(site: Site) -> Other:
    project_id = organizations.create_project(site.db, organization_id=DEFAULT_ORGANIZATION, name="Other").id
    request = KeyRequest(organization_id=DEFAULT_ORGANIZATION, project_id=project_id, name="x", scopes=ORDINARY)
    _, token = key_admin.create(site.db, request)
    return Other(site, project_id, token, site.client(token))


@pytest.fixture
def admin(site: Site) -> httpx.Client:
    return site.client(create_key(site.db, name="admin", scopes=ALL))


def narrowed(site: Site, admin: httpx.Client, project_id: str) -> httpx.Client:
    """The administrator's client for one project."""
    key = admin.headers["Authorization"].removeprefix("Bearer ")
    return site.client(key, headers={"OpenAI-Project": project_id})


def tune(site: Site, run: Run) -> str:
    """Let a run succeed with a model that can be exported. Returns its name."""
    run.start()
    name = run.succeed(site.settings.data_dir)
    folder = site.settings.data_dir / f"runs/{run.job_id}/model"
    make_model(folder)
    write_manifest(folder)
    return name


@dataclass
class Things:
    """One of each that a project can own."""

    job_id: str
    file_id: str
    upload_id: str
    model: str
    endpoint_id: str

    @classmethod
    def make(cls, site: Site) -> Things:
        """In the default project."""
        run = site.run()
        model = tune(site, run)
        client = site.client()
        upload_id, endpoint_id = (
            ok(client.post(path, json=body))["id"]
            for path, body in (("/v1/uploads", UPLOAD), ("/v1/webhook_endpoints", WEBHOOK))
        )
        return cls(run.job_id, site.get(run.job_id)["training_file"], upload_id, model, endpoint_id)

    def fill(self, template: str) -> tuple[str, str, str]:
        """A route's path with the id of one, and with one like it that nothing has; and what is the other's id."""
        [name] = re.findall(r"\{([^}]*)\}", template)
        real = getattr(self, name.removesuffix(":path"))
        unknown = re.sub(r"[0-9a-f]{8}$", lambda found: found[0].translate(_TURN), real)
        return template.replace(f"{{{name}}}", real), template.replace(f"{{{name}}}", unknown), unknown


_TURN = str.maketrans("0123456789abcdef", "fedcba9876543210")


def owned_routes(site: Site) -> Iterator[str]:
    """Every route with an id in its path, but for those of the administration."""
    for route in main.create_app(site.settings).routes:
        if isinstance(route, APIRoute) and "{" in route.path and not route.path.startswith("/v1/organization"):
            yield from (f"{method} {route.path}" for method in route.methods)


def test_every_route_with_another_projects_id(site: Site, other: Other, admin: httpx.Client) -> None:
    assert set(owned_routes(site)) == set(REQUESTS), "routes with an id, and what is tried here"
    things = Things.make(site)
    strangers = {"its key": other.client, "an administrator in it": narrowed(site, admin, other.project_id)}
    tries = [*REQUESTS.items(), *((name, {"params": {"stream": "true"}}) for name in STREAMS)]
    for who, client in strangers.items():
        for name, request in tries:
            method, template = name.split(" ")
            real, missing, unknown = things.fill(template)
            refused, absent = (client.request(method, path, **request) for path in (real, missing))
            assert refused.status_code == absent.status_code == 404, (who, name, refused.text)
            told = absent.text.replace(unknown, things.fill("{" + template.split("{")[1].split("}")[0] + "}")[0])
            assert refused.text == told, (who, name)
    assert ok(site.client().get(f"{JOBS}/{things.job_id}"))["status"] == "succeeded"
    for template in ("/v1/files/{file_id}", "/v1/models/{model:path}", "/v1/webhook_endpoints/{endpoint_id}"):
        path, _, _ = things.fill(template)
        assert [client.get(path).status_code for client in (site.client(), admin)] == [200, 200], path


def test_lists_are_a_projects_and_an_administrators_are_all(site: Site, other: Other, admin: httpx.Client) -> None:
    things = Things.make(site)
    [result] = site.get(things.job_id)["result_files"]
    job_id = other.submit()
    file_id = ok(other.client.get(f"{JOBS}/{job_id}"))["training_file"]
    endpoint_id = ok(other.client.post("/v1/webhook_endpoints", json=WEBHOOK))["id"]
    model = tune(site, site.claim(job_id))
    [other_result] = ok(other.client.get(f"{JOBS}/{job_id}"))["result_files"]
    own = {
        JOBS: [things.job_id],
        "/v1/files": [result, things.file_id],
        "/v1/models": [MODEL, things.model],
        "/v1/webhook_endpoints": [things.endpoint_id],
    }
    others = {
        JOBS: [job_id],
        "/v1/files": [other_result, file_id],
        "/v1/models": [MODEL, model],
        "/v1/webhook_endpoints": [endpoint_id],
    }
    there = narrowed(site, admin, other.project_id)
    for path, listed in own.items():
        assert ids(site.client().get(path)) == listed
        assert ids(other.client.get(path)) == ids(there.get(path)) == others[path]
        assert sorted(ids(admin.get(path))) == sorted({*listed, *others[path]})
        if path != "/v1/models":
            for client in (other.client, there):
                refused = client.get(f"{path}?after={listed[0]}")
                assert refused.status_code == 404
                assert ok(client.get(f"{path}?after={others[path][-1]}"))["data"] == []
    for path in (JOBS, "/v1/files"):
        assert ids(admin.get(f"{path}?project_id={other.project_id}")) == others[path]
        assert ids(site.client().get(f"{path}?project_id={other.project_id}")) == []
        assert ids(other.client.get(f"{path}?project_id={other.project_id}")) == others[path]


def test_queue_and_hosts_tell_of_others_the_number_alone(site: Site, other: Other, admin: httpx.Client) -> None:
    run, mine, theirs = site.run(), site.submit(), other.submit()
    there = narrowed(site, admin, other.project_id)
    for client, queued, running in (
        (site.client(), [mine], [run.job_id]),
        (other.client, [theirs], []),
        (there, [theirs], []),
        (admin, [mine, theirs], [run.job_id]),
    ):
        queue = ok(client.get("/v1/queue"))
        assert (queue["num_queued"], [item["job_id"] for item in queue["data"]]) == (2, queued)
        first = ok(client.get("/v1/queue?limit=1"))
        assert ([item["job_id"] for item in first["data"]], first["has_more"]) == (queued[:1], len(queued) > 1)
        [host] = ok(client.get("/v1/hosts"))["data"]
        assert (host["num_running"], host["running_jobs"]) == (1, running)


def test_what_another_project_has_is_no_part_of_a_job(site: Site, other: Other) -> None:
    things = Things.make(site)
    own = other.upload()
    checkpoint = f"{things.model}:ckpt-step-1"
    for changes, code in (
        ({"model": MODEL, "training_file": things.file_id}, "file_not_found"),
        ({"model": MODEL, "training_file": own, "validation_file": things.file_id}, "file_not_found"),
        ({"model": things.model, "training_file": own}, "model_not_found"),
        ({"model": checkpoint, "training_file": own}, "model_not_found"),
    ):
        refused = other.client.post(JOBS, json=changes)
        assert error(refused) == (400, code)
        assert things.job_id not in refused.text
    clone = other.client.post(f"{JOBS}/{other.submit()}/clone", json={"training_file": things.file_id})
    assert error(clone) == (400, "file_not_found")
    chat = {"model": things.model, "messages": [{"role": "user", "content": "hi"}]}
    assert error(other.client.post("/v1/chat/completions", json=chat)) == (404, "model_not_found")
    assert error(other.client.post("/v1/plan", json={"model": things.model})) == (400, "model_not_found")
    preview = other.client.get(f"/v1/files/{own}/preview?row=1&model={things.model}")
    assert error(preview) == (400, "model_not_found")
    assert ok(site.client().post(JOBS, json={"model": things.model, "training_file": things.file_id}))


def test_what_an_administrator_makes_belongs_to_the_project_that_it_names(
    site: Site, other: Other, admin: httpx.Client
) -> None:
    def make(client: httpx.Client) -> tuple[dict[str, Any], dict[str, Any]]:
        form = {"files": {"file": ("x.jsonl", TRAIN_ROW)}, "data": {"purpose": "fine-tune"}}
        file = ok(client.post("/v1/files", **form))
        return file, ok(client.post(JOBS, json={"model": MODEL, "training_file": file["id"]}))

    there = narrowed(site, admin, other.project_id)
    file, job = make(there)
    assert (file["project_id"], job["lomo"]["project_id"]) == (other.project_id, other.project_id)
    assert ok(other.client.get(f"{JOBS}/{job['id']}"))["training_file"] == file["id"]
    file, job = make(admin)
    assert ids(site.client().get(JOBS)) == [job["id"]]
    assert ids(site.client().get("/v1/files")) == [file["id"]]
    # What another project began stays its own, whoever goes on with it.
    upload_id = ok(other.client.post("/v1/uploads", json=UPLOAD))["id"]
    part = ok(admin.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}))["id"]
    done = ok(admin.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]}))
    assert done["file"]["project_id"] == other.project_id
    endpoint = ok(there.post("/v1/webhook_endpoints", json=WEBHOOK))["id"]
    assert ids(other.client.get("/v1/webhook_endpoints")) == [endpoint]
    assert ids(site.client().get("/v1/webhook_endpoints")) == []


def test_which_projects_a_header_may_name(site: Site, other: Other, admin: httpx.Client) -> None:
    foreign = create_key(site.db, name="first", organization_id="org-foreign", scopes=ALL)
    stranger = site.client(foreign)
    assert [narrowed(site, admin, other.project_id).get(JOBS).status_code, stranger.get(JOBS).status_code] == [200, 200]
    own = ok(stranger.get("/v1/organization/projects"))["data"][0]["id"]
    assert narrowed(site, stranger, own).get(JOBS).status_code == 200
    for client, project_id in ((stranger, other.project_id), (admin, own), (admin, "proj_none"), (admin, "%00")):
        assert error(narrowed(site, client, project_id).get(JOBS)) == (401, "mismatched_project")
    assert site.client(headers={"OpenAI-Project": other.project_id}).get(JOBS).status_code == 401, "no administrator"
    there = narrowed(site, admin, other.project_id)
    job_id = other.submit()
    ok(there.post(f"/v1/organization/projects/{other.project_id}/archive"))
    assert error(there.get(JOBS)) == (401, "mismatched_project")
    assert ids(admin.get(JOBS)) == [job_id], "what it made stays"


def test_an_idempotency_key_is_its_projects(site: Site, other: Other, admin: httpx.Client) -> None:
    there = narrowed(site, admin, other.project_id)
    headers = {"Idempotency-Key": "a"}
    body = {"model": MODEL, "training_file": other.upload()}
    theirs = ok(other.client.post(JOBS, json=body, headers=headers))["id"]
    own = {"model": MODEL, "training_file": site.upload()}
    mine = ok(site.client().post(JOBS, json=own, headers=headers))["id"]
    assert mine != theirs
    replayed = admin.post(JOBS, json=own, headers=headers)
    assert (ok(replayed)["id"], replayed.headers["idempotent-replayed"]) == (mine, "true")
    assert ok(there.post(JOBS, json=body, headers=headers))["id"] == theirs
    reused = there.post(JOBS, json=own, headers=headers)
    assert error(reused) == (409, "idempotency_key_reused")
    assert (theirs in reused.text, mine in reused.text) == (True, False)
    # A repetition by itself is its project's, too, though the same key sends it.
    first = ok(admin.post(JOBS, json=body, headers={"x-stainless-retry-count": "0"}))["id"]
    retries = {"x-stainless-retry-count": "1"}
    assert ok(admin.post(JOBS, json=body, headers=retries))["id"] == first
    elsewhere = ok(there.post(JOBS, json=body, headers=retries))
    assert (elsewhere["id"] != first, elsewhere["lomo"]["project_id"]) == (True, other.project_id)


def test_live_lists_tell_of_what_their_readers_see(site: Site, other: Other, admin: httpx.Client) -> None:
    stream = f"{JOBS}?stream=true"
    clients = {
        "own": site.client(),
        "other": other.client,
        "admin": admin,
        "narrowed": narrowed(site, admin, other.project_id),
    }
    followers = {name: Follower(client, stream) for name, client in clients.items()}
    for follower in followers.values():
        follower.wait_for(lambda follower=follower: bool(follower.frames), "the first page")  # type: ignore[misc]
        assert follower.frames[0].body == {"data": [], "has_more": False}
    mine, theirs = site.submit(), other.submit()
    seen = {"own": {mine}, "other": {theirs}, "admin": {mine, theirs}, "narrowed": {theirs}}
    for name, follower in followers.items():
        follower.wait_for(
            lambda follower=follower, name=name: changed(follower) >= seen[name],  # type: ignore[misc]
            "the jobs",
        )
    # A later change of each, so that one that had leaked would have come.
    site.client().post(f"{JOBS}/{mine}/cancel").raise_for_status()
    other.client.post(f"{JOBS}/{theirs}/cancel").raise_for_status()
    for name, follower in followers.items():
        follower.wait_for(
            lambda follower=follower, name=name: changed(follower, "cancelled") >= seen[name],  # type: ignore[misc]
            "the ends",
        )
        assert changed(follower) == seen[name]


def changed(follower: Follower, status: str | None = None) -> set[str]:
    """The jobs that a live list has told of after its first page."""
    jobs = [frame.body for frame in follower.frames if frame.event == "job"]
    return {job["id"] for job in jobs if status in (None, job["status"])}


@pytest.mark.parametrize(
    ("is_narrowed", "end"),
    [
        (False, "UPDATE api_keys SET scopes = array_remove(scopes, 'admin')"),
        (True, "UPDATE api_keys SET scopes = array_remove(scopes, 'admin')"),
        (True, "UPDATE projects SET archived_at = now() WHERE NOT is_default"),
    ],
)
def test_a_stream_ends_when_its_reader_may_see_it_no_more(
    site: Site, other: Other, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch, *, is_narrowed: bool, end: str
) -> None:
    monkeypatch.setattr(sse, "RECHECK_S", 0.1)
    job_id = other.submit()
    client = narrowed(site, admin, other.project_id) if is_narrowed else admin
    own = Follower(other.client, f"{JOBS}/{job_id}/events?stream=true")
    followers = [Follower(client, path) for path in (f"{JOBS}/{job_id}/events?stream=true", f"{JOBS}?stream=true")]
    for follower in (own, *followers):
        follower.wait_for(lambda follower=follower: bool(follower.frames), "the beginning")  # type: ignore[misc]
    with site.db.transaction() as session:
        session.execute(text(end))
    for follower in followers:
        follower.join()
        assert not follower.is_done
    assert not own.has_ended


def test_webhooks_tell_of_their_projects_jobs(site: Site, other: Other) -> None:
    endpoints = [
        ok(client.post("/v1/webhook_endpoints", json=WEBHOOK))["id"] for client in (site.client(), other.client)
    ]
    jobs = [site.submit(), other.submit()]
    for job_id in jobs:
        site.claim(job_id).succeed()
    with site.db.read() as session:
        told = session.execute(text("SELECT endpoint_id, body::json -> 'data' ->> 'id' FROM webhook_deliveries")).all()
    assert sorted(map(tuple, told)) == sorted(zip(endpoints, jobs, strict=True))


def test_what_another_projects_job_uses_is_kept_and_the_job_not_named(
    site: Site, other: Other, admin: httpx.Client
) -> None:
    """An administrator's job may use what is any project's."""
    own = other.submit()
    model = tune(site, site.claim(own))
    file_id = other.upload()
    job_id = ok(admin.post(JOBS, json={"model": model, "training_file": file_id}))["id"]
    for path in (f"/v1/files/{file_id}", f"/v1/models/{model}", f"{JOBS}/{own}"):
        refused = other.client.delete(path)
        assert error(refused) == (400, "invalid_state")
        assert "a job of another project" in refused.text
        assert job_id not in refused.text
    with site.db.transaction() as session:
        session.execute(
            text(
                "INSERT INTO data_checks (job_id, training_file, checked_at, report)"
                " VALUES (:job_id, :file_id, now(), '{\"training_file\": {}}')"
            ),
            {"job_id": job_id, "file_id": file_id},
        )
    assert error(other.client.get(f"/v1/files/{file_id}/report")) == (404, "report_not_found")
    assert ok(admin.get(f"/v1/files/{file_id}/report"))["job_id"] == job_id

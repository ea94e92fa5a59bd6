"""One job for one request: `Idempotency-Key`, and the tries that the official client repeats by itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Barrier
from typing import Any

import httpx
import openai
import pytest
import redis
from sqlalchemy import func, select, update

from jobs import idempotency, keys
from jobs.dispatch import JOBS_QUEUE
from jobs.models import Submission
from local.valkey import Valkey
from server.routes import jobs as routes

from .conftest import MODEL, Site

URL = "/v1/fine_tuning/jobs"


def create(
    site: Site, body: dict[str, Any] | bytes, *, key: str | None = None, tries: int | str | None = None, token: str = ""
) -> httpx.Response:
    """Send a job's creation, as it is."""
    headers = {} if key is None else {"Idempotency-Key": key}
    if tries is not None:
        headers["x-stainless-retry-count"] = str(tries)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return site.client(token or None).post(URL, content=content, headers=headers, timeout=60)


def job_id(response: httpx.Response, *, replayed: bool = False) -> str:
    """The id of the job that a creation was answered with."""
    assert response.status_code == 200, response.text
    assert response.headers.get("idempotent-replayed") == ("true" if replayed else None)
    return str(response.json()["id"])


def made(site: Site, token: str = "") -> list[str]:
    """Every job of an organization, oldest first."""
    return [job["id"] for job in site.client(token or None).get(URL).json()["data"]][::-1]


def age(site: Site, by: timedelta) -> None:
    """Let time go by for everything that has arrived."""
    with site.db.transaction() as session:
        session.execute(update(Submission).values(created_at=Submission.created_at - by))


@pytest.fixture
def body(site: Site) -> dict[str, Any]:
    """A job without a seed, so that each one made of it has another."""
    return {"model": MODEL, "training_file": site.upload()}


def test_a_key_makes_one_job(site: Site, body: dict[str, Any], valkey_server: Valkey) -> None:
    first = create(site, body, key="a")
    again = create(site, body, key="a")
    assert job_id(again, replayed=True) == job_id(first)
    assert again.json()["seed"] == first.json()["seed"]
    reordered = f'{{ "training_file": "{body["training_file"]}",  "model": "{MODEL}"}}'.encode()
    assert job_id(create(site, reordered, key="a", tries=0), replayed=True) == job_id(first)
    assert made(site) == [job_id(first)]
    with redis.Redis.from_url(valkey_server.client_url) as client:
        site.wait_until(lambda: client.llen(JOBS_QUEUE) == 1, 10, "the message")


def test_another_body_under_a_key_is_refused(site: Site, body: dict[str, Any]) -> None:
    first = job_id(create(site, body, key="a"))
    for other in (body | {"seed": 1}, body | {"suffix": None}):
        refused = create(site, other, key="a")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"], error["type"]) == (
            409,
            "idempotency_key_reused",
            "Idempotency-Key",
            "invalid_request_error",
        )
        assert first in error["message"]
        assert refused.headers["x-should-retry"] == "false"
    assert made(site) == [first]
    assert job_id(create(site, body | {"seed": 1}, key="b")) != first


def test_a_replay_answers_with_the_job_as_it_is_though_it_could_not_be_made_again(
    site: Site, body: dict[str, Any]
) -> None:
    first = job_id(create(site, body, key="a"))
    site.client().post(f"{URL}/{first}/cancel").raise_for_status()
    site.client().delete(f"/v1/files/{body['training_file']}").raise_for_status()
    again = create(site, body, key="a")
    assert (job_id(again, replayed=True), again.json()["status"]) == (first, "cancelled")
    assert create(site, body).status_code == 400


def test_a_request_that_was_refused_leaves_its_key_free(site: Site, body: dict[str, Any]) -> None:
    assert create(site, body | {"model": "gone"}, key="a").status_code == 400
    assert create(site, body | {"lomo": {"galore": 1}}, key="a").status_code == 400
    first = job_id(create(site, body, key="a"))
    assert create(site, body | {"model": "gone"}, key="a").status_code == 409
    assert made(site) == [first]


def test_a_key_is_its_projects(site: Site, body: dict[str, Any]) -> None:
    first = job_id(create(site, body, key="a"))
    colleague = keys.create_key(site.db, name="colleague")
    assert job_id(create(site, body, key="a", token=colleague), replayed=True) == first
    stranger = keys.create_key(site.db, name="stranger", organization_id="org-foreign")
    refused = create(site, body, key="a", token=stranger)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "file_not_found")
    upload = site.client(stranger).post(
        "/v1/files", files={"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}')}, data={"purpose": "fine-tune"}
    )
    own = job_id(create(site, body | {"training_file": upload.json()["id"]}, key="a", token=stranger))
    assert (made(site), made(site, stranger)) == ([first], [own])


def test_a_key_lives_for_a_day_and_old_rows_go(site: Site, body: dict[str, Any]) -> None:
    first = job_id(create(site, body, key="a"))
    age(site, timedelta(hours=23, minutes=59))
    assert job_id(create(site, body, key="a"), replayed=True) == first
    age(site, timedelta(minutes=2))
    with pytest.MonkeyPatch.context() as patch:
        # As where another arrival holds the rows that are to go.
        patch.setattr(idempotency, "_clear", lambda _session: None)
        second = job_id(create(site, body | {"seed": 5}, key="a"))
    assert second != first
    age(site, timedelta(hours=25))
    create(site, body, key="b")
    with site.db.read() as session:
        assert session.scalars(select(Submission.idempotency_key)).all() == ["b"]


@pytest.mark.parametrize("key", ["", "x" * 256, "ü", "a\tb"])
def test_what_cannot_be_a_key(site: Site, body: dict[str, Any], key: str) -> None:
    headers = {"Idempotency-Key": key.encode()}
    refused = site.client().post(URL, json=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_idempotency_key")
    assert made(site) == []
    job_id(create(site, body, key="~ " * 127 + "!"))


@pytest.mark.parametrize(("key", "first_try"), [("a", None), (None, 1)])
def test_requests_at_once_make_one_job(
    site: Site, body: dict[str, Any], key: str | None, first_try: int | None
) -> None:
    together = Barrier(6)

    def send(number: int) -> httpx.Response:
        together.wait(30)
        return create(site, body, key=key, tries=None if first_try is None else first_try + number)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert {answer.json()["id"] for answer in answers} == set(made(site))
    assert len(made(site)) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1


def test_different_bodies_at_once_under_one_key_make_one_job(site: Site, body: dict[str, Any]) -> None:
    together = Barrier(6)

    def send(seed: int) -> httpx.Response:
        together.wait(30)
        return create(site, body | {"seed": seed}, key="a")

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(send, range(6)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 5
    assert len(made(site)) == 1


@pytest.mark.parametrize("key", ["a", None])
def test_a_first_try_that_is_slower_than_its_repetition(
    site: Site, body: dict[str, Any], key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gave up waiting while the first try was being planned; both end in the job that one of them made."""
    plan, together = routes._plan, Barrier(2)

    def plan_when_both_are_there(*args: Any) -> Any:
        together.wait(30)
        return plan(*args)

    monkeypatch.setattr(routes, "_plan", plan_when_both_are_there)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(create, site, body, key=key, tries=0)
        # Not before the first has arrived: that is what the repetition is found by.
        site.wait_until(lambda: num_rows(site) == 1, 30, "the first try")
        second = pool.submit(create, site, body, key=key, tries=1)
        assert first.result(60).json()["id"] == second.result(60).json()["id"]
    assert len(made(site)) == 1


def num_rows(site: Site) -> int:
    with site.db.read() as session:
        return session.scalars(select(func.count()).select_from(Submission)).one()


def test_retries_belong_to_their_first_try(site: Site, body: dict[str, Any]) -> None:
    first = job_id(create(site, body, tries=0))
    assert job_id(create(site, body, tries=1), replayed=True) == first
    assert job_id(create(site, body, tries=2), replayed=True) == first
    assert job_id(create(site, body, tries=2), replayed=True) == first
    # A first try, counted or not, is a request of its own.
    others = [job_id(create(site, body, tries=0)), job_id(create(site, body)), job_id(create(site, body, tries="many"))]
    assert made(site) == [first, *others]
    # The newest that is repeated for the first time, and not a request that is repeated by nobody.
    assert job_id(create(site, body, tries=1), replayed=True) == others[0]


def test_equal_requests_that_are_repeated_at_once_keep_a_job_each(site: Site, body: dict[str, Any]) -> None:
    firsts = {job_id(create(site, body, tries=0)) for _ in range(3)}
    retries = [job_id(create(site, body, tries=1), replayed=True) for _ in range(3)]
    assert len(firsts) == 3
    assert set(retries) == firsts


def test_a_retry_is_new_where_the_first_try_made_nothing_like_it(site: Site, body: dict[str, Any]) -> None:
    first = job_id(create(site, body, tries=0))
    other_body = job_id(create(site, body | {"seed": 1}, tries=1))
    colleague = keys.create_key(site.db, name="colleague")
    other_key = job_id(create(site, body, tries=1, token=colleague))
    keyed = job_id(create(site, body, key="a", tries=1))
    age(site, idempotency.RETRY_WINDOW + timedelta(seconds=1))
    late = job_id(create(site, body, tries=1))
    assert made(site) == [first, other_body, other_key, keyed, late]


class Network(ThreadingHTTPServer):
    """Delivers every request to a site, and loses the first answers to those that create a job."""

    daemon_threads = True

    def __init__(self, site: Site, num_lost: int) -> None:
        super().__init__(("127.0.0.1", 0), Delivery)
        self.site = site
        self.num_left = num_lost
        self.tries: list[str] = []
        """The `x-stainless-retry-count` of each creation."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Delivery(BaseHTTPRequestHandler):
    """One request on its way."""

    server: Network

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in {"host", "connection"}}
        answer = self.server.site.client("").post(self.path, content=content, headers=headers, timeout=60)
        self.close_connection = True
        if self.path == URL:
            self.server.tries.append(self.headers["x-stainless-retry-count"])
            self.server.num_left -= 1
            if self.server.num_left >= 0:
                return
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def network(site: Site) -> Iterator[Network]:
    """Two answers are lost: as many as the client tries again by itself."""
    with Network(site, 2) as network:
        thread = threading.Thread(target=network.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield network
        network.shutdown()
        thread.join()


@pytest.fixture
def client(site: Site, network: Network) -> Iterator[openai.OpenAI]:
    """The official client, unmodified, over that network."""
    with openai.OpenAI(api_key=site.key, base_url=f"{network.url}/v1") as client:
        yield client


def test_the_official_client_makes_one_job_over_a_network_that_loses_answers(
    site: Site, body: dict[str, Any], client: openai.OpenAI, network: Network
) -> None:
    job = client.fine_tuning.jobs.create(**body)
    assert network.tries == ["0", "1", "2"]
    assert made(site) == [job.id]
    assert client.fine_tuning.jobs.create(**body).id != job.id


def test_the_official_client_does_not_repeat_a_conflict(
    site: Site, body: dict[str, Any], client: openai.OpenAI, network: Network
) -> None:
    network.num_left = 0
    named = {"Idempotency-Key": "nightly"}
    job = client.fine_tuning.jobs.create(**body, extra_headers=named)
    assert client.fine_tuning.jobs.create(**body, extra_headers=named).id == job.id
    with pytest.raises(openai.ConflictError) as caught:
        client.fine_tuning.jobs.create(**body, seed=3, extra_headers=named)
    assert caught.value.code == "idempotency_key_reused"
    assert len(network.tries) == 3
    assert made(site) == [job.id]

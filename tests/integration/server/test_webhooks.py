"""Webhooks over a real server: the official client's calls, and a receiver that is told how jobs end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from sqlalchemy import select, text, update

from jobs import keys, webhooks
from jobs.webhook_models import WebhookDelivery
from server.settings import ServerSettings
from server.webhook_delivery import ATTEMPT_TIMEOUT_S

from ...conftest import WaitUntil, wait_until_true
from .conftest import Site, running_site

DEADLINE_S = 20.0
ALL = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


@dataclass
class Receiver:
    """An HTTP server that keeps what it was sent; `answers` are the statuses it gives, 204 when they are used up."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def wait(self, number: int) -> None:
        wait_until_true(lambda: len(self.received) >= number, DEADLINE_S, f"message {number}")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status = kept.answers.pop(0) if kept.answers else 204
            kept.received.append((dict(self.headers), body))
            self.send_response(status)
            self.send_header("Location", f"{kept.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kept
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def inside(settings: ServerSettings, wait_until: WaitUntil) -> Iterator[Site]:
    """A site whose webhooks may go to where the receiver is."""
    with running_site(settings.model_copy(update={"webhook_private_addresses": True}), wait_until) as site:
        yield site


@pytest.fixture
def client(inside: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        api_key=inside.key, base_url=f"{inside.url}/v1", _strict_response_validation=True, max_retries=0
    ) as opened:
        yield opened


def test_endpoints_are_made_found_changed_and_removed(client: openai.OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="ops", url=receiver.url, event_types=["fine_tuning.job.failed"])
    assert made.signing_secret.startswith("whsec_")
    found = client.webhooks.retrieve(made.id)
    assert "signing_secret" not in (found.model_extra or {})
    assert found.signing_secret_hint is not None
    assert found.signing_secret_hint.endswith(made.signing_secret[-4:])
    changed = client.webhooks.update(made.id, name="on call", event_types=["fine_tuning.job.succeeded"])
    assert (changed.name, changed.event_types, changed.url) == ("on call", ["fine_tuning.job.succeeded"], receiver.url)
    more: dict[str, Any] = {"url": receiver.url, "event_types": ["fine_tuning.job.failed"]}
    others = [client.webhooks.create(name=f"n{number}", **more) for number in range(2)]
    assert [each.id for each in client.webhooks.list(limit=1)] == [others[1].id, others[0].id, made.id]
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)
    assert set(ALL) < set(client.webhooks.event_types.list().data)


def test_there_are_twenty_endpoints_at_the_most(inside: Site, client: openai.OpenAI, receiver: Receiver) -> None:
    body: dict[str, Any] = {"name": "n", "url": receiver.url, "event_types": ["fine_tuning.job.failed"]}
    for _ in range(webhooks.MAX_ENDPOINTS):
        client.webhooks.create(**body)
    with pytest.raises(openai.BadRequestError, match="delete one"):
        client.webhooks.create(**body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"url": "ftp://example.com"}, "url"),
        ({"url": "https://user:secret@example.com"}, "url"),
        ({"url": "https://"}, "url"),
        ({"url": "https://0177.0.0.1/"}, "url"),
        ({"url": "https://exa mple.com"}, "url"),
        ({"url": "x" * 3000}, "url"),
        ({"url": "http://example.com"}, "url"),
        ({"url": "https://example.com:65536"}, "url"),
        ({"url": "https://example.com:0"}, "url"),
        ({"url": "https://example.com:-1"}, "url"),
        ({"url": "https://xn--/"}, "url"),
        ({"url": "https://127.0.0.1#@example.com/"}, "url"),
        ({"url": "https://example.com\\@127.0.0.1/"}, "url"),
        ({"url": "https:127.0.0.1"}, "url"),
        ({"url": "//127.0.0.1/"}, "url"),
        ({"url": "javascript:alert(1)"}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["batch.completed"]}, "event_types.0"),
        ({"name": ""}, "name"),
        ({"secret": "mine"}, "secret"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused(site: Site, body: dict[str, Any], param: str) -> None:
    good = {"name": "n", "url": "https://example.com", "event_types": ["fine_tuning.job.failed"]}
    response = site.client().post("/v1/webhook_endpoints", json=good | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_another_organizations_endpoint_is_not_there(inside: Site, client: openai.OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="ops", url=receiver.url, event_types=["fine_tuning.job.failed"])
    stranger = inside.client(keys.create_key(inside.db, name="stranger", organization_id="org-foreign"))
    path = f"/v1/webhook_endpoints/{made.id}"
    assert stranger.get("/v1/webhook_endpoints").json()["data"] == []
    assert stranger.get(path).status_code == 404
    assert stranger.post(path, json={"name": "mine"}).status_code == 404
    assert stranger.post(f"{path}/rotate_secret").status_code == 404
    assert stranger.post(f"{path}/test", json={"event_type": "fine_tuning.job.failed"}).status_code == 404
    assert stranger.delete(path).status_code == 404
    assert client.webhooks.retrieve(made.id).name == "ops"


def test_each_end_of_a_job_is_told_and_the_client_verifies_it(
    inside: Site, client: openai.OpenAI, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="ops", url=receiver.url, event_types=ALL)  # type: ignore[arg-type]
    inside.run().succeed()
    failed = inside.run()
    failed.fail()
    cancelled = inside.submit()
    client.fine_tuning.jobs.cancel(cancelled)
    receiver.wait(3)
    events = [client.webhooks.unwrap(body, headers, secret=made.signing_secret) for headers, body in receiver.received]
    assert {event.type for event in events} == set(ALL)
    by_type = {event.type: event for event in events}
    assert by_type["fine_tuning.job.failed"].data.id == failed.job_id
    assert by_type["fine_tuning.job.cancelled"].data.id == cancelled


def test_only_what_was_subscribed_to_is_sent(inside: Site, client: openai.OpenAI, receiver: Receiver) -> None:
    client.webhooks.create(name="ops", url=receiver.url, event_types=["fine_tuning.job.failed"])
    inside.run().succeed()
    inside.run().fail()
    receiver.wait(1)
    with inside.db.read() as session:
        assert len(session.scalars(select(WebhookDelivery)).all()) == 1


def test_a_delivery_that_fails_is_tried_again_later_with_the_same_id(
    inside: Site, client: openai.OpenAI, receiver: Receiver
) -> None:
    receiver.answers = [500, 302]
    client.webhooks.create(name="ops", url=receiver.url, event_types=ALL)  # type: ignore[arg-type]
    inside.run().succeed()
    for attempt, result in ((1, "answered 500"), (2, "answered 302"), (3, "answered 204")):
        receiver.wait(attempt)
        wait_until_true(lambda result=result: delivery(inside).last_result == result, DEADLINE_S, result)  # type: ignore[misc]
        if attempt < 3:
            waits = delivery(inside)
            assert waits.next_attempt_at is not None
            assert (waits.next_attempt_at - waits.created_at).total_seconds() > 4
            with inside.db.transaction() as session:  # the time passes
                session.execute(update(WebhookDelivery).values(next_attempt_at=text("now()")))
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1, "a redirect is not followed"
    assert delivery(inside).delivered_at is not None
    assert delivery(inside).next_attempt_at is None


def test_receivers_that_do_not_answer_hold_up_nobody_elses_message(
    inside: Site, client: openai.OpenAI, receiver: Receiver
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        for number in range(3):
            client.webhooks.create(name=f"silent{number}", url=url, event_types=ALL)  # type: ignore[arg-type]
        inside.run().fail()
        wait_until_true(lambda: _num_tried(inside) == 3, DEADLINE_S, "the silent ones to be tried")
        client.webhooks.create(name="ops", url=receiver.url, event_types=ALL)  # type: ignore[arg-type]
        started = time.monotonic()
        inside.run().fail()
        receiver.wait(1)
        assert time.monotonic() - started < ATTEMPT_TIMEOUT_S / 2


def _num_tried(site: Site) -> int:
    with site.db.read() as session:
        return len(session.scalars(select(WebhookDelivery).where(WebhookDelivery.num_attempts > 0)).all())


def test_a_delivery_is_given_up_after_three_days(inside: Site, client: openai.OpenAI, receiver: Receiver) -> None:
    client.webhooks.create(name="ops", url=receiver.url, event_types=ALL)  # type: ignore[arg-type]
    with inside.db.transaction() as session:
        endpoint_id = client.webhooks.list().data[0].id
        old = text("now() - interval '73 hours'")
        receiver.answers = [503]
        session.add(WebhookDelivery(id="evt_old", endpoint_id=endpoint_id, body="{}"))
        session.flush()
        session.execute(update(WebhookDelivery).values(created_at=old))
    receiver.wait(1)
    wait_until_true(lambda: delivery(inside).next_attempt_at is None, DEADLINE_S, "the delivery to be given up")
    assert delivery(inside).delivered_at is None


def test_a_rotated_secret_signs_at_once_and_the_old_one_only_if_it_was_kept(
    inside: Site, client: openai.OpenAI, receiver: Receiver
) -> None:
    made = client.webhooks.create(name="ops", url=receiver.url, event_types=ALL)  # type: ignore[arg-type]
    kept = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    inside.run().succeed()
    receiver.wait(1)
    for secret in (made.signing_secret, kept.signing_secret):
        assert client.webhooks.unwrap(receiver.received[0][1], receiver.received[0][0], secret=secret)
    last = client.webhooks.rotate_secret(made.id)
    inside.run().succeed()
    receiver.wait(2)
    assert client.webhooks.unwrap(receiver.received[1][1], receiver.received[1][0], secret=last.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(receiver.received[1][1], receiver.received[1][0], secret=kept.signing_secret)


def test_a_test_message_tells_what_the_receiver_answered(client: openai.OpenAI, receiver: Receiver) -> None:
    made = client.webhooks.create(name="ops", url=receiver.url, event_types=ALL)  # type: ignore[arg-type]
    receiver.answers = [418]
    result = client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert (result.status_code, result.event_type) == (418, "fine_tuning.job.failed")
    headers, body = receiver.received[0]
    assert client.webhooks.unwrap(body, headers, secret=made.signing_secret).type == "fine_tuning.job.failed"


def test_no_message_goes_inside_where_it_is_not_allowed(site: Site, receiver: Receiver) -> None:
    """The receiver is the trap: nothing may connect to it, by address or by name."""
    http = site.client()
    body = {"name": "n", "event_types": ["fine_tuning.job.succeeded"]}
    assert http.post("/v1/webhook_endpoints", json=body | {"url": receiver.url}).status_code == 400
    for url in (receiver.url.replace("http:", "https:"), receiver.url.replace("http://127.0.0.1", "https://localhost")):
        made = http.post("/v1/webhook_endpoints", json=body | {"url": url}).raise_for_status().json()
        path = f"/v1/webhook_endpoints/{made['id']}/test"
        answer = http.post(path, json={"event_type": "fine_tuning.job.succeeded"})
        assert answer.status_code == 400
        assert "not public" in answer.json()["error"]["message"]
    site.run().succeed()
    with site.db.read() as session:
        assert len(session.scalars(select(WebhookDelivery)).all()) == 2

    def tried() -> bool:
        with site.db.read() as session:
            return all(row.last_result is not None for row in session.scalars(select(WebhookDelivery)))

    wait_until_true(tried, DEADLINE_S, "both deliveries to be tried")
    assert receiver.received == []


def delivery(site: Site) -> WebhookDelivery:
    """The only delivery there is."""
    with site.db.read() as session:
        return session.scalars(select(WebhookDelivery)).one()

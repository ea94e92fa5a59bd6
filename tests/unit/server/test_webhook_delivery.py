"""Signatures that the official client accepts, and addresses that no webhook goes to."""

from __future__ import annotations

import asyncio
import base64
import select
import socket
import ssl
import time
from typing import Any

import httpx
import openai
import pytest
import trustme
from openai import InvalidWebhookSignatureError, OpenAI

from jobs.webhooks import Due, make_body
from server.webhook_delivery import UndeliverableError, WebhookSender, check_scheme, is_public, sign

SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
OTHER = "whsec_" + base64.b64encode(b"t" * 32).decode()


def due(*secrets: str, url: str = "https://example.com/hook") -> Due:
    body = make_body(event_id="evt_1", event_type="fine_tuning.job.succeeded", created_at=5, job_id="ftjob-1")
    return Due(id="evt_1", url=url, body=body, secrets=secrets)


@pytest.mark.parametrize("secret", [SECRET, OTHER])
def test_the_official_client_unwraps_what_was_signed_with_either_secret(secret: str) -> None:
    message = due(SECRET, OTHER)
    headers = sign(message, timestamp_s=int(time.time()))
    with OpenAI(api_key="none") as client:
        event = client.webhooks.unwrap(message.body, headers, secret=secret)
    assert isinstance(event, openai.types.webhooks.FineTuningJobSucceededWebhookEvent)
    assert (event.id, event.data.id, event.created_at) == ("evt_1", "ftjob-1", 5)


def test_a_changed_body_an_old_message_and_another_secret_are_not_accepted() -> None:
    message = due(SECRET)
    headers = sign(message, timestamp_s=int(time.time()))
    old = sign(message, timestamp_s=int(time.time()) - 600)
    with OpenAI(api_key="none") as client:
        for body, given, secret in (
            (message.body + b" ", headers, SECRET),
            (message.body, old, SECRET),
            (message.body, headers, OTHER),
        ):
            with pytest.raises(InvalidWebhookSignatureError):
                client.webhooks.unwrap(body, given, secret=secret)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.1", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:a9fe:a9fe",
        "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2001:db8::1", "3fff::1", "fec0::1", "::7f00:1",
        "::ffff:0:7f00:1", "5f00::1", "2001::1", "fd00:ec2::254", "fe80::5efe:7f00:1", "192.0.0.1", "198.18.0.1",
        "240.0.0.1",
    ],
)  # fmt: skip
def test_no_message_goes_to(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_messages_go_to(address: str) -> None:
    assert is_public(address)


# Hosts as people write them who want in, and names of a resolver that they own.
HOSTS_INSIDE = (
    "127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "0X7F.0.0.1", "017700000001",
    "10.0.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "169.254.169.254", "2852039166", "0xA9FEA9FE",
    "127.0.0.1.", "localhost", "LOCALHOST", "localhost.", "%31%32%37.0.0.1", "127\u30020\u30020\u30021",
    "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[fe80::1]",
    "[fec0::1]", "[fd00:ec2::254]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]",
    "[::ffff:0:7f00:1]", "[ff02::1]", "loop.example", "LOOP.example", "mixed.example", "mapped.example", "site.example",
    "link.example", "metadata.example", "sixtofour.example", "b\u00fccher.example",
)  # fmt: skip
RESOLVED = {
    "loop.example": ["127.0.0.1"],
    "mixed.example": ["93.184.216.34", "10.0.0.1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "site.example": ["fec0::1"],
    "link.example": ["fe80::1%2"],
    "metadata.example": ["169.254.169.254"],
    "sixtofour.example": ["2002:a00:1::"],
    "xn--bcher-kva.example": ["192.168.0.1"],
}


@pytest.mark.parametrize("host", HOSTS_INSIDE)
def test_no_connection_is_made_to_a_host_inside(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name: only the resolver, which a tenant may own, is the test's."""
    resolve = socket.getaddrinfo

    def getaddrinfo(name: str, port: int, *options: Any) -> Any:
        found = RESOLVED.get(name.lower()) if isinstance(name, str) else None
        if found is None:
            return resolve(name, port, *options)
        return [(socket.AF_UNSPEC, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with socket.create_server(("", 0)) as trap:
        url = f"https://{host}:{trap.getsockname()[1]}/"
        with pytest.raises(UndeliverableError, match=r"not public|no address"):
            asyncio.run(WebhookSender(allow_private=False).send(due(SECRET, url=url)))
        assert not select.select([trap], [], [], 0)[0]


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/", "https://localhost/", "https://[::1]/", "https://[::ffff:127.0.0.1]/",
        "https://2130706433/", "https://169.254.169.254/latest/meta-data",
    ],
)  # fmt: skip
def test_a_url_into_the_network_around_us_is_refused_before_a_connection(url: str) -> None:
    sender = WebhookSender(allow_private=False)
    with pytest.raises(UndeliverableError, match=r"not public|no address"):
        asyncio.run(sender.send(due(SECRET, url=url)))


def test_a_name_whose_addresses_are_not_all_public_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", (address, 443)) for address in ("93.184.216.34", "10.0.0.1")]

    async def send() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        await WebhookSender(allow_private=False).send(due(SECRET))

    with pytest.raises(UndeliverableError, match="not public"):
        asyncio.run(send())


@pytest.mark.parametrize(("name", "is_known"), [("hook.test", True), ("other.test", True), ("hook.test", False)])
def test_over_tls_the_certificate_has_to_be_the_names(
    monkeypatch: pytest.MonkeyPatch, name: str, is_known: bool
) -> None:
    """The connection goes to an address; the name is what the receiver is asked for and has to prove."""
    authority, stranger = trustme.CA(), trustme.CA()
    receiver = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("hook.test").configure_cert(receiver)
    trusted = ssl.create_default_context()
    (authority if is_known else stranger).configure_trust(trusted)
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.close()

    async def send() -> int:
        async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=receiver) as server:
            port = server.sockets[0].getsockname()[1]
            resolve = asyncio.get_running_loop().getaddrinfo

            async def find(host: str, *arguments: Any, **options: Any) -> Any:
                return await resolve("127.0.0.1" if host.endswith(".test") else host, *arguments, **options)

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", find)
            sender = WebhookSender(allow_private=True)
            monkeypatch.setattr(sender, "_tls", trusted)
            return await sender.send(due(SECRET, url=f"https://{name}:{port}/hook"))

    if name == "hook.test" and is_known:
        assert asyncio.run(send()) == 204
        assert asked[0].startswith(b"POST /hook HTTP/1.1\r\nHost: hook.test:")
    else:
        with pytest.raises(UndeliverableError, match="no connection"):
            asyncio.run(send())
        assert asked == []


def test_only_https_and_http_where_it_is_allowed() -> None:
    check_scheme(httpx.URL("https://example.com"), allow_private=False)
    check_scheme(httpx.URL("http://inside"), allow_private=True)
    with pytest.raises(UndeliverableError, match="https"):
        check_scheme(httpx.URL("http://inside"), allow_private=False)
    with pytest.raises(UndeliverableError, match="https"):
        check_scheme(httpx.URL("ftp://inside"), allow_private=True)

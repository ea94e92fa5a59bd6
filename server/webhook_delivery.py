"""Sending webhooks: signed as Standard Webhooks say, as OpenAI's client verifies, and never into the network around us.

A tenant chooses the URL, so it is the server that is being aimed: only https, the name resolved once, every address of
it public, the connection made to one of those (with the name for TLS and `Host`), no redirect followed, no proxy, and
nothing of the answer read but its status. `webhook_private_addresses` lifts this where receivers are on the inside.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import socket
import ssl
import time
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import httpx
import structlog
from starlette.concurrency import run_in_threadpool

from jobs import webhooks
from jobs.db import UNREACHABLE, Database
from jobs.webhooks import Due
from server.settings import ServerSettings

# A receiver is to answer first and work afterwards. Standard Webhooks recommend 15 to 30 s; a tenant's slow receiver
# must not hold up the others' messages.
ATTEMPT_TIMEOUT_S = 10.0
_MAX_AT_ONCE = 16
# How late a message may be at first. An idle look costs the database an index that is empty.
_LOOK_EVERY_S = 1.0
_FORGET_EVERY_S = 3600.0
# `is_global` of the standard library calls more public than is: NAT64, 6to4 and the older ways to write an IPv4 address
# as an IPv6 one lead to any, site-local ones (fec0::) to the inside. All that the internet routes is in 2000::/3.
_ROUTED = IPv6Network("2000::/3")
_NOT_ROUTED = (IPv6Network("2002::/16"), IPv6Network("3fff::/20"))  # 6to4; documentation (RFC 9637)

log = structlog.get_logger(__name__)


class UndeliverableError(Exception):
    """No answer came; the text says why, for the owner of the endpoint."""


class WebhookSender:
    """Sends one message at a time per call, to addresses that may be sent to."""

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._tls = ssl.create_default_context()

    async def send(self, due: Due) -> int:
        """The status of the receiver's answer.

        Raises:
            UndeliverableError: there was none.
        """
        try:
            async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                return await self._send(due)
        except TimeoutError as error:
            raise UndeliverableError(f"no answer within {ATTEMPT_TIMEOUT_S:.0f} s") from error
        except httpx.HTTPError as error:
            raise UndeliverableError(f"no connection: {type(error).__name__}") from error

    async def _send(self, due: Due) -> int:
        url = httpx.URL(due.url)
        check_scheme(url, allow_private=self._allow_private)
        address = await self._resolve(url)
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": "lomo-webhooks",
            **sign(due, timestamp_s=int(time.time())),
        }
        async with (
            httpx.AsyncClient(
                verify=self._tls, trust_env=False, follow_redirects=False, timeout=ATTEMPT_TIMEOUT_S
            ) as client,
            client.stream(
                "POST",
                url.copy_with(host=address),
                content=due.body,
                headers=headers,
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            ) as response,
        ):
            return response.status_code

    async def _resolve(self, url: httpx.URL) -> str:
        """An address of the URL's host; refuses the host if any of them is not public."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise UndeliverableError("its host name has no address") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not self._allow_private and not all(is_public(address) for address in addresses):
            raise UndeliverableError("its host name leads to an address that is not public")
        return addresses[0]


class WebhookDelivery:
    """The task that delivers what is due, for as long as the server runs."""

    def __init__(self, db: Database, settings: ServerSettings) -> None:
        self.sender = WebhookSender(allow_private=settings.webhook_private_addresses)
        self._db = db
        self._task: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin, on the running event loop."""
        self._task = asyncio.create_task(self._run(), name="webhooks")

    async def close(self) -> None:
        """Stop. What was being sent is sent again later."""
        tasks = [*self._sending, *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        forgot_at = -_FORGET_EVERY_S
        while True:
            num_free = _MAX_AT_ONCE - len(self._sending)
            taken: list[Due] = []
            try:
                if time.monotonic() - forgot_at >= _FORGET_EVERY_S:
                    forgot_at = time.monotonic()
                    await run_in_threadpool(webhooks.forget_old, self._db)
                if num_free:
                    taken = await run_in_threadpool(webhooks.take_due, self._db, limit=num_free)
            except UNREACHABLE as error:
                log.warning("webhooks_without_database", error=str(error).partition("\n")[0])
            except Exception:
                log.exception("webhooks_failed")
            for due in taken:
                # Each by itself: one receiver that is slow to answer holds up nobody else's message.
                task = asyncio.create_task(self._deliver(due))
                self._sending.add(task)
                task.add_done_callback(self._has_sent)
            if not num_free or len(taken) < num_free:
                await asyncio.sleep(_LOOK_EVERY_S)

    def _has_sent(self, task: asyncio.Task[None]) -> None:
        """What could not be noted down is due again in a minute, as if it had not been sent."""
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("webhook_not_recorded", exc_info=error)

    async def _deliver(self, due: Due) -> None:
        try:
            status = await self.sender.send(due)
            is_delivered, result = 200 <= status < 300, f"answered {status}"
        except UndeliverableError as error:
            is_delivered, result = False, str(error)
        log.info("webhook_sent", webhook_id=due.id, is_delivered=is_delivered, result=result)
        await run_in_threadpool(webhooks.record, self._db, due.id, is_delivered=is_delivered, result=result)


def sign(due: Due, *, timestamp_s: int) -> dict[str, str]:
    """The three headers of Standard Webhooks 1.0: one signature for each secret that is valid."""
    signed = b".".join((due.id.encode(), str(timestamp_s).encode(), due.body))
    signatures = [f"v1,{_hmac(secret, signed)}" for secret in due.secrets]
    return {
        "webhook-id": due.id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(signatures),
    }


def check_scheme(url: httpx.URL, *, allow_private: bool) -> None:
    """Refuse anything but https (and http, where private addresses are allowed).

    Raises:
        UndeliverableError: it is something else.
    """
    if url.scheme != "https" and not (allow_private and url.scheme == "http"):
        raise UndeliverableError("its URL does not begin with https://")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, also when it is an IPv4 one inside an IPv6 one."""
    parsed: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        elif parsed not in _ROUTED or any(parsed in network for network in _NOT_ROUTED):
            return False
    return parsed.is_global and not parsed.is_multicast


def _hmac(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()

"""The streams: replay from Postgres, then follow the hub, without a gap and without an event twice.

A client subscribes before it reads what was before, so nothing falls between. A stream ends with the event that ended
the job (`data: [DONE]` follows), when its key is revoked, when the server stops, or when the client leaves; it goes on,
here or on another server, from the id of the last event that was seen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jobs import reads
from jobs.db import UNREACHABLE
from jobs.keys import Principal
from jobs.models import Job
from jobs.owner import Owner
from jobs.status import TERMINAL
from server.auth import RECHECK_S
from server.describe import describe_jobs
from server.feeds import Feed, encode_frame
from server.hub import RETRY_S, Hub, Queue, Signal
from server.schemas import JobPage

T = TypeVar("T")

# Proxies give up on a silent connection after 60 s at the earliest; 15 s also tells a client in time. No empty line
# follows, here and after _RETRY: the official client takes it for an event without data, and fails.
_COMMENT_PING = (b": ping\n", 15.0)
# A comment is invisible to a page, and the dashboard marks its data as old after 10 s without a message.
_EVENT_PING = (b"event: ping\ndata: {}\n\n", 5.0)
_DONE = b"data: [DONE]\n\n"
# How long a browser waits before it connects again, in milliseconds.
_RETRY = b"retry: 3000\n"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who reads a stream, and the check that this may go on."""

    principal: Principal
    is_still_valid: Callable[[], bool]


class EventStreamResponse(StreamingResponse):
    """Server-sent events that no proxy buffers; the generator is closed with the response, not when it is collected."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def stream_feed(
    hub: Hub, feed: Feed, job: Job, *, watcher: Watcher, after: int, event_pings: bool
) -> AsyncGenerator[bytes, None]:
    """What comes of a job after number `after`, until the job has ended."""
    pace = _Pace(hub, watcher, _EVENT_PING if event_pings else _COMMENT_PING)
    # A number that was never given would wait for ever: such a client is told what is new.
    last = min(after, feed.position(job))
    queue = hub.subscribe_feed(feed, job)
    hub.opened(watcher.principal.api_key_id)
    try:
        yield _RETRY
        while True:
            while batch := await _read(hub, partial(feed.read, hub.db, job.id, last)):
                last = batch.last_seq
                # A batch may have nothing to show of this feed; no bytes at all would end the response.
                yield batch.frames or pace.ping
                if batch.is_last:
                    yield _DONE
                    return
                if not batch.has_more:
                    break
            if job.status in TERMINAL:
                # The client had seen the last one before.
                yield _DONE
                return
            while (item := await pace.next_item(queue)) is not Signal.STOPPED:
                # All that has come up to now goes out at once: the more there is to do, the less each line costs.
                joined = _join(item, queue, last)
                if joined is None:
                    break
                last = joined.last_seq
                yield joined.frames or pace.ping
                if joined.is_last:
                    yield _DONE
                    return
            else:
                return
    except Exception:
        log.exception("stream_failed", feed=feed.name, job_id=job.id, last_seq=last)
    finally:
        hub.closed(watcher.principal.api_key_id)
        hub.unsubscribe_feed(feed, job.id, queue)


async def stream_jobs(hub: Hub, *, watcher: Watcher, limit: int, with_curve: bool) -> AsyncGenerator[bytes, None]:
    """The newest jobs that the caller sees, then each of them that changes; never ends by itself."""
    pace = _Pace(hub, watcher, _EVENT_PING)
    owner = watcher.principal.view
    read_page = partial(_read_page, hub, owner=owner, limit=limit, with_curve=with_curve)
    queue = hub.subscribe_jobs(owner)
    hub.opened(watcher.principal.api_key_id)
    try:
        yield _RETRY
        while True:
            yield await _read(hub, read_page)
            while (item := await pace.next_item(queue)) is not Signal.STOPPED:
                if item is None:
                    yield pace.ping
                elif item is Signal.LAGGED:
                    break
                else:
                    yield item.with_curve if with_curve else item.plain
            else:
                return
    except Exception:
        log.exception("stream_failed", **owner.parameters)
    finally:
        hub.closed(watcher.principal.api_key_id)
        hub.unsubscribe_jobs(owner, queue)


class _Pace:
    """Waits for a stream's next item: with pings in between, and with the check that its reader is still allowed."""

    def __init__(self, hub: Hub, watcher: Watcher, ping: tuple[bytes, float]) -> None:
        self.ping, self._ping_s = ping
        self._hub = hub
        self._watcher = watcher
        self._check_at = time.monotonic() + RECHECK_S

    async def next_item(self, queue: Queue) -> Any:
        """What comes next: an item, None when it is time for a ping, or Signal.STOPPED."""
        if self._hub.is_stopping:
            return Signal.STOPPED
        now = time.monotonic()
        if now >= self._check_at:
            self._check_at = now + RECHECK_S
            if not await self._hub.read(self._watcher.is_still_valid):
                return Signal.STOPPED
        try:
            async with asyncio.timeout(min(self._ping_s, self._check_at - now)):
                return await queue.get()
        except TimeoutError:
            return None


@dataclass(frozen=True, slots=True)
class _Joined:
    """What of several batches goes out in one piece."""

    frames: bytes
    last_seq: int
    is_last: bool


def _join(item: Any, queue: Queue, last: int) -> _Joined | None:
    """What comes after number `last` of an item and those behind it in the queue, which may be nothing. None: there is
    a gap, and the stream has to go back to the database.

    A batch of which the stream has read the first part from the database is taken from there on: streams that would
    read the rest of it as well would do so again and again where many of them keep the server busy.
    """
    frames, is_last = [], False
    while True:
        if item is Signal.STOPPED:
            queue.put_nowait(item)  # for once this has been sent
            break
        if item is Signal.LAGGED or (item is not None and item.first_seq > last + 1):
            return None
        if item is not None and (item.last_seq > last or item.is_last):
            frames.append(item.after(last))
            last, is_last = max(last, item.last_seq), item.is_last
        if is_last or queue.empty():
            break
        item = queue.get_nowait()
    return _Joined(b"".join(frames), last, is_last)


async def _read(hub: Hub, function: Callable[[], T]) -> T:
    """Read from the database, waiting for it while it does not answer."""
    while True:
        try:
            return await hub.read(function)
        except UNREACHABLE as error:
            if hub.is_stopping:
                raise
            log.warning("stream_read_failed", error=str(error).splitlines()[0])
            await asyncio.sleep(RETRY_S)


def _read_page(hub: Hub, *, owner: Owner, limit: int, with_curve: bool) -> bytes:
    page = reads.list_jobs(hub.db, owner=owner, limit=limit)
    jobs = describe_jobs(hub.db, hub.settings, page.items, with_curve=with_curve)
    return encode_frame(JobPage(data=jobs, has_more=page.has_more).model_dump_json(), event="jobs")

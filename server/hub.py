"""Who is told when a job changes: one LISTEN connection per process, one query per changed job, however many listen.

A subscription is a bounded queue of ready-made bytes. A client too slow to empty it loses what is in it and is told so;
its stream then reads on from Postgres, which is the truth anyway. Database reads run in threads of their own, so that
streams cannot starve the routes, nor the other way round.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import psycopg
import structlog
from sqlalchemy import make_url

from jobs import reads
from jobs.db import UNREACHABLE, Database
from jobs.models import NOTIFY_CHANNEL, Job
from jobs.owner import Owner
from server.describe import describe_jobs
from server.errors import ApiError
from server.feeds import Feed, encode_frame
from server.settings import ServerSettings

T = TypeVar("T")

# Batches a client may be behind before it reads from Postgres again; batches are shared, so this bounds references.
_QUEUE_BATCHES = 64
# A job is sent at most once a second on a stream of jobs: what people can see.
_JOBS_INTERVAL_S = 1.0
# Until the next try to reach a database that does not answer; a restart of Postgres takes 0.1 to 2 s.
RETRY_S = 0.5
# How long the LISTEN connection may be silent before it is tested: a dead peer sends nothing, not even an end.
_LISTEN_TEST_S = 15.0
# For libpq: seconds to connect; a peer that is gone without a word is noticed in some 20 s, not in two hours.
_LISTEN_OPTIONS: dict[str, Any] = {
    "connect_timeout": 3,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,
}
_READ_THREADS = 4

log = structlog.get_logger(__name__)


class Signal(Enum):
    """What a queue holds besides batches."""

    LAGGED = "read again from the database"
    STOPPED = "the server stops"


@dataclass(frozen=True, slots=True)
class JobFrame:
    """One job's frame, in both forms that subscribers may have asked for."""

    plain: bytes
    with_curve: bytes


Queue = asyncio.Queue[Any]


class Hub:
    """Topics by job and by owner of jobs, and the connection that wakes them. Lives on one event loop."""

    def __init__(self, db: Database, settings: ServerSettings) -> None:
        self.db = db
        self.settings = settings
        self.is_stopping = False
        self.num_queries = 0
        self._feeds: dict[str, dict[Feed, _FeedTopic]] = {}
        self._jobs: dict[Owner, _JobsTopic] = {}
        self._open: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="hub")
        self._listener: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._listener = asyncio.create_task(self._listen(), name="hub-listener")
        self._listener.add_done_callback(self._after_listener)

    def stop_streams(self) -> None:
        """End every stream: they would otherwise hold up the server's stop for ever."""
        self.is_stopping = True
        for topic in self._topics():
            topic.publish(Signal.STOPPED)

    async def close(self) -> None:
        """End every stream and let go of the database."""
        self.stop_streams()
        tasks = [topic.task for topic in self._topics()] + ([self._listener] if self._listener else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False)

    def check_room(self, api_key_id: str) -> None:
        """Refuse a stream beyond the limits.

        Raises:
            ApiError: 429 `too_many_streams`.
        """
        settings = self.settings
        if self._open.total() >= settings.max_streams or self._open[api_key_id] >= settings.max_streams_per_key:
            message = "Too many event streams are open: close some."
            raise ApiError(429, message, code="too_many_streams", headers={"Retry-After": "10"})

    def opened(self, api_key_id: str) -> None:
        """Count a stream."""
        self._open[api_key_id] += 1

    def closed(self, api_key_id: str) -> None:
        """Count it no more."""
        self._open[api_key_id] -= 1
        if not self._open[api_key_id]:
            del self._open[api_key_id]

    async def read(self, function: Callable[[], T]) -> T:
        """Run a database read in the hub's threads."""
        self.num_queries += 1
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def subscribe_feed(self, feed: Feed, job: Job) -> Queue:
        """A queue of the feed's batches from now on. Subscribe first, then read what was before."""
        topics = self._feeds.setdefault(job.id, {})
        topic = topics.get(feed)
        if topic is None:
            topic = topics[feed] = _FeedTopic(self, feed, job)
        return topic.subscribe()

    def unsubscribe_feed(self, feed: Feed, job_id: str, queue: Queue) -> None:
        """Forget a queue."""
        topics = self._feeds[job_id]
        if topics[feed].unsubscribe(queue):
            del topics[feed]
        if not topics:
            del self._feeds[job_id]

    def subscribe_jobs(self, owner: Owner) -> Queue:
        """A queue of JobFrames of the owner's changed jobs."""
        topic = self._jobs.get(owner)
        if topic is None:
            topic = self._jobs[owner] = _JobsTopic(self, owner)
        return topic.subscribe()

    def unsubscribe_jobs(self, owner: Owner, queue: Queue) -> None:
        """Forget a queue."""
        if self._jobs[owner].unsubscribe(queue):
            del self._jobs[owner]

    def _topics(self) -> list[_Topic]:
        return [*(topic for topics in self._feeds.values() for topic in topics.values()), *self._jobs.values()]

    async def _listen(self) -> None:
        """Wake topics on notifications, for ever; after a lost connection wake them all."""
        url = make_url(self.db.url).set(drivername="postgresql").render_as_string(hide_password=False)
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(url, autocommit=True, **_LISTEN_OPTIONS) as connection:
                    await connection.execute(f"LISTEN {NOTIFY_CHANNEL}")
                    log.info("hub_listening")
                    self._wake_all()
                    while True:
                        async for notification in connection.notifies(timeout=_LISTEN_TEST_S):
                            self._wake(notification.payload)
                        await connection.execute("SELECT 1")
            except psycopg.Error as error:
                log.warning("hub_connection_lost", error=str(error).splitlines()[:1])
                await asyncio.sleep(RETRY_S)

    def _after_listener(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.error("hub_listener_failed", exc_info=task.exception())
            asyncio.get_running_loop().call_later(RETRY_S, self.start)

    def _wake(self, job_id: str) -> None:
        for feed in self._feeds.get(job_id, {}).values():
            feed.wake.set()
        for topic in self._jobs.values():
            topic.changed.add(job_id)
            topic.wake.set()

    def _wake_all(self) -> None:
        for topics in self._feeds.values():
            for feed in topics.values():
                feed.wake.set()
        for jobs in self._jobs.values():
            jobs.publish(Signal.LAGGED)


class _Topic:
    """Subscribers of one thing, and a task that reads it when woken."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.wake = asyncio.Event()
        self.queues: set[Queue] = set()
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._after_end)

    def subscribe(self) -> Queue:
        queue: Queue = asyncio.Queue(_QUEUE_BATCHES)
        self.queues.add(queue)
        return queue

    def unsubscribe(self, queue: Queue) -> bool:
        """Returns whether nobody is left; the topic has then ended."""
        self.queues.discard(queue)
        if not self.queues:
            self.task.cancel()
        return not self.queues

    def publish(self, item: Any) -> None:
        """Hand an item to every subscriber; one whose queue is full loses all that is in it and is told."""
        for queue in self.queues:
            if queue.full():
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(item if item is Signal.STOPPED else Signal.LAGGED)
            else:
                queue.put_nowait(item)

    async def _run(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            try:
                await self.pump()
            except UNREACHABLE as error:
                log.warning("hub_read_failed", error=str(error).splitlines()[:1])
                await asyncio.sleep(RETRY_S)
                self.wake.set()

    def _after_end(self, task: asyncio.Task[None]) -> None:
        """A defect must not leave streams that only ping: they end, and come back to a new topic."""
        if not task.cancelled():
            log.error("hub_topic_failed", exc_info=task.exception())
            self.publish(Signal.STOPPED)

    async def pump(self) -> None:
        """Read what is new and publish it."""
        raise NotImplementedError


class _FeedTopic(_Topic):
    """A feed of a job."""

    def __init__(self, hub: Hub, feed: Feed, job: Job) -> None:
        super().__init__(hub)
        self.feed = feed
        self.job_id = job.id
        self.position = feed.position(job)
        """Number up to which batches have been published."""

    async def pump(self) -> None:
        while batch := await self.hub.read(partial(self.feed.read, self.hub.db, self.job_id, self.position)):
            self.position = batch.last_seq
            self.publish(batch)
            if batch.is_last or not batch.has_more:
                return


class _JobsTopic(_Topic):
    """A project's jobs, or a whole organization's."""

    def __init__(self, hub: Hub, owner: Owner) -> None:
        super().__init__(hub)
        self.owner = owner
        self.changed: set[str] = set()

    async def pump(self) -> None:
        # A job that changes while it is read is read again; one whose read has failed as well.
        job_ids, self.changed = self.changed, set()
        try:
            frames = await self.hub.read(partial(self._read, sorted(job_ids)))
        except UNREACHABLE:
            self.changed |= job_ids
            raise
        for frame in frames:
            self.publish(frame)
        await asyncio.sleep(_JOBS_INTERVAL_S)

    def _read(self, job_ids: Sequence[str]) -> list[JobFrame]:
        db, settings = self.hub.db, self.hub.settings
        jobs = reads.find_jobs(db, owner=self.owner, job_ids=job_ids)
        frames = []
        for job in describe_jobs(db, settings, jobs, with_curve=True):
            with_curve = encode_frame(job.model_dump_json(), event="job")
            job.lomo = job.lomo.model_copy(update={"loss_curve": None})
            frames.append(JobFrame(encode_frame(job.model_dump_json(), event="job"), with_curve))
        return frames

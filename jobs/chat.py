"""A chat's way from server to worker and back, over the broker's Valkey: nothing is kept, and losing it harms none.

    lomo:chat:queue         list of requests, oldest first; bounded, and each worker takes one at a time
    lomo:chat:hosts         sorted set of the workers that answer chats, by the second until which they count as there
    lomo:chat:answer:<id>   stream of the answer's events, which expires
    lomo:chat:reader:<id>   exists while somebody waits for the answer; when it is gone, the generation ends

A request names its model and never a folder: the worker looks it up among what the caller sees.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis

from jobs.owner import Owner

QUEUE_KEY = "lomo:chat:queue"
HOSTS_KEY = "lomo:chat:hosts"
# Eight chats on one worker are minutes of waiting; whoever comes later is told so at once.
MAX_QUEUED = 8
# A worker says every second or two that it is there; three times the 5 s that a restart of Valkey may take.
PRESENT_FOR_S = 15.0
# A server renews its interest every second: a few missed ones, and the server has died.
READER_TTL_S = 10
ANSWER_TTL_S = 120
# While it loads or computes without a word to pass on, a worker tells this often that it lives.
ALIVE_EVERY_S = 3.0
# Longest time for one answer, loading included: 14 GB from a disk of 200 MB/s are 70 s.
ANSWER_TIMEOUT_S = 300.0

# What an unreachable broker raises.
UNREACHABLE_BROKER = (redis.ConnectionError, redis.TimeoutError)

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One chat: whose, of which model, and what the engine is to do (`lomo_core.chat.ChatTurn` without its id)."""

    id: str
    organization_id: str
    project_id: str | None
    """None: an administrator's, of any project's model."""
    model: str
    turn: Mapping[str, Any]

    @property
    def owner(self) -> Owner:
        """Whose model it may be."""
        return Owner(self.organization_id, self.project_id)

    def to_json(self) -> str:
        """As it lies in the queue."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ChatRequest:
        """Back from the queue."""
        return cls(**json.loads(text))


def client_url(broker_url: str) -> str:
    """Celery's URL of a broker as the Redis client spells it: `redis+socket:///path?virtual_host=0` is `unix://`."""
    parts = urlsplit(broker_url)
    if parts.scheme != "redis+socket":
        return broker_url
    number = parse_qs(parts.query).get("virtual_host", ["0"])[0]
    return f"unix://{parts.path}?db={number}"


def answer_key(request_id: str) -> str:
    """The stream of one answer."""
    return f"lomo:chat:answer:{request_id}"


def reader_key(request_id: str) -> str:
    """What exists while somebody waits for an answer."""
    return f"lomo:chat:reader:{request_id}"


class ChatInbox:
    """The worker's end. Each method raises one of `UNREACHABLE_BROKER` where the broker does not answer."""

    def __init__(self, broker_url: str, *, host: str) -> None:
        # The client's types mix its two colours; longer than the longest blocking read below.
        self._redis: Any = redis.Redis.from_url(client_url(broker_url), decode_responses=True, socket_timeout=10)
        self._host = host

    def announce(self) -> None:
        """Say that this worker answers chats."""
        self._redis.zadd(HOSTS_KEY, {self._host: time.time() + PRESENT_FOR_S})

    def leave(self) -> None:
        """Say that it does so no more."""
        self._redis.zrem(HOSTS_KEY, self._host)

    def take(self, *, wait_s: float) -> ChatRequest | None:
        """The oldest request that somebody still waits for; None where none comes in time."""
        found = self._redis.blpop([QUEUE_KEY], timeout=wait_s)
        if found is None:
            return None
        request = ChatRequest.from_json(found[1])
        return request if self.has_reader(request.id) else None

    def has_reader(self, request_id: str) -> bool:
        """Whether somebody still waits for this answer."""
        return bool(self._redis.exists(reader_key(request_id)))

    def send(self, request_id: str, *events: Event) -> None:
        """Append to an answer."""
        key = answer_key(request_id)
        with self._redis.pipeline(transaction=False) as pipe:
            for event in events:
                pipe.xadd(key, {"event": json.dumps(event)})
            pipe.expire(key, ANSWER_TTL_S)
            pipe.execute()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

"""The server's end of chats: a request into the queue, and its answer's events back, with every wait bounded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

import redis.asyncio
import structlog

from jobs.chat import (
    ANSWER_TIMEOUT_S,
    HOSTS_KEY,
    MAX_QUEUED,
    QUEUE_KEY,
    READER_TTL_S,
    UNREACHABLE_BROKER,
    ChatRequest,
    Event,
    answer_key,
    client_url,
    reader_key,
)
from server.errors import ApiError

# How long a request may lie in the queue. Longer, and a person has left.
_QUEUE_TIMEOUT_S = 60.0
# A worker that has taken a request says something every 3 s.
_SILENCE_S = 20.0
_BLOCK_MS = 1000
_RETRY_AFTER_S = 5

# Adds to the queue where it is not full; one step, so that the limit holds for many servers.
_PUSH = (
    "if redis.call('LLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end return redis.call('RPUSH', KEYS[1], ARGV[2])"
)

_STATUS_BY_CODE = {
    "context_length_exceeded": 400,
    "invalid_messages": 400,
    "model_not_found": 404,
    "invalid_model": 400,
    "timeout": 504,
    "engine_failed": 500,
}

log = structlog.get_logger(__name__)


class ChatClient:
    """Asks workers for answers. Nothing is connected to before the first request."""

    def __init__(self, broker_url: str) -> None:
        # The client's types mix its two colours. Longer than a blocking read takes.
        self._redis: Any = redis.asyncio.Redis.from_url(
            client_url(broker_url), decode_responses=True, socket_timeout=10, socket_connect_timeout=3
        )
        self._leaving: set[asyncio.Task[None]] = set()

    async def ask(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """The events of an answer, with an `alive` one each second in which there is none; the last is `finished`.

        Raises:
            ApiError: nobody answers chats, too many wait, or the worker refuses or is lost.
        """
        try:
            await self._push(request)
            try:
                async for event in self._follow(request):
                    yield event
            finally:
                # By a task of its own: this one may be on its way out, and must not wait for anything more.
                task = asyncio.create_task(self._leave(request))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)
        except UNREACHABLE_BROKER as error:
            log.warning("chat_without_broker", error=str(error))
            raise _unavailable("broker_unavailable", "The message broker does not answer: try again.") from error

    async def close(self) -> None:
        """Let go of what is under way, and close the connections."""
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=1)
        await self._redis.aclose()

    async def _push(self, request: ChatRequest) -> None:
        if not await self._num_hosts():
            raise _no_worker()
        await self._redis.set(reader_key(request.id), "1", ex=READER_TTL_S)
        if not await self._redis.eval(_PUSH, 1, QUEUE_KEY, MAX_QUEUED, request.to_json()):
            await self._redis.delete(reader_key(request.id))
            raise _busy(f"{MAX_QUEUED} chats are waiting already")

    async def _follow(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        started = heard = time.monotonic()
        was_taken = False
        last_id = "0-0"
        while True:
            await self._redis.set(reader_key(request.id), "1", ex=READER_TTL_S)
            found = await self._redis.xread({answer_key(request.id): last_id}, block=_BLOCK_MS)
            now = time.monotonic()
            if found:
                was_taken, heard = True, now
                for last_id, fields in found[0][1]:  # noqa: B007 - the last one is where the next read begins
                    event = json.loads(fields["event"])
                    if event["type"] in ("failed", "refused"):
                        raise _failed(event)
                    yield event
                    if event["type"] == "finished":
                        return
                continue
            await self._check(now, started=started, heard=heard, was_taken=was_taken)
            yield {"type": "alive"}

    async def _check(self, now: float, *, started: float, heard: float, was_taken: bool) -> None:
        """Whether there is still something to wait for."""
        if was_taken and (now - heard > _SILENCE_S or now - started > _QUEUE_TIMEOUT_S + ANSWER_TIMEOUT_S + _SILENCE_S):
            raise _unavailable("worker_lost", "The worker that answered has gone silent: try again.")
        if not was_taken and now - started > _QUEUE_TIMEOUT_S:
            raise _busy(f"no worker came to this chat in {_QUEUE_TIMEOUT_S:.0f} s")
        if not was_taken and not await self._num_hosts():
            raise _no_worker()

    async def _num_hosts(self) -> int:
        return int(await self._redis.zcount(HOSTS_KEY, time.time(), "+inf"))

    async def _leave(self, request: ChatRequest) -> None:
        """Tell the worker that nobody reads any more, and take back what it has not begun."""
        with suppress(*UNREACHABLE_BROKER):
            await self._redis.delete(reader_key(request.id), answer_key(request.id))
            await self._redis.lrem(QUEUE_KEY, 1, request.to_json())


def _failed(event: Event) -> ApiError:
    code, message = str(event["code"]), str(event["message"])
    status = _STATUS_BY_CODE.get(code, 503)
    param = {"model_not_found": "model", "invalid_model": "model"}.get(code, "messages" if status == 400 else None)
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else {}
    return ApiError(status, message, code=code, param=param, headers=headers)


def _unavailable(code: str, message: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(_RETRY_AFTER_S)})


def _no_worker() -> ApiError:
    return _unavailable("no_worker", "No worker is running that could answer: start one, or wait until one is back.")


def _busy(reason: str) -> ApiError:
    message = f"The server is busy: {reason}. Try again in some seconds."
    return ApiError(429, message, code="busy", headers={"Retry-After": str(_RETRY_AFTER_S)})

"""`POST /v1/chat/completions`: a worker's model answers, whole or as it writes."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from jobs import catalog
from jobs.chat import ChatRequest, Event
from server import schemas
from server.deps import Caller, ChatBody, ServicesDep, authenticated
from server.errors import ApiError, error_response
from server.services import Services
from server.sse import EventStreamResponse

router = APIRouter(prefix="/v1/chat", dependencies=[Depends(authenticated)])

# Proxies give up on a silent connection after 60 s at the earliest.
_PING_EVERY_S = 10.0
_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"


@router.post("/completions", response_model=None)
async def create_chat(
    request: Request, body: ChatBody, caller: Caller, services: ServicesDep
) -> dict[str, Any] | Response:
    """Answer a conversation by a base model, a tuned one or a checkpoint."""
    services.hub.check_room(caller.api_key_id)
    # A wrong name is told at once; the worker looks the folder up for itself.
    await run_in_threadpool(
        catalog.resolve_served_model,
        services.db,
        services.settings,
        owner=caller.view,
        name=body.model,
    )
    chat = ChatRequest(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        organization_id=caller.view.organization_id,
        project_id=caller.view.project_id,
        model=body.model,
        turn=body.turn(),
    )
    answer = _counted(services, caller.api_key_id, chat)
    if not body.stream:
        return await _whole_answer(request, chat, answer)
    # What the worker refuses is refused by status, so that nothing is sent before it has begun.
    first = None
    try:
        first = await _first_event(request, answer)
    finally:
        if first is None:
            await answer.aclose()
    if first is None:
        return _nobody()
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return EventStreamResponse(_chunks(chat, first, answer, with_usage=with_usage))


async def _counted(services: Services, api_key_id: str, chat: ChatRequest) -> AsyncGenerator[Event, None]:
    """The events of an answer, counted among the streams of the caller; they end when the server stops."""
    services.hub.opened(api_key_id)
    events = services.chats.ask(chat)
    try:
        async for event in events:
            if services.hub.is_stopping:
                raise ApiError(503, "The server is stopping: try again.", code="server_stopping")
            yield event
    finally:
        services.hub.closed(api_key_id)
        await events.aclose()


async def _whole_answer(
    request: Request, chat: ChatRequest, answer: AsyncGenerator[Event, None]
) -> dict[str, Any] | Response:
    created, texts, prompt_tokens = int(time.time()), [], 0
    try:
        async for event in answer:
            match event["type"]:
                case "started":
                    prompt_tokens = event["prompt_tokens"]
                case "delta":
                    texts.append(event["text"])
                case "finished":
                    message = {"role": "assistant", "content": "".join(texts), "refusal": None}
                    choice = {
                        "index": 0,
                        "message": message,
                        "finish_reason": event["finish_reason"],
                        "logprobs": None,
                    }
                    return {
                        "id": chat.id,
                        "object": "chat.completion",
                        "created": created,
                        "model": chat.model,
                        "choices": [choice],
                        "usage": _usage(prompt_tokens, event["completion_tokens"]),
                    }
                case _ if await request.is_disconnected():
                    break
    finally:
        await answer.aclose()
    return _nobody()


async def _first_event(request: Request, answer: AsyncGenerator[Event, None]) -> Event | None:
    """The event with which the answer begins; None where the client has left before."""
    async for event in answer:
        if event["type"] == "started":
            return event
        if await request.is_disconnected():
            return None
    raise AssertionError("an answer begins, or raises")


async def _chunks(
    chat: ChatRequest, first: Event, answer: AsyncGenerator[Event, None], *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    created, prompt_tokens = int(time.time()), first["prompt_tokens"]
    # With usage, OpenAI's chunks before the last have it as null.
    no_usage = {"usage": None} if with_usage else {}

    def chunk(delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> bytes:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}]
        return frame(choices, **(no_usage | more))

    def frame(choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {"id": chat.id, "object": "chat.completion.chunk", "created": created, "model": chat.model}
        return b"data: " + json.dumps({**head, "choices": choices, **more}).encode() + b"\n\n"

    try:
        yield chunk({"role": "assistant", "content": ""})
        sent_at = time.monotonic()
        async for event in answer:
            if event["type"] == "delta":
                yield chunk({"content": event["text"]})
                sent_at = time.monotonic()
            elif event["type"] == "finished":
                yield chunk({}, event["finish_reason"])
                if with_usage:
                    yield frame([], usage=_usage(prompt_tokens, event["completion_tokens"]))
                yield _DONE
            elif time.monotonic() - sent_at > _PING_EVERY_S:
                yield _PING
                sent_at = time.monotonic()
    except ApiError as error:
        # The status has been sent: the clients raise at a frame that holds an error.
        yield b"data: " + bytes(error_response(error).body) + b"\n\n"
    finally:
        await answer.aclose()


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    usage = schemas.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
    return usage.model_dump()


def _nobody() -> Response:
    """Nobody reads it: the client has left (499 is nginx's word for that in logs)."""
    return Response(status_code=499)

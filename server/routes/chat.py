"""`POST /v1/chat/completions`: a worker's model answers, whole or as it writes."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
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
_BEGUN = {"role": "assistant", "content": ""}


@router.post("/completions", response_model=None)
async def create_chat(
    request: Request, body: ChatBody, caller: Caller, services: ServicesDep
) -> dict[str, Any] | Response:
    """Answer a conversation by a base model, a tuned one or a checkpoint, once or several times."""
    services.hub.check_room(caller.api_key_id)
    # A wrong name is told at once; the worker looks the folder up for itself.
    await run_in_threadpool(
        catalog.resolve_served_model,
        services.db,
        services.settings,
        owner=caller.view,
        name=body.model,
    )
    chats = [
        ChatRequest(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            organization_id=caller.view.organization_id,
            project_id=caller.view.project_id,
            model=body.model,
            turn=body.turn(index),
        )
        for index in range(body.n or 1)
    ]
    chat, answer = chats[0], _counted(services, caller.api_key_id, chats)
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


async def _counted(
    services: Services, api_key_id: str, chats: Sequence[ChatRequest]
) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of the answers, one after the other and each with its answer's number, counted together as one among
    the streams of the caller; they end when the server stops."""
    services.hub.opened(api_key_id)
    try:
        for index, chat in enumerate(chats):
            async with aclosing(services.chats.ask(chat)) as events:
                async for event in events:
                    if services.hub.is_stopping:
                        raise ApiError(503, "The server is stopping: try again.", code="server_stopping")
                    yield index, event
    finally:
        services.hub.closed(api_key_id)


async def _whole_answer(
    request: Request, chat: ChatRequest, answer: AsyncGenerator[tuple[int, Event], None]
) -> dict[str, Any] | Response:
    created, texts, prompt_tokens, completion_tokens = int(time.time()), list[str](), 0, 0
    choices: list[dict[str, Any]] = []
    async with aclosing(answer):
        async for index, event in answer:
            match event["type"]:
                case "started":
                    prompt_tokens, texts = event["prompt_tokens"], []
                case "delta":
                    texts.append(event["text"])
                case "finished":
                    completion_tokens += event["completion_tokens"]
                    message = _message("".join(texts), _tool_calls(event))
                    end = {"finish_reason": event["finish_reason"], "logprobs": None}
                    choices.append({"index": index, "message": message, **end})
                case _ if await request.is_disconnected():
                    return _nobody()
    return {
        "id": chat.id,
        "object": "chat.completion",
        "created": created,
        "model": chat.model,
        "choices": choices,
        "usage": _usage(prompt_tokens, completion_tokens),
    }


async def _first_event(request: Request, answer: AsyncGenerator[tuple[int, Event], None]) -> Event | None:
    """The event with which the first answer begins; None where the client has left before."""
    async for _, event in answer:
        if event["type"] == "started":
            return event
        if await request.is_disconnected():
            return None
    raise AssertionError("an answer begins, or raises")


async def _chunks(
    chat: ChatRequest, first: Event, answer: AsyncGenerator[tuple[int, Event], None], *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    created, prompt_tokens, completion_tokens = int(time.time()), first["prompt_tokens"], 0
    # With usage, OpenAI's chunks before the last have it as null.
    no_usage = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        return frame([{"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}], **no_usage)

    def frame(choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {"id": chat.id, "object": "chat.completion.chunk", "created": created, "model": chat.model}
        return b"data: " + json.dumps({**head, "choices": choices, **more}).encode() + b"\n\n"

    try:
        yield chunk(0, _BEGUN)
        sent_at = time.monotonic()
        async for index, event in answer:
            if event["type"] == "started":
                yield chunk(index, _BEGUN)
            elif event["type"] == "delta":
                yield chunk(index, {"content": event["text"]})
            elif event["type"] == "finished":
                completion_tokens += event["completion_tokens"]
                calls = [{"index": place, **call} for place, call in enumerate(_tool_calls(event))]
                if calls:
                    yield chunk(index, {"tool_calls": calls})
                yield chunk(index, {}, event["finish_reason"])
            elif time.monotonic() - sent_at > _PING_EVERY_S:
                yield _PING
            else:
                continue
            sent_at = time.monotonic()
        if with_usage:
            yield frame([], usage=_usage(prompt_tokens, completion_tokens))
        yield _DONE
    except ApiError as error:
        # The status has been sent: the clients raise at a frame that holds an error.
        yield b"data: " + bytes(error_response(error).body) + b"\n\n"
    finally:
        await answer.aclose()


def _message(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message; where it calls functions, and says nothing, its content is null."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {**message, "content": text or None, "tool_calls": calls} if calls else message


def _tool_calls(finished: Event) -> list[dict[str, Any]]:
    """The calls with which an answer has ended, each with an id that its answer refers to."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for call in finished["tool_calls"]
    ]


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

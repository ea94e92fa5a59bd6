"""Answering chats with one loaded model: `python -m lomo_core chat --model FOLDER`, requests in by stdin, text out.

One JSON object a line, both ways. In: `{"id", "messages", "tools", "max_tokens", "temperature", "top_p", "seed",
"stop"}` asks, `{"stop_id": id}` ends an answer early. Out, each with the request's `id`: `started` (prompt_tokens),
`delta` (text), then `finished` (finish_reason, completion_tokens, tool_calls) or `refused` (code, message); and once,
before all, `ready`.

A base model without a chat template gets a plain one: `User: ...` and `Assistant: ...`, a blank line between turns.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from lomo_core.chat_text import CallText, StopText
from lomo_core.data.chat_format import read_messages, read_tools
from lomo_core.data.rows import ChatMessage, RowError
from lomo_core.data.template import ChatEncoder
from lomo_core.model import load_model, pick_device
from lomo_core.model_folder import read_model_folder, stored_precision
from lomo_core.tokenizer import load_tokenizer

DEFAULT_MAX_TOKENS = 512
# How a turn of the plain template begins; what a base model writes after its answer is the next question.
_PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
_PLAIN_STOP = "\n\nUser:"

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """One request: a conversation, and how the answer is drawn. `temperature` 0 is greedy."""

    id: str
    messages: Sequence[dict[str, Any]]
    """As OpenAI's, of text alone; with `tool_calls` and `tool_call_id` where functions were called."""
    tools: Sequence[dict[str, Any]] = ()
    """As OpenAI's: functions that the answer may call."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()

    @property
    def has_tools(self) -> bool:
        """Whether functions may be called, or have been."""
        return bool(self.tools) or any(
            message["role"] == "tool" or "tool_calls" in message for message in self.messages
        )


class RefusedTurnError(Exception):
    """A request that this model cannot answer; `code` is OpenAI's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ChatModel:
    """A model folder, loaded in the precision that it is stored in.

    Raises:
        ModelError: the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        folder = read_model_folder(path)
        self._tokenizer = load_tokenizer(path)
        self._encoder = ChatEncoder(self._tokenizer) if self._tokenizer.chat_template else None
        self._model = load_model(path, precision=stored_precision(folder), device=pick_device())
        self._context = _context_length(folder.config, self._tokenizer)
        self._end_ids = _end_ids(self._model, self._tokenizer)
        self._stopped_id: str | None = None

    def stop(self, turn_id: str) -> None:
        """End the answer to this request at the next token. May be called from another thread."""
        self._stopped_id = turn_id

    def answer(self, turn: ChatTurn, say: Say) -> None:
        """Generate one answer.

        Raises:
            RefusedTurnError: the conversation is too long for the model, or its template refuses it.
        """
        ids, max_tokens = self._fit(turn)
        say({"type": "started", "prompt_tokens": len(ids)})
        stops = list(turn.stop) if self._encoder is not None else [*turn.stop, _PLAIN_STOP]
        calls = CallText()

        def send(text: str) -> None:
            piece = calls.feed(text) if turn.tools else text
            if piece:
                say({"type": "delta", "text": piece})

        stream = _AnswerStream(self._tokenizer, self._end_ids, StopText(stops), send)
        inputs = torch.tensor([ids], device=self._model.device)
        if turn.seed is None:
            torch.seed()
        else:
            torch.manual_seed(turn.seed)
        self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=self._sampling(turn, max_tokens),
            streamer=stream,
            stopping_criteria=[
                lambda found, _: torch.full(
                    (len(found),), stream.is_done or self._stopped_id == turn.id, device=found.device
                )
            ],
        )
        reason = stream.finish()
        rest, found = calls.finish()
        if rest:
            say({"type": "delta", "text": rest})
        end = {"finish_reason": "tool_calls" if found else reason, "completion_tokens": stream.num_tokens}
        say({"type": "finished", **end, "tool_calls": found})

    def _fit(self, turn: ChatTurn) -> tuple[list[int], int]:
        """The prompt's token ids, and how many tokens the answer may have."""
        try:
            ids = self._prompt_ids(turn)
        except RowError as error:
            raise RefusedTurnError("invalid_messages", f"The messages cannot be used: {error}.") from error
        room = self._context - len(ids)
        if room < 1 or (turn.max_tokens is not None and turn.max_tokens > room):
            asked = "" if turn.max_tokens is None else f" and max_tokens asks for {turn.max_tokens} more"
            raise RefusedTurnError(
                "context_length_exceeded",
                f"The model's context is {self._context} tokens. The messages have {len(ids)}{asked}: make them shorter"
                f"{'' if turn.max_tokens is None else ', or max_tokens smaller'}.",
            )
        return ids, min(room, turn.max_tokens or DEFAULT_MAX_TOKENS)

    def _prompt_ids(self, turn: ChatTurn) -> list[int]:
        if turn.has_tools:
            if self._encoder is None:
                raise RowError("the model has no chat template, and so no way to be told of tools")
            body = {"messages": list(turn.messages), "tools": list(turn.tools)}
            return self._encoder.prompt_ids(read_messages(body), read_tools(body))
        messages = [ChatMessage(message["role"], message["content"], trained=False) for message in turn.messages]
        if self._encoder is not None:
            return self._encoder.prompt_ids(messages)
        turns = [f"{_PLAIN_NAMES[message.role]}: {message.content}" for message in messages]
        # With the special tokens that such a tokenizer puts in front: a base model has never seen a text without.
        return list(self._tokenizer("\n\n".join([*turns, "Assistant:"])).input_ids)

    def _sampling(self, turn: ChatTurn, max_tokens: int) -> Any:
        """Nothing of the model's own (temperatures, penalties) but its end tokens."""
        config_class: Any = transformers.GenerationConfig
        drawn = {"do_sample": True, "temperature": turn.temperature, "top_p": turn.top_p, "top_k": 0}
        return config_class(
            max_new_tokens=max_tokens,
            repetition_penalty=1.0,
            eos_token_id=sorted(self._end_ids) or None,
            pad_token_id=self._tokenizer.pad_token_id,
            **(drawn if turn.temperature > 0 else {"do_sample": False}),
        )


class _AnswerStream(BaseStreamer):
    """Takes tokens as they are drawn and passes on text: never half a character, nothing of a stop text."""

    def __init__(self, tokenizer: Any, end_ids: set[int], stop_text: StopText, send: Callable[[str], None]) -> None:
        self.num_tokens = 0
        self.is_done = False
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stop_text = stop_text
        self._send = send
        self._ids: list[int] = []
        self._begin = 0  # of the tokens that are decoded together with the new ones, for the space between them
        self._sent = 0  # tokens whose text has been passed on
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """Take the prompt, which comes first and whole, or the next token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        token = int(value.reshape(-1)[0])
        self.num_tokens += 1
        if token in self._end_ids:
            self.is_done = True
        elif not self.is_done:
            self._ids.append(token)
            self._pass_on(is_last=False)

    def end(self) -> None:
        """Nothing: `finish` is called by the one who started."""

    def finish(self) -> str:
        """Pass on what was held back. Returns the reason of the end."""
        if not self.is_done or not self._stop_text.was_found:
            self._pass_on(is_last=True)
        return "stop" if self.is_done else "length"

    def _pass_on(self, *, is_last: bool) -> None:
        before = self._decode(self._ids[self._begin : self._sent])
        text = self._decode(self._ids[self._begin :])
        # U+FFFD at the end: the next token may complete the character.
        if is_last or (len(text) > len(before) and not text.endswith("\ufffd")):
            self._begin, self._sent = self._sent, len(self._ids)
            piece = self._stop_text.feed(text[len(before) :], is_last=is_last)
            if piece:
                self._send(piece)
            self.is_done = self.is_done or self._stop_text.was_found

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def serve(path: Path) -> None:
    """Load a model and answer until stdin ends.

    Raises:
        ModelError: the folder cannot be used.
    """
    out = _own_stdout()
    model = ChatModel(path)
    turns: queue.SimpleQueue[ChatTurn | None] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(model, turns), name="requests", daemon=True).start()
    _write(out, {"type": "ready"})
    while (turn := turns.get()) is not None:
        say = partial(_write, out, turn_id=turn.id)
        try:
            model.answer(turn, say)
        except RefusedTurnError as error:
            say({"type": "refused", "code": error.code, "message": error.message})


def _read_requests(model: ChatModel, turns: queue.SimpleQueue[ChatTurn | None]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "stop_id" in request:
            model.stop(request["stop_id"])
        else:
            turns.put(ChatTurn(**request))
    turns.put(None)


def _own_stdout() -> TextIO:
    """The real stdout for the protocol alone; whatever else prints goes to stderr from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _write(out: TextIO, event: dict[str, Any], *, turn_id: str | None = None) -> None:
    out.write(json.dumps({"id": turn_id, **event}) + "\n")
    out.flush()


def _context_length(config: dict[str, Any], tokenizer: Any) -> int:
    """Tokens that the model was made for; what the tokenizer says where the configuration is silent."""
    text = config.get("text_config") or config
    length = text.get("max_position_embeddings") or text.get("n_positions")
    return int(length or tokenizer.model_max_length)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The model's end tokens and the tokenizer's, which is that of a turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return {int(token) for token in [*found, tokenizer.eos_token_id] if token is not None}

"""Server-sent events: a parser of frames, and a stream that outlives restarts of the server.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html (9.2.5, parsing an event stream).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import httpx

from cli.client import ApiClient, unreachable
from cli.errors import ApiError, CliError, UnreachableError

T = TypeVar("T")

DONE = "[DONE]"
"""The data of the last frame."""

_BOM = b"\xef\xbb\xbf"
# The server pings every 15 s: three missed ones mean that the connection is dead though nobody closed it.
_SILENCE_S = 45.0
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 10.0
_GIVE_UP_S = 300.0  # a restart with a migration takes well below that
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True)
class Frame:
    """One event of a stream. `id` is that of the last frame that had one."""

    id: str
    event: str
    data: str


class FrameParser:
    """Turns chunks of bytes into frames, wherever the chunks were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip_newline = False
        self._at_start = True
        self._last_id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Frame]:
        """Take the next bytes and return the frames that they complete."""
        lines = (line.decode("utf-8", errors="replace") for line in self._lines(chunk))
        return [frame for line in lines if (frame := self._take(line))]

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        """Split at CRLF, LF or CR; a CR at the end of a chunk ends its line at once."""
        data = self._rest + chunk
        if self._at_start:
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._rest = data
                return
            data, self._at_start = data.removeprefix(_BOM), False
        if self._skip_newline and data:
            data, self._skip_newline = data.removeprefix(b"\n"), False
        self._skip_newline = self._skip_newline or data.endswith(b"\r")
        *lines, self._rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        yield from lines

    def _take(self, line: str) -> Frame | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._last_id = value
        return None  # a comment (no name), `retry`, which we leave to our own back-off, or an unknown field

    def _dispatch(self) -> Frame | None:
        data, event = self._data, self._event or "message"
        self._data, self._event = [], ""
        return Frame(self._last_id, event, "\n".join(data)) if data else None


class Patience:
    """Waits between attempts to reach a server, and gives up when it has been away for too long."""

    def __init__(
        self,
        *,
        on_wait: Callable[[str], None] = lambda text: None,
        give_up_s: float = _GIVE_UP_S,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._on_wait = on_wait
        self._give_up_s = give_up_s
        self._clock = clock
        self._pause = pause
        self._away_since: float | None = None
        self._wait_s = _FIRST_WAIT_S

    def succeeded(self) -> None:
        """The server has answered: the next loss starts a new count."""
        self._away_since = None
        self._wait_s = _FIRST_WAIT_S

    def failed(self, error: CliError) -> None:
        """Wait before the next attempt.

        Raises:
            UnreachableError: the server has been away for longer than `give_up_s`.
        """
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
            self._on_wait(f"{error}; trying again for {self._give_up_s / 60:.0f} minutes")
        if now - self._away_since > self._give_up_s:
            raise UnreachableError(f"gave up after {self._give_up_s / 60:.0f} minutes: {error}") from error
        self._pause(self._wait_s)
        self._wait_s = min(_LONGEST_WAIT_S, self._wait_s * 2)


def persist(call: Callable[[], T], patience: Patience) -> T:
    """Return `call()`, repeating it while the server is away."""
    while True:
        try:
            result = call()
        except (UnreachableError, ApiError) as error:
            if not _may_pass(error):
                raise
            patience.failed(error)
        else:
            patience.succeeded()
            return result


def iterate(client: ApiClient, path: str, patience: Patience, *, last_id: str = "") -> Iterator[Frame]:
    """Yield the frames of a stream, each once, up to the last; reconnects by Last-Event-ID where it breaks off.

    Raises:
        ApiError: the server refuses the stream (no such job, no right to it).
        UnreachableError: the server stayed away for too long.
    """
    while True:
        frames = _connect(client, path, patience, last_id=last_id)
        try:
            with closing(frames):
                for frame in frames:
                    patience.succeeded()
                    if frame.data == DONE:
                        return
                    last_id = frame.id or last_id
                    yield frame
            # The end without the last frame: the server was told to stop.
            lost: CliError = UnreachableError(f"the server at {client.connection.root_url} closed the stream")
        except httpx.HTTPError as error:
            lost = unreachable(error, client.connection)
        except (UnreachableError, ApiError) as error:
            if not _may_pass(error):
                raise
            lost = error
        patience.failed(lost)


def _connect(client: ApiClient, path: str, patience: Patience, *, last_id: str) -> Generator[Frame, None, None]:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
    parser = FrameParser()
    with client.stream(path, headers=headers, read_timeout_s=_SILENCE_S) as response:
        for number, chunk in enumerate(response.iter_bytes()):
            if number > 0:  # a ping will do; the first chunk also comes from a server that closes at once
                patience.succeeded()
            yield from parser.feed(chunk)


def _may_pass(error: CliError) -> bool:
    """Whether the same request may succeed later: no answer, too many requests, or a fault of the server."""
    if isinstance(error, ApiError):
        return error.status == _TOO_MANY_REQUESTS or error.status >= _SERVER_ERROR
    return True

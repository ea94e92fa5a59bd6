"""Load on a server over keep-alive connections, and readers of event streams, in as little Python as will do.

HTTP clients for people spend a millisecond per request, which on a machine that also runs the server is measured as
the server's. Here a request is bytes, and of an answer only its status and its length are read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field


class LoadError(RuntimeError):
    """The server answered what it should not have."""


@dataclass(slots=True)
class Answers:
    """What a run of requests took."""

    latencies_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    num_bytes: int = 0
    """Of the last answer's body."""

    @property
    def per_s(self) -> float:
        """Requests answered per second."""
        return len(self.latencies_s) / self.seconds

    def quantile_ms(self, share: float) -> float:
        """The latency that this share of the requests stays below, in milliseconds."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def make_request(method: str, path: str, *, key: str, body: bytes = b"") -> bytes:
    """One HTTP/1.1 request as it goes over the wire."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(port: int, request: Callable[[int], bytes], *, num_requests: int, num_connections: int) -> Answers:
    """Send `request(0)`, `request(1)`, ... over several connections, each as soon as its last answer is there."""
    answers, numbers = Answers(), iter(range(num_requests))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            started = time.perf_counter()
            writer.write(request(number))
            answers.num_bytes = len(await _read_answer(reader))
            answers.latencies_s.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(num_connections)))
    answers.seconds = time.perf_counter() - started
    return answers


async def follow(port: int, request: bytes, on_frames: Callable[[bytes], bool]) -> None:
    """Read a stream's frames, as many at once as have arrived, until `on_frames` says that the last was among them, or
    the stream ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(request)
    await reader.readuntil(b"\r\n\r\n")
    rest = b""
    while chunk := await reader.read(2**18):
        frames, separator, rest = (rest + chunk).rpartition(b"\n\n")
        if separator and on_frames(frames):
            break
    writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lowered = head.lower()
    start = lowered.index(b"content-length: ") + len(b"content-length: ")
    body = await reader.readexactly(int(lowered[start : lowered.index(b"\r", start)]))
    if not head.startswith(b"HTTP/1.1 200"):
        raise LoadError(f"{head.splitlines()[0].decode()}: {body[:300].decode(errors='replace')}")
    return body

"""The frame parser, and a stream that goes on across breaks."""

from __future__ import annotations

import pytest

from cli.client import ApiClient
from cli.connection import Connection
from cli.errors import ApiError, UnreachableError
from cli.sse import Frame, FrameParser, Patience, iterate, persist
from tests.support.scripted_server import Response, ScriptedServer

STREAM = (
    b': hello\nretry: 3000\n\nid: 1\nevent: metrics\ndata: {"a": 1}\n\n'
    b"id: 2\ndata: x\ndata: \xc3\xa4\n\n: ping\n\ndata:[DONE]\n\n"
)
FRAMES = [Frame("1", "metrics", '{"a": 1}'), Frame("2", "message", "x\n\u00e4"), Frame("2", "message", "[DONE]")]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_frames_do_not_depend_on_where_the_bytes_are_cut(newline: bytes, bom: bytes) -> None:
    stream = bom + STREAM.replace(b"\n", newline)
    for cut in range(len(stream) + 1):
        parser = FrameParser()
        assert parser.feed(stream[:cut]) + parser.feed(stream[cut:]) == FRAMES, cut
    parser = FrameParser()
    assert [frame for byte in stream for frame in parser.feed(bytes([byte]))] == FRAMES


def test_a_frame_that_is_not_complete_is_not_given() -> None:
    parser = FrameParser()
    assert parser.feed(b"data: half\n") == []
    assert parser.feed(b"\n") == [Frame("", "message", "half")]


def test_fields_as_the_standard_reads_them() -> None:
    parser = FrameParser()
    assert parser.feed(b"data\n\n") == [Frame("", "message", "")]
    assert parser.feed(b"data:  two\n\n") == [Frame("", "message", " two")]
    assert parser.feed(b"id: 7\nevent: x\n\n") == []  # without data nothing is dispatched, the id holds
    assert parser.feed(b"unknown: y\ndata: z\n\n") == [Frame("7", "message", "z")]
    assert parser.feed(b"id: a\0b\ndata: z\n\n") == [Frame("7", "message", "z")]


class FakeTime:
    """A clock that moves by what is waited for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def pause(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def patience(time: FakeTime, notes: list[str] | None = None) -> Patience:
    notes = [] if notes is None else notes
    return Patience(on_wait=notes.append, clock=lambda: time.now, pause=time.pause)


def test_waits_grow_and_end_after_five_minutes() -> None:
    time, notes = FakeTime(), []
    waiting = patience(time, notes)
    with pytest.raises(UnreachableError, match="gave up after 5 minutes: no server"):
        while True:
            waiting.failed(UnreachableError("no server"))
    assert time.waits[:6] == [0.5, 1, 2, 4, 8, 10]
    assert 300 < time.now < 315
    assert notes == ["no server; trying again for 5 minutes"]


def test_each_loss_has_its_own_five_minutes() -> None:
    time = FakeTime()
    waiting = patience(time)
    for _ in range(10):
        time.now += 250
        waiting.failed(UnreachableError("gone"))
        waiting.succeeded()
    assert set(time.waits) == {0.5}


def test_persist_repeats_what_may_pass_only() -> None:
    time = FakeTime()
    errors = [UnreachableError("gone"), ApiError("down", status=503), ApiError("slow down", status=429)]

    def call() -> str:
        if errors:
            raise errors.pop()
        return "answer"

    assert persist(call, patience(time)) == "answer"
    assert len(time.waits) == 3

    def refuse() -> str:
        raise ApiError("no such job", status=404)

    with pytest.raises(ApiError, match="no such job"):
        persist(refuse, patience(time))
    assert len(time.waits) == 3


PATH = "/fine_tuning/jobs/ftjob-1/events"


def read(server: ScriptedServer, time: FakeTime) -> list[Frame]:
    with ApiClient(Connection(server.url, "sk-x")) as client:
        return list(iterate(client, f"{PATH}?stream=true", patience(time)))


def test_a_broken_stream_goes_on_after_the_last_id(server: ScriptedServer) -> None:
    server.on(
        "GET",
        PATH,
        Response(chunks=[b"retry: 3000\n\n", b"id: 1\ndata: a\n\nid: 2\nda"], breaks=True),
        Response(503, body={"error": {"message": "starting", "code": None}}),
        Response(chunks=[b"id: 2\ndata: b\n\n"]),  # ends without the last frame
        Response(chunks=[b"id: 3\ndata: c\n\ndata: [DONE]\n\n"]),
    )
    time = FakeTime()
    assert [frame.data for frame in read(server, time)] == ["a", "b", "c"]
    assert [request.headers.get("Last-Event-ID") for request in server.requests] == [None, "1", "1", "2"]
    assert {request.headers["Accept"] for request in server.requests} == {"text/event-stream"}
    assert time.waits == [0.5, 1.0, 0.5]


def test_a_server_that_is_down_for_a_while_is_waited_for(server: ScriptedServer) -> None:
    server.on("GET", PATH, Response(chunks=[b"id: 1\ndata: a\n\ndata: [DONE]\n\n"]))
    server.stop()

    class Restarting(FakeTime):
        def pause(self, seconds: float) -> None:
            super().pause(seconds)
            if len(self.waits) == 3:
                server.start()

    time = Restarting()
    assert [frame.data for frame in read(server, time)] == ["a"]
    assert time.waits == [0.5, 1, 2]


def test_a_refused_stream_is_an_error_at_once(server: ScriptedServer) -> None:
    time = FakeTime()
    with pytest.raises(ApiError, match="Unknown route") as caught:
        read(server, time)
    assert (caught.value.status, caught.value.code) == (404, "not_found")
    assert time.waits == []


def test_a_server_that_stays_away_is_given_up(server: ScriptedServer) -> None:
    server.stop()
    with pytest.raises(UnreachableError, match=r"gave up after 5 minutes: no server at .*lomo up"):
        read(server, FakeTime())

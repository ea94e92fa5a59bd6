"""`lomo chat`, `lomo export`, `lomo models delete`: what is sent, and what is shown of answers, also broken ones."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.scripted_server import Response, ScriptedServer

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Lomo

CHAT = "/chat/completions"
TUNED = "ft:org/base::docs:12345678"


def stream(*texts: str, end: bytes = b"data: [DONE]\n\n") -> Response:
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    frames = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    raw = b": ping\n\n" + frames + end
    return Response(chunks=[raw[:7], raw[7:31], raw[31:]], headers={"Content-Type": "text/event-stream"})


def test_an_answer_is_printed_as_it_is_written(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("POST", CHAT, stream("d", "ay\n", "\u2600\x1b[31m"))
    code, out, _ = lomo(
        "chat", TUNED, "what goes with sun?", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9"
    )
    assert (code, out) == (0, "day\n\u2600\ufffd[31m\n")
    [request] = server.requests
    assert request.json == {
        "model": TUNED,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what goes with sun?"}],
        "temperature": 0.0,
        "max_tokens": 9,
        "stream": True,
    }


def test_two_models_beside_each_other_remember_their_own_answers(
    server: ScriptedServer, lomo: Lomo, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on("POST", CHAT, stream("A1"), stream("B1"), stream("A2"), stream("B2"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    code, out, _ = lomo("chat", TUNED, "--beside", "base")
    assert (code, out) == (0, f"[{TUNED}]\nA1\n[base]\nB1\n[{TUNED}]\nA2\n[base]\nB2\n")
    assert [request.json["model"] for request in server.requests] == [TUNED, "base"] * 2
    assert [message["content"] for message in server.requests[3].json["messages"]] == ["one", "B1", "two"]


def test_json_is_the_servers_own(server: ScriptedServer, lomo: Lomo) -> None:
    answer = {"choices": [{"message": {"role": "assistant", "content": "day"}}]}
    server.on("POST", CHAT, Response(body=answer))
    code, out, _ = lomo("chat", TUNED, "sun?", "-o", "json")
    assert (code, json.loads(out)) == (0, answer)
    assert "stream" not in server.requests[0].json


def test_what_goes_wrong_is_told(server: ScriptedServer, lomo: Lomo) -> None:
    error = {"message": "No worker is running.", "type": "server_error", "param": None, "code": "no_worker"}
    server.on("POST", CHAT, Response(503, {"error": error}))
    assert lomo("chat", TUNED, "x")[::2] == (1, "error: No worker is running. [no_worker]\n")
    raw = json.dumps({"error": error | {"message": "A job needs the room."}}).encode()
    server.on("POST", CHAT, stream("da", end=b"data: " + raw + b"\n\n"))
    code, out, err = lomo("chat", TUNED, "x")
    assert (code, out) == (1, "da")
    assert "A job needs the room." in err
    server.on("POST", CHAT, stream("da", end=b""))
    assert "broke the answer off" in lomo("chat", TUNED, "x").err


def test_export_and_delete(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    server.on("GET", f"/models/{TUNED}/export", Response(body=b"tar" * 1000))
    target = tmp_path / "out.tar"
    code, _, err = lomo("export", TUNED, "--to", str(target))
    assert (code, err) == (0, f"Wrote {target}.\n")
    assert target.read_bytes() == b"tar" * 1000
    assert server.requests[0].path == f"/v1/models/{TUNED}/export?format=tar"
    assert lomo("export", TUNED, "--format", "gguf", "--to", str(target))[::2] == (0, f"Wrote {target}.\n")
    assert server.requests[1].path == f"/v1/models/{TUNED}/export?format=gguf"
    server.on("GET", f"/models/{TUNED}/export", Response(chunks=[b"half"], breaks=True))
    assert lomo("export", TUNED, "--to", str(tmp_path / "other.tar")).code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]
    server.on("DELETE", f"/models/{TUNED}", Response(body={"id": TUNED, "object": "model", "deleted": True}))
    assert lomo("models", "delete", TUNED)[:2] == (0, f"{TUNED}\n")

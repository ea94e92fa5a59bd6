"""A chat through a real Celery worker, beside its jobs: asked as the server asks, answered by the real engine."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import psutil

from jobs import chat, reads
from server.chat import ChatClient
from server.errors import ApiError
from tests.support.known_host import give_calibration
from tests.support.tiny_model import make_tiny_model
from tests.support.worker_bench import ORGANIZATION, CeleryWorker


async def ask(broker_url: str, number: int) -> list[chat.Event]:
    """The events of one answer."""
    client = ChatClient(broker_url)
    turn = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
    request = chat.ChatRequest(
        id=f"chatcmpl-{number}", organization_id=ORGANIZATION, project_id=None, model="tiny", turn=turn
    )
    try:
        return [event async for event in client.ask(request)]
    finally:
        await client.close()


def engines(worker: CeleryWorker) -> list[psutil.Process]:
    """Its processes that answer chats."""
    return [child for child in psutil.Process(worker.process.pid).children() if "chat" in child.cmdline()]


def test_a_worker_answers_and_takes_its_engine_along(bench: Any, start_worker: Any, wait_until: Any) -> None:
    make_tiny_model(bench.settings.data_dir / "models" / "tiny")
    engine_command = (sys.executable, "-m", "lomo_core")
    give_calibration(bench.settings.model_copy(update={"engine_command": engine_command}))
    worker = start_worker(engine_command=engine_command)
    wait_until(lambda: reads.find_host(bench.db, name="host-a"), 90, "the host")
    events = asyncio.run(ask(bench.settings.broker_url, 1))
    assert next(event["type"] for event in events if event["type"] != "alive") == "started"
    assert events[-1] == {"type": "finished", "finish_reason": "length", "completion_tokens": 5, "tool_calls": []}
    [engine] = engines(worker)
    asyncio.run(ask(bench.settings.broker_url, 2))
    assert [child.pid for child in engines(worker)] == [engine.pid]

    assert worker.terminate() == 0
    wait_until(lambda: not engine.is_running(), 10, "the engine's end")
    try:
        asyncio.run(ask(bench.settings.broker_url, 3))
    except ApiError as error:
        assert error.code == "no_worker"
    else:
        raise AssertionError("a worker that has stopped still counts as there")
    assert "Traceback" not in worker.log()

"""Chats on this host: one at a time, by an engine process for each model, two of which stay loaded for a while: a tuned
model and its base, between which a question goes back and forth.

A thread of its own takes requests from the broker and starts the engines, since the kernel ends a child with the thread
that started it. The models have to fit beside what the host's running jobs need by plan, and beside what is free now; a
second one stays only where there is room for both. A job that is claimed later and needs the room gets it: they go, the
one that was used last at last.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import structlog

from jobs import catalog, reads
from jobs.chat import ALIVE_EVERY_S, ANSWER_TIMEOUT_S, UNREACHABLE_BROKER, ChatInbox, ChatRequest, Event
from jobs.db import Database
from jobs.errors import JobsError
from lomo_core.errors import ModelError
from lomo_core.memory.process import TYPICAL
from lomo_core.model_folder import loaded_bytes, read_model_folder
from worker.chat_engine import ChatEngine, EngineEndedError
from worker.gpus import find_gpus, measure_device
from worker.outage import NOT_READY, first_line
from worker.settings import WorkerSettings

_POLL_S = 0.25  # how late a reader's leaving, and a job that needs the room, are seen
_TAKE_S = 1.0
_BROKER_PAUSE_S = 2.0
_MAX_LOADED = 2
# Beside the weights: the process itself, and a tenth for keys and values and the activations of a prompt.
_BASE_BYTES = TYPICAL.base_bytes + TYPICAL.libraries_bytes
_SPARE_SHARE = 0.1

log = structlog.get_logger(__name__)


class _RefusedError(Exception):
    """This chat cannot be answered here now; `code` is for the server, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.event: Event = {"type": "failed", "code": code, "message": message}


class ChatService:
    """Takes chats until it is closed."""

    def __init__(self, db: Database, settings: WorkerSettings) -> None:
        self._db = db
        self._settings = settings
        self._closed = threading.Event()
        self._make_room = threading.Event()
        self._engines: list[ChatEngine] = []  # the one that was used last at the end
        self._thread = threading.Thread(target=self._live, name="chats", daemon=True)

    @property
    def is_loaded(self) -> bool:
        """Whether a model takes memory here."""
        return bool(self._engines)

    @property
    def engine_pid(self) -> int | None:
        """The process of the model that was used last, for whoever watches it."""
        return self._engines[-1].pid if self._engines else None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def make_room(self) -> None:
        """A job was claimed: the models go, as far as they do not fit beside."""
        self._make_room.set()

    def close(self) -> None:
        """End the thread, and with it the engines."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _live(self) -> None:
        inbox = ChatInbox(self._settings.broker_url, host=self._settings.worker_name)
        try:
            while not self._closed.is_set():
                try:
                    self._turn(inbox)
                except UNREACHABLE_BROKER as error:
                    log.warning("chat_without_broker", error=first_line(error))
                    self._closed.wait(_BROKER_PAUSE_S)
                except Exception:
                    # A defect of ours must cost one answer, not all chats until the worker's next start.
                    log.exception("chat_failed")
                    self._unload_all()
            inbox.leave()
        except UNREACHABLE_BROKER:
            pass
        finally:
            self._unload_all()
            inbox.close()

    def _turn(self, inbox: ChatInbox) -> None:
        """One look into the queue, and the answer to what was there."""
        inbox.announce()
        request = inbox.take(wait_s=_TAKE_S)
        if request is not None:
            self._answer(inbox, request)
        self._let_go()

    def _let_go(self) -> None:
        """End the engines that nobody has asked for some time, or whose room a job needs."""
        longest_s = self._settings.chat_idle_s
        for engine in [engine for engine in self._engines if time.monotonic() - engine.used_at > longest_s]:
            self._unload(engine)
        self._give_room()

    def _give_room(self) -> None:
        """Unload what does not fit beside the jobs any more, where one was claimed."""
        if not self._make_room.is_set():
            return
        self._make_room.clear()
        if not self._engines:
            return
        try:
            free_bytes = self._planned_free_bytes() or 0
        except NOT_READY:
            free_bytes = 0
        while self._engines and free_bytes < self._loaded_bytes():
            self._unload(self._engines[0])

    def _loaded_bytes(self) -> int:
        """What the loaded models take, as it was reckoned."""
        return sum(engine.needed_bytes for engine in self._engines)

    def _answer(self, inbox: ChatInbox, request: ChatRequest) -> None:
        started = time.monotonic()
        try:
            engine = self._take_engine(request)
            try:
                self._wait_until_ready(inbox, request, engine)
                self._generate(inbox, request, engine, deadline=started + ANSWER_TIMEOUT_S)
            except EngineEndedError as error:
                self._unload(engine)
                log.warning("chat_engine_ended", model=request.model, error=str(error))
                message = f"The process that answers for {request.model} has ended: {error}"
                raise _RefusedError("engine_failed", message) from error
        except _RefusedError as error:
            inbox.send(request.id, error.event)
        except NOT_READY as error:
            log.warning("chat_without_database", error=first_line(error))
            event = {"type": "failed", "code": "database_unavailable", "message": "The worker's database is away."}
            inbox.send(request.id, event)
        log.info("chat_answered", model=request.model, seconds=round(time.monotonic() - started, 3))

    def _take_engine(self, request: ChatRequest) -> ChatEngine:
        """The engine of this model: one that is here, or a new one where there is room for it, which has to load it."""
        folder = self._find_folder(request)
        for engine in self._engines:
            if engine.folder == folder and engine.is_alive:
                self._engines.remove(engine)
                self._engines.append(engine)
                return engine
        try:
            weight_bytes = loaded_bytes(read_model_folder(folder))
        except ModelError as error:
            raise _RefusedError("invalid_model", f"{request.model} cannot be used: {error.message}.") from error
        needed = round(weight_bytes * (1 + _SPARE_SHARE)) + _BASE_BYTES
        self._make_place(request.model, needed)
        place = min(set(range(_MAX_LOADED)) - {engine.place for engine in self._engines})
        engine = ChatEngine(self._settings, folder=folder, needed_bytes=needed, place=place)
        self._engines.append(engine)
        return engine

    def _wait_until_ready(self, inbox: ChatInbox, request: ChatRequest, engine: ChatEngine) -> None:
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        alive_at = 0.0
        while not engine.is_ready:
            engine.is_ready = any(event["type"] == "ready" for event in engine.read(wait_s=_POLL_S))
            alive_at = self._check_on(inbox, request, engine, deadline=deadline, alive_at=alive_at)

    def _find_folder(self, request: ChatRequest) -> Path:
        try:
            folder = catalog.resolve_served_model(self._db, self._settings, owner=request.owner, name=request.model)
        except JobsError as error:
            raise _RefusedError(error.code, error.message) from error
        return folder.resolve()

    def _make_place(self, model: str, needed_bytes: int) -> None:
        """Unload what has to go for another model, the longest unused first.

        Raises:
            _RefusedError: there is no room for it even alone.
        """
        for engine in [engine for engine in self._engines if not engine.is_alive]:
            self._unload(engine)
        while len(self._engines) >= _MAX_LOADED or (self._engines and self._free_bytes() < needed_bytes):
            self._unload(self._engines[0])
        free = self._free_bytes()
        if free < needed_bytes:
            raise _RefusedError(
                "no_room",
                f"{model} needs {_gib(needed_bytes)} to answer, and {self._settings.worker_name} has {_gib(free)} free "
                "beside its running jobs: try again when they have ended.",
            )

    def _free_bytes(self) -> int:
        """What is left for another model, by plan and now.

        Raises:
            _RefusedError: the host has not measured itself yet.
        """
        by_plan = self._planned_free_bytes()
        if by_plan is None:
            raise _RefusedError("no_room", "The host has only just started: try again in some seconds.")
        return min(by_plan - self._loaded_bytes(), measure_device(find_gpus()).available_bytes)

    def _planned_free_bytes(self) -> int | None:
        """What this host's running jobs leave by plan; None before the host has measured itself."""
        name = self._settings.worker_name
        state = next((state for state in reads.list_hosts(self._db) if state.host.name == name), None)
        return None if state is None else state.free_bytes

    def _generate(self, inbox: ChatInbox, request: ChatRequest, engine: ChatEngine, *, deadline: float) -> None:
        engine.ask(request.id, request.turn)
        alive_at = 0.0
        while True:
            # A model may be fast: what has come since the last look goes out together.
            events = [event for event in engine.read(wait_s=_POLL_S) if event.pop("id", None) == request.id]
            if events:
                inbox.send(request.id, *events)
                if events[-1]["type"] in ("finished", "refused"):
                    return
            try:
                alive_at = self._check_on(inbox, request, engine, deadline=deadline, alive_at=alive_at)
            except _RefusedError as error:
                if error.event["code"] == "timeout":
                    self._unload(engine)  # it may hang in a model's template, which no stop ends
                else:
                    engine.stop(request.id)
                raise

    def _check_on(
        self, inbox: ChatInbox, request: ChatRequest, engine: ChatEngine, *, deadline: float, alive_at: float
    ) -> float:
        """Whether to go on; tells the reader now and then that this worker does. Returns when it last did.

        Raises:
            _RefusedError: nobody reads any more, time is up, or a job needs the room.
        """
        if self._closed.is_set():
            raise _RefusedError("worker_stopping", "The worker is stopping: try again.")
        if not inbox.has_reader(request.id):
            raise _RefusedError("reader_gone", "Nobody waits for this answer any more.")
        if time.monotonic() > deadline:
            raise _RefusedError("timeout", f"The answer was not complete after {ANSWER_TIMEOUT_S:.0f} s.")
        self._give_room()
        if engine not in self._engines:
            raise _RefusedError("no_room", "A job has started that needs the memory: try again when it has ended.")
        now = time.monotonic()
        if now - alive_at < ALIVE_EVERY_S:
            return alive_at
        inbox.announce()
        inbox.send(request.id, {"type": "alive"})
        return now

    def _unload(self, engine: ChatEngine) -> None:
        self._engines.remove(engine)
        engine.close()

    def _unload_all(self) -> None:
        while self._engines:
            self._unload(self._engines[0])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"

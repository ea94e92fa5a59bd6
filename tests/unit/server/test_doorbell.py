"""When the server rings for new jobs: at once, and for many that come together only a few times."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import cast

import pytest
from celery import Celery

from jobs import dispatch
from server import doorbell
from server.doorbell import Doorbell

BROKER = cast(Celery, object())
TIMEOUT_S = 10


class Bell:
    """In place of the broker: counts what is rung, and lets a test hold the first ring."""

    def __init__(self) -> None:
        self.num_rung = 0
        self.is_up = True
        self.rung = threading.Semaphore(0)
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def ring(self, app: Celery) -> bool:
        assert app is BROKER
        self.num_rung += 1
        self.rung.release()
        assert self.may_go_on.wait(TIMEOUT_S)
        return self.is_up

    def wait(self) -> None:
        assert self.rung.acquire(timeout=TIMEOUT_S)


@pytest.fixture
def bell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bell]:
    bell = Bell()
    monkeypatch.setattr(dispatch, "ring", bell.ring)
    yield bell
    bell.may_go_on.set()


def test_one_job_is_one_ring_at_once(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "_PAUSE_S", 3600)
    with closing(Doorbell(BROKER)) as asked:
        asked.start()
        asked.ask()
        bell.wait()
    assert bell.num_rung == 1


def test_those_that_ask_while_it_rings_are_rung_for_together(bell: Bell) -> None:
    bell.may_go_on.clear()
    with closing(Doorbell(BROKER)) as asked:
        asked.start()
        asked.ask()
        bell.wait()
        for _ in range(50):
            asked.ask()
        bell.may_go_on.set()
    assert bell.num_rung == 1 + doorbell._MAX_AT_ONCE


def test_two_that_come_together_are_two_rings(bell: Bell) -> None:
    """Of two hosts each shall begin."""
    with closing(Doorbell(BROKER)) as asked:
        asked.ask()
        asked.ask()
        asked.start()
        bell.wait()
        bell.wait()
    assert bell.num_rung == 2


def test_a_stop_rings_for_whoever_has_asked(bell: Bell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "_PAUSE_S", 3600)
    asked = Doorbell(BROKER)
    asked.start()
    asked.ask()
    bell.wait()
    asked.ask()
    asked.close()
    assert bell.num_rung == 2


def test_a_broker_that_is_down_is_asked_once_for_all(bell: Bell) -> None:
    bell.is_up = False
    with closing(Doorbell(BROKER)) as asked:
        for _ in range(3):
            asked.ask()
        asked.start()
        bell.wait()
    assert bell.num_rung == 1

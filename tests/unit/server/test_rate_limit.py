"""Token buckets: a minute's worth at once, then evenly; what the headers say; what a request costs."""

from __future__ import annotations

import time

import pytest

from server import rate_limit
from server.rate_limit import RateLimiter, format_reset, network_of


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_holds_a_minute_and_fills_evenly() -> None:
    clock = Clock()
    limiter = RateLimiter(60, clock=clock)
    found = [limiter.take("key") for _ in range(61)]
    assert [allowance.is_exceeded for allowance in found] == [False] * 60 + [True]
    assert [allowance.remaining for allowance in found[:2]] == [59, 58]
    assert found[-1].retry_after_s == pytest.approx(1)
    assert not limiter.take("another key").is_exceeded
    clock.now += 0.75
    late = limiter.take("key")
    assert (late.is_exceeded, late.retry_after_s) == (True, pytest.approx(0.25))
    clock.now += 0.25
    assert not limiter.take("key").is_exceeded, "a refused request has taken nothing"
    assert limiter.take("key").is_exceeded
    clock.now += 3600
    assert limiter.take("key").remaining == 59, "no more than a minute's worth is saved up"


def test_looking_takes_nothing() -> None:
    limiter = RateLimiter(1, clock=Clock())
    assert not limiter.look("key").is_exceeded
    assert not limiter.look("key").is_exceeded
    assert not limiter.take("key").is_exceeded
    assert limiter.look("key").is_exceeded


def test_headers() -> None:
    clock = Clock()
    limiter = RateLimiter(120, clock=clock)
    assert limiter.take("key").headers() == {
        "x-ratelimit-limit-requests": "120",
        "x-ratelimit-remaining-requests": "119",
        "x-ratelimit-reset-requests": "500ms",
    }
    for _ in range(119):
        limiter.take("key")
    exceeded = limiter.take("key").headers()
    assert (exceeded["Retry-After"], exceeded["retry-after-ms"]) == ("1", "500")
    assert exceeded["x-ratelimit-reset-requests"] == "1m0s"


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, "0ms"), (0.0101, "11ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (7, "7s")]
)
def test_times_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert format_reset(seconds) == written


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("::1", "::"),
        ("no:address", "no:address"),
    ],
)
def test_who_has_many_addresses_has_one_bucket(address: str, network: str) -> None:
    assert network_of(address) == network


def test_memory_is_bounded_and_a_bucket_in_use_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "_MAX_BUCKETS", 10)
    clock = Clock()
    limiter = RateLimiter(60, clock=clock)
    for number in range(9):
        limiter.take(f"idle {number}")
    clock.now += 59
    for _ in range(60):
        limiter.take("busy")
    clock.now += 0.5
    for number in range(9):
        limiter.take(f"new {number}")
        assert len(limiter._buckets) <= 10
    assert limiter.take("busy").is_exceeded


def test_it_costs_little() -> None:
    """Measured: 4 us, headers included, the best of five. The limit is what a request may cost."""
    limiter = RateLimiter(10**9)
    best_s = min(_time_requests(limiter) for _ in range(5))
    print(f"{1e6 * best_s:.1f} us a request")
    assert best_s < 20e-6


def _time_requests(limiter: RateLimiter) -> float:
    num_requests = 2000
    started = time.perf_counter()
    for number in range(num_requests):
        limiter.look("address")
        limiter.take(f"key {number % 50}").headers()
    return (time.perf_counter() - started) / num_requests

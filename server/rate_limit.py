"""How often somebody may ask: token buckets in memory, one per API key, and one per address for wrong keys.

A bucket holds a minute's worth and fills evenly. The figures are of this process alone: after a restart every bucket is
full.
"""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

# Buckets; each is some 200 bytes. Beyond it the full ones are forgotten, which changes nothing, and if that is not
# enough all of them.
_MAX_BUCKETS = 10_000


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left after a request."""

    limit: int
    """Requests a minute."""
    remaining: int
    reset_s: float
    """Until the bucket is full again."""
    retry_after_s: float
    """0 where the request may pass, else until the next one may."""

    @property
    def is_exceeded(self) -> bool:
        """Whether the request is one too many."""
        return self.retry_after_s > 0

    def headers(self) -> dict[str, str]:
        """As OpenAI's; with the two that say when to come again, where it is needed."""
        found = {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": format_reset(self.reset_s),
        }
        if self.is_exceeded:
            found["Retry-After"] = str(math.ceil(self.retry_after_s))
            found["retry-after-ms"] = str(math.ceil(1000 * self.retry_after_s))
        return found


class RateLimiter:
    """Buckets of `per_minute` tokens by name. Safe among threads."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._per_s = per_minute / 60
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Tokens, and when that was."""
        self._lock = threading.Lock()

    def take(self, name: str) -> Allowance:
        """Take a token out of a bucket, if it holds one."""
        with self._lock:
            tokens, now = self._fill(name)
            if tokens < 1:
                return self._allowance(tokens, retry_after_s=(1 - tokens) / self._per_s)
            if len(self._buckets) >= _MAX_BUCKETS and name not in self._buckets:
                self._forget(now)
            self._buckets[name] = (tokens - 1, now)
            return self._allowance(tokens - 1, retry_after_s=0.0)

    def look(self, name: str) -> Allowance:
        """What `take` would say, without taking."""
        with self._lock:
            tokens, _ = self._fill(name)
            return self._allowance(tokens, retry_after_s=max(0.0, (1 - tokens) / self._per_s))

    def _fill(self, name: str) -> tuple[float, float]:
        now = self._clock()
        tokens, since = self._buckets.get(name, (float(self._per_minute), now))
        return min(self._per_minute, tokens + (now - since) * self._per_s), now

    def _forget(self, now: float) -> None:
        self._buckets = {
            name: (tokens, since)
            for name, (tokens, since) in self._buckets.items()
            if tokens + (now - since) * self._per_s < self._per_minute
        }
        if len(self._buckets) >= _MAX_BUCKETS:
            self._buckets.clear()

    def _allowance(self, tokens: float, *, retry_after_s: float) -> Allowance:
        return Allowance(self._per_minute, int(tokens), (self._per_minute - tokens) / self._per_s, retry_after_s)


def network_of(address: str) -> str:
    """What one party can be taken to have: an address of IPv4, or the 64 bits of IPv6 that a provider gives away."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.IPv6Network((address.partition("%")[0], 64), strict=False).network_address)
    except ValueError:
        return address


def format_reset(seconds: float) -> str:
    """A time as OpenAI writes it: `10ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"

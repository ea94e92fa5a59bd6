"""A real Chromium in front of a real server over a real database.

Every page that a test opens is watched: an error in the console, a breach of the content security policy or a request
that failed fails the test, unless the test says that it expects it.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from jobs import keys
from jobs.db import Database
from server.serve import Server
from server.settings import ServerSettings
from tests.conftest import WaitUntil

_CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
# What a page may take to show what the server has; some hundred milliseconds on an idle machine.
PAGE_TIMEOUT_MS = 20_000
_START_S = 30.0
_VIOLATIONS = """
    window.cspViolations = [];
    document.addEventListener('securitypolicyviolation',
        event => window.cspViolations.push(event.violatedDirective + ' ' + event.blockedURI));
"""


@dataclass
class Dashboard:
    """The server, in a thread: where it listens, a key that it takes, and the database behind it."""

    settings: ServerSettings
    db: Database
    key: str
    wait_until: WaitUntil
    port: int = 0
    server: Server | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve; after a stop on the same port as before."""
        self.server = Server(self.settings.model_copy(update={"server_port": self.port}))
        self.thread = threading.Thread(target=self.server.run, name="server")
        self.thread.start()
        thread, server = self.thread, self.server
        self.wait_until(lambda: server.started or not thread.is_alive(), _START_S, "the server to start")
        self.port = server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """End the server and wait for its end."""
        assert self.server is not None
        assert self.thread is not None
        self.server.should_exit = True
        self.thread.join()

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"


@dataclass
class WatchedPage:
    """A page, and what went wrong in it."""

    page: Page
    faults: list[str] = field(default_factory=list)


OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One headless Chromium for a module. Costs about 1 s and 200 MB of memory.

    Not for the session: while Playwright's driver is there, an event loop runs in this thread, and tests elsewhere
    that call `asyncio.run` would fail.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        message = "no Chromium was found: install the package chromium to run the browser tests"
        if os.environ.get("LOMO_TEST_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def dashboard(database_url: str, broker_url: str, tmp_path: Path, wait_until: WaitUntil) -> Iterator[Dashboard]:
    """The server of `python -m server`, in a thread, on a free port. Costs about 0.5 s."""
    settings = ServerSettings(database_url=database_url, broker_url=broker_url, data_dir=tmp_path, data_checks=False)
    db = Database(database_url)
    running = Dashboard(settings, db, keys.create_key(db, name="browser test"), wait_until)
    running.start()
    yield running
    running.stop()
    db.dispose()


@pytest.fixture
def open_page(chromium: Browser, dashboard: Dashboard) -> Iterator[OpenPage]:
    """`open_page(width=, height=, scheme=, watched=)`: a page with a context of its own. Costs about 50 ms.

    It is closed before the server stops, so that a page that loses its server at the end is no fault.
    """
    assert dashboard.port
    contexts: list[BrowserContext] = []
    pages: list[WatchedPage] = []

    def open_one(*, width: int = 1440, height: int = 900, scheme: str = "light", watched: bool = True) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,  # type: ignore[arg-type]  # a literal in playwright's types
            reduced_motion="reduce",
        )
        contexts.append(context)
        context.set_default_timeout(PAGE_TIMEOUT_MS)
        context.add_init_script(_VIOLATIONS)
        page = context.new_page()
        if watched:
            pages.append(_watch(page))
        return page

    yield open_one
    faults = [fault for watched in pages for fault in _faults(watched)]
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def signed_in(open_page: OpenPage, dashboard: Dashboard) -> OpenPage:
    """Like `open_page`, with a session: the page is at the jobs list."""

    def open_one(**options: object) -> Page:
        page = open_page(**options)
        page.goto(f"{dashboard.url}/login")
        page.get_by_label("API key").fill(dashboard.key)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("heading", name="Jobs", exact=True).wait_for()
        return page

    return open_one


def _watch(page: Page) -> WatchedPage:
    watched = WatchedPage(page)
    page.on("pageerror", lambda error: watched.faults.append(f"uncaught: {error}"))
    page.on(
        "console", lambda line: line.type in {"error", "warning"} and watched.faults.append(f"console: {line.text}")
    )
    page.on(
        "response",
        lambda response: response.status >= 400 and watched.faults.append(f"{response.status}: {response.url}"),
    )
    return watched


def _faults(watched: WatchedPage) -> list[str]:
    violations: list[str] = watched.page.evaluate("window.cspViolations ?? []")
    return watched.faults + [f"content security policy: {violation}" for violation in violations]

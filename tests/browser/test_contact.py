"""What the page says when the server is gone, and that it catches up by itself."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.simulated_run import SimulatedRun, submit

# One process for all of them: they share a Chromium, whose driver keeps an event loop running there.
pytestmark = pytest.mark.browser


@pytest.mark.parametrize("where", ["list", "job"])
def test_a_lost_server_is_said_and_everything_catches_up(signed_in: OpenPage, dashboard: Dashboard, where: str) -> None:
    submit(dashboard.db, "support-replies")
    run = SimulatedRun.start(dashboard.db, total_steps=200)
    run.train(20)
    page = signed_in(watched=False)  # refused connections are written into the console
    page.get_by_text("20 of 200").wait_for()
    if where == "job":
        page.get_by_role("link", name="support-replies").click()
        page.get_by_text("20 of 200 steps").wait_for()
    expect(page.get_by_role("status")).to_have_text("Live")
    page.clock.install()
    dashboard.stop()
    page.clock.run_for(12_000)
    expect(page.get_by_role("status")).to_have_text("Stale")
    expect(page.get_by_role("alert")).to_contain_text("Jobs go on without this page.")
    run.train(30)
    dashboard.start()
    page.get_by_role("button", name="Try now").click()
    expect(page.get_by_role("status")).to_have_text("Live")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.clock.run_for(2_000)
    expect(page.get_by_text("50 of 200")).to_be_visible()

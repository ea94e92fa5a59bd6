"""The page of the hosts: their memory, what runs there, and that it is asked for again while it can be seen."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import text, update

from jobs.models import Job
from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.simulated_run import SimulatedRun, memory_mb, register, submit

# One process for all of them: they share a Chromium, whose driver keeps an event loop running there.
pytestmark = pytest.mark.browser

PLAN = memory_mb(parameters=2690, gradients=113, activations=1240, other=397)  # 4.44 GB in all
REFRESH_MS = 10_000
# A tab that goes to the back, or comes to the front: headless, a page is always visible.
_SHOW = """state => {
    Object.defineProperty(document, 'visibilityState', { configurable: true, value: state });
    document.dispatchEvent(new Event('visibilitychange'));
}"""


def open_hosts(page: Page) -> None:
    """Go there as a reader does."""
    page.get_by_role("link", name="Hosts").click()
    page.get_by_role("heading", name="Hosts", exact=True).wait_for()


def silence(dashboard: Dashboard, name: str) -> None:
    """Let a host have been silent for three minutes."""
    with dashboard.db.transaction() as session:
        session.execute(
            text("UPDATE hosts SET last_seen_at = now() - interval '180 s' WHERE name = :name"), {"name": name}
        )


def test_without_a_host_the_page_says_how_to_start_one(signed_in: OpenPage, dashboard: Dashboard) -> None:
    page = signed_in()
    open_hosts(page)
    page.get_by_role("heading", name="No worker host yet").wait_for()
    expect(page.locator("pre")).to_have_text("lomo up")
    expect(page.get_by_role("link", name="Hosts")).to_have_attribute("aria-current", "page")
    assert page.title() == "Hosts · LOMO"


def test_each_host_shows_memory_slots_and_jobs(signed_in: OpenPage, dashboard: Dashboard) -> None:
    db = dashboard.db
    register(db, "desk", available_mb=16_000, slots=3)
    for name in ("support-replies", "foreign"):
        submit(db, name, plan=PLAN)
        run = SimulatedRun.start(db, total_steps=10)
    with db.transaction() as session:
        session.execute(update(Job).where(Job.id == run.job_id).values(organization_id="org-foreign"))
    register(db, "lost", available_mb=12_000, cpu=True)
    silence(dashboard, "lost")
    register(db, "old", available_mb=None)
    page = signed_in()
    open_hosts(page)
    rows = page.locator("table.hosts tbody tr")
    expect(rows).to_have_count(3)
    desk, lost, old = rows.all()
    expect(desk).to_contain_text("NVIDIA GeForce RTX 4090")
    expect(desk).to_contain_text("and 1 of other organizations")
    expect(desk).to_contain_text("8.88 promised, 7.12 freeof 16.0 GB")
    expect(desk).to_contain_text("2 of 3")
    expect(desk.locator(".w-seen")).to_have_text("alive")
    bar = desk.get_by_role("img", name="16.0 GB for jobs, 8.88 GB promised, 7.12 GB free")
    whole, promised = bar.bounding_box(), bar.locator(".seg-row").bounding_box()
    assert whole is not None
    assert promised is not None
    assert promised["width"] / whole["width"] == pytest.approx(8.88 / 16, abs=0.01)
    expect(lost).to_contain_text("not answering")
    expect(lost).to_contain_text("AMD EPYC 7313")
    expect(lost.locator(".w-seen")).to_have_text("last seen 3 min ago")
    expect(lost.get_by_role("img", name="12.0 GB for jobs, use not known")).to_be_visible()
    expect(old.get_by_role("img", name="memory for jobs not measured")).to_be_visible()
    expect(old).to_contain_text("idle")
    expect(page.get_by_text("3 hosts, 1 busy, 1 not answering")).to_be_visible()
    desk.get_by_role("link", name="support-replies").click()
    page.get_by_role("heading", name="support-replies").wait_for()
    expect(page.get_by_role("link", name="Jobs", exact=True)).to_have_attribute("aria-current", "true")


def test_the_page_asks_again_while_it_can_be_seen_and_only_then(signed_in: OpenPage, dashboard: Dashboard) -> None:
    register(dashboard.db, "desk")
    page = signed_in()
    page.clock.install()
    asked: list[str] = []
    page.on("request", lambda request: request.url.endswith("/v1/hosts") and asked.append(request.url))
    open_hosts(page)
    rows = page.locator("table.hosts tbody tr")
    expect(rows).to_have_count(1)
    expect(page.get_by_role("status")).to_have_text("Live")
    register(dashboard.db, "newer")
    with page.expect_response("**/v1/hosts"):
        page.clock.run_for(REFRESH_MS)
    expect(rows).to_have_count(2)
    page.evaluate(_SHOW, "hidden")
    before = len(asked)
    page.clock.run_for(3 * REFRESH_MS)
    assert len(asked) == before
    register(dashboard.db, "newest")
    with page.expect_response("**/v1/hosts"):
        page.evaluate(_SHOW, "visible")
    expect(rows).to_have_count(3)


def test_a_lost_server_is_said_and_what_was_known_stays(signed_in: OpenPage, dashboard: Dashboard) -> None:
    register(dashboard.db, "desk")
    page = signed_in(watched=False)  # refused connections are written into the console
    page.clock.install()
    open_hosts(page)
    rows = page.locator("table.hosts tbody tr")
    expect(rows).to_have_count(1)
    dashboard.stop()
    page.clock.run_for(REFRESH_MS)
    expect(page.get_by_role("status")).to_have_text("Stale")
    expect(page.get_by_role("alert")).to_contain_text("the server cannot be reached")
    expect(rows).to_have_count(1)
    dashboard.start()
    page.get_by_role("button", name="Try now").click()
    expect(page.get_by_role("status")).to_have_text("Live")
    expect(page.get_by_role("alert")).to_have_count(0)

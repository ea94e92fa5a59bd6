"""Both themes, wide and narrow: nothing overflows, everything that can be used has a name; and the README's picture."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.simulated_run import PLAN, SimulatedRun, memory_mb, register, submit

# One process for all of them: they share a Chromium, whose driver keeps an event loop running there.
pytestmark = pytest.mark.browser

PICTURE = Path(__file__).parents[2] / "docs" / "img" / "dashboard.png"
TABS = ("Events", "Log", "Checkpoints", "Evaluation", "Samples", "Config")

# What a screen reader would have nothing to say about.
_NAMELESS = """() => [...document.querySelectorAll('a, button, input, [role=img], [role=progressbar], [tabindex="0"]')]
    .filter(e => e.checkVisibility() && !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length))
    .map(e => e.outerHTML.slice(0, 120))"""


def find_axe() -> str | None:
    """The source of axe-core, where LOMO_TEST_AXE names its file or the package axe-playwright-python is installed."""
    if path := os.environ.get("LOMO_TEST_AXE"):
        return Path(path).read_text(encoding="utf-8")
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8")


OUT_OF_MEMORY = (
    "The step needs 2.31 GB, 0.31 GB more than the device has. It held:\n"
    "  parameters      269 MB\n  activations   1,240 MB\n  peak          2,017 MB\n"
    "batch_size 2 needs 812 MB and would fit."
)


def make_jobs(dashboard: Dashboard) -> SimulatedRun:
    """A failed, a running and a waiting job; returns the running one's run."""
    submit(dashboard.db, "gsm8k-full", plan=PLAN)
    failed = SimulatedRun.start(dashboard.db, total_steps=100, steps_ago=20)
    failed.train(20)
    failed.run_out_of_memory(OUT_OF_MEMORY, memory_mb(parameters=269, gradients=113, activations=1240, other=395))
    options = {"eval_every_steps": 20, "sample_prompts": ["Where is my parcel?"]}
    submit(dashboard.db, "support-replies", lomo=options, plan=PLAN, auto=["batch_size"])
    run = SimulatedRun.start(dashboard.db, total_steps=180, steps_ago=124)
    run.evaluate(valid_loss=2.98, choice_accuracy=0.36)
    for valid_loss, share in ((2.3, 0.5), (1.95, 0.68), (1.8, 0.74)):
        run.train(20)
        run.evaluate(valid_loss=valid_loss, choice_accuracy=share)
        run.sample("Where is my parcel?", "It left our house today. " * (1 + run.step // 4))
    run.checkpoint(best_step=40)
    run.say("row 4117 is longer than 512 tokens and was cut", level="warn")
    run.lose_and_resume(from_step=60)
    run.train(64)
    submit(dashboard.db, "a-job-with-a-name-that-is-far-too-long-for-its-column-in-the-list", plan=PLAN)
    register(dashboard.db, "desk", slots=1)
    register(dashboard.db, "a-host-with-a-name-too-long-for-its-column.example.org", available_mb=None)
    return run


def open_pages(page: Page, run: SimulatedRun) -> list[str]:
    """The addresses to look at, after the list has been read."""
    page.get_by_text("support-replies", exact=True).wait_for()
    return ["#/jobs", "#/hosts", *(f"#/job/{run.job_id}/{tab.lower()}" for tab in TABS)]


def check_looks(page: Page, address: str, width: int) -> None:
    """Nothing wider than the window, nothing nameless, one h1; and axe-core's rules where it is at hand."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width, address
    assert page.evaluate(_NAMELESS) == [], address
    expect(page.locator("h1")).to_have_count(1)
    if (axe := find_axe()) is not None:
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == [], address


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 400])
def test_the_pages_without_jobs_fit_too(
    open_page: OpenPage, signed_in: OpenPage, dashboard: Dashboard, scheme: str, width: int
) -> None:
    stranger = open_page(width=width, scheme=scheme)
    stranger.goto(f"{dashboard.url}/login")
    check_looks(stranger, "/login", width)
    page = signed_in(width=width, scheme=scheme)
    page.get_by_role("heading", name="No jobs yet").wait_for()
    check_looks(page, "#/jobs", width)
    page.goto(f"{dashboard.url}/#/hosts")
    page.get_by_role("heading", name="No worker host yet").wait_for()
    check_looks(page, "#/hosts", width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 400])
def test_every_view_fits_its_width_and_names_its_parts(
    signed_in: OpenPage, dashboard: Dashboard, scheme: str, width: int
) -> None:
    run = make_jobs(dashboard)
    page = signed_in(width=width, scheme=scheme)
    for address in open_pages(page, run):
        page.goto(f"{dashboard.url}/{address}")
        page.locator(".card").first.wait_for()
        if "hosts" in address:
            page.locator("table.hosts").wait_for()
        if "job/" in address:
            expect(page.locator(".plot canvas")).to_have_count(4)
        check_looks(page, address, width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 400])
def test_jobs_that_wait_or_failed_fit_their_width_too(
    signed_in: OpenPage, dashboard: Dashboard, scheme: str, width: int
) -> None:
    make_jobs(dashboard)
    page = signed_in(width=width, scheme=scheme)
    for name, part in (("gsm8k-full", ".failure pre"), ("a-job-with-a-name", ".empty .figures")):
        page.goto(f"{dashboard.url}/#/jobs")
        page.get_by_role("link", name=name).click()
        page.locator(part).wait_for()
        check_looks(page, name, width)


def test_the_theme_can_be_chosen_and_is_remembered(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = make_jobs(dashboard)
    page = signed_in(scheme="light")
    page.goto(f"{dashboard.url}/#/job/{run.job_id}")
    expect(page.locator(".plot canvas")).to_have_count(4)
    page.get_by_role("button", name="Switch to dark theme").click()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(15, 17, 20)"
    expect(page.locator(".plot canvas")).to_have_count(4)
    page.reload()
    page.get_by_role("button", name="Switch to light theme").wait_for()


@pytest.mark.skipif(os.environ.get("LOMO_UPDATE_PICTURES") != "1", reason="LOMO_UPDATE_PICTURES=1 draws it anew")
def test_draw_the_picture_of_the_readme(signed_in: OpenPage, dashboard: Dashboard) -> None:
    submit(dashboard.db, "support-replies", lomo={"eval_every_steps": 60, "checkpoint_every_steps": 120}, plan=PLAN)
    run = SimulatedRun.start(dashboard.db, total_steps=600, steps_ago=424)
    run.evaluate(valid_loss=2.98)
    for step in range(60, 421, 60):
        run.train(60)
        run.evaluate(valid_loss=1.7 + 1.27 * math.exp(-6 * step / 600))
        if step % 120 == 0:
            run.checkpoint()
    run.train(4)
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{run.job_id}")
    expect(page.locator(".plot canvas")).to_have_count(4)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURE)

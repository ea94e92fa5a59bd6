"""The jobs list: what it shows, that it follows the server without a reload, and that its choices have addresses."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.simulated_run import SimulatedRun, submit

# One process for all of them: they share a Chromium, whose driver keeps an event loop running there.
pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="window.pwned=1">\u202e</td>'


def names(page: Page) -> list[str]:
    """The names of the jobs in the list's order."""
    return page.locator("table.jobs .name").all_inner_texts()


def test_an_empty_list_says_how_to_begin(signed_in: OpenPage, dashboard: Dashboard) -> None:
    page = signed_in()
    page.get_by_role("heading", name="No jobs yet").wait_for()
    assert "lomo jobs create" in page.locator("pre").inner_text()
    page.get_by_role("button", name="curl").click()
    assert f"curl {dashboard.url}/v1/files" in page.locator("pre").inner_text()


def test_each_status_has_its_words(signed_in: OpenPage, dashboard: Dashboard) -> None:
    db = dashboard.db
    submit(db, "done")
    run = SimulatedRun.start(db, total_steps=30)
    run.train(30)
    run.succeed()
    submit(db, "broken")
    run = SimulatedRun.start(db, total_steps=100)
    run.train(10)
    run.train(1, loss=float("nan"))
    run.fail("diverged", "The loss was not finite at step 11.")
    submit(db, "stopped")
    run = SimulatedRun.start(db, total_steps=100)
    run.cancelled()
    submit(db, "waiting")
    page = signed_in()

    def row(name: str) -> str:
        return page.locator("tr", has=page.get_by_text(name, exact=True)).inner_text()

    page.get_by_text("done", exact=True).wait_for()
    assert names(page) == ["waiting", "stopped", "broken", "done"]
    assert all(
        words in row("done") for words in ("Succeeded", "30 steps", "took", "→ ft:smollm2-135m-instruct", "desk")
    )
    assert all(words in row("broken") for words in ("Failed", "The loss was not finite at step 11.", "not finite"))
    assert all(words in row("stopped") for words in ("Cancelled", "Cancelled before the first step"))
    assert all(words in row("waiting") for words in ("Queued", "Waits for a free worker", "not known"))
    bar = page.get_by_role("img", name=re.compile(r"^measured 1\.\d\d GB, plan not known, limit 2\.00 GB$"))
    expect(bar).to_have_count(2)


def test_a_running_job_moves_without_a_reload_and_a_new_one_enters_on_top(
    signed_in: OpenPage, dashboard: Dashboard
) -> None:
    submit(dashboard.db, "support-replies")
    run = SimulatedRun.start(dashboard.db, total_steps=200)
    run.train(20)
    page = signed_in()
    page.get_by_text("20 of 200").wait_for()
    page.evaluate("window.sameDocument = true")
    run.train(30)
    page.get_by_text("50 of 200").wait_for()
    submit(dashboard.db, "newer")
    page.get_by_text("newer", exact=True).wait_for()
    assert names(page) == ["newer", "support-replies"]
    run.succeed()
    page.locator("tr", has_text="support-replies").get_by_text("Succeeded").wait_for()
    assert page.evaluate("window.sameDocument") is True
    expect(page.get_by_role("status")).to_have_text("Live")


def test_filter_search_and_sort_are_in_the_address(signed_in: OpenPage, dashboard: Dashboard) -> None:
    for name in ("beta", "alpha", "gamma"):
        submit(dashboard.db, name)
    SimulatedRun.start(dashboard.db, total_steps=10).train(1)
    page = signed_in()
    page.get_by_text("gamma", exact=True).wait_for()
    page.get_by_role("button", name="Job", exact=True).click()
    assert names(page) == ["alpha", "beta", "gamma"]
    page.get_by_role("button", name="Waiting 2").click()
    assert names(page) == ["alpha", "gamma"]
    page.keyboard.press("/")
    page.keyboard.type("gam")
    assert names(page) == ["gamma"]
    assert page.url.endswith("#/jobs?sort=name&status=waiting&q=gam")
    page.reload()
    page.get_by_text("gamma", exact=True).wait_for()
    assert names(page) == ["gamma"]
    page.get_by_label("Search jobs").fill("nothing like it")
    page.get_by_role("button", name="Show all jobs").click()
    assert names(page) == ["alpha", "beta", "gamma"]


def test_keys_move_and_open_and_back_returns(signed_in: OpenPage, dashboard: Dashboard) -> None:
    for name in ("first", "second"):
        submit(dashboard.db, name)
    page = signed_in()
    page.get_by_text("first", exact=True).wait_for()
    for key in ("j", "j", "Enter"):
        page.keyboard.press(key)
    page.get_by_role("heading", name="first").wait_for()
    page.go_back()
    page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    page.get_by_text("first", exact=True).wait_for()
    page.keyboard.press("n")
    page.get_by_role("heading", name="New job").wait_for()


def test_hostile_names_stay_text(signed_in: OpenPage, dashboard: Dashboard) -> None:
    job_id = submit(dashboard.db, HOSTILE)
    run = SimulatedRun.start(dashboard.db, total_steps=10)
    run.say(HOSTILE + "\x1b[31mred\x1b[0m", level="warn")
    run.train(1)
    page = signed_in()
    name = page.locator(".name")
    expect(name).to_contain_text("<img src=x onerror=")
    assert "\u202e" not in name.inner_text()
    page.goto(f"{dashboard.url}/#/job/{job_id}/log")
    warning = page.locator(".log .warn")
    expect(warning).to_contain_text('<img src=x onerror="window.pwned=1">')
    assert "\x1b" not in warning.inner_text()
    for tab in ("Events", "Evaluation", "Config"):
        page.get_by_role("tab", name=tab).click()
    assert page.evaluate("window.pwned") is None
    expect(page.locator("img")).to_have_count(0)

"""Signing in and out, as a person does it."""

from __future__ import annotations

import pytest

from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.simulated_run import submit

# One process for all of them: they share a Chromium, whose driver keeps an event loop running there.
pytestmark = pytest.mark.browser


def test_a_wrong_key_is_refused_in_one_sentence(open_page: OpenPage, dashboard: Dashboard) -> None:
    page = open_page(watched=False)  # the browser writes the 401 into its console
    page.goto(dashboard.url)
    page.get_by_label("API key").fill("sk-lomo-000000000000-" + "x" * 43)
    with page.expect_response("**/login") as answer:
        page.get_by_role("button", name="Sign in").click()
    assert answer.value.status == 401
    assert "not valid" in page.get_by_role("alert").inner_text()
    assert page.context.cookies() == []


def test_the_right_key_leads_to_the_jobs_and_its_cookie_is_out_of_reach_of_scripts(
    open_page: OpenPage, dashboard: Dashboard
) -> None:
    page = open_page()
    page.goto(dashboard.url)
    assert page.url.startswith(f"{dashboard.url}/login")
    page.get_by_label("API key").fill(dashboard.key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="No jobs yet").wait_for()
    (cookie,) = page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == ("lomo_session", True, "Strict")
    assert page.evaluate("document.cookie") == ""
    assert dashboard.key not in page.content()


def test_the_address_that_was_asked_for_survives_the_sign_in(open_page: OpenPage, dashboard: Dashboard) -> None:
    job_id = submit(dashboard.db, "support-replies")
    page = open_page()
    page.goto(f"{dashboard.url}/#/job/{job_id}/config")
    page.get_by_label("API key").fill(dashboard.key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="support-replies").wait_for()
    assert page.get_by_role("tab", name="Config").get_attribute("aria-selected") == "true"


def test_signing_out_ends_the_session(signed_in: OpenPage, dashboard: Dashboard) -> None:
    page = signed_in()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("API key").wait_for()
    page.goto(dashboard.url)
    page.get_by_label("API key").wait_for()

"""The job page: charts that are drawn and follow the run, its tabs, and its one dangerous button."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from playwright.sync_api import Page, expect

from cli.job_options import JOB_OPTIONS
from jobs.models import Job
from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.simulated_run import SimulatedRun, submit
from tests.conftest import WaitUntil

# One process for all of them: they share a Chromium, whose driver keeps an event loop running there.
pytestmark = pytest.mark.browser

# Memory, loss, gradient norm with learning rate, speed.
NUM_CHARTS = 4
# Axes, grid and labels alone colour less than a hundredth of a canvas's pixels; an area or a line adds to it.
_COLOURED = """canvas => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    let coloured = 0;
    for (let i = 0; i < data.length; i += 4) {
        const [r, g, b] = data.slice(i, i + 3);
        if (data[i + 3] && Math.max(r, g, b) - Math.min(r, g, b) > 40) coloured++;
    }
    return coloured;
}"""


def coloured_pixels(page: Page) -> list[int]:
    """Pixels of each chart that are not grey: what the series have drawn."""
    return [canvas.evaluate(_COLOURED) for canvas in page.locator(".plot canvas").all()]


def open_job(page: Page, dashboard: Dashboard, job_id: str) -> None:
    """Go to a job with steps, and wait until its charts are there."""
    page.goto(f"{dashboard.url}/#/job/{job_id}")
    expect(page.locator(".plot canvas")).to_have_count(NUM_CHARTS)


def start(dashboard: Dashboard, *, total_steps: int = 200, steps: int = 40) -> SimulatedRun:
    """A running job that has taken some steps."""
    submit(dashboard.db, "support-replies")
    run = SimulatedRun.start(dashboard.db, total_steps=total_steps, steps_ago=steps)
    run.train(steps)
    return run


def test_the_charts_are_drawn_and_follow_the_run(
    signed_in: OpenPage, dashboard: Dashboard, wait_until: WaitUntil
) -> None:
    run = start(dashboard)
    page = signed_in()
    open_job(page, dashboard, run.job_id)
    before = wait_until(lambda: pixels if all(pixels := coloured_pixels(page)) else None, 20, "every chart to be drawn")
    page.evaluate("window.sameDocument = true")
    expect(page.get_by_text("40 of 200 steps")).to_be_visible()
    run.evaluate(valid_loss=1.9)
    run.train(60)
    expect(page.get_by_text("100 of 200 steps")).to_be_visible()
    expect(page.get_by_text("valid 1.900 at step 40")).to_be_visible()
    wait_until(
        lambda: all(now > then for now, then in zip(coloured_pixels(page), before, strict=True)),
        20,
        "every chart to have grown",
    )
    assert page.title() == "50 % support-replies · LOMO"
    assert page.evaluate("window.sameDocument") is True


def test_a_job_that_begins_while_it_is_watched(signed_in: OpenPage, dashboard: Dashboard) -> None:
    job_id = submit(dashboard.db, "support-replies")
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{job_id}")
    page.get_by_role("heading", name="Waits for a worker").wait_for()
    expect(page.get_by_text("No worker host is alive; start one.")).to_be_visible()
    run = SimulatedRun.start(dashboard.db, total_steps=20)
    page.get_by_role("heading", name="Loading model and data").wait_for()
    run.train(20)
    expect(page.locator(".plot canvas")).to_have_count(NUM_CHARTS)
    run.succeed()
    expect(page.get_by_role("status")).to_have_text("Final")
    expect(page.get_by_text("20 of 20 steps")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("ft:smollm2-135m-instruct::support-replies")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_a_second_attempt_replaces_the_steps_it_repeats(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard, steps=50)
    page = signed_in()
    open_job(page, dashboard, run.job_id)
    run.lose_and_resume(from_step=30)
    run.train(30)
    expect(page.get_by_text("60 of 200 steps")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("attempt 2")
    # One column of the charts per step: the crosshair's keys walk through 60, not through 80.
    page.locator(".plot").first.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".where")).to_contain_text("step 59")
    for _ in range(5):
        page.keyboard.press("Shift+ArrowLeft")
    expect(page.locator(".where")).to_contain_text("step 9 ")


def test_a_double_click_on_cancel_does_no_harm_and_cancel_asks_once(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard)
    run.checkpoint()
    page = signed_in()
    open_job(page, dashboard, run.job_id)
    page.get_by_role("button", name="Cancel").dblclick()
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_role("button", name="Go on")).to_be_focused()
    with page.expect_response("**/cancel"):
        page.get_by_role("button", name="Cancel, keep checkpoint 40").click()
    expect(page.get_by_role("button", name="Cancelling")).to_be_disabled()
    run.cancelled()
    expect(page.locator(".jobhead .pill")).to_have_text("Cancelled")
    expect(page.get_by_role("button", name="Cancelling")).to_have_count(0)


def test_a_job_is_paused_and_resumed(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard)
    page = signed_in()
    open_job(page, dashboard, run.lease.job_id)
    with page.expect_response("**/pause"):
        page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Pausing")).to_be_disabled()
    run.paused()
    expect(page.locator(".jobhead .pill")).to_have_text("Paused")
    with page.expect_response("**/resume"):
        page.get_by_role("button", name="Resume").click()
    expect(page.locator(".jobhead .pill")).to_have_text("Queued")
    expect(page.get_by_role("button", name="Pause")).to_be_enabled()


def test_a_waiting_job_is_cancelled_at_once(signed_in: OpenPage, dashboard: Dashboard) -> None:
    job_id = submit(dashboard.db, "support-replies")
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{job_id}")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel, nothing ran yet").click()
    expect(page.locator(".jobhead .pill")).to_have_text("Cancelled")


def test_a_failed_job_states_cause_and_remedy(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard)
    run.train(1, loss=float("nan"))
    run.fail("diverged", "The loss was not finite at step 41.")
    page = signed_in()
    open_job(page, dashboard, run.job_id)
    expect(page.locator(".failure")).to_contain_text("The loss was not finite at step 41. Use a smaller learning_rate")
    expect(page.locator(".kpis")).to_contain_text("not finite")


def test_the_tabs_show_events_checkpoints_evaluations_and_the_same_job_as_commands(
    signed_in: OpenPage, dashboard: Dashboard
) -> None:
    run = start(dashboard, steps=0)
    run.evaluate(choice_accuracy=0.36)
    run.train(40)
    run.checkpoint()
    run.evaluate(choice_accuracy=0.76)
    page = signed_in()
    open_job(page, dashboard, run.job_id)
    panel = page.get_by_role("tabpanel")
    expect(panel).to_contain_text("Training 134,515,008 parameters on cpu (AMD EPYC 7313)")
    expect(panel).not_to_contain_text("Step 40/200")  # milestones only
    page.get_by_role("tab", name="Checkpoints").click()
    expect(panel).to_contain_text("ckpt-step-40")
    page.keyboard.press("ArrowRight")
    expect(panel).to_contain_text("36.0 %76.0 %+40.0 points")
    page.get_by_role("tab", name="Config").click()
    page.get_by_role("button", name="Python").click()
    command = panel.locator("pre").inner_text()
    compile(command, "the Python form", "exec")
    assert '"optimizer": "lomo"' in command
    page.get_by_role("button", name="lomo", exact=True).click()
    command = panel.locator("pre").inner_text()
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:3] == ["lomo", "jobs", "create"]
    flags = {word for word in words if word.startswith("--")}
    known = {f"--{option.name.replace('_', '-')}" for option in JOB_OPTIONS}
    known |= {"--model", "--training-file", "--validation-file", "--metadata", "--no-packing", "--no-keep-best"}
    assert flags <= known
    assert words[words.index("--clip-mode") + 1] == "norm"
    assert page.url.endswith("/config")


def test_what_the_plan_has_chosen_is_marked(signed_in: OpenPage, dashboard: Dashboard) -> None:
    job_id = submit(dashboard.db, "support-replies", auto=["batch_size", "activation_checkpointing"])
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{job_id}/config")
    panel = page.get_by_role("tabpanel")
    chosen = panel.locator("dd", has_text="chosen by the plan")
    expect(chosen).to_have_text(["4 chosen by the plan", "true chosen by the plan"])
    names = panel.locator("dt", has=page.locator("xpath=following-sibling::dd[1][contains(., 'chosen')]"))
    expect(names).to_have_text(["batch_size", "activation_checkpointing"])
    # The same job again has the values, not the choice: another host might choose otherwise.
    expect(panel.locator("pre")).to_contain_text('"batch_size":4')
    expect(panel.locator("pre")).to_contain_text('"activation_checkpointing":true')


def test_samples_are_told_by_prompt_and_step_and_never_as_markup(signed_in: OpenPage, dashboard: Dashboard) -> None:
    lomo = {"sample_prompts": ["Why?", "How?"], "param_groups": [{"pattern": "*.bias"}], "frozen": ["model.embed*"]}
    submit(dashboard.db, "support-replies", lomo=lomo)
    run = SimulatedRun.start(dashboard.db, total_steps=200, steps_ago=40)
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{run.job_id}/samples")
    panel = page.get_by_role("tabpanel")
    expect(panel).to_contain_text("No sample yet")
    run.sample("Why?", "because")
    run.train(40)
    run.sample("Why?", "<img src=x onerror=alert(1)>\x1b[31m")
    run.sample("Why?", "<b>so</b>\n  indeed")
    run.sample("How?", "")
    answers = panel.get_by_role("listitem")
    expect(answers).to_have_count(3)
    assert [text.split() for text in answers.all_inner_texts()] == [
        ["step", "40", "<b>so</b>", "indeed"],
        ["step", "0", "because"],
        ["step", "40", "nothing"],
    ]
    run.checkpoint(best_step=20)
    page.get_by_role("tab", name="Checkpoints").click()
    expect(panel).to_contain_text("Best evaluation: step 20")
    page.get_by_role("tab", name="Events").click()
    expect(panel).to_contain_text("Checkpoint created at step 40")
    expect(panel).not_to_contain_text("because")
    page.get_by_role("tab", name="Config").click()
    page.get_by_role("button", name="lomo", exact=True).click()
    words = shlex.split(panel.locator("pre").inner_text().replace("\\\n", ""))
    assert [words[at + 1] for at, word in enumerate(words) if word == "--sample-prompts"] == ["Why?", "How?"]
    assert words[words.index("--frozen") + 1] == "model.embed*"
    [groups] = [word for word in words if word.startswith("param_groups=")]
    assert json.loads(groups.removeprefix("param_groups="))[0]["pattern"] == "*.bias"
    page.get_by_role("button", name="Python").click()
    compile(panel.locator("pre").inner_text(), "the Python form", "exec")


def test_a_job_of_another_version_is_shown(signed_in: OpenPage, dashboard: Dashboard) -> None:
    job_id = submit(dashboard.db, "support-replies")
    with dashboard.db.transaction() as session:
        session.get_one(Job, job_id).spec = {"model": 1, "lomo": {"optimizer": "new", "clip": "yes", "width": [1]}}
    page = signed_in()
    page.get_by_role("columnheader", name="Model").click()
    page.goto(f"{dashboard.url}/#/job/{job_id}/config")
    expect(page.get_by_role("tabpanel")).to_contain_text("This one cannot read: lomo.clip, lomo.optimizer, lomo.width")


def test_the_log_follows_stops_for_a_reader_and_finds(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard, steps=80)
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{run.job_id}/log")
    log = page.get_by_role("list", name="Log lines")
    expect(log).to_contain_text("Step 80/200")
    log.scroll_into_view_if_needed()
    run.say("the last line")
    expect(log.get_by_text("the last line")).to_be_in_viewport()
    log.evaluate("element => element.scrollTo(0, 0)")
    expect(page.get_by_label("Follow")).not_to_be_checked()
    run.say("one more")
    page.get_by_role("button", name="1 new").click()
    expect(log.get_by_text("one more")).to_be_in_viewport()
    page.get_by_label("Search the log").fill("LAST LINE")
    expect(log.locator("li")).to_have_count(1)
    expect(log.locator("mark")).to_have_text("last line")


def test_a_drag_zooms_every_chart_and_a_double_click_resets(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard, steps=150)
    page = signed_in()
    open_job(page, dashboard, run.job_id)
    box = page.locator(".u-over").first.bounding_box()
    assert box is not None
    whole = coloured_pixels(page)
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 60, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Show the whole run").wait_for()
    first, last = (float(step) for step in page.url.partition("zoom=")[2].split("-"))
    assert 38 <= first <= 42
    assert 78 <= last <= 82
    # The zoomed window is full of data where the whole run had an empty end: the areas grow.
    zoomed = coloured_pixels(page)
    assert zoomed[0] > 1.2 * whole[0]
    assert zoomed[3] > 1.2 * whole[3]
    page.locator(".u-over").nth(1).dblclick()
    expect(page.get_by_role("button", name="Show the whole run")).to_have_count(0)
    assert "zoom" not in page.url


def test_a_zoom_in_the_address_is_drawn_step_by_step(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard, total_steps=3000, steps=2500)
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{run.job_id}?zoom=1000-1100")
    expect(page.locator(".plot canvas")).to_have_count(NUM_CHARTS)
    page.get_by_role("button", name="Show the whole run").wait_for()
    # The thinned history has every second or third step; the window that was read for the zoom has each.
    page.locator(".u-over").first.hover(position={"x": 300, "y": 100})
    here = page.locator(".where b")
    expect(here).to_have_text(re.compile(r"^1,0\d\d$"))
    plot = page.locator(".plot").first
    plot.focus()

    def walk() -> list[int]:
        steps = []
        for _ in range(4):
            page.keyboard.press("ArrowRight")
            steps.append(int(here.inner_text().replace(",", "")))
        return steps

    expect(page.get_by_role("status")).to_have_text("Live")
    first, *others = walk()
    assert others == [first + 1, first + 2, first + 3]


def test_an_unknown_job_is_said_in_words(signed_in: OpenPage, open_page: OpenPage, dashboard: Dashboard) -> None:
    page = signed_in(watched=False)  # the browser writes the 404 into its console
    page.goto(f"{dashboard.url}/#/job/ftjob-{'0' * 24}")
    page.get_by_role("heading", name="No such job").wait_for()
    page.get_by_role("link", name="All jobs").click()
    page.get_by_role("heading", name="Jobs", exact=True).wait_for()

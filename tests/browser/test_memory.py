"""Memory on the job page: what is planned against what is measured, from the queue to the end of the run."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Dashboard, OpenPage
from tests.browser.simulated_run import PLAN, SimulatedRun, memory_mb, register, submit
from tests.conftest import WaitUntil

# One process for all of them: they share a Chromium, whose driver keeps an event loop running there.
pytestmark = pytest.mark.browser

# The heights at which a dark line crosses the empty right end of the plot, in CSS pixels from its top: what runs over
# nearly the whole width there is a level line (a light page has dark lines), its label aside.
_LINES = """canvas => {
    const { width, height } = canvas;
    const copy = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const [from, to] = [Math.round(0.6 * width), Math.round(0.75 * width)];
    const rows = [];
    for (let y = 0; y < height; y++) {
        const { data } = copy.getImageData(from, y, to - from, 1);
        let dark = 0;
        for (let i = 0; i < data.length; i += 4) {
            const [red, green, blue, opaque] = data.slice(i, i + 4);
            if (opaque > 200 && red + green + blue < 500) dark++;
        }
        if (dark > 0.4 * (to - from)) rows.push(y / devicePixelRatio);
    }
    return rows.filter((y, n) => n === 0 || y - rows[n - 1] > 2);
}"""
OUT_OF_MEMORY = (
    "Out of memory in step 41 (8 rows of 512 tokens). It held:\n"
    "  activations  1,182.6 MiB\n"
    "  peak         1,923.6 MiB\n"
    "batch_size 2 needs 812.0 MiB and would fit."
)


def start(dashboard: Dashboard, *, planned: dict[str, int] | None, device_mb: int = 2000) -> SimulatedRun:
    """A run of 40 steps out of 200, planned at the job's creation as `PLAN` and by the engine as given."""
    submit(dashboard.db, "support-replies", plan=PLAN)
    run = SimulatedRun.start(
        dashboard.db, total_steps=200, steps_ago=40, device_bytes=device_mb * 1_000_000, planned=planned
    )
    run.train(40)
    return run


def open_chart(page: Page, dashboard: Dashboard, run: SimulatedRun) -> Locator:
    """Go to the job; the memory chart's card."""
    page.goto(f"{dashboard.url}/#/job/{run.job_id}")
    card = page.locator(".card.chart").first
    expect(card.locator("canvas")).to_be_visible()
    return card


def lines(card: Locator, wait_until: WaitUntil, number: int) -> list[float]:
    """Heights of the level lines of the memory chart, from the top, once so many are drawn."""
    found: list[float] = []

    def are_drawn() -> bool:
        found[:] = card.locator("canvas").evaluate(_LINES)
        return len(found) == number

    wait_until(are_drawn, 10, f"{number} level lines to be drawn")
    return found


def test_planned_peak_and_limit_are_drawn_above_the_stack(
    signed_in: OpenPage, dashboard: Dashboard, wait_until: WaitUntil
) -> None:
    page = signed_in()
    card = open_chart(page, dashboard, start(dashboard, planned=None))
    limit, planned = lines(card, wait_until, 2)
    # The scale ends at 117 % of the limit of 2 GB: the distances from the bottom are as the figures.
    box = card.locator(".u-over").bounding_box()
    canvas = card.locator("canvas").bounding_box()
    assert box is not None
    assert canvas is not None
    bottom = box["y"] + box["height"] - canvas["y"]
    assert (bottom - planned) / (bottom - limit) == pytest.approx(PLAN["peak_bytes"] / 2e9, abs=0.02)
    expect(card.get_by_role("img")).to_have_attribute(
        "aria-label", "Memory by category over steps. Peak 1.13 GB, planned 1.14 GB, device limit 2.00 GB."
    )
    expect(card.locator(".ghost")).to_have_count(0)


@pytest.mark.parametrize(
    ("activations", "device_mb", "number", "tags"),
    [
        (9_000, 64_000, 0, ["↑ device limit 64.0 GB 57× this peak", "↑ planned peak 9.79 GB 8.6× this peak"]),
        (1_300, 64_000, 1, ["↑ device limit 64.0 GB 57× this peak"]),
        (105, 2_000, 2, []),
    ],
)
def test_a_plan_far_from_the_stack_stays_readable(
    signed_in: OpenPage,
    dashboard: Dashboard,
    wait_until: WaitUntil,
    activations: int,
    device_mb: int,
    number: int,
    tags: list[str],
) -> None:
    plan = memory_mb(parameters=269, gradients=113, activations=activations, other=405)
    page = signed_in()
    card = open_chart(page, dashboard, start(dashboard, planned=plan, device_mb=device_mb))
    lines(card, wait_until, number)
    expect(card.locator(".ghost")).to_have_text(tags)


def test_figures_and_table_hold_the_engines_plan_against_the_run(signed_in: OpenPage, dashboard: Dashboard) -> None:
    run = start(dashboard, planned=memory_mb(parameters=269, gradients=113, activations=300, other=395))
    page = signed_in()
    open_chart(page, dashboard, run)
    figure = page.locator(".kpi", has_text="Peak memory")
    expect(figure).to_contain_text("1.13 GB of 1.08 planned · limit 2.00")
    expect(figure).not_to_contain_text("planned / measured")
    table = page.locator("table.pm")
    expect(table.locator("tr", has_text="Activations")).to_contain_text(re.compile(r"Activations0\.300\.35\+1\d\.\d %"))
    expect(table.locator("tr", has_text="Parameters")).to_contain_text("0.270.27exact")
    expect(table.locator("tfoot")).to_have_text(re.compile(r"planned / measured, so far\s*0\.95"))
    run.train(160)
    run.succeed()
    expect(table.locator("tfoot")).to_have_text(re.compile(r"planned / measured\s*0\.95"))
    expect(figure).to_contain_text("planned / measured 0.95")


def test_a_job_without_a_plan_says_so(signed_in: OpenPage, dashboard: Dashboard) -> None:
    submit(dashboard.db, "support-replies")
    run = SimulatedRun.start(dashboard.db, total_steps=200, steps_ago=40)
    run.train(40)
    page = signed_in()
    card = open_chart(page, dashboard, run)
    expect(page.locator(".kpi", has_text="Peak memory")).to_contain_text("plan not known · limit 2.00")
    expect(page.locator("table.pm tfoot")).to_have_count(0)
    expect(card.get_by_role("img")).to_have_attribute("aria-label", re.compile("plan not known"))


def test_a_queued_job_shows_its_plan_and_why_it_waits(signed_in: OpenPage, dashboard: Dashboard) -> None:
    register(dashboard.db, "desk", available_mb=1000)
    job_id = submit(dashboard.db, "support-replies", plan=PLAN)
    page = signed_in()
    row = page.locator("tr", has_text="support-replies")
    reason = r"eeds 1\.\d+ GiB, and no host is large enough: the largest has 0\.9\d? GiB\."
    expect(row).to_contain_text(re.compile(f"Waits for memory: n{reason}"))
    expect(row.get_by_role("img", name="not measured yet, planned 1.14 GB, limit not known")).to_be_visible()
    page.goto(f"{dashboard.url}/#/job/{job_id}")
    page.get_by_role("heading", name="Waits for memory").wait_for()
    expect(page.locator(".empty")).to_contain_text(re.compile(f"N{reason}"))
    expect(page.locator(".empty")).to_contain_text("Planned peak 1.14 GB.")
    bar = page.get_by_role("img", name="not measured yet, planned 1.14 GB, limit not known")
    expect(bar).to_have_class(re.compile("planned"))
    expect(bar.locator("i")).to_have_count(4)  # there is no optimizer state
    expect(page.locator(".figures")).to_have_text(
        "Parameters 0.27Gradients 0.11Optimizer state 0.00Activations 0.35Other 0.41peak 1.14 GB"
    )


def test_a_job_that_ran_out_of_memory_keeps_its_table_and_shows_what_it_held(
    signed_in: OpenPage, dashboard: Dashboard
) -> None:
    run = start(dashboard, planned=None)
    page = signed_in()
    card = open_chart(page, dashboard, run)
    expect(page.get_by_role("status")).to_have_text("Live")
    # Its last words carry memory, as steps do, while the page watches: they are no step.
    run.run_out_of_memory(OUT_OF_MEMORY, memory_mb(parameters=269, gradients=113, activations=1240, other=395))
    failure = page.locator(".failure")
    expect(failure.locator("b").first).to_have_text("Out of memory in step 41 (8 rows of 512 tokens). It held:")
    account = failure.locator("pre")
    assert account.inner_text().splitlines() == OUT_OF_MEMORY.splitlines()[1:]
    expect(failure.get_by_role("img")).to_have_attribute(
        "aria-label", "measured 2.02 GB, planned 1.14 GB, limit 2.00 GB"
    )
    expect(failure.locator(".held")).to_contain_text("What the run held, in GB")
    expect(failure.locator(".figures")).to_contain_text("Activations 1.24")
    expect(page.locator(".where")).to_contain_text("step 40")
    expect(card.locator("h2")).to_contain_text("1.03 GB")
    expect(page.get_by_role("tabpanel")).to_contain_text("The engine ended: out_of_memory.")


def test_a_model_that_could_not_be_loaded_shows_its_plan(signed_in: OpenPage, dashboard: Dashboard) -> None:
    submit(dashboard.db, "support-replies", plan=PLAN)
    run = SimulatedRun.claim(dashboard.db, total_steps=200)
    run.run_out_of_memory("Out of memory while the model was loaded.", PLAN)
    page = signed_in()
    page.goto(f"{dashboard.url}/#/job/{run.job_id}")
    failure = page.locator(".failure")
    expect(failure.locator(".held")).to_contain_text("What the run needs by its plan, in GB")
    bar = failure.get_by_role("img", name="not measured yet, planned 1.14 GB, limit not known")
    expect(bar).to_have_class(re.compile("planned"))
    expect(page.locator(".empty")).to_contain_text("There is nothing to draw: no step was taken.")

"""The bounds: who is held against whom, and with which of several results."""

from __future__ import annotations

from typing import Any

from bench.bounds import Check, check_all, report


def row(implementation: str, optimizer: str, **changes: Any) -> dict[str, Any]:
    """A result of the grid: 100 bytes above the weights, 1 CPU second for 256 tokens."""
    values: dict[str, Any] = {
        "implementation": implementation,
        "optimizer": optimizer,
        "allocator": "engine",
        "rounding": "nearest",
        "clip": "none",
        "dtype": "bf16",
        "batch": 1,
        "seq": 256,
        "checkpointing": True,
        "purpose": "lomo",
        "num_steps": 3,
        "cpu_s_min": 1.0,
        "cpu_s_median": 1.0,
        "rss_above_weights_bytes": 100,
        **changes,
    }
    tokens = values["batch"] * values["seq"]
    return {"tokens_per_cpu_s": tokens / values["cpu_s_min"], "tokens_per_s": tokens / values["cpu_s_min"], **values}


def one(rows: list[dict[str, Any]], start: str) -> Check:
    """The only check whose name begins so."""
    (found,) = [check for check in check_all(rows) if check.what.startswith(start)]
    return found


def test_memory_is_held_against_the_smaller_of_a_peers_allocators() -> None:
    rows = [
        row("lomo_core", "lomo"),
        row("lomo-optim", "lomo", rss_above_weights_bytes=500),
        row("lomo-optim", "lomo", allocator="default", rss_above_weights_bytes=399),
    ]
    check = one(rows, "memory bf16 1x256 ckpt: lomo / lomo-optim lomo [default]")
    assert (check.value, check.bound, check.verdict) == (100 / 399, 0.25, "MISSED")
    rows[2]["rss_above_weights_bytes"] = 400
    assert one(rows, "memory").verdict == "met"


def test_memory_bounds_depend_on_checkpointing_and_peer() -> None:
    def bounds(checkpointing: bool) -> dict[str, float | None]:
        peers = [("lomo-optim", "lomo"), ("torch", "sgd"), ("torch", "adamw"), ("transformers", "lomo")]
        rows = [row(*who, checkpointing=checkpointing) for who in [("lomo_core", "lomo"), *peers]]
        return {check.what.split(" / ")[1]: check.bound for check in check_all(rows) if "memory" in check.what}

    assert bounds(True) == {
        "lomo-optim lomo [engine]": 0.25,
        "torch sgd [engine]": None,
        "torch adamw [engine]": 0.12,
        "transformers lomo [engine]": None,
    }
    assert set(bounds(False).values()) == {0.8}


def test_speed_is_held_against_the_allocator_of_the_better_median() -> None:
    rows = [
        row("lomo_core", "lomo", cpu_s_min=0.9, cpu_s_median=1.1),
        row("torch", "sgd", cpu_s_min=0.95, cpu_s_median=1.0),
        # One lucky step: its setting is the slower one.
        row("torch", "sgd", allocator="default", cpu_s_min=0.8, cpu_s_median=1.2),
    ]
    check = one(rows, "speed")
    assert check.what.endswith("torch sgd [engine]")
    assert round(check.value, 6) == round(0.95 / 0.9, 6)
    assert (check.bound, check.verdict) == (1.0, "met")


def test_cells_and_groups_are_kept_apart() -> None:
    rows = [
        row("lomo_core", "lomo"),
        row("lomo_core", "lomo", purpose="clipping", cpu_s_min=0.1, cpu_s_median=0.1),
        row("lomo_core", "lomo", seq=512, batch=2, cpu_s_min=0.1, cpu_s_median=0.1),
        row("lomo-optim", "lomo", cpu_s_min=1.05, cpu_s_median=1.05),
    ]
    check = one(rows, "speed")
    assert round(check.value, 6) == 1.05
    assert check.verdict == "MISSED"


def test_clipping_is_held_against_the_bare_step_of_its_own_group() -> None:
    rows = [
        row("lomo_core", "lomo", cpu_s_min=5.0),
        row("lomo_core", "lomo", purpose="clipping"),
        row("lomo_core", "lomo", purpose="clipping", clip="group", cpu_s_min=1.06),
        row("lomo_core", "lomo", purpose="clipping", clip="second_backward", cpu_s_min=1.79),
        row("lomo_core", "lomo", purpose="clipping", clip="delayed", cpu_s_min=9.0),
    ]
    verdicts = {check.what.split(": ")[1]: check.verdict for check in check_all(rows)}
    assert verdicts == {"group / none": "MISSED", "second_backward / none": "met", "delayed / none": ""}


def test_stochastic_rounding_is_held_against_nearest() -> None:
    def verdict(**size: int) -> str:
        stochastic = row("lomo_core", "lomo", rounding="stochastic", cpu_s_min=1.06, **size)
        return one([row("lomo_core", "lomo", **size), stochastic], "rounding").verdict

    assert verdict(batch=1, seq=256) == "met"
    assert verdict(batch=2, seq=512) == "MISSED"


def test_hooks_take_the_best_of_repeats() -> None:
    seconds = {"plain": 1.0, "torch sgd": 1.2, "lomo_core": 1.3, "lomo-optim": 30.0}
    rows = [{"hooks": 291, "implementation": name, "backward_cpu_s": value} for name, value in seconds.items()]
    assert one(rows, "hooks, 291 tensors: lomo_core").verdict == "MISSED"
    rows.append({"hooks": 291, "implementation": "lomo_core", "backward_cpu_s": 1.05})
    assert one(rows, "hooks, 291 tensors: lomo_core").verdict == "met"


def test_the_report_counts_what_is_met() -> None:
    rows = [
        row("lomo_core", "lomo"),
        row("lomo-optim", "lomo", rss_above_weights_bytes=1000, cpu_s_min=1.05, cpu_s_median=1.05),
    ]
    text = report(rows, check_all(rows))
    assert "1 of 2 bounds met" in text
    assert "lomo_core lomo [engine]" in text

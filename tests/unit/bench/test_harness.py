"""What the benchmarks share: child processes, files of results, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.bench_engine import Group, Hooks, plan, result_of
from bench.harness import ROOT, BenchError, Cell, Child, JsonLines, Variant, environment_of, table

ECHO = "tests.support.echo_child"


def test_a_child_answers_line_by_line_and_ends_with_its_stdin() -> None:
    with Child(ECHO, {"a": 1}, name="echo", allocator="default") as child:
        assert child.read() == {"a": 1}
        assert child.ask("step") == {"line": "step"}
        assert child.ask("again") == {"line": "again"}


def test_a_child_that_ends_is_named_with_what_it_said() -> None:
    with Child(ECHO, {}, name="bf16 1x256 of somebody", allocator="default") as child:
        child.read()
        with pytest.raises(BenchError, match=r"bf16 1x256 of somebody ended with code 1:\nas it was told"):
            child.ask("fail")


def test_only_the_chosen_settings_reach_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("LOMO_ENGINE_THREADS", "7")
    default, engine = environment_of("default"), environment_of("engine")
    assert not {"MALLOC_ARENA_MAX", "OMP_NUM_THREADS", "LOMO_ENGINE_THREADS"} & (default.keys() | engine.keys())
    assert "MALLOC_MMAP_THRESHOLD_" in engine
    assert not any(name.startswith(("MALLOC_", "OMP_", "ONEDNN_")) for name in default)


def test_results_are_read_back_without_a_line_that_was_cut_off(tmp_path: Path) -> None:
    out = JsonLines(tmp_path / "deep" / "results.jsonl", bench="engine")
    assert out.read() == []
    row = out.append({"a": 1})
    assert row["a"] == 1
    assert {"bench", "cpu", "torch", "transformers", "commit"} <= row.keys()
    with out.path.open("a", encoding="utf-8") as file:
        file.write('{"a": 2')
    assert out.read() == [row]


def test_a_table_stands_in_line() -> None:
    assert table([["what", "is"], ["a", "1.25"], ["longer", "3"]]) == "what      is\na       1.25\nlonger     3"


def test_the_plan_has_every_cell_and_nothing_twice() -> None:
    work = [work for lane in plan(quick=False).values() for work in lane]
    names = [piece.name for piece in work]
    assert len(names) == len(set(names))
    grid = [piece for piece in work if isinstance(piece, Group) and piece.purpose == "lomo"]
    assert len({piece.cell for piece in grid}) == 8
    assert {piece.num_tensors for piece in work if isinstance(piece, Hooks)} == {291, 723}
    for group in grid:
        peers = [v for v in group.variants if v.implementation != "lomo_core"]
        assert {v.allocator for v in peers} == {"engine", "default"}
        assert all(v.allocator == "engine" for v in group.variants if v.implementation == "lomo_core")


def test_a_result_takes_the_fastest_step_and_the_largest_peak() -> None:
    group = Group("lomo", Cell("bf16", 2, 512, checkpointing=True), (), rounds=2)
    steps = [
        {"loss": 3.0, "cpu_s": 4.0, "wall_s": 5.0, "peak_bytes": 300},
        {"loss": 2.0, "cpu_s": 2.0, "wall_s": 2.5, "peak_bytes": 250},
    ]
    row = result_of(group, Variant("torch", "sgd", "default"), {"base_bytes": 100, "weights_bytes": 60}, steps)
    assert row["rss_above_weights_bytes"] == 200
    assert row["tokens_per_cpu_s"] == 1024 / 2.0
    assert row["tokens_per_s"] == 1024 / 2.5
    assert row["cpu_s_median"] == 3.0
    assert (row["implementation"], row["dtype"], row["seq"]) == ("torch", "bf16", 512)
    json.dumps(row)


def test_the_parents_load_no_torch() -> None:
    """The measured processes are children; a parent of several hundred MB would stand in their way."""
    code = "import sys, bench.bench_engine, bench.bench_quality\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

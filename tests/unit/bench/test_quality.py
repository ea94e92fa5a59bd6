"""The comparison of what is learned: tasks, runs, and what is said about them."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.bench_quality import ARMS, Run, is_result_of, losses_of, planned, specification
from bench.corpus import CHAT_TOPICS, Task, TaskName, chat_rows, normalised, write_task
from bench.quality_summary import ADAMW, NEAREST, STOCHASTIC, best, claims, overall, standard_error, summary
from lomo_core.data.formats import RowReader, read_rows

pytestmark = pytest.mark.slow


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentence(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


@pytest.mark.parametrize("name", ["docs", "chat"])
def test_no_sentence_is_on_two_sides(name: TaskName, tmp_path: Path) -> None:
    task = write_task(name, tmp_path)
    sides = [{sentence(row) for row in read(path)} for path in (task.train, task.choosing, task.reporting)]
    assert [len(side) for side in sides] == [task.num_train, task.num_choosing, task.num_reporting]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert abs(task.num_choosing - task.num_reporting) <= 1
    assert len(read_rows(RowReader(task.train, param="training_file"))) == task.num_train


def test_chat_rows_are_the_same_every_time_and_no_topic_rules() -> None:
    rows = chat_rows()
    assert rows == chat_rows()
    counts = Counter(row["choices"][row["answer"]] for row in rows)
    assert set(counts) == set(CHAT_TOPICS.values())
    assert max(counts.values()) / len(rows) < 0.25
    assert all(sentence(row) == normalised(sentence(row)) for row in rows)


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"steps": 100, "batch_size": 8, "threads": 2, "only": "", **changes})


def test_every_way_is_tried_at_three_rates_with_the_same_steps() -> None:
    runs = [run for run, _ in planned(options())]
    assert len(runs) == len(set(runs)) == 2 * 3 * 3
    assert len({(run.steps, run.batch_size, run.seed) for run in runs}) == 1
    assert [run.arm for run, _ in planned(options(only="chat adamw.* 3e-05"))] == [ADAMW]


def test_the_two_ways_of_rounding_differ_in_nothing_else(tmp_path: Path) -> None:
    task = Task(tmp_path, tmp_path, tmp_path, num_train=200, num_choosing=1, num_reporting=1)
    specifications = []
    for arm in ARMS[:2]:
        run = Run("chat", arm.name, 0.01, steps=100, batch_size=8, seed=1, threads=2)
        specifications.append(specification(run, arm, task, tmp_path))
    assert [spec["optimizer"].pop("rounding") for spec in specifications] == ["stochastic", "nearest"]
    assert specifications[0] == specifications[1]
    assert specifications[0]["n_epochs"] == 4  # 800 rows of 200


def test_a_run_is_made_again_for_another_commit_or_other_settings() -> None:
    arm = ARMS[0]
    run = Run("chat", arm.name, 0.01, steps=100, batch_size=8, seed=1, threads=2)
    row = {"task": "chat", "arm": arm.name, "learning_rate": 0.01, "steps": 100, "batch_size": 8, "seed": 1}
    row |= {"threads": 2, "settings": json.loads(json.dumps(arm.optimizer)), "commit": "abc", "losses": []}
    assert is_result_of(row, run, arm, "abc")
    assert not is_result_of(row, run, arm, "abd")
    assert not is_result_of(row | {"steps": 50}, run, arm, "abc")
    assert not is_result_of(row, run, ARMS[1], "abc")


def test_losses_are_those_of_the_steps(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    lines = [{"type": "started"}, {"type": "step", "loss": 2.5}, {"type": "message"}, {"type": "step", "loss": None}]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert losses_of(journal) == [2.5, None]


def result(arm: str, rate: float, choosing: float, reporting: float, last_loss: float = 1.0) -> dict[str, Any]:
    return {
        "task": "chat",
        "arm": arm,
        "learning_rate": rate,
        "choosing_accuracy": choosing,
        "reporting_accuracy": reporting,
        "num_choosing": 100,
        "num_reporting": 100,
        "losses": [2.0] * 10 + [last_loss] * 10,
        "train_s": 10.0,
    }


def test_the_rate_is_chosen_by_one_half_only() -> None:
    rows = [
        result(STOCHASTIC, 0.01, 0.80, 0.50),
        result(STOCHASTIC, 0.02, 0.70, 0.90),
        result(STOCHASTIC, 0.005, 0.80, 0.60, last_loss=0.5),
    ]
    chosen = best(rows, "chat", STOCHASTIC)
    assert chosen is not None
    assert chosen["learning_rate"] == 0.005
    assert overall(chosen) == (0.7, 200)
    assert best(rows, "docs", STOCHASTIC) is None


def test_claims_are_met_within_the_margin_and_missed_beyond_it() -> None:
    rows = [
        result(STOCHASTIC, 0.01, 0.80, 0.70),
        result(NEAREST, 0.01, 0.80, 0.70),
        result(ADAMW, 3e-5, 0.80, 0.73),
    ]
    lines = claims(rows, "chat")[0].splitlines()
    assert [line.split(":")[0] for line in lines] == ["MISSED", "met", "MISSED", "MISSED"]
    assert "-3.0 points" in lines[0]
    rows[1] = result(NEAREST, 0.01, 0.80, 0.65)
    assert [line.split(":")[0] for line in claims(rows, "chat")[0].splitlines()] == ["MISSED", "met", "met", "met"]


def test_the_summary_shows_the_loss_of_each_ten_steps() -> None:
    text = summary([result(STOCHASTIC, 0.01, 0.8, 0.7, last_loss=0.25)])
    assert "2.000  0.250" in text
    assert summary([]) == "\n"


def test_standard_error_of_a_share() -> None:
    assert math.isclose(standard_error(0.5, 100), 0.05)

"""The demo's data: real sentences, one topic each, none of them on both sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from local import demo, demo_data
from local.demo_data import NUM_HELD_BACK, TOPICS, DemoFiles, write_demo_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    """The files of this interpreter. Costs about a second."""
    return write_demo_files(tmp_path_factory.mktemp("demo"))


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentence(row: dict[str, object]) -> str:
    messages = row["messages"]
    assert isinstance(messages, list)
    return str(messages[1]["content"])


def test_about_a_thousand_rows_and_two_hundred_held_back(files: DemoFiles) -> None:
    assert len(rows(files.held_back)) == files.num_held_back_rows == NUM_HELD_BACK
    assert 900 <= len(rows(files.train)) == files.num_train_rows <= 1100


def test_no_sentence_is_on_both_sides_or_twice(files: DemoFiles) -> None:
    sentences = [sentence(row) for path in (files.train, files.held_back) for row in rows(path)]
    assert len(sentences) == len(set(sentences))


def test_topics_are_equally_frequent_so_that_guessing_gains_nothing(files: DemoFiles) -> None:
    choices = list(TOPICS)
    assert all(row["choices"] == choices for row in rows(files.held_back))
    trained = Counter(row["messages"][-1]["content"] for row in rows(files.train))  # type: ignore[index]
    held_back = Counter(choices[int(str(row["answer"]))] for row in rows(files.held_back))
    assert set(trained) == set(choices)
    total = trained + held_back
    assert max(total.values()) <= 1.2 * min(total.values())
    assert max(held_back.values()) <= 0.2 * NUM_HELD_BACK


def test_the_same_interpreter_gives_the_same_rows(files: DemoFiles, tmp_path: Path) -> None:
    again = write_demo_files(tmp_path)
    assert again.train.read_bytes() == files.train.read_bytes()
    assert again.held_back.read_bytes() == files.held_back.read_bytes()


def test_sentences_are_prose() -> None:
    docstring = """Return the thing that was asked for by the caller.

    >>> thing() is not a sentence although it is long enough.

    A second sentence, which is also kept by the demo. Short. It calls __init__ and so it is left out here.
    """
    assert list(demo_data._sentences(docstring)) == [
        "Return the thing that was asked for by the caller.",
        "A second sentence, which is also kept by the demo.",
    ]


@pytest.mark.parametrize(("words", "precision"), [("sse2 avx512_bf16", "bf16"), ("sse2 avx2", "fp32")])
def test_the_precision_is_the_one_that_the_processor_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, precision: str
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags : {words}\n")
    monkeypatch.setattr(demo, "_CPU_INFO", info)
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    assert demo._precision() == precision


def test_the_result_is_what_the_job_measured() -> None:
    evaluations = [
        {"step": 0, "choice_accuracy": 0.3},
        {"step": 50, "choice_accuracy": None},
        {"step": 150, "choice_accuracy": 0.7},
    ]
    job = {
        "id": "ftjob-1",
        "status": "succeeded",
        "lomo": {"evaluations": evaluations, "memory": {"measured_peak_bytes": 5}, "model_path": "/m"},
    }
    assert demo._result(job, seconds=1.26) == {
        "job_id": "ftjob-1",
        "status": "succeeded",
        "accuracy_before": 0.3,
        "accuracy_after": 0.7,
        "peak_bytes": 5,
        "model_path": "/m",
        "seconds": 1.3,
    }
    job["lomo"]["evaluations"] = []  # type: ignore[index]
    assert demo._result({**job, "status": "failed"}, seconds=1)["accuracy_after"] is None

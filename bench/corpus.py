"""The two tasks of `bench_quality.py`, made from what pip installs: each sentence is to be routed to its topic.

`docs`: sentences of Python's own documentation, the demo's data (`local/demo_data.py`). `chat`: what people say to a
chatbot, of the English part of `chatterbot-corpus`, lowercased and without punctuation, since some of its files could
be told by their capitals. Topics are named by one token each, so that their likelihoods compare. Splits depend on the
sentences alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from bench.harness import BenchError
from local.demo_data import TOPICS as DOCS_TOPICS
from local.demo_data import write_demo_files

TaskName = Literal["docs", "chat"]
Row = dict[str, Any]

# The corpus's files with enough rows, and their topics' names.
CHAT_TOPICS = {
    "ai": "robot",
    "coding": "coding",
    "emotion": "people",
    "literature": "books",
    "psychology": "mind",
    "trivia": "facts",
}
# The two large files would otherwise be most of it.
_MAX_PER_TOPIC = 90
_NUM_CHAT_TRAIN = 200
# 100 steps of 8 rows take 800 of the demo's 1,015 training rows: what is over adds to its 200 held-back ones.
_NUM_DOCS_TRAIN = 800
_WHEEL = "chatterbot_corpus"


@dataclass(frozen=True, slots=True)
class Task:
    """Files of JSON lines: chat rows to train on, choice rows to choose the learning rate by, others to report."""

    train: Path
    choosing: Path
    reporting: Path
    num_train: int
    num_choosing: int
    num_reporting: int


def write_task(name: TaskName, folder: Path) -> Task:
    """Write a task's files into `folder` (made if absent).

    Raises:
        BenchError: the wheel `chatterbot-corpus` is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _docs_rows(folder) if name == "docs" else chat_rows()
    num_train = _NUM_DOCS_TRAIN if name == "docs" else _NUM_CHAT_TRAIN
    held_back = rows[num_train:]
    half = len(held_back) // 2
    task = Task(
        train=folder / "train.jsonl",
        choosing=folder / "choosing.jsonl",
        reporting=folder / "reporting.jsonl",
        num_train=num_train,
        num_choosing=half,
        num_reporting=len(held_back) - half,
    )
    _write(task.train, (_as_chat(row) for row in rows[:num_train]))
    _write(task.choosing, held_back[:half])
    _write(task.reporting, held_back[half:])
    return task


def _docs_rows(folder: Path) -> list[Row]:
    """The demo's rows as choice rows, the demo's held-back ones last."""
    files = write_demo_files(folder / "demo")
    topics = list(DOCS_TOPICS)
    rows = []
    for row in _read(files.train):
        *prompt, answer = row["messages"]
        rows.append({"messages": prompt, "choices": topics, "answer": topics.index(answer["content"])})
    return rows + _read(files.held_back)


def chat_rows() -> list[Row]:
    """Choice rows of the chatbot corpus, in an order that depends on the sentences alone."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise BenchError("the corpus is not installed: run `pip install -e '.[bench]'`")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "english"
    topics_of: dict[str, set[str]] = defaultdict(set)
    for path in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            topics_of[normalised(str(conversation[0]))].add(path.stem)
    by_topic: dict[str, list[str]] = defaultdict(list)
    for sentence in sorted(topics_of, key=shuffled):
        names = topics_of[sentence]
        if len(sentence.split()) > 1 and len(names) == 1:
            by_topic[next(iter(names))].append(sentence)
    labelled = [(sentence, name) for name in CHAT_TOPICS for sentence in by_topic[name][:_MAX_PER_TOPIC]]
    return [_choice_row(*pair) for pair in sorted(labelled, key=lambda pair: shuffled("split:" + pair[0]))]


def normalised(text: str) -> str:
    """Lowercase words without punctuation, one space between them."""
    return " ".join(re.sub(r"[^a-z0-9']+", " ", text.lower()).split())


def shuffled(text: str) -> bytes:
    """A sort key that puts texts in a random order, the same one on every machine."""
    return hashlib.sha256(text.encode()).digest()


def _choice_row(sentence: str, name: str) -> Row:
    topics = list(CHAT_TOPICS.values())
    system = f"Name the topic of the sentence. Topics: {', '.join(topics)}."
    return {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": sentence}],
        "choices": topics,
        "answer": list(CHAT_TOPICS).index(name),
    }


def _as_chat(row: Row) -> Row:
    answer = row["choices"][row["answer"]]
    return {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""Real training data that every Python installation already holds: the docstrings of the standard library.

Each sentence is to be routed to its topic (dates, email, network, ...): about 1,000 rows to train on and 200
held back. Nothing is downloaded and no licence is to be asked for. A sentence that occurs under two topics is dropped,
so every row has one right answer. The rows depend on the interpreter's version alone.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

TOPICS: dict[str, tuple[str, ...]] = {
    "dates": ("datetime", "_pydatetime", "calendar", "time", "zoneinfo", "sched", "_strptime"),
    "email": ("email", "smtplib", "imaplib", "poplib", "mailbox"),
    "network": ("socket", "ssl", "http", "urllib", "socketserver", "ftplib", "ipaddress", "xmlrpc", "selectors"),
    "testing": ("unittest", "doctest"),
    "files": ("pathlib", "shutil", "posixpath", "tempfile", "glob", "fnmatch", "zipfile", "tarfile", "gzip", "filecmp"),
    "numbers": ("decimal", "_pydecimal", "fractions", "math", "statistics", "random", "numbers", "cmath"),
    "xml": ("xml",),
    "processes": ("subprocess", "multiprocessing", "signal", "concurrent"),
    "logging": ("logging",),
}
"""A topic and the modules and packages whose docstrings speak of it.

Each name is one token of the demo's model. Scores are mean log-likelihoods per token; of a name of several tokens the
later ones are certain once the first is given, so it would win against any name of one token.
"""

NUM_HELD_BACK = 200
# Equal topics, so that always answering the largest gains nothing; 9 x 135 = 1,215 rows.
_MAX_SENTENCES_PER_TOPIC = 135
# Words: shorter ones are labels ("Return True."), longer ones cost time without teaching more.
_MIN_WORDS, _MAX_WORDS = 6, 32

_SENTENCE_END = re.compile(r"(?<=[a-z)`'\"][.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"^[A-Z][^<>{}|\\=]*[.!?]$")
_SYSTEM = "Name the topic of the sentence. Topics: {}."


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The two files of the demo: chat rows to train on, choice rows to score."""

    train: Path
    held_back: Path
    num_train_rows: int
    num_held_back_rows: int


def write_demo_files(folder: Path) -> DemoFiles:
    """Write `train.jsonl` and `held_back.jsonl` into `folder` (made if absent)."""
    # Another order than the one that chose each topic's sentences, or the largest topics would lead it.
    rows = sorted(_labelled_sentences(), key=lambda row: _shuffled("split", row[0]))
    held_back, train = rows[:NUM_HELD_BACK], rows[NUM_HELD_BACK:]
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(folder / "train.jsonl", folder / "held_back.jsonl", len(train), len(held_back))
    choices = list(TOPICS)
    _write(
        files.train,
        ({"messages": [*_prompt(text), {"role": "assistant", "content": topic}]} for text, topic in train),
    )
    _write(
        files.held_back,
        ({"messages": _prompt(text), "choices": choices, "answer": choices.index(topic)} for text, topic in held_back),
    )
    return files


def _prompt(sentence: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": _SYSTEM.format(", ".join(TOPICS))},
        {"role": "user", "content": sentence},
    ]


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _labelled_sentences() -> list[tuple[str, str]]:
    """`(sentence, topic)` of every sentence that belongs to one topic only."""
    topics_of: dict[str, set[str]] = defaultdict(set)
    for topic, names in TOPICS.items():
        for name in names:
            for docstring in _docstrings(name):
                for sentence in _sentences(docstring):
                    topics_of[sentence].add(topic)
    by_topic: dict[str, list[str]] = defaultdict(list)
    for sentence, topics in topics_of.items():
        if len(topics) == 1:
            by_topic[next(iter(topics))].append(sentence)
    return [
        (sentence, topic)
        for topic, sentences in by_topic.items()
        for sentence in sorted(sentences, key=lambda text: _shuffled("choice", text))[:_MAX_SENTENCES_PER_TOPIC]
    ]


def _shuffled(purpose: str, text: str) -> bytes:
    """A sort key that puts texts in a random order, the same one on every machine."""
    return hashlib.sha256(f"{purpose}:{text}".encode()).digest()


def _docstrings(name: str) -> Iterator[str]:
    """Docstrings of a module or package: from its source without running it, or, where it is built in, from objects."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return  # `_pydatetime` is there since Python 3.12 only
    if spec.origin is None or not spec.origin.endswith(".py"):
        yield from _builtin_docstrings(importlib.import_module(name))
        return
    yield from _source_docstrings(Path(spec.origin))
    for found in pkgutil.iter_modules(spec.submodule_search_locations or ()):
        if "test" not in found.name or name == "unittest":
            yield from _docstrings(f"{name}.{found.name}") if found.name != "__main__" else ()


def _source_docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _builtin_docstrings(module: ModuleType) -> Iterator[str]:
    for _, member in [("", module), *inspect.getmembers(module)]:
        docstring = inspect.getdoc(member)
        if docstring and inspect.getmodule(member) in (module, None):
            yield docstring


def _sentences(docstring: str) -> Iterator[str]:
    """Sentences of prose: paragraphs without code, split at full stops."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if any(line.lstrip().startswith((">>>", "...", "*", "-", "|")) for line in lines):
            continue
        for sentence in _SENTENCE_END.split(" ".join(" ".join(lines).split())):
            if (
                _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS
                and sentence.isascii()
                and _PROSE.match(sentence)
                and "__" not in sentence
            ):
                yield sentence

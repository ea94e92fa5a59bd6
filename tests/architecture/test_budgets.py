"""Size, documentation and forbidden patterns of our own code: the house rules that a program can check."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cli", "jobs", "local", "lomo_core", "server", "worker")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

MAX_FUNCTION_LINES = 80
MAX_MEDIAN_FUNCTION_LINES = 14  # the anchors we measure ourselves against have 8 to 17
MAX_FILE_LINES = 500
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(tree: ast.Module) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def _num_lines(node: FunctionNode) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES, "split the file by concern"
    long = {
        node.name: _num_lines(node) for node in _functions(ast.parse(text)) if _num_lines(node) > MAX_FUNCTION_LINES
    }
    assert not long, long


def test_median_function_is_short() -> None:
    lengths = [_num_lines(node) for path in SOURCES for node in _functions(ast.parse(path.read_text(encoding="utf-8")))]
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is for, and why"
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, FunctionNode | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, f"public names without a docstring: {bare}"


# A broad except hides defects, so the places that may have one are named here, each the edge of a process or task.
BROAD_EXCEPT_ALLOWED = {
    "lomo_core/__main__.py",  # engine main: an unexpected error becomes an exit code and a traceback in the log
    "server/sse.py",  # a stream that breaks must end alone
    "server/webhook_delivery.py",  # a delivery that meets a defect must not end all the others
    "worker/data_checker.py",  # a check that meets a defect must not end all the others
    "worker/chat.py",  # a chat that meets a defect must not take those after it with it
    "worker/tasks.py",  # a Celery task must not take the worker with it
}


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_broad_excepts_stand_at_named_boundaries(path: Path) -> None:
    broad = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}))
    ]
    assert not broad or _relative(path) in BROAD_EXCEPT_ALLOWED, broad


# Each of these has been the way into a comparable service (pickled weights, shell injection, remote code).
FORBIDDEN = {
    r"\bimport pickle\b|\bpickle\.": "nothing is pickled or unpickled",
    r"\btorch\.load\(": "weights are safetensors",
    r"shell=True": "commands are lists",
    r"trust_remote_code=True": "a model brings no code",
    r"\.commit\(": "transactions end in jobs/db.py",
    r"\bos\.system\(": "commands are lists",
}


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_forbidden_patterns(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = [reason for pattern, reason in FORBIDDEN.items() if re.search(pattern, text)]
    assert not found, found


def test_environment_is_read_in_settings_only() -> None:
    """Configuration is read once; who passes the environment on to a child process is named."""
    readers = {
        _relative(path) for path in SOURCES if re.search(r"\bos\.(environ|getenv)\b", path.read_text(encoding="utf-8"))
    }
    passers_on = {
        "lomo_core/__main__.py",  # sets what transformers and torch read before they are imported
        "lomo_core/death_watch.py",
        "worker/engine_process.py",
        "jobs/shape_cache.py",
        "jobs/row_preview.py",
        "local/launch.py",
        "local/services.py",
        "local/stack.py",
        "local/postgres.py",
        "local/valkey.py",
        "local/demo.py",
        "cli/settings.py",
        "cli/main.py",
    }
    assert readers <= passers_on, readers - passers_on

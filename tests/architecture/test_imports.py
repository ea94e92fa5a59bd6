"""What a linter of import statements cannot see: which modules are really loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Loading torch costs seconds and hundreds of megabytes, and forking a process that holds it is unsafe: only the
# engine's own process may. The linter follows import statements; this follows the interpreter.
TORCH_FREE = [
    "server.main",
    "worker.app",
    "worker.tasks",
    "worker.runner",
    "jobs.lifecycle",
    "jobs.eventlog",
    "jobs.migrate",
    "cli.main",
    "local.stack",
    "local.demo",
    "lomo_core.config",
    "lomo_core.data.formats",
    "lomo_core.events",
    "lomo_core.gguf.export",
    "lomo_core.errors",
    "lomo_core.schedule",
]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_loads_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))\n"
        "assert not heavy, heavy"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "LOMO_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none",
        "LOMO_BROKER_URL": "redis://127.0.0.1:1/0",
        "LOMO_DATA_DIR": "/nonexistent",
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]

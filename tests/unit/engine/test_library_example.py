"""The example of library use runs as it is printed in the documentation, and its loss falls."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "library_use.py"


def test_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    alive, largest = map(int, re.findall(r"(\d+) bytes; the largest tensor has (\d+)", output)[0])
    assert alive == largest

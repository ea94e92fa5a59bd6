"""What the tests on devices share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two threads spin while they wait for each other: beside other tests on two cores, the six tests of the ways to
    the norm took over 36 CPU seconds with them, and 14 with one."""
    torch.set_num_threads(1)

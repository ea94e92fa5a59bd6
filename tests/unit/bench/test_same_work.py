"""Engine and peers do the same work: the figures of a comparison mean nothing otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cell, peers
from bench.harness import Cell, Variant
from lomo_core.model import load_model
from tests.support.tiny_model import make_tiny_model

RATE = cell._RATE
SHAPE = Cell("fp32", 2, 24, checkpointing=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few thousand weights."""
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "tiny")


def trained(folder: Path, build: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of three steps, and the weights after them."""
    torch.manual_seed(0)
    model = load_model(folder, precision="fp32", device=torch.device("cpu"))
    cell.measure_base(model)
    step = build(model)
    losses = [step(ids) for ids in cell.make_batches(str(folder), SHAPE)[:3]]
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("peer", [("torch", "sgd"), ("lomo-optim", "lomo")], ids=" ".join)
def test_lomo_and_its_peers_take_the_same_steps(folder: Path, peer: tuple[str, str], tmp_path: Path) -> None:
    ours = trained(folder, lambda model: cell.our_step(model, Variant("lomo_core", "lomo"), tmp_path))
    theirs = trained(folder, lambda model: peers.STEPS[peer](model, RATE))
    # fp32 sums in another order: loss over chunks here, over the whole there.
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
    assert all(parameter.isfinite().all() for parameter in ours[1])


def test_adalomo_moves_as_far_as_its_namesake(folder: Path, tmp_path: Path) -> None:
    ours = trained(folder, lambda model: cell.our_step(model, Variant("lomo_core", "adalomo"), tmp_path))
    theirs = trained(folder, lambda model: peers.STEPS["lomo-optim", "adalomo"](model, RATE))
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-4, atol=0.0)


def test_batches_are_whole_and_differ(folder: Path) -> None:
    batches = cell.make_batches(str(folder), SHAPE)
    assert {tuple(batch.shape) for batch in batches} == {(2, 24)}
    assert not torch.equal(batches[0], batches[1])

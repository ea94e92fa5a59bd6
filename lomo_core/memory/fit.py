"""Which setting goes into a given memory: what "auto" takes, and the nearest to one that does not fit. Torch-free.

What may change: activation checkpointing, which makes a step take a third more time (2 of 6 N FLOP per token are done
twice: arXiv 2001.08361, section 2.1); the batch; the rows' length, which cuts data; and the optimizer. What is later in
this list changes more of what a run computes, so that the earlier is tried first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Plan, Setting, plan

# Lengths that are proposed: multiples of what hardware likes, or else the shortest that a run may have.
_LENGTH_STEP = 64
_LEAST_LENGTH = 8
# What may change, and what a run calls it.
_OPTIONS = {
    "optimizer": "optimizer",
    "batch_size": "batch_size",
    "seq_length": "max_seq_length",
    "activation_checkpointing": "activation_checkpointing",
}


@dataclass(frozen=True, slots=True)
class Fitting:
    """A setting that fits, and its plan."""

    setting: Setting
    plan: Plan

    def changes(self, given: Setting) -> dict[str, Any]:
        """What is other than in `given`, by the names of a run's options."""
        return {
            name: getattr(self.setting, field)
            for field, name in _OPTIONS.items()
            if getattr(self.setting, field) != getattr(given, field)
        }


def largest_that_fits(
    shapes: ModelShapes, setting: Setting, capacity_bytes: int, *, auto_batch: bool, auto_checkpointing: bool
) -> Fitting | None:
    """The setting, with what is left to choose chosen: the largest batch of the setting's own, its half, its quarter;
    at that batch no checkpointing where there is room, since it is faster.

    Returns None where nothing that may be chosen fits.
    """
    batch = setting.batch_size
    batches = [batch >> shift for shift in range(batch.bit_length())] if auto_batch else [batch]
    ways = (False, True) if auto_checkpointing else (setting.activation_checkpointing,)
    for batch in batches:
        for checkpointing in ways:
            candidate = replace(setting, batch_size=batch, activation_checkpointing=checkpointing)
            found = plan(shapes, candidate)
            if found.peak_bytes <= capacity_bytes:
                return Fitting(candidate, found)
    return None


def nearest_that_fits(shapes: ModelShapes, setting: Setting, capacity_bytes: int) -> Fitting | None:
    """The setting with the least change that fits; None where even the least run under LOMO does not."""

    def fits(candidate: Setting) -> bool:
        return plan(shapes, candidate).peak_bytes <= capacity_bytes

    for candidate in _nearest_first(setting, fits):
        if fits(candidate):
            return Fitting(candidate, plan(shapes, candidate))
    return None


def _nearest_first(setting: Setting, fits: Callable[[Setting], bool]) -> Iterator[Setting]:
    """Candidates in the order of the changes, the largest of each kind."""
    checkpointed = replace(setting, activation_checkpointing=True)
    yield setting
    yield checkpointed
    batches = range(1, setting.batch_size)
    lengths = [*range(_LENGTH_STEP, setting.seq_length, _LENGTH_STEP)]
    if setting.seq_length > _LEAST_LENGTH:
        lengths.insert(0, _LEAST_LENGTH)
    for tried in (setting, checkpointed):
        yield from _largest([replace(tried, batch_size=batch) for batch in batches], fits)
    one_row = replace(checkpointed, batch_size=1)
    yield from _largest([replace(one_row, seq_length=length) for length in lengths], fits)
    if setting.optimizer != "lomo":
        yield from _nearest_first(replace(setting, optimizer="lomo"), fits)


def _largest(candidates: Sequence[Setting], fits: Callable[[Setting], bool]) -> Sequence[Setting]:
    """The last one of ever larger candidates that fits; none if the first does not."""
    end = bisect_right(candidates, 0, key=lambda candidate: int(not fits(candidate)))
    return candidates[end - 1 : end] if end else ()

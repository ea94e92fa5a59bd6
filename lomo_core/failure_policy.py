"""What happens when a loss or a gradient is not finite: skip the step, go back once, give up. Torch-free.

A bad step is skipped: no weight changes. After `MAX_IN_A_ROW` of them the weights themselves are in doubt, and the run
goes back to earlier ones, once, and passes over the batches that it saw before and during the bad steps (so did PaLM,
arXiv 2204.02311, section 5.1: the same weights on other data went on well). Where that does not help either, the run
has diverged. The state is saved with each checkpoint, and every decision is a function of it and of the step's outcome,
so that a resumed run decides as an uninterrupted one does. From which checkpoint before the first suspect the run comes
back does not matter: the steps in between give the same weights again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

# A batch or two may be at fault; after more in a row it is the weights that are suspected. A choice, not a measurement.
MAX_IN_A_ROW = 5


class Verdict(Enum):
    """What to do after a step."""

    GO_ON = "go on"
    ROLL_BACK = "roll back"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureState:
    """Steps are 0-based here: `step` is the one after `step` others."""

    num_in_row: int = 0
    first_in_row: int = 0
    """The first of the `num_in_row` bad steps, if any."""
    has_rolled_back: bool = False
    pass_from: int = 0
    """After the rollback, steps from here to before `pass_until` are passed over."""
    pass_until: int = 0

    def passes_over(self, step: int) -> bool:
        """Whether this step's batch is left out."""
        return self.pass_from <= step < self.pass_until

    @property
    def is_in_doubt(self) -> bool:
        """Whether the last step was bad: not the moment for a checkpoint that others may be thrown away for."""
        return self.num_in_row > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step did to the weights."""

    is_applied: bool
    """False: loss or gradient were not finite, and no weight was changed."""
    is_overflow: bool = False
    """An fp16 gradient was too large for its loss scale, which can still fall: nothing is wrong."""
    is_spoilt: bool = False
    """Weights have taken a gradient that is not finite."""


def judge(state: FailureState, outcome: Outcome, *, step: int) -> tuple[FailureState, Verdict]:
    """What follows from the step after `step` others."""
    if outcome.is_overflow:
        return state, Verdict.GO_ON
    if outcome.is_applied and not outcome.is_spoilt:
        return replace(state, num_in_row=0), Verdict.GO_ON
    first = state.first_in_row if state.num_in_row else step
    state = replace(state, num_in_row=state.num_in_row + 1, first_in_row=first)
    if state.num_in_row <= MAX_IN_A_ROW and not outcome.is_spoilt:
        return state, Verdict.GO_ON
    return state, Verdict.GIVE_UP if state.has_rolled_back else Verdict.ROLL_BACK


def first_suspect(state: FailureState, *, last: int, is_culprit_known: bool, weights_are_finite: bool) -> int:
    """The first step whose batch is passed over after a rollback because of the bad steps up to `last`."""
    if is_culprit_known:
        return last
    if not weights_are_finite:
        # No clip mode with a norm: the step before the first bad loss has spoilt the weights unseen.
        return max(0, state.first_in_row - 1)
    # The weights were already leaving when the first loss went bad: as many steps before it as were bad.
    return max(0, state.first_in_row - (last + 1 - state.first_in_row))


def after_rollback(*, first: int, last: int) -> FailureState:
    """The state with which the run goes on: the steps from `first` to `last` will be passed over."""
    return FailureState(has_rolled_back=True, pass_from=first, pass_until=last + 1)

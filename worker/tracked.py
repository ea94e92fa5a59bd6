"""What is told of a run to the tools that draw it: the journal's figures under the names that the field uses.

One set of names for TensorBoard, Weights & Biases and MLflow, so that runs can be compared across them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from jobs.eventlog import NumberedLine
from lomo_core.events import Evaluation, MemoryBytes, RolledBack, Started, Step

_MEMORY = tuple(MemoryBytes.__dataclass_fields__)
_MEMORY_NAMES = tuple(f"memory/{name}" for name in _MEMORY)
_get_memory = attrgetter(*_MEMORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Figures of one step."""

    step: int
    time_s: float
    """Seconds since the epoch."""
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """The run goes on from an earlier step: what was told of steps from `step` on no longer holds."""

    step: int
    time_s: float


def read_tracked(lines: Sequence[NumberedLine]) -> list[Point | Restart]:
    """What of some lines is worth telling, in their order. An attempt begins with a `Restart`."""
    return [tracked for _, line in lines for tracked in _read(line.event, line.time)]


def _read(event: object, time_s: float) -> Iterable[Point | Restart]:
    match event:
        case Started(step=step) | RolledBack(step=step):
            # The evaluation of the base model, step 0, is done again only by a run that begins anew.
            return [Restart(step=step + 1 if step else 0, time_s=time_s)]
        case Step():
            return [Point(step=event.step, time_s=time_s, values=_known(_step_values(event)))]
        case Evaluation():
            return [Point(step=event.step, time_s=time_s, values=_known(_evaluation_values(event)))]
        case _:
            return []


def _step_values(step: Step) -> dict[str, float | None]:
    return {
        "train/loss": step.loss,
        "train/token_accuracy": step.mean_token_accuracy,
        "train/learning_rate": step.learning_rate,
        "train/grad_norm": step.grad_norm,
        "train/tokens_per_s": step.tokens_per_s,
        "train/step_s": step.step_s,
        "train/epoch": step.epoch,
        **dict(zip(_MEMORY_NAMES, _get_memory(step.memory), strict=True)),
    }


def _evaluation_values(evaluation: Evaluation) -> dict[str, float | None]:
    return {
        "eval/loss": evaluation.valid_loss,
        "eval/token_accuracy": evaluation.valid_mean_token_accuracy,
        "eval/choice_accuracy": evaluation.choice_accuracy,
        "eval/seconds": evaluation.seconds,
    }


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}

"""What the end of an engine means for its job: one table from exit code to verdict, and the texts that go with it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum

from jobs.lifecycle import JobFailure
from jobs.run_config import api_param
from lomo_core.errors import EXIT_CODES, EngineError, InterruptedRunError
from lomo_core.events import Failed, Finished


class Asked(Enum):
    """Why the worker itself told the engine to stop."""

    NOTHING = "nothing"
    STOP = "stop"
    """The worker is shutting down."""
    CANCEL = "cancel"
    """The job's user wants it to end."""
    PAUSE = "pause"
    """The job's user wants it to stop for now."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The model is complete."""

    finished: Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp:
    """Another attempt would end the same way. `show_log`: the end of the engine's output tells more than the text."""

    failure: JobFailure
    show_log: bool = False


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Stopped as its user asked."""


@dataclass(frozen=True, slots=True)
class Paused:
    """Stopped as its user asked, to go on later."""


@dataclass(frozen=True, slots=True)
class Released:
    """Stopped because the worker stops: another attempt goes on, and it counts as no failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """Killed from outside: another attempt may fare better."""

    reason: str


Verdict = Succeeded | GaveUp | Cancelled | Paused | Released | Died

RELEASED_REASON = "The worker is shutting down"

_STOPPED: dict[Asked, Verdict] = {Asked.STOP: Released(RELEASED_REASON), Asked.PAUSE: Paused()}

# For an engine that ended without a word in its journal. Want of memory or disk may be the reason.
_TEXTS = {
    "engine_error": "The engine met an unexpected error",
    "invalid_hyperparameters": "The engine refused the run's parameters",
    "invalid_model": "The engine cannot use the base model",
    "unforeseen_model": "The engine cannot foresee the base model's memory",
    "invalid_training_file": "The engine cannot use the training data",
    "out_of_memory": (
        "The device has too little memory for this run. Use a smaller batch_size or max_seq_length, or turn "
        "activation_checkpointing on"
    ),
    "diverged": "The loss is no longer finite. Use a smaller learning rate",
    "disk_full": "The worker's disk is full: a checkpoint or the model could not be written",
}


def judge(exit_code: int, *, asked: Asked, finished: Finished | None, failed: Failed | None) -> Verdict:
    """What an engine's end means. `exit_code` is negative for a signal; `finished`, `failed`: its journal's last words.

    Work that is done is kept, so success comes before a cancel. After our own SIGTERM its death says nothing about the
    job; an error of its own (exit codes 10 to 16) still does.
    """
    if exit_code == 0 and finished is not None:
        return Succeeded(finished)
    if asked is Asked.CANCEL:
        return Cancelled()
    error = EXIT_CODES.get(exit_code)
    is_own_error = error is not None and error not in (EngineError, InterruptedRunError)
    if asked in _STOPPED and not is_own_error:
        return _STOPPED[asked]
    if exit_code < 0:
        return Died(f"The engine was killed by {describe_signal(-exit_code)}")
    if error is InterruptedRunError:
        return Died("The engine was told to stop by somebody other than its worker")
    return _gave_up(exit_code, error, failed)


def describe_signal(number: int) -> str:
    """`signal 9 (SIGKILL)`, and what usually sends it."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
    hint = ", often sent by the kernel when memory runs out" if number == signal.SIGKILL else ""
    return f"signal {number} ({name}{hint})"


def _gave_up(exit_code: int, error: type[EngineError] | None, failed: Failed | None) -> GaveUp:
    is_defect = error is None or error is EngineError
    if failed is not None:
        failure = JobFailure(code=failed.code, message=failed.message, param=api_param(failed.param))
    elif exit_code == 0:
        failure = JobFailure(code=EngineError.code, message="The engine ended without writing a model.")
        is_defect = True
    else:
        code = EngineError.code if error is None else error.code
        failure = JobFailure(code=code, message=f"{_TEXTS[code]} (exit code {exit_code}).")
    return GaveUp(failure=failure, show_log=is_defect)

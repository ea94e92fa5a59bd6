"""Errors of the engine, and the exit code that carries each one across the process boundary.

The engine runs as its own process; the worker sees nothing of it but its journal and its exit code. Every class
therefore has a stable `code` (the API's `error.code`) and an `exit_code`, one to one.

EngineError                  1   engine_error            unexpected: a defect of the engine
  ConfigError               10   invalid_hyperparameters a field of the run's specification is wrong
  ModelError                11   invalid_model           the base model cannot be used
    UnforeseenModelError    18   unforeseen_model        what memory it takes cannot be told beforehand
  DataError                 12   invalid_training_file   the data cannot be used
  OutOfMemoryError          14   out_of_memory
  DivergedError             15   diverged                the loss stayed non-finite
  DiskFullError             16   disk_full
  InterruptedRunError       17   interrupted             asked to stop; a checkpoint was written
"""

from __future__ import annotations

from typing import Any

from lomo_core.events import MemoryBytes


class EngineError(Exception):
    """An error whose text is written for the person who submitted the job.

    `param` names the request field at fault in the API's words (`training_file`, `model`, `learning_rate`), or None.
    """

    code = "engine_error"
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(EngineError):
    """A field of the run's specification is missing, unknown or out of range."""

    code = "invalid_hyperparameters"
    exit_code = 10


class ModelError(EngineError):
    """The base model's folder is incomplete, unsafe or of an unknown kind."""

    code = "invalid_model"
    exit_code = 11


class UnforeseenModelError(ModelError):
    """The model can be trained, but what memory that takes cannot be told from its configuration."""

    code = "unforeseen_model"
    exit_code = 18


class DataError(EngineError):
    """The training or validation data cannot be used."""

    code = "invalid_training_file"
    exit_code = 12


class CheckpointError(Exception):
    """One checkpoint cannot be used; its text says why.

    It ends no run: the checkpoint is reported and the next older one tried, and with none left the run begins anew.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class OutOfMemoryError(EngineError):
    """The device or the host has too little memory for this run.

    `memory` and `suggestion` are as in the `failed` event.
    """

    code = "out_of_memory"
    exit_code = 14

    def __init__(
        self, message: str, *, memory: MemoryBytes | None = None, suggestion: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.memory = memory
        self.suggestion = suggestion


class DivergedError(EngineError):
    """The loss is no longer finite."""

    code = "diverged"
    exit_code = 15


class DiskFullError(EngineError):
    """A checkpoint or the model could not be written for want of space."""

    code = "disk_full"
    exit_code = 16


class InterruptedRunError(EngineError):
    """The run was asked to stop (SIGTERM); its last checkpoint is where the next attempt goes on."""

    code = "interrupted"
    exit_code = 17


EXIT_CODES: dict[int, type[EngineError]] = {
    error.exit_code: error
    for error in (
        EngineError,
        ConfigError,
        ModelError,
        UnforeseenModelError,
        DataError,
        OutOfMemoryError,
        DivergedError,
        DiskFullError,
        InterruptedRunError,
    )
}

"""The body that creates a job: OpenAI's, with the engine's options under `lomo`."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, field_validator

from jobs.errors import InvalidRequestError
from jobs.run_config import check_options
from jobs.spec import MAX_INTEGRATIONS, Integration, JobSpec, RequestedOptions
from server.schemas.base import Request

# OpenAI's limits of `metadata`: 16 pairs, 64 characters per key, 512 per value.
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]


# Seeds are 31-bit in OpenAI's schema.
NUM_SEEDS = 2**31


def _none_for_auto(value: Any) -> Any:
    return None if value == "auto" else value


Epochs = Annotated[int, Field(ge=1, le=50)]
BatchSize = Annotated[int, Field(ge=1, le=256)]
Multiplier = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Hyperparameters(Request):
    """OpenAI's supervised hyperparameters; "auto" or absent: the server's default, of `batch_size` at most that."""

    n_epochs: Annotated[
        Epochs | None, BeforeValidator(_none_for_auto, json_schema_input_type=Epochs | Literal["auto"] | None)
    ] = None
    """Passes over the training file; by default 1."""
    batch_size: Annotated[
        BatchSize | None, BeforeValidator(_none_for_auto, json_schema_input_type=BatchSize | Literal["auto"] | None)
    ] = None
    """Rows of a step, or sequences where they are packed; by default the largest of 4, 2 and 1 that fits."""
    learning_rate_multiplier: Annotated[
        Multiplier | None, BeforeValidator(_none_for_auto, json_schema_input_type=Multiplier | Literal["auto"] | None)
    ] = None
    """Times `lomo.learning_rate`, which may so become 1e-12 to 10; by default 1."""


class Supervised(Request):
    """The settings of a supervised job."""

    hyperparameters: Hyperparameters | None = None


class Method(Request):
    """How to train. The other methods of OpenAI's schema are known, to be refused with a reason."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None


class CreateJob(Request):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    """The name of a base model, a tuned model or a checkpoint."""
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    """Id of a file of purpose `fine-tune`."""
    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    """Id of a file that is evaluated on and not trained on."""
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    """Part of the tuned model's name: printable characters."""
    seed: Annotated[int, Field(ge=0, lt=NUM_SEEDS)] | None = None
    """Of all that is random in the run; by default drawn, and then on the job."""
    metadata: Metadata | None = None
    """What lists of jobs can be filtered by."""
    integrations: Annotated[list[Integration], Field(max_length=MAX_INTEGRATIONS)] | None = None
    """Tools that are told of the run."""
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI in favour of `method`, still sent by older clients."""
    method: Method | None = None
    """How to train: supervised is the only one here."""
    lomo: RequestedOptions | None = None
    """What is this server's own: the engine's options."""

    @field_validator("suffix")
    @classmethod
    def _printable(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("a suffix has printable characters only")
        return value

    def to_spec(self) -> JobSpec:
        """The job to do, with every default filled in; `auto` names what the plan of its memory is to choose.

        Raises:
            InvalidRequestError: a part of OpenAI's schema that is not supported, hyperparameters in two places, or
                options that the engine cannot have together.
        """
        if self.method is not None and self.method.type != "supervised":
            reason = f"The method {self.method.type!r} is not supported: this server trains supervised jobs only."
            raise _unsupported(reason, "method.type")
        if self.method is not None and (self.method.dpo or self.method.reinforcement):
            raise _unsupported("A supervised job has no settings of another method.", "method")
        given = self._hyperparameters()
        chosen = {name: value for name, value in given.model_dump().items() if value is not None}
        options, auto = (self.lomo or RequestedOptions()).resolve()
        if given.batch_size is None:
            auto.insert(0, "batch_size")
        spec = JobSpec(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            suffix=self.suffix,
            seed=self.seed if self.seed is not None else secrets.randbelow(NUM_SEEDS),
            lomo=options,
            auto=auto,
            integrations=self.integrations or [],
            **chosen,
        )
        check_options(spec)
        return spec

    def _hyperparameters(self) -> Hyperparameters:
        """Those of `method.supervised`, or the deprecated ones at the top."""
        supervised = self.method.supervised if self.method is not None else None
        inner = supervised.hyperparameters if supervised is not None else None
        if inner is not None and self.hyperparameters is not None and inner != self.hyperparameters:
            raise InvalidRequestError(
                "The hyperparameters are given twice and differ: keep those in method.supervised.",
                param="hyperparameters",
            )
        return inner or self.hyperparameters or Hyperparameters()


def _unsupported(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="unsupported_value", param=param)

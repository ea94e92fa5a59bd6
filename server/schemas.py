"""The bodies of requests and responses: OpenAI's fine-tuning shapes, with what is ours under `lomo`.

Requests forbid unknown keys, so that a misspelt setting is an error and not a default. Rows become responses in
`describe.py`.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
)

from jobs.errors import InvalidRequestError
from jobs.run_config import check_options
from jobs.spec import Choosable, JobSpec, LomoOptions, RequestedOptions

# OpenAI's limits of `metadata`: 16 pairs, 64 characters per key, 512 per value.
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]
# Seeds are 31-bit in OpenAI's schema.
_NUM_SEEDS = 2**31
# Of events some 600 bytes each; OpenAI documents no upper limit.
_MAX_PAGE = 1000
# Of LomoOptions.max_steps.
_MAX_STEP = 10**9


def _none_for_auto(value: Any) -> Any:
    return None if value == "auto" else value


class Request(BaseModel):
    """A body: unknown keys are errors, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Hyperparameters(Request):
    """OpenAI's supervised hyperparameters; "auto" or absent: the server's default, of `batch_size` at most that."""

    n_epochs: Annotated[int | None, Field(ge=1, le=50), BeforeValidator(_none_for_auto)] = None
    batch_size: Annotated[int | None, Field(ge=1, le=256), BeforeValidator(_none_for_auto)] = None
    learning_rate_multiplier: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False), BeforeValidator(_none_for_auto)
    ] = None


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
    training_file: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    validation_file: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, lt=_NUM_SEEDS)] | None = None
    metadata: Metadata | None = None
    integrations: list[Any] | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI in favour of `method`, still sent by older clients."""
    method: Method | None = None
    lomo: RequestedOptions | None = None

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
        if self.integrations:
            raise _unsupported("Integrations are not supported yet.", "integrations")
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
            seed=self.seed if self.seed is not None else secrets.randbelow(_NUM_SEEDS),
            lomo=options,
            auto=auto,
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


class JobsQuery(BaseModel):
    """The query of a list of jobs. `metadata[key]` is read beside it."""

    limit: int = Field(default=20, ge=1, le=100)
    after: str | None = None
    include: list[Literal["loss_curve"]] = Field(default=[], alias="include[]")
    stream: bool = False


class EventsQuery(BaseModel):
    """The query of a job's events."""

    limit: int = Field(default=20, ge=1, le=_MAX_PAGE)
    after: str | None = None
    stream: bool | None = None
    """None: as the Accept header says."""
    pings: bool = False
    """Pings as events in place of comments, on a stream."""


class CheckpointsQuery(BaseModel):
    """The query of a job's checkpoints."""

    limit: int = Field(default=10, ge=1, le=_MAX_PAGE)
    after: str | None = None


class MetricsQuery(BaseModel):
    """The query of a job's series."""

    max_points: int = Field(default=1000, ge=1, le=2000)
    first_step: int | None = Field(default=None, ge=0, le=_MAX_STEP)
    last_step: int | None = Field(default=None, ge=0, le=_MAX_STEP)


class FilesQuery(BaseModel):
    """The query of a list of files."""

    limit: int = Field(default=10_000, ge=1, le=10_000)
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class UsedHyperparameters(BaseModel):
    """The hyperparameters as used: numbers, never "auto"; None where another version's job cannot be read."""

    n_epochs: int | None
    batch_size: int | None
    learning_rate_multiplier: float | None


class UsedSupervised(BaseModel):
    """The inner object of `method` in a response."""

    hyperparameters: UsedHyperparameters


class UsedMethod(BaseModel):
    """`method` in a response."""

    type: Literal["supervised"] = "supervised"
    supervised: UsedSupervised


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class Evaluation(BaseModel):
    """One pass over the validation file."""

    step: int
    created_at: int
    num_rows: int
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    choice_accuracy: float | None


class Memory(BaseModel):
    """Bytes by category: planned (at the job's creation for rows as long as they may be, from its start on for the
    longest batch of its data) and measured, at the step with the highest peak. None: not known."""

    planned: dict[str, int] | None = None
    measured: dict[str, int] | None = None
    measured_peak_bytes: int | None = None
    planned_peak_bytes: int | None = None


class RunState(BaseModel):
    """How a job's run stands."""

    attempt: int
    failures: int
    host: str | None
    started_at: int | None
    cancel_requested: bool
    waiting_for: str | None
    """Why a queued job waits, as of this answer: `memory: ...`, `slot: ...` or `worker: ...`."""
    step: int
    total_steps: int | None
    loss: float | None
    tokens_per_second: float | None
    eta_s: float | None
    num_parameters: int | None
    num_train_rows: int | None
    device: str | None
    device_bytes: int | None
    memory: Memory
    evaluations: list[Evaluation]
    weights_sha256: str | None
    model_path: str | None
    """Absolute folder of the tuned model once the job has succeeded."""
    loss_curve: list[tuple[int, float]] | None = None
    """Only in a list that was asked for it."""

    @model_serializer(mode="wrap")
    def _without_unasked_curve(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = handler(self)
        if self.loss_curve is None:
            del body["loss_curve"]
        return body


class JobLomo(LomoOptions, RunState):
    """The engine's options as used, and how the run stands."""

    auto: list[Choosable]
    """What was left to the plan of the run's memory; the values chosen stand in their places."""


class ForeignLomo(RunState):
    """The same of a job that another version of this program stored: its options as they are, unchecked."""

    model_config = ConfigDict(extra="allow")

    unreadable: list[str]
    """Keys of the stored job that this version does not know, that are missing, or whose values it does not take."""


class FineTuningJob(BaseModel):
    """OpenAI's `fine_tuning.job`."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    model: str | None
    """None, like the other fields of the request, where another version's job cannot be read."""
    created_at: int
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str] = []
    status: str
    validation_file: str | None
    training_file: str | None
    hyperparameters: UsedHyperparameters
    trained_tokens: int | None
    error: JobError | None
    integrations: list[Any] = []
    seed: int | None
    estimated_finish: int | None
    user_provided_suffix: str | None
    method: UsedMethod
    metadata: dict[str, str]
    lomo: JobLomo | ForeignLomo


class JobEvent(BaseModel):
    """OpenAI's `fine_tuning.job.event`; `seq` and `attempt` are ours."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None
    seq: int
    attempt: int


class CheckpointMetrics(BaseModel):
    """OpenAI's metrics of a checkpoint, as far as they are known."""

    step: int
    train_loss: float | None
    valid_loss: float | None


class JobCheckpoint(BaseModel):
    """OpenAI's `fine_tuning.job.checkpoint`."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
    bytes: int
    manifest_sha256: str
    attempt: int


class FileObject(BaseModel):
    """OpenAI's `file`; `num_lines` and `sha256` are ours."""

    object: Literal["file"] = "file"
    id: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    num_lines: int | None
    sha256: str


class DeletedFile(BaseModel):
    """The answer to the deletion of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Model(BaseModel):
    """OpenAI's `model`."""

    object: Literal["model"] = "model"
    id: str
    created: int
    owned_by: str


class _List(BaseModel):
    object: Literal["list"] = "list"
    has_more: bool


class JobList(_List):
    """A page of jobs, newest first."""

    data: list[FineTuningJob]


class JobPage(BaseModel):
    """The first frame of a stream of jobs."""

    data: list[FineTuningJob]
    has_more: bool


class EventList(_List):
    """A page of events, newest first."""

    data: list[JobEvent]


class _EdgedList(_List):
    """A list that names its first and last id, where OpenAI's schema requires it."""

    first_id: str | None
    last_id: str | None


class CheckpointList(_EdgedList):
    """A page of checkpoints, newest first."""

    data: list[JobCheckpoint]


class FileList(_EdgedList):
    """A page of files."""

    data: list[FileObject]


class ModelList(BaseModel):
    """Every model; never paged."""

    object: Literal["list"] = "list"
    data: list[Model]


class Host(BaseModel):
    """A worker host as it last reported itself, and what runs there."""

    object: Literal["host"] = "host"
    name: str
    device_kind: Literal["cuda", "cpu"] | None
    """None, as the three numbers below, where the worker is of a version that did not measure."""
    devices: dict[str, Any]
    memory_bytes: int
    """Of the host itself, cards not counted."""
    available_bytes: int | None
    """Free on the device when the worker started: what its jobs may need together."""
    run_overhead_bytes: int | None
    """What each run takes beside its plan: on a CPU host the process around it."""
    free_bytes: int | None
    """What the running jobs leave of it, by plan."""
    slots: int
    running_jobs: list[str]
    """Of the caller's organization."""
    num_running: int
    """Of all organizations."""
    last_seen_at: int
    is_alive: bool


class HostList(BaseModel):
    """Every host; never paged."""

    object: Literal["list"] = "list"
    data: list[Host]


class Attempt(BaseModel):
    """One claim of a job by a worker."""

    number: int
    host: str
    started_at: int
    ended_at: int | None
    outcome: str | None
    detail: str | None


class JobMetrics(BaseModel):
    """The series of a run as columns of equal length, its evaluations and its attempts."""

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    job_id: str
    columns: dict[str, list[Any]]
    evaluations: list[Evaluation]
    attempts: list[Attempt]


class Readiness(BaseModel):
    """Whether the service can run jobs; one word or sentence per part."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]

"""A job and its run, as answered: OpenAI's objects, with what is ours under `lomo`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from jobs.spec import Choosable, Integration, LomoOptions
from server.schemas.base import Answer, EdgedPage, Page
from server.schemas.data import DataFigures


class UsedHyperparameters(Answer):
    """The hyperparameters as used: numbers, never "auto"; null where another version's job cannot be read."""

    n_epochs: int | None
    batch_size: int | None
    learning_rate_multiplier: float | None


class UsedSupervised(Answer):
    """The inner object of `method` in a response."""

    hyperparameters: UsedHyperparameters


class UsedMethod(Answer):
    """`method` in a response."""

    type: Literal["supervised"] = "supervised"
    supervised: UsedSupervised


class JobError(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class Evaluation(Answer):
    """One pass over the validation file."""

    step: int
    created_at: int
    num_rows: int
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    choice_accuracy: float | None


class Memory(Answer):
    """Bytes by category: planned (at the job's creation for rows as long as they may be, from its start on for the
    longest batch of its data) and measured, at the step with the highest peak. null: not known."""

    planned: dict[str, int] | None = None
    """`parameters_bytes`, `gradients_bytes`, `optimizer_bytes`, `activations_bytes`, `other_bytes`, `peak_bytes`."""
    measured: dict[str, int] | None = None
    """The same."""
    measured_peak_bytes: int | None = None
    """`peak_bytes` of `measured`."""
    planned_peak_bytes: int | None = None
    """`peak_bytes` of `planned`."""


class RunState(Answer):
    """How a job's run stands."""

    project_id: str | None
    """Of the key that created the job."""
    attempt: int
    """How many times a worker has claimed it."""
    failures: int
    """How many attempts were lost, with their engine or worker."""
    host: str | None
    """The worker host of the latest attempt."""
    started_at: int | None
    """When it was first claimed."""
    cancel_requested: bool
    """Its worker has been asked to end it, and has not done so yet."""
    pause_requested: bool
    """Its worker has been asked to pause it, and has not done so yet."""
    queue_position: int | None
    """Of a queued job, among those of all organizations: 1 is the next to be claimed."""
    waiting_for: str | None
    """Why a queued job waits, as of this answer: `memory: ...`, `slot: ...`, `quota: ...` or
    `worker: ...`."""
    step: int
    """Steps done."""
    total_steps: int | None
    """Steps of the whole run."""
    loss: float | None
    """Of the latest step, in nats a token."""
    tokens_per_second: float | None
    """Of the latest step, padding not counted."""
    eta_s: float | None
    """Seconds until the last step."""
    num_parameters: int | None
    """Of the model."""
    num_train_rows: int | None
    """Of the training file, as far as they are trained on."""
    device: str | None
    """What the run computes on."""
    device_bytes: int | None
    """Memory of that device."""
    memory: Memory
    """Planned and measured."""
    data: DataFigures | None = None
    """What the check of the files has found; null before, and where they were not checked."""
    evaluations: list[Evaluation]
    """The first, and the latest 99."""
    weights_sha256: str | None
    """Of the tuned model: the same seed and data give the same weights."""
    model_path: str | None
    """Absolute folder of the tuned model once the job has succeeded."""
    loss_curve: list[tuple[int, float]] | None = Field(default=None, exclude_if=lambda curve: curve is None)
    """Step and loss, at most 48 points; only in a list that was asked for it."""


class JobLomo(LomoOptions, RunState):
    """The engine's options as used, and how the run stands."""

    auto: list[Choosable]
    """What was left to the plan of the run's memory; the values chosen stand in their places."""


class ForeignLomo(RunState):
    """The same of a job that another version of this program stored: its options as they are, unchecked."""

    model_config = ConfigDict(extra="allow")

    unreadable: list[str]
    """Keys of the stored job that this version does not know, that are missing, or whose values it does not take."""


class FineTuningJob(Answer):
    """OpenAI's `fine_tuning.job`."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    model: str | None
    """null, like the other fields of the request, where another version's job cannot be read."""
    created_at: int
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str] = Field(default=[])
    status: str
    validation_file: str | None
    training_file: str | None
    hyperparameters: UsedHyperparameters
    trained_tokens: int | None
    error: JobError | None
    integrations: list[Integration] = Field(default=[])
    seed: int | None
    estimated_finish: int | None
    user_provided_suffix: str | None
    method: UsedMethod
    metadata: dict[str, str]
    lomo: JobLomo | ForeignLomo
    """What is this server's own: the engine's options as used, and how the run stands."""


class DeletedJob(Answer):
    """What is left of a job, in OpenAI's form for deleted objects."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    deleted: Literal[True] = True
    bytes_freed: int
    """On the disk."""


class JobEvent(Answer):
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


class CheckpointMetrics(Answer):
    """OpenAI's metrics of a checkpoint, as far as they are known: the validation file's where it was evaluated at that
    step, and always of all its rows."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class JobCheckpoint(Answer):
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


class JobList(Page):
    """A page of jobs, newest first."""

    data: list[FineTuningJob]


class JobPage(Answer):
    """The first frame of a stream of jobs."""

    data: list[FineTuningJob]
    has_more: bool


class EventList(Page):
    """A page of events, newest first."""

    data: list[JobEvent]


class CheckpointList(EdgedPage):
    """A page of checkpoints, newest first."""

    data: list[JobCheckpoint]


class Attempt(Answer):
    """One claim of a job by a worker."""

    number: int
    host: str
    started_at: int
    ended_at: int | None
    outcome: str | None
    detail: str | None


class MetricPoint(Answer):
    """The figures of one step, as a stream brings them: the names are those of the columns in `JobMetrics`."""

    object: Literal["fine_tuning.job.metrics.point"] = "fine_tuning.job.metrics.point"
    step: int
    attempt: int
    time: float
    total_steps: int | None
    epoch: float | None
    loss: float | None
    mean_token_accuracy: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_s: float | None
    step_s: float | None
    parameters_bytes: int | None
    gradients_bytes: int | None
    optimizer_bytes: int | None
    activations_bytes: int | None
    other_bytes: int | None
    peak_bytes: int | None


class EvaluationPoint(Answer):
    """An evaluation, as a stream of figures brings it."""

    object: Literal["fine_tuning.job.metrics.evaluation"] = "fine_tuning.job.metrics.evaluation"
    step: int
    attempt: int
    time: float
    num_rows: int | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    choice_accuracy: float | None


class JobLogLine(Answer):
    """A line that an engine of the job printed; `seq` numbers the job's lines from 1."""

    object: Literal["fine_tuning.job.log"] = "fine_tuning.job.log"
    id: str
    created_at: int
    text: str
    seq: int
    attempt: int


class LogList(Page):
    """A page of a job's log, newest first."""

    data: list[JobLogLine]


class JobMetrics(Answer):
    """The series of a run as columns of equal length, its evaluations and its attempts."""

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    job_id: str
    columns: dict[str, list[Any]]
    evaluations: list[Evaluation]
    attempts: list[Attempt]

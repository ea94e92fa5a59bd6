"""A job driven through the real lifecycle and event log with made-up figures: a worker without an engine.

The figures follow a fixed formula, so that a page built from them looks the same each time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import select

from jobs import eventlog, host_registry, lifecycle, submission
from jobs.db import Database
from jobs.host_registry import HostReport
from jobs.lifecycle import JobFailure, RetryPolicy
from jobs.models import Attempt, Event, Host, Job
from jobs.organizations import DEFAULT_ORGANIZATION
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.repository import Lease
from jobs.spec import JobSpec
from lomo_core import events as engine

_INCARNATION = "incarnation-1"
_HOST_NAME = "desk"
_HOST = f"{_HOST_NAME}/{_INCARNATION}"
_LEASE_S = 3600.0
_POLICY = RetryPolicy(max_failures=3, backoff_s=0.0)
_MB = 1_000_000
DEVICE_BYTES = 2_000 * _MB


def memory_mb(*, parameters: int, gradients: int, activations: int, other: int) -> dict[str, int]:
    """Memory by category, as a job's row has it, out of megabytes."""
    parts = {"parameters": parameters, "gradients": gradients, "optimizer": 0, "activations": activations}
    parts["other"] = other
    return {f"{name}_bytes": size * _MB for name, size in {**parts, "peak": sum(parts.values())}.items()}


# A little above what the steps below take.
PLAN = memory_mb(parameters=269, gradients=113, activations=355, other=405)


def submit(
    db: Database,
    name: str | None,
    *,
    model: str = "smollm2-135m-instruct",
    lomo: dict[str, Any] | None = None,
    plan: dict[str, int] | None = None,
    auto: Sequence[str] = (),
) -> str:
    """Queue a job and return its id. `plan` is its memory as planned at its creation, `auto` what that has chosen."""
    spec = JobSpec.model_validate(
        {
            "model": model,
            "training_file": "file-5be107d25be107d25be107d2",
            "validation_file": "file-a90c14bea90c14bea90c14be",
            "suffix": name,
            "seed": 17,
            "lomo": lomo or {},
        }
    )
    planned = PlannedJob(
        spec=spec.model_copy(update={"auto": list(auto)}),
        plan=plan and {"memory": plan},
        planned_bytes=plan and plan["peak_bytes"],
    )
    return submission.submit(
        db, planned=planned, owner=Owner(DEFAULT_ORGANIZATION), api_key_id=None, metadata={"team": "support"}
    ).id


def register(db: Database, name: str, *, available_mb: int | None = 16_000, slots: int = 2, cpu: bool = False) -> None:
    """Announce a host, as its worker does."""
    gpus = [] if cpu else [{"name": "NVIDIA GeForce RTX 4090", "memory_bytes": 24_000 * _MB}]
    report = HostReport(
        name=name,
        incarnation=_INCARNATION,
        memory_bytes=64_000 * _MB,
        available_bytes=None if available_mb is None else available_mb * _MB,
        device_kind=None if available_mb is None else "cpu" if cpu else "cuda",
        devices={"cpu": {"name": "AMD EPYC 7313", "count": 16}, "gpus": gpus},
        slots=slots,
    )
    host_registry.register_host(db, report)


@dataclass(kw_only=True)
class SimulatedRun:
    """A job that this object's methods bring forward; it is claimed when the object is made by `start`."""

    db: Database
    lease: Lease
    total_steps: int
    device_bytes: int = DEVICE_BYTES
    begun: float = field(default_factory=time.time)
    """Unix time of the attempt's first step: in the past, so that times and rates look like those of a real run."""
    step_s: float = 2.0
    step: int = 0
    line: int = 0

    @classmethod
    def start(
        cls,
        db: Database,
        *,
        total_steps: int,
        device_bytes: int = DEVICE_BYTES,
        steps_ago: int = 0,
        planned: dict[str, int] | None = None,
    ) -> SimulatedRun:
        """Claim the oldest queued job and begin to train it, as if `steps_ago` steps of time had passed since.

        It is claimed by the host `desk`, which is announced with room for everything unless it has been. `planned` is
        what the engine plans for the job's data.
        """
        run = cls.claim(db, total_steps=total_steps, device_bytes=device_bytes)
        run.begun -= steps_ago * run.step_s
        run._move_to_the_past(steps_ago * run.step_s)
        run._started(planned)
        return run

    @classmethod
    def claim(cls, db: Database, *, total_steps: int, device_bytes: int = DEVICE_BYTES) -> SimulatedRun:
        """Claim the oldest queued job, whose model is yet to be loaded."""
        with db.read() as session:
            announced = session.get(Host, _HOST_NAME) is not None
        if not announced:
            register(db, _HOST_NAME, available_mb=1_000_000, slots=100)
        claim = lifecycle.claim(db, owner=_HOST, lease_s=_LEASE_S)
        assert claim is not None, "no job is queued"
        return cls(db=db, lease=claim.lease, total_steps=total_steps, device_bytes=device_bytes)

    def train(self, steps: int, *, loss: float | None = None) -> None:
        """Take further steps; `loss` replaces the formula's (NaN is shipped as such)."""
        self.ship(*(self._step(self.step + 1 + n, loss) for n in range(steps)))
        self.step += steps

    def say(self, message: str, *, level: engine.Level = "info") -> None:
        """Write a line to the log."""
        self.ship(engine.Message(level=level, message=message))

    def evaluate(self, *, valid_loss: float | None = None, choice_accuracy: float | None = None) -> None:
        """Report an evaluation at the present step."""
        self.ship(
            engine.Evaluation(step=self.step, num_rows=200, valid_loss=valid_loss, choice_accuracy=choice_accuracy)
        )

    def sample(self, prompt: str, text: str) -> None:
        """Report an answer at the present step."""
        self.ship(engine.Sample(step=self.step, prompt=prompt, text=text, num_tokens=len(text.split())))

    def checkpoint(self, *, best_step: int | None = None) -> None:
        """Report a checkpoint at the present step."""
        self.ship(
            engine.Checkpoint(
                step=self.step,
                path=f"runs/checkpoint-{self.step}",
                manifest_sha256="9c41d7e0" * 8,
                num_bytes=270 * _MB,
                train_loss=_loss(self.step, self.total_steps),
                best_step=best_step,
            )
        )

    def succeed(self) -> None:
        """End well."""
        lifecycle.succeed(
            self.db, self.lease, model_path="models/tuned", weights_sha256="ab" * 32, trained_tokens=self.step * 1800
        )

    def fail(self, code: str, message: str) -> None:
        """End badly."""
        lifecycle.fail(self.db, self.lease, JobFailure(code=code, message=message))

    def run_out_of_memory(self, message: str, held: dict[str, int]) -> None:
        """End for want of memory: the engine's last words, with what it held, and the failure."""
        memory = engine.MemoryBytes(**held)
        self.ship(engine.Failed(code="out_of_memory", message=message, memory=memory, suggestion={"batch_size": 2}))
        self.fail("out_of_memory", message)

    def paused(self) -> None:
        """The worker has seen the request, and its engine has stopped."""
        lifecycle.paused(self.db, self.lease)

    def cancelled(self) -> None:
        """End as the user asked."""
        lifecycle.cancelled(self.db, self.lease)

    def lose_and_resume(self, *, from_step: int) -> None:
        """The worker dies; a second attempt goes on from the checkpoint at `from_step`."""
        lifecycle.retry(self.db, self.lease, reason="The worker on desk was restarted", policy=_POLICY)
        claim = lifecycle.claim(self.db, owner=_HOST, lease_s=_LEASE_S)
        assert claim is not None
        assert claim.lease.job_id == self.job_id
        self.lease, self.step, self.line = claim.lease, from_step, 0
        self._started()

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.lease.job_id

    def ship(self, *events: engine.Event) -> None:
        """Send events as the journal's next lines."""
        lines = [(self.line + n, engine.JournalLine(self._time_of(event), event)) for n, event in enumerate(events)]
        eventlog.ship(self.db, self.lease, lines, attempt=self.lease.attempt, relative=str)
        self.line += len(events)

    def _move_to_the_past(self, seconds: float) -> None:
        """Let the job have been created and claimed `seconds` ago."""
        past = timedelta(seconds=seconds)
        with self.db.transaction() as session:
            job = session.get_one(Job, self.job_id)
            job.created_at -= past
            job.started_at = job.started_at and job.started_at - past
            for attempt in session.scalars(select(Attempt).where(Attempt.job_id == self.job_id)):
                attempt.started_at -= past
            for event in session.scalars(select(Event).where(Event.job_id == self.job_id)):
                event.created_at -= past

    def _time_of(self, event: engine.Event) -> float:
        return self.begun + getattr(event, "step", self.step) * self.step_s

    def _started(self, planned: dict[str, int] | None = None) -> None:
        self.ship(
            engine.Started(
                step=self.step,
                total_steps=self.total_steps,
                num_parameters=134_515_008,
                num_train_rows=1010,
                num_truncated_rows=3,
                num_trainable_tokens=184_100,
                device="cpu (AMD EPYC 7313)",
                device_bytes=self.device_bytes,
                planned=None if planned is None else engine.MemoryBytes(**planned),
            )
        )

    def _step(self, step: int, loss: float | None) -> engine.Step:
        wave = math.sin(1.7 * step) + math.sin(0.61 * step)
        gradients, activations, other = 113 * _MB, int((300 + 25 * wave) * _MB), int((395 + 3 * wave) * _MB)
        parameters = 269 * _MB
        peak = parameters + gradients + activations + other
        warmup = max(1, self.total_steps // 30)
        decay = min(step / warmup, (self.total_steps - step) / max(1, self.total_steps - warmup))
        return engine.Step(
            step=step,
            total_steps=self.total_steps,
            epoch=step / self.total_steps,
            loss=_loss(step, self.total_steps) + 0.05 * wave if loss is None else loss,
            mean_token_accuracy=0.5,
            learning_rate=0.02 * decay,
            grad_norm=0.55 + 1.5 * math.exp(-step / 40) + 0.09 * wave,
            num_tokens=2048,
            num_trained_tokens=step * 1800,
            step_s=self.step_s,
            tokens_per_s=1024 + 9 * wave,
            memory=engine.MemoryBytes(
                parameters_bytes=parameters,
                gradients_bytes=gradients,
                optimizer_bytes=0,
                activations_bytes=activations,
                other_bytes=other,
                peak_bytes=peak,
            ),
        )


def _loss(step: int, total_steps: int) -> float:
    return 1.65 + 1.27 * math.exp(-6 * step / total_steps)

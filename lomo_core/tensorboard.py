"""A run's figures as a TensorBoard event file, written beside the journal and from the same events.

    tensorboard --logdir <data folder>/runs/<job>

Each start of the engine writes a file of its own into `<run folder>/tensorboard`. Where a run goes back to an earlier
step, the file says so by a session's start, and TensorBoard drops what it has of the steps that are repeated. Only the
file format of tensorboardX is used, not its writer, which would bring a thread and a queue into a process whose memory
is measured. Its import takes 0.2 s and 10 MiB beside torch's; a step takes 0.06 ms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import fields

from tensorboardX.proto.event_pb2 import Event as Record
from tensorboardX.proto.event_pb2 import SessionLog
from tensorboardX.record_writer import RecordWriter

from lomo_core.events import Evaluation, Event, MemoryBytes, RolledBack, Started, Step
from lomo_core.journal import Journal

FOLDER_NAME = "tensorboard"
# Between writes to disk, which wait for it. TensorBoard looks every 30 s.
_FLUSH_S = 5.0


class TensorBoardFile:
    """Listens to a journal. A file that cannot be written costs the run a warning and nothing else."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._writer: RecordWriter | None = None
        self._flushed_at = 0.0
        self._has_failed = False

    def note(self, event: Event) -> None:
        """Write what an event adds; most add nothing."""
        record = _to_record(event)
        if record is None or self._has_failed:
            return
        try:
            self._write(record)
        except OSError as error:
            self._fail(error)
            self.close()

    def close(self) -> None:
        """Put everything on disk and close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._journal.say("warn", f"TensorBoard's file is not complete, it cannot be written: {error.strerror}")

    def _write(self, record: Record) -> None:
        now = record.wall_time = time.time()
        if self._writer is None:
            folder = self._journal.path.parent / FOLDER_NAME
            folder.mkdir(exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            self._writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}.lomo"))
            self._writer.write(Record(wall_time=now, file_version="brain.Event:2").SerializeToString())
        self._writer.write(record.SerializeToString())
        if now - self._flushed_at > _FLUSH_S:
            self._writer.flush()
            self._flushed_at = now


def _to_record(event: Event) -> Record | None:
    match event:
        case Started() | RolledBack():
            return Record(step=event.step + 1, session_log=SessionLog(status=SessionLog.START))
        case Step():
            return _figures(event.step, _step_values(event))
        case Evaluation():
            return _figures(event.step, _evaluation_values(event))
        case _:
            return None


def _figures(step: int, values: Mapping[str, float | None]) -> Record:
    """Values by tag at a step; those that are not known or not finite are left out."""
    record = Record(step=step)
    for tag, value in values.items():
        if value is not None and math.isfinite(value):
            record.summary.value.add(tag=tag, simple_value=value)
    return record


def _step_values(event: Step) -> dict[str, float | None]:
    return {
        "train/loss": event.loss,
        "train/token_accuracy": event.mean_token_accuracy,
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "train/tokens_per_s": event.tokens_per_s,
        "train/step_s": event.step_s,
        **{f"memory/{field.name}": getattr(event.memory, field.name) for field in fields(MemoryBytes)},
    }


def _evaluation_values(event: Evaluation) -> dict[str, float | None]:
    return {
        "eval/loss": event.valid_loss,
        "eval/token_accuracy": event.valid_mean_token_accuracy,
        "eval/choice_accuracy": event.choice_accuracy,
        "eval/seconds": event.seconds,
    }

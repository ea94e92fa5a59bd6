"""TensorBoard's files, read back record by record: what is in them, and what of it counts after a run went back."""

from __future__ import annotations

import json
import struct
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event as Record
from tensorboardX.record_writer import masked_crc32c

from lomo_core import events
from lomo_core.journal import Journal
from lomo_core.tensorboard import FOLDER_NAME, TensorBoardFile

MEMORY = events.MemoryBytes(
    parameters_bytes=100, gradients_bytes=10, optimizer_bytes=0, activations_bytes=20, other_bytes=5, peak_bytes=135
)
STARTED = events.Started(
    step=0,
    total_steps=9,
    num_parameters=1,
    num_train_rows=1,
    num_truncated_rows=0,
    num_trainable_tokens=1,
    device="cpu",
    device_bytes=None,
)
ROLLED_BACK = events.RolledBack(step=1, first_skipped=2, last_skipped=3, checkpoint="step-1")


def step(number: int, loss: float) -> events.Step:
    return events.Step(
        step=number,
        total_steps=9,
        epoch=0.0,
        loss=loss,
        mean_token_accuracy=None,
        learning_rate=0.5,
        grad_norm=2.0,
        num_tokens=8,
        num_trained_tokens=8,
        step_s=0.25,
        tokens_per_s=32.0,
        memory=MEMORY,
    )


def write(run_dir: Path, *given: events.Event) -> None:
    """What a start of the engine writes that says this."""
    with closing(Journal(run_dir)) as journal, closing(TensorBoardFile(journal)) as file:
        journal.add_listener(file.note)
        for event in given:
            journal.write(event)


def read(run_dir: Path) -> list[Record]:
    """Every record of a run's files, its checksums seen to."""
    found = []
    for path in sorted((run_dir / FOLDER_NAME).iterdir()):
        assert "tfevents" in path.name
        raw = path.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            data = raw[12 : 12 + size]
            assert struct.unpack("<I", raw[8:12]) == (masked_crc32c(raw[:8]),)
            assert struct.unpack("<I", raw[12 + size : 16 + size]) == (masked_crc32c(data),)
            found.append(Record.FromString(data))
            raw = raw[16 + size :]
    return found


def points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    """A tag's points as TensorBoard shows them: a session's start drops those from its step on."""
    kept: list[tuple[int, float]] = []
    for record in read(run_dir):
        if record.HasField("session_log"):
            kept = [point for point in kept if point[0] < record.step]
        kept += [(record.step, value.simple_value) for value in record.summary.value if value.tag == tag]
    return kept


def test_figures_by_tag(tmp_path: Path) -> None:
    write(tmp_path, STARTED, step(1, 3.0), events.Evaluation(step=1, num_rows=2, valid_loss=1.5))
    version, start, first, evaluation = read(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert start.HasField("session_log")
    values = {value.tag: value.simple_value for value in first.summary.value}
    assert (first.step, values["train/loss"], values["memory/peak_bytes"]) == (1, 3.0, 135)
    assert "train/token_accuracy" not in values
    assert {value.tag: value.simple_value for value in evaluation.summary.value}["eval/loss"] == 1.5


def test_repeated_steps_take_the_place_of_the_first_ones(tmp_path: Path) -> None:
    write(tmp_path, STARTED, step(1, 5.0), step(2, float("nan")), step(3, 9.0), ROLLED_BACK, step(4, 4.0))
    assert points(tmp_path, "train/loss") == [(1, 5.0), (4, 4.0)]
    write(tmp_path, replace(STARTED, step=1), step(2, 4.5))
    assert points(tmp_path, "train/loss") == [(1, 5.0), (2, 4.5)]


@pytest.mark.parametrize("place", ["file", "record"])
def test_a_file_that_cannot_be_written_is_one_warning(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "file":
        (tmp_path / FOLDER_NAME).write_text("in the way")
    else:
        monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: Path("/dev/full").open("wb"))  # noqa: SIM115
    write(tmp_path, STARTED, *(step(number, 1.0) for number in range(1, 200)))
    lines = [json.loads(line) for line in (tmp_path / events.JOURNAL_NAME).read_text().splitlines()]
    warnings = [line["message"] for line in lines if line["type"] == "message"]
    assert len(warnings) == 1
    assert "cannot be written" in warnings[0]
    assert len(lines) == 201

"""`WandbLogger.sync` on a finished job, offline: run by an environment that has `wandb`. Argument: the job's id.

`mode` is handed on to `wandb.init`. Data sets are left out: `wandb` takes no artifact as an input of
an offline run.

Prints, as one line of JSON, what the run's file on disk holds afterwards: its history and its summary.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.integration.openai.fine_tuning import WandbLogger
from wandb.proto import wandb_internal_pb2

FILE_HEADER = 7
BLOCK = 32768
RECORD_HEADER = struct.Struct("<IHB")
WHOLE, LAST = 1, 4


def read_run(path: Path) -> dict[str, Any]:
    """The history and the summary in a run's file."""
    history, summary = [], {}
    for data in read_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(_read(record.history.item))
        elif kind == "summary":
            summary.update(_read(record.summary.update))
    return {"history": history, "summary": summary}


def read_records(content: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, which a run's file has after seven bytes of its own.

    In blocks of 32 KiB a record lies whole (1), or as a first (2), middle (3) and last (4) part, each after a
    checksum, a length and its type.
    """
    place, parts = FILE_HEADER, []
    while place + RECORD_HEADER.size <= len(content):
        left = BLOCK - place % BLOCK
        if left < RECORD_HEADER.size:
            place += left
            continue
        _checksum, length, kind = RECORD_HEADER.unpack_from(content, place)
        place += RECORD_HEADER.size
        parts.append(content[place : place + length])
        place += length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []


def _read(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


if __name__ == "__main__":
    WandbLogger.sync(fine_tune_job_id=sys.argv[1], mode="offline", log_datasets=False)
    wandb.teardown()  # what writes the run's file has ended afterwards
    (run_file,) = Path(os.environ["WANDB_DIR"]).rglob("run-*.wandb")
    print(json.dumps(read_run(run_file)))

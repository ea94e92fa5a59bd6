"""Where files are kept: what the setting may be, and that nothing of S3 is loaded without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs import storage
from jobs.settings import JobsSettings


def make(url: str) -> str:
    settings = JobsSettings(database_url="d", broker_url="b", data_dir=Path("/data"), storage_url=url)
    return settings.storage_url


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("", ""),
        ("s3://bucket", "s3://bucket"),
        ("s3://my.bucket-1/a/b_c/", "s3://my.bucket-1/a/b_c"),
    ],
)
def test_a_bucket_or_nothing(url: str, kept: str) -> None:
    assert make(url) == kept


@pytest.mark.parametrize(
    "url",
    [
        "memory://x",
        "file:///data",
        "bucket",
        "s3://",
        "s3://Bucket",
        "s3://b",
        "s3://key:secret@bucket",
        "s3://bucket//a",
        "s3://bucket/a?x=1",
    ],
)
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="s3://bucket or s3://bucket/prefix"):
        make(url)


def test_without_the_library_the_setting_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.settings.is_installed", lambda: False)
    with pytest.raises(ValidationError, match=r"pip install 'lomo-server\[s3\]'"):
        make("s3://bucket")
    assert make("") == ""


def test_an_object_is_told_from_a_file_of_the_data_folder() -> None:
    assert storage.is_object(storage.object_url("s3://bucket/a", "file-1"))
    assert not storage.is_object(None)
    assert not storage.is_object("runs/ftjob-1/attempt-1/step_metrics.csv")


def test_nothing_of_s3_is_loaded_before_it_is_used() -> None:
    program = (
        "import sys, server.main, worker.tasks\n"
        "assert not {'fsspec', 's3fs', 'botocore', 'aiohttp'} & set(sys.modules)\n"
        "from jobs import storage\n"
        "storage._connect('s3://bucket/x')\n"
        "assert 's3fs' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

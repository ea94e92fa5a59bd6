"""Data before it costs anything, over HTTP: bad uploads, jobs that wait for their check, reports and previews."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import checking
from jobs.errors import BusyError
from jobs.row_preview import PreviewPlaces
from server.settings import ServerSettings
from tests.support.tiny_model import PLAIN_TEMPLATE, chat, make_tiny_model

from ..jobs.test_checking import file_report, report
from .conftest import MODEL, TRAIN_ROW, Site

BAD = Path(__file__).parents[2] / "data" / "bad"
INDEX = json.loads((BAD / "index.json").read_text(encoding="utf-8"))
FILES = [(item["file"], item["line"]) for item in INDEX if item["file"] != "filenames.json"]
FILENAMES = json.loads((BAD / "filenames.json").read_text(encoding="utf-8"))
HYPERPARAMETERS = json.loads((BAD / "hyperparameters.json").read_text(encoding="utf-8"))
# Of the odd ones, what stands for itself: "auto" is chosen, null is the default.
ACCEPTED = ({"learning_rate": None}, {"batch_size": "auto"})
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SHOWN = "tiny-shown"


@pytest.fixture
def settings(settings: ServerSettings) -> ServerSettings:
    """As every server's, with the check of files."""
    return settings.model_copy(update={"data_checks": True})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a template. Costs some seconds, once."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def place_model(site: Site, tiny_model: Path) -> Callable[..., None]:
    """Put the tiny model, with a template of the test's own, where the server looks for it."""

    def place(template: str = PLAIN_TEMPLATE) -> None:
        folder = site.settings.data_dir / "models" / SHOWN
        folder.mkdir(parents=True, exist_ok=True)
        for path in tiny_model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    return place


def check(site: Site, found: dict[str, Any]) -> None:
    """Do the check that waits, as a worker would."""
    claim = checking.claim_check(site.db, owner="gpu1/1", lease_s=60, max_failures=3)
    assert claim is not None
    checking.finish_check(site.db, claim, found)


@pytest.mark.parametrize(("name", "line"), FILES)
def test_a_bad_file_is_refused_with_its_line_or_left_to_the_check(site: Site, name: str, line: int | None) -> None:
    """What is no JSON lines is refused while its uploader waits; what a row must hold, the check tells (its own table
    is in tests/unit/engine/test_data_check.py)."""
    response = site.client().post(
        "/v1/files", files={"file": (name, (BAD / name).read_bytes())}, data={"purpose": "fine-tune"}
    )
    if response.status_code == 200:
        # For the official client's wait_for_processing.
        assert response.json()["status"] == "processed"
        assert name.startswith(("05", "07", "09", "11", "13", "23", "31", "35", "37")), response.text
        return
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_file_format", "file")
    if line is not None:
        assert f"Line {line} " in error["message"], error


@pytest.mark.parametrize("filename", FILENAMES)
def test_odd_file_names_are_kept_as_text_alone(site: Site, filename: str) -> None:
    before = {path for path in site.settings.data_dir.rglob("*") if path.is_file()}
    boundary = "----odd"
    quoted = filename.replace("\\", "\\\\").replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    body = (
        (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n\r\n'
        ).encode()
        + TRAIN_ROW
        + f"\r\n--{boundary}--\r\n".encode()
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    response = site.client().post("/v1/files", content=body, headers=headers)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["param"] == "file"
        return
    file = response.json()
    assert "/" not in file["filename"]
    assert file["filename"].isprintable()
    made = {path for path in site.settings.data_dir.rglob("*") if path.is_file()} - before
    assert made == {site.settings.files_dir / file["id"]}
    content = site.client().get(f"/v1/files/{file['id']}/content")
    assert content.status_code == 200
    assert "x-injected" not in content.headers
    assert content.headers["content-disposition"].startswith("attachment")


@pytest.mark.parametrize("values", HYPERPARAMETERS, ids=str)
@pytest.mark.parametrize("place", ["lomo", "method", "hyperparameters", "top"])
def test_odd_hyperparameters_are_refused_by_name(site: Site, values: dict[str, Any], place: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "lomo": {"lomo": values},
        "method": {"method": {"type": "supervised", "supervised": {"hyperparameters": values}}},
        "hyperparameters": {"hyperparameters": values},
        "top": values,
    }
    body = {"model": MODEL, "training_file": site.upload(), **bodies[place]}
    response = site.client().post("/v1/fine_tuning/jobs", json=body)
    if response.status_code == 200:
        assert values in ACCEPTED, response.text
        return
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    if values.get("seed", 0) > 2**64:
        # No number of JSON's common kind: refused while the body is read, before anything has a name.
        assert error["code"] == "invalid_json"
        return
    assert error["param"].split(".")[-1] in values


def test_a_job_waits_for_its_check(site: Site) -> None:
    job_id = site.submit()
    assert site.get(job_id)["status"] == "validating_files"
    assert site.get(job_id)["lomo"]["data"] is None
    missing = site.client().get(f"/v1/fine_tuning/jobs/{job_id}/data_report")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "report_not_found")
    check(site, report(file_report()))
    job = site.get(job_id)
    assert job["status"] == "queued"
    assert job["lomo"]["data"]["training_file"]["num_trained_tokens"] == 40
    assert job["lomo"]["data"]["estimate"]["steps"] == 2
    assert job["lomo"]["data"]["estimate"]["peak_bytes"] == job["lomo"]["memory"]["planned_peak_bytes"] > 0
    whole = site.client().get(f"/v1/fine_tuning/jobs/{job_id}/data_report").raise_for_status().json()
    assert whole["job_id"] == job_id
    assert whole["training_file"] == file_report()
    assert whole["estimate"]["peak_bytes"] == job["lomo"]["memory"]["planned_peak_bytes"]
    listed = site.client().get("/v1/fine_tuning/jobs").raise_for_status().json()
    assert listed["data"][0]["lomo"]["data"] == job["lomo"]["data"]
    site.claim(job_id)


def test_a_failed_check_is_the_jobs_error(site: Site) -> None:
    job_id = site.submit()
    wrong = [{"line": 3, "where": "line 3", "reason": 'messages[0].role is "bot"'}]
    check(site, report(file_report(num_errors=1, errors=wrong)))
    job = site.get(job_id)
    assert job["status"] == "failed"
    assert job["error"]["code"] == "invalid_training_file"
    assert 'line 3: messages[0].role is "bot"' in job["error"]["message"]
    frames = site.follow_job(job_id)
    frames.join()
    assert frames.is_done


def test_a_job_can_be_cancelled_while_it_is_checked(site: Site) -> None:
    job_id = site.submit()
    cancelled = site.client().post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    assert checking.claim_check(site.db, owner="gpu1/1", lease_s=60, max_failures=3) is None


def test_a_file_has_the_newest_report(site: Site) -> None:
    file_id = site.upload()
    missing = site.client().get(f"/v1/files/{file_id}/report")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "report_not_found")
    for num_rows in (5, 6):
        job_id = site.submit(training_file=file_id)
        check(site, report(file_report(num_rows=num_rows)))
    found = site.client().get(f"/v1/files/{file_id}/report").raise_for_status().json()
    assert (found["job_id"], found["report"]["num_rows"]) == (job_id, 6)
    as_validation = site.submit(validation_file=file_id)
    check(site, report(file_report(), validation_file=file_report(num_rows=7)))
    found = site.client().get(f"/v1/files/{file_id}/report").raise_for_status().json()
    assert (found["job_id"], found["report"]["num_rows"]) == (as_validation, 7)


def test_a_row_is_shown_with_its_trained_tokens(site: Site, place_model: Callable[..., None]) -> None:
    place_model()
    file_id = site.upload((json.dumps(chat("a", "b")) + "\n" + json.dumps(chat("what?", "that"))).encode())
    url = f"/v1/files/{file_id}/preview"
    shown = site.client(timeout=60).get(url, params={"row": 2, "model": SHOWN}).raise_for_status().json()
    assert shown["text"] == "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\nthat<|im_end|>\n"
    assert "".join(token["text"] for token in shown["tokens"] if token["trained"]) == "that<|im_end|>"
    far = site.client(timeout=60).get(url, params={"row": 3, "model": SHOWN})
    assert (far.status_code, far.json()["error"]["param"]) == (400, "row")
    assert "the file has 2" in far.json()["error"]["message"]
    for query in ({"row": 0, "model": SHOWN}, {"row": 1}, {"row": 1, "model": "no-such"}, {"model": "../../etc"}):
        response = site.client().get(url, params=query)
        assert response.status_code == 400, query


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(FOREVER, id="endless"),
        pytest.param("{{ ('x' * 10**9) ~ ('y' * 10**9) }}", id="larger than memory"),
        pytest.param("{{ ''.__class__.__mro__[1].__subclasses__() }}", id="out of the sandbox"),
        pytest.param("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", id="recursion"),
    ],
)
def test_a_hostile_template_ends_in_an_answer(
    site: Site, place_model: Callable[..., None], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.row_preview.MOST_CPU_S", 4)
    place_model(template)
    file_id = site.upload()
    response = site.client(timeout=60).get(f"/v1/files/{file_id}/preview", params={"model": SHOWN})
    assert response.status_code == 400, response.text
    assert "template" in response.json()["error"]["message"]


def test_a_third_preview_at_once_is_told_to_come_later() -> None:
    """`server/errors.py` makes a 429 of it."""
    places = PreviewPlaces()
    with places.take():
        with places.take(), pytest.raises(BusyError, match="ask again in a few seconds"), places.take():
            pytest.fail("there were places for three")
        with places.take():
            pass  # the second one's is free again

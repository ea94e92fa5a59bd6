"""Files, jobs, models, health: what is sent, what is printed where, and how failures are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cli.client import ApiClient
from cli.connection import Connection
from tests.support.scripted_server import JOB_ID, KEY, Response, ScriptedServer, make_event, make_job

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Lomo

ROOT = Path(__file__).parents[3]
JOBS = "/fine_tuning/jobs"
JOB = f"{JOBS}/{JOB_ID}"
FILE = {
    "id": "file-abc",
    "object": "file",
    "bytes": 2048,
    "created_at": 1_760_000_000,
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
}


def page(*items: dict, has_more: bool = False) -> Response:
    return Response(body={"object": "list", "data": list(items), "has_more": has_more})


def test_upload_prints_the_id_and_sends_the_bytes(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "train.jsonl").write_bytes(data)
    server.on("POST", "/files", Response(body=FILE))
    code, out, err = lomo("files", "upload", str(tmp_path / "train.jsonl"))
    assert (code, out, err) == (0, "file-abc\n", "Uploaded train.jsonl (2.9 MiB) as file-abc.\n")
    [request] = server.requests
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.headers["User-Agent"].startswith("lomo-cli/")
    assert 'name="purpose"\r\n\r\nfine-tune\r\n' in request.body[:1000].decode("latin-1")
    assert 'filename="train.jsonl"' in request.body[:1000].decode("latin-1")
    assert data in request.body


def test_the_project_is_named_where_it_is_given(
    server: ScriptedServer, lomo: Lomo, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {"error": {"message": "Not this one.", "code": "mismatched_project", "param": None}}
    server.on("GET", "/files", page(FILE), page(FILE), Response(status=401, body=refused))
    assert lomo("files", "list").code == 0
    monkeypatch.setenv("LOMO_PROJECT", "proj_1")
    assert lomo("files", "list").code == 0
    assert [request.headers.get("OpenAI-Project") for request in server.requests] == [None, "proj_1"]
    assert lomo("files", "list").err == "error: Not this one. [mismatched_project]\n"


def test_an_upload_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    read: list[int] = []
    # The server is a process of its own, so that what is measured is the client alone.
    code = (
        "import http.server\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        left = int(self.headers['Content-Length'])\n"
        "        while left: left -= len(self.rfile.read(min(left, 1 << 16)))\n"
        "        self.send_response(200); self.send_header('Content-Length', '2'); self.end_headers()\n"
        "        self.wfile.write(b'{}')\n"
        "s = http.server.HTTPServer(('127.0.0.1', 0), H); print(s.server_port, flush=True); s.handle_request()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        port = int(other.stdout.readline())
        with ApiClient(Connection(f"http://127.0.0.1:{port}/v1", "sk-x")) as client:
            tracemalloc.start()
            client.upload(path, purpose="fine-tune", on_read=read.append)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert sum(read) == 64 << 20
    assert peak < 4 << 20


def test_a_refused_upload_says_why(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    message = "Line 1 is not valid JSON. A training file holds one JSON object per line."
    error = {"message": message, "type": "invalid_request_error", "param": "file", "code": "invalid_file_format"}
    server.on("POST", "/files", Response(400, body={"error": error}))
    code, out, err = lomo("files", "upload", str(tmp_path / "bad.jsonl"))
    assert (code, out, err) == (1, "", f"error: {message} [invalid_file_format]\n")


def test_a_row_is_shown_with_what_is_learnt_marked(server: ScriptedServer, lomo: Lomo) -> None:
    tokens = [("hi", False), ("th", True), ("at", True), ("\x1b", False)]
    body = {
        "where": "line 3",
        "format": "chat",
        "num_tokens": 4,
        "num_trained": 2,
        "is_truncated": True,
        "tokens": [{"id": 1, "text": text, "trained": trained} for text, trained in tokens],
    }
    server.on("GET", "/files/file-abc/preview", Response(body=body))
    code, out, _ = lomo("preview", "file-abc", "--model", "tiny", "--row", "3")
    assert code == 0
    assert "line 3 of file-abc" in out
    assert "4, 2 of them trained (its beginning is cut)" in out
    assert "hi>>that<<\N{REPLACEMENT CHARACTER}" in out
    assert json.loads(lomo("-o", "json", "preview", "file-abc", "--model", "tiny").out) == body


def test_files_are_listed_shown_and_deleted(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("GET", "/files", page(FILE))
    server.on("GET", "/files/file-abc", Response(body=FILE))
    server.on("DELETE", "/files/file-abc", Response(body={"id": "file-abc", "object": "file", "deleted": True}))
    lines = lomo("files", "list").out.splitlines()
    assert lines[0].split() == ["ID", "FILENAME", "SIZE", "PURPOSE", "CREATED"]
    assert lines[1].split()[:5] == ["file-abc", "train.jsonl", "2.0", "KiB", "fine-tune"]
    assert not [line for line in lines if line.endswith(" ")]
    assert "train.jsonl" in lomo("files", "get", "file-abc").out
    assert json.loads(lomo("files", "get", "file-abc", "-o", "json").out) == FILE
    assert lomo("files", "delete", "file-abc").out == "file-abc\n"


def test_content_goes_to_stdout_or_to_a_file(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    server.on("GET", "/files/file-abc/content", Response(body=data))
    command = [sys.executable, "-m", "cli.main", "files", "content", "file-abc"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout == data
    code, out, err = lomo("files", "content", "file-abc", "--to", str(tmp_path / "result.csv"))
    assert (code, out, err) == (0, "", f"Wrote {tmp_path / 'result.csv'}.\n")
    assert (tmp_path / "result.csv").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["result.csv"]


def test_a_broken_download_leaves_no_file(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    server.on("GET", "/files/file-abc/content", Response(chunks=[b"half"], breaks=True))
    code, _, err = lomo("files", "content", "file-abc", "--to", str(tmp_path / "result.csv"))
    assert code == 1
    assert err.startswith(f"error: the connection to {server.url.removesuffix('/v1')} broke")
    assert list(tmp_path.iterdir()) == []


def test_a_download_into_nowhere_is_wrong_usage(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    server.on("GET", "/files/file-abc/content", Response(body=b"x"))
    code, _, err = lomo("files", "content", "file-abc", "--to", str(tmp_path / "none" / "result.csv"))
    assert code == 2
    assert "No such file or directory" in err


def test_jobs_are_listed_page_by_page(server: ScriptedServer, lomo: Lomo) -> None:
    first = [make_job(id=f"ftjob-{number}") for number in range(100)]
    last = [make_job(id=f"ftjob-{number}") for number in range(100, 130)]
    server.on("GET", JOBS, page(*first, has_more=True), page(*last[:20], has_more=True))
    code, out, err = lomo("jobs", "list", "--limit", "120")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == [f"ftjob-{number}" for number in range(120)]
    assert "There are more" in err
    assert [request.path.partition("?")[2] for request in server.requests] == [
        "limit=100",
        "after=ftjob-99&limit=20",
    ]


def test_an_empty_list_has_its_headings(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("GET", JOBS, page())
    assert lomo("jobs", "list").out.split() == ["ID", "STATUS", "STEP", "CREATED", "MODEL"]


def test_a_job_is_shown(server: ScriptedServer, lomo: Lomo) -> None:
    evaluations = [
        {"step": 0, "valid_loss": None, "choice_accuracy": 0.36},
        {"step": 9, "valid_loss": 1.5, "choice_accuracy": 0.86},
    ]
    lomo_fields = {"step": 9, "total_steps": 90, "eta_s": 73.0, "loss": 1.25, "evaluations": evaluations}
    server.on("GET", JOB, Response(body=make_job(status="running", lomo=lomo_fields)))
    lines = lomo("jobs", "get", JOB_ID).out.splitlines()
    fields = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    assert fields["status"] == "running"
    assert fields["step"] == "9/90"
    assert fields["time"].split() == ["left", "1m13s"]
    assert lines[-1].strip() == "step 9: loss 1.500, choice accuracy 0.860"
    assert "finished" not in fields


def test_a_job_shows_its_plan_what_it_chose_and_why_it_waits(server: ScriptedServer, lomo: Lomo) -> None:
    memory = {"planned_peak_bytes": 3 << 29, "measured_peak_bytes": None}
    lomo_fields = {
        "activation_checkpointing": True,
        "auto": ["batch_size", "activation_checkpointing"],
        "waiting_for": "memory: needs 1.5 GiB, the largest free host has 0.4 GiB.",
        "memory": memory,
    }
    job = make_job(status="queued", lomo=lomo_fields, hyperparameters={"n_epochs": 1, "batch_size": 2})
    ended = make_job(status="succeeded", lomo={"memory": {**memory, "measured_peak_bytes": 1 << 30}})
    server.on("GET", JOB, Response(body=job), Response(body=ended))
    shown = [line.split("  ") for line in lomo("jobs", "get", JOB_ID).out.splitlines()]
    fields = {parts[0]: parts[-1].strip() for parts in shown}
    assert fields["waiting for"] == lomo_fields["waiting_for"]
    assert fields["planned peak"] == "1.5 GiB"
    assert fields["chosen by plan"] == "batch_size=2, activation_checkpointing=true"
    assert "measured peak" not in fields
    assert "1.0 GiB (planned / measured 1.50)" in lomo("jobs", "get", JOB_ID).out


WONT_FIT = (
    "This run does not fit: it needs 9.10 GiB, and the largest host, desk, has 2.00 GiB.\n"
    "  parameters   0.26 GiB\n"
    "  activations  8.00 GiB\n"
    "The nearest setting that fits: batch_size 1 (1.10 GiB)."
)


def test_an_error_of_several_lines_keeps_them(server: ScriptedServer, lomo: Lomo) -> None:
    error = {"message": WONT_FIT, "type": "invalid_request_error", "param": None, "code": "wont_fit", "nearest": {}}
    server.on("POST", JOBS, Response(400, body={"error": error}))
    code, out, err = lomo("jobs", "create", "--model", "m", "--training-file", "file-a")
    assert (code, out) == (1, "")
    first, *rest = WONT_FIT.splitlines()
    assert err.splitlines() == [f"error: {first} [wont_fit]", *rest]


def test_a_failed_jobs_account_keeps_its_lines(server: ScriptedServer, lomo: Lomo) -> None:
    error = {"code": "out_of_memory", "message": f"{WONT_FIT}\x1b[31m", "param": None}
    server.on("GET", JOB, Response(body=make_job(status="failed", error=error, lomo={})))
    server.on("GET", f"{JOB}/events", Response(chunks=[b"data: [DONE]\n\n"]))
    lines = lomo("jobs", "get", JOB_ID).out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("error"))
    indent = lines[start].index("This run")
    assert [line[indent:] for line in lines[start : start + 4]] == f"{WONT_FIT}\ufffd[31m".splitlines()
    err = lomo("jobs", "follow", JOB_ID).err
    assert err == f"The job failed: {WONT_FIT}\ufffd[31m\n"


def test_options_may_stand_before_or_after_the_command(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("GET", JOB, Response(body=make_job()))
    assert json.loads(lomo("-o", "json", "jobs", "get", JOB_ID).out) == make_job()
    assert json.loads(lomo("jobs", "get", JOB_ID, "--output", "json").out) == make_job()
    assert lomo("--url", "http://127.0.0.1:1", "jobs", "get", JOB_ID, "--url", server.url).code == 0


@pytest.mark.parametrize(
    ("status", "said"), [("cancelled", "Cancelled."), ("running", "Its worker has been asked to stop.")]
)
def test_cancel(server: ScriptedServer, lomo: Lomo, status: str, said: str) -> None:
    server.on("POST", f"{JOB}/cancel", Response(body=make_job(status=status)))
    assert lomo("jobs", "cancel", JOB_ID) == (0, f"{JOB_ID}\n", f"{said}\n")


@pytest.mark.parametrize(
    ("verb", "status", "said"),
    [
        ("pause", "paused", "Paused."),
        ("pause", "running", "Its worker has been asked to pause it."),
        ("resume", "queued", "Queued."),
        ("resume", "running", "The pause was taken back: the job goes on."),
    ],
)
def test_pause_and_resume(server: ScriptedServer, lomo: Lomo, verb: str, status: str, said: str) -> None:
    server.on("POST", f"{JOB}/{verb}", Response(body=make_job(status=status)))
    assert lomo("jobs", verb, JOB_ID) == (0, f"{JOB_ID}\n", f"{said}\n")
    assert json.loads(lomo("jobs", verb, JOB_ID, "-o", "json").out)["status"] == status


def test_delete_tells_what_is_free_again(server: ScriptedServer, lomo: Lomo) -> None:
    answer = {"object": "fine_tuning.job", "id": JOB_ID, "deleted": True, "bytes_freed": 3 << 30}
    server.on("DELETE", JOB, Response(body=answer))
    assert lomo("jobs", "delete", JOB_ID) == (0, f"{JOB_ID}\n", "Deleted: 3.0 GiB are free again.\n")
    refused = {"error": {"message": "Job has not ended.", "type": "invalid_request_error", "param": None, "code": "x"}}
    server.on("DELETE", JOB, Response(status=400, body=refused))
    code, out, err = lomo("jobs", "delete", JOB_ID)
    assert (code, out, "has not ended" in err) == (1, "", True)


def test_a_clone_sends_only_what_changes(server: ScriptedServer, lomo: Lomo) -> None:
    made = make_job(id="ftjob-2")
    server.on("POST", f"{JOB}/clone", Response(body=made))
    assert lomo("jobs", "clone", JOB_ID).out == "ftjob-2\n"
    options = ("--seed", "4", "--optimizer", "adalomo", "--n-epochs", "3", "--metadata", "a=b", "--suffix", "x")
    assert lomo("jobs", "clone", JOB_ID, *options).code == 0
    assert [request.json for request in server.requests] == [
        {},
        {
            "seed": 4,
            "suffix": "x",
            "metadata": {"a": "b"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
            "lomo": {"optimizer": "adalomo"},
        },
    ]


def log_line(seq: int, text: str) -> dict:
    return {"object": "fine_tuning.job.log", "id": f"ftlog-x-{seq}", "created_at": 1, "text": text, "seq": seq}


def test_logs_are_shown_oldest_first_and_cannot_drive_the_terminal(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("GET", f"{JOB}/logs", page(log_line(2, "\x1b[31msecond"), log_line(1, "a\tfirst")))
    assert lomo("jobs", "logs", JOB_ID).out == "a       first\n\ufffd[31msecond\n"
    assert "limit=100" in server.requests[0].path


def test_followed_logs_end_with_the_stream(server: ScriptedServer, lomo: Lomo) -> None:
    lines = [log_line(1, "first"), log_line(2, "second")]
    frames = [f"id: {line['seq']}\nevent: log\ndata: {json.dumps(line)}\n\n".encode() for line in lines]
    server.on("GET", f"{JOB}/logs", Response(chunks=[*frames, b"data: [DONE]\n\n"]))
    assert lomo("jobs", "logs", JOB_ID, "--follow").out == "first\nsecond\n"
    out = lomo("jobs", "logs", JOB_ID, "--follow", "-o", "json").out
    assert [json.loads(line) for line in out.splitlines()] == lines


def test_the_queue(server: ScriptedServer, lomo: Lomo) -> None:
    item = {
        "job_id": JOB_ID,
        "position": 3,
        "jobs_ahead": 2,
        "predicted_start": None,
        "waiting_for": "slot: all taken.",
    }
    server.on("GET", "/queue", Response(body={"num_queued": 5, "num_running": 1, "data": [item]}))
    code, out, err = lomo("queue")
    assert (code, err) == (0, "5 queued and 1 running, of all organizations.\n")
    assert out.splitlines()[1].split() == ["3", JOB_ID, "2", "-", "slot:", "all", "taken."]


def test_events_are_shown_oldest_first(server: ScriptedServer, lomo: Lomo) -> None:
    events = [make_event(2, "second", level="warn"), make_event(1, "first")]
    server.on("GET", f"{JOB}/events", page(*events))
    lines = lomo("jobs", "events", JOB_ID).out.splitlines()
    assert [line[10:] for line in lines] == ["first", "warning: second"]
    assert json.loads(lomo("jobs", "events", JOB_ID, "-o", "json").out)["data"] == events


def test_followed_events_as_json_are_lines(server: ScriptedServer, lomo: Lomo) -> None:
    events = [make_event(1, "first"), make_event(2, "second")]
    frames = [f"id: {event['seq']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
    server.on("GET", f"{JOB}/events", Response(chunks=[*frames, b"data: [DONE]\n\n"]))
    out = lomo("jobs", "events", JOB_ID, "--follow", "-o", "json").out
    assert [json.loads(line) for line in out.splitlines()] == events


def test_checkpoints_and_metrics_and_models(server: ScriptedServer, lomo: Lomo) -> None:
    checkpoint = {
        "id": "ftckpt_1",
        "created_at": 1_760_000_000,
        "fine_tuned_model_checkpoint": "ft:m:::ckpt-step-9",
        "metrics": {"step": 9, "train_loss": 1.5},
        "step_number": 9,
    }
    server.on("GET", f"{JOB}/checkpoints", page(checkpoint))
    assert lomo("jobs", "checkpoints", JOB_ID).out.splitlines()[1].split()[:4] == ["ftckpt_1", "9", "1.5", "-"]

    names = ("loss", "mean_token_accuracy", "learning_rate", "grad_norm", "tokens_per_s")
    columns = {"step": [1, 2], **{name: [0.5, None] for name in names}, "peak_bytes": [1 << 30, None]}
    server.on("GET", f"{JOB}/metrics", Response(body={"columns": columns}))
    lines = lomo("jobs", "metrics", JOB_ID).out.splitlines()
    assert lines[1].split() == ["1", "0.5", "0.5", "0.5", "0.5", "0.5", "1.0", "GiB"]
    assert lines[2].split() == ["2", "-", "-", "-", "-", "-", "-"]
    assert server.requests[-1].path.endswith("?max_points=20")
    assert lomo("jobs", "metrics", JOB_ID, "-o", "json").code == 0
    assert server.requests[-1].path.endswith("/metrics")

    model = {"id": "ft:m::x:1", "object": "model", "created": 1_760_000_000, "owned_by": "org-local"}
    server.on("GET", "/models", page(model))
    server.on("GET", "/models/ft:m::x:1", Response(body=model))
    assert lomo("models", "list").out.splitlines()[1].split()[:2] == ["ft:m::x:1", "org-local"]
    assert json.loads(lomo("models", "get", "ft:m::x:1", "-o", "json").out) == model


@pytest.mark.parametrize(("status", "code", "word"), [(200, 0, "yes"), (503, 1, "no")])
def test_health(
    server: ScriptedServer, lomo: Lomo, status: int, code: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOMO_API_KEY")  # it needs none
    body = {"status": "x", "checks": {"database": "ok", "worker": "none seen"}}
    server.on("GET", "//readyz", Response(status, body=body))
    result = lomo("health")
    assert result.code == code
    fields = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert fields == {
        "server": server.url.removesuffix("/v1"),
        "ready": word,
        "database": "ok",
        "worker": "none seen",
    }
    assert json.loads(lomo("health", "-o", "json").out) == body


def test_no_server(server: ScriptedServer, lomo: Lomo) -> None:
    server.stop()
    for arguments in (["jobs", "list"], ["health"], ["files", "content", "file-abc"]):
        code, out, err = lomo(*arguments)
        url = server.url.removesuffix("/v1")
        assert (code, out) == (1, "")
        assert err.startswith(f"error: no server at {url}")
        assert "start one with `lomo up`" in err


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (Response(200, body=b"<html>"), "answered 200 with something that is not JSON: is it a LOMO server?"),
        (Response(200, body=[1]), "answered 200 with something that is not JSON"),
        (Response(502, body=b"<html>"), "the server answered 502 Bad Gateway"),
        (Response(500, body={"detail": "x"}), "the server answered 500 Internal Server Error"),
        (Response(500, body={"error": "x"}), "the server answered 500 Internal Server Error"),
        (
            Response(401, body={"error": {"message": "The key is wrong.", "code": "invalid_api_key"}}),
            "The key is wrong. [invalid_api_key] Give the key by LOMO_API_KEY or --api-key-file.",
        ),
        (Response(400, body={"error": {"message": "\x1b[31mred", "code": None}}), "\ufffd[31mred"),
    ],
)
def test_answers_that_are_no_success(server: ScriptedServer, lomo: Lomo, response: Response, message: str) -> None:
    server.on("GET", JOB, response)
    code, out, err = lomo("jobs", "get", JOB_ID)
    assert (code, out) == (1, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_without_a_key_nothing_is_sent(server: ScriptedServer, lomo: Lomo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOMO_API_KEY")
    code, _, err = lomo("jobs", "list")
    assert code == 2
    assert err.startswith("error: no API key")
    assert server.requests == []


def test_version_and_help(lomo: Lomo) -> None:
    assert lomo("--version").out.startswith("lomo 0.")
    assert "--training-file ID|PATH" in lomo("jobs", "create", "--help").out
    code, _, err = lomo("jobs", "creat")
    assert code == 2
    assert "Did you mean 'create'?" in err


def test_the_command_starts_without_what_it_does_not_need() -> None:
    """It is started often, by scripts: torch alone would cost it two seconds."""
    heavy = ["torch", "transformers", "fastapi", "sqlalchemy", "celery", "openai", "jobs", "server", "worker", "local"]
    code = f"import sys, cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_up_becomes_the_local_service(tmp_path: Path) -> None:
    """A data folder that cannot be one is refused by `local`: its words and its exit code are ours then."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(tmp_path / "file"), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_crash(server: ScriptedServer, lomo: Lomo) -> None:
    del lomo  # sets the environment
    server.on("GET", JOBS, page(*(make_job(id=f"ftjob-{number:024d}") for number in range(100))))
    command = f"'{sys.executable}' -m cli.main jobs list --limit 100 -o json | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)  # noqa: S607
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr

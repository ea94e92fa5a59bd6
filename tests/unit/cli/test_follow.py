"""`jobs follow` and `jobs create --follow`: exit codes, what is on stdout and on stderr, breaks, Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.scripted_server import (
    DONE,
    JOB_ID,
    RETRY,
    Response,
    ScriptedServer,
    frame,
    make_event,
    make_job,
    make_step,
)

if TYPE_CHECKING:
    from tests.conftest import WaitUntil
    from tests.unit.cli.conftest import Lomo

EVENTS = f"/fine_tuning/jobs/{JOB_ID}/events"
JOB = f"/fine_tuning/jobs/{JOB_ID}"
MODEL = "ft:smollm2::docs:01234567"
RUN = [
    make_event(1, "Queued.", data={"status": "queued"}),
    make_event(2, "Training 9 parameters on cpu: 8 rows, 4 steps", data={"step": 0, "total_steps": 4}),
    *(make_step(2 + step, step) for step in range(1, 5)),
    make_event(7, "Row 3 was cut.", level="warn"),
    make_event(8, "The job has successfully completed", data={"status": "succeeded"}),
]


def script(server: ScriptedServer, job: dict, *, events: list[dict] = RUN) -> None:
    """Let the server know a job that has ended."""
    server.on("GET", EVENTS, Response(chunks=[RETRY, *map(frame, events), DONE]))
    server.on("GET", JOB, Response(body=job))


def succeeded() -> dict:
    return make_job(status="succeeded", fine_tuned_model=MODEL, lomo={"model_path": "/data/model"})


def test_success(server: ScriptedServer, lomo: Lomo) -> None:
    script(server, succeeded())
    code, out, err = lomo("jobs", "follow", JOB_ID)
    assert (code, out) == (0, f"{MODEL}\n")
    lines = err.splitlines()
    assert [line[10:] for line in lines if line[2:3] == ":"] == [
        "Queued.",
        "Training 9 parameters on cpu: 8 rows, 4 steps",
        "warning: Row 3 was cut.",
        "The job has successfully completed",
    ]
    # Steps come faster than every two seconds: the first, and the last one before a message.
    assert [line for line in lines if line.startswith("step")] == [
        "step 1/4  loss 2.500  812 tokens/s  peak 1.3 GiB  2s left",
        "step 4/4  loss 0.625  812 tokens/s  peak 1.3 GiB",
    ]
    assert lines[-2:] == [f"Succeeded. The tuned model: {MODEL}", "Its folder: /data/model"]


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (
            make_job(status="failed", error={"code": "out_of_memory", "message": "It needs 9 GiB.", "param": None}),
            "The job failed: It needs 9 GiB.",
        ),
        (make_job(status="cancelled"), "The job was cancelled."),
    ],
)
@pytest.mark.parametrize("form", ["table", "json"])
def test_no_success(server: ScriptedServer, lomo: Lomo, job: dict, reason: str, form: str) -> None:
    script(server, job)
    code, out, err = lomo("jobs", "follow", JOB_ID, "-o", form)
    assert code == 1
    assert err.splitlines()[-1] == reason
    assert out == "" if form == "table" else json.loads(out) == job


def test_create_and_follow_prints_the_id_alone(server: ScriptedServer, lomo: Lomo) -> None:
    script(server, succeeded())
    server.on("POST", "/fine_tuning/jobs", Response(body=make_job()))
    code, out, _ = lomo("jobs", "create", "--model", "m", "--training-file", "file-abc", "--follow")
    assert (code, out) == (0, f"{JOB_ID}\n")


def test_create_and_follow_as_json_prints_the_final_job_alone(server: ScriptedServer, lomo: Lomo) -> None:
    script(server, succeeded())
    server.on("POST", "/fine_tuning/jobs", Response(body=make_job()))
    code, out, _ = lomo("jobs", "create", "--model", "m", "--training-file", "file-abc", "--follow", "-o", "json")
    assert code == 0
    assert json.loads(out) == succeeded()


def test_a_restart_of_the_server_does_not_end_it(server: ScriptedServer, lomo: Lomo) -> None:
    script(server, succeeded())
    server.on(
        "GET",
        EVENTS,
        Response(chunks=[RETRY, *map(frame, RUN[:4])], breaks=True),
        Response(chunks=[*map(frame, RUN[4:]), DONE]),
    )
    code, _, err = lomo("jobs", "follow", JOB_ID)
    assert code == 0
    assert "broke" in err
    assert "trying again for 5 minutes" in err
    assert err.count("Queued.") == 1
    assert server.requests[1].headers["Last-Event-ID"] == "4"


def test_an_unknown_job(server: ScriptedServer, lomo: Lomo) -> None:
    code, out, err = lomo("jobs", "follow", "ftjob-none")
    assert (code, out) == (1, "")
    assert err == "error: Unknown route. [not_found]\n"


def run_in_terminal(server: ScriptedServer, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the command with a terminal of 80 columns as its stderr."""
    controller, terminal = pty.openpty()
    env = {
        **{name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}},
        "LOMO_URL": server.url,
        "LOMO_API_KEY": "sk-x",
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        "LINES": "24",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *arguments],
        env=env,
        cwd=Path(__file__).parents[3],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    return process, controller


class Screen:
    """What a terminal was sent so far."""

    def __init__(self, controller: int) -> None:
        self._controller = controller
        self._sent = b""

    def __str__(self) -> str:
        """Read what is there; at the end of the terminal's other side there is nothing more."""
        while select.select([self._controller], [], [], 0)[0]:
            try:
                chunk = os.read(self._controller, 65536)
            except OSError:
                break
            if not chunk:
                break
            self._sent += chunk
        return self._sent.decode("utf-8", errors="replace")


def test_in_a_terminal_there_is_a_panel_and_messages_above_it(server: ScriptedServer, wait_until: WaitUntil) -> None:
    hold = threading.Event()
    script(server, succeeded())
    server.on(
        "GET",
        EVENTS,
        Response(chunks=[*map(frame, RUN[:5])], hold=hold, breaks=True),
        Response(chunks=[*map(frame, RUN[5:]), DONE]),
    )
    process, controller = run_in_terminal(server, "jobs", "follow", JOB_ID)
    screen = Screen(controller)
    wait_until(lambda: "step 3/4" in str(screen), 20, "the third step on the screen")
    hold.set()
    wait_until(lambda: "Its folder" in str(screen), 20, "the end on the screen")
    out, _ = process.communicate(timeout=20)
    os.close(controller)
    assert (process.returncode, out.decode()) == (0, f"{MODEL}\n")
    text = str(screen._sent.decode())
    for part in ("Queued.", "100%", "done", "812 tokens/s", "Row 3 was cut."):
        assert part in text
    positions = [text.index(name) for name in ("Parameters", "Gradients", "Optimizer state", "Activations", "Other")]
    assert positions == sorted(positions)
    assert "\x1b[38;2;" in text or "\x1b[38;5;" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


def test_ctrl_c_ends_the_watching_only(server: ScriptedServer, wait_until: WaitUntil) -> None:
    hold = threading.Event()
    server.on("GET", EVENTS, Response(chunks=[*map(frame, RUN[:4])], hold=hold))
    process, controller = run_in_terminal(server, "jobs", "follow", JOB_ID)
    screen = Screen(controller)
    wait_until(lambda: "step 2/4" in str(screen), 20, "the second step on the screen")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    hold.set()
    text = str(screen)
    os.close(controller)
    assert (process.returncode, out) == (130, b"")
    assert "The job goes on." in text
    assert f"lomo jobs cancel {JOB_ID}" in text
    assert "Traceback" not in text
    assert [request.method for request in server.requests] == ["GET"], "nothing was cancelled"


def test_progress_is_seen_while_it_happens(server: ScriptedServer, wait_until: WaitUntil, tmp_path: Path) -> None:
    """Lines must not wait in a buffer: this is what a log of CI shows."""
    hold = threading.Event()
    server.on("GET", EVENTS, Response(chunks=[*map(frame, RUN[:3])], hold=hold))
    log = tmp_path / "log"
    env = {**os.environ, "LOMO_URL": server.url, "LOMO_API_KEY": "sk-x"}
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "jobs", "events", JOB_ID, "--follow"],
            env=env,
            cwd=Path(__file__).parents[3],
            stdout=file,
        )
    wait_until(lambda: b"Step 1/4" in log.read_bytes(), 20, "the first step in the log")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    hold.set()
    assert time.monotonic() - started < 30

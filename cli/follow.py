"""Following a job from its first event to its end, through restarts of the server."""

from __future__ import annotations

import json

from cli.client import ApiClient, Json
from cli.output import make_talk, printable, say
from cli.sse import Patience, iterate, persist
from cli.view import LiveView, PlainView, View

SUCCEEDED = "succeeded"


class Follower:
    """`Follower(client, job_id).run()` shows a job's events on stderr and returns the job when it has ended."""

    def __init__(self, client: ApiClient, job_id: str) -> None:
        self._client = client
        self._path = f"/fine_tuning/jobs/{job_id}"

    def run(self) -> Json:
        """Return the job in its final state.

        Raises:
            ApiError: there is no such job.
            UnreachableError: the server stayed away for too long.
            KeyboardInterrupt: the user has seen enough.
        """
        talk = make_talk()
        view: View = LiveView(talk) if talk.is_terminal else PlainView(say)
        patience = Patience(on_wait=view.note)
        with view:
            for frame in iterate(self._client, f"{self._path}/events?stream=true", patience):
                view.show(json.loads(frame.data))
        return persist(lambda: self._client.get(self._path), patience)


def describe_end(job: Json) -> str:
    """One sentence about how a job ended."""
    if job["status"] == SUCCEEDED:
        folder = (job.get("lomo") or {}).get("model_path")
        where = f"\nIts folder: {folder}" if folder else ""
        return f"Succeeded. The tuned model: {job['fine_tuned_model']}{where}"
    reason = printable((job.get("error") or {}).get("message") or "")
    return f"The job {'was cancelled' if job['status'] == 'cancelled' else job['status']}" + (
        f": {reason}" if reason else "."
    )

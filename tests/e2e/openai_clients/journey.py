"""Every endpoint, by an unmodified `openai` client: run by the interpreter of the environment that has it.

Needs nothing but that client and the standard library, and runs with each of its versions. Reads OPENAI_BASE_URL and
OPENAI_API_KEY as any program would; argument: a folder with `train.jsonl` and `held_back.jsonl`. Prints each leg that
it has gone, one a line, and ends with a traceback where one fails.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
import sys
import tarfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai

SILENCE_S = 60.0  # a stream sends something every 15 s
ENDED = {"succeeded", "failed", "cancelled"}


class Journey:
    """One client's way through the service; each leg leaves behind what the next ones need."""

    def __init__(self, folder: Path) -> None:
        self.train = folder / "train.jsonl"
        self.held_back = folder / "held_back.jsonl"
        # Strict: an answer that is not as the client's own types say is an error.
        self.client = openai.OpenAI(_strict_response_validation=True, max_retries=0)
        self.name = f"{openai.__version__}-{time.time_ns()}"
        self.file_id = ""
        self.held_back_id = ""
        self.job: Any = None

    def files(self) -> None:
        """Upload, find, read back, page through and delete files."""
        with self.train.open("rb") as opened:
            file = self.client.files.create(file=opened, purpose="fine-tune")
        assert self.client.files.wait_for_processing(file.id).status == "processed"
        assert self.client.files.retrieve(file.id).bytes == self.train.stat().st_size
        assert self.client.files.content(file.id).read() == self.train.read_bytes()
        others = [
            self.client.files.create(file=("row.jsonl", self.train.read_bytes()), purpose="fine-tune").id
            for _ in range(3)
        ]
        paged = [each.id for each in self.client.files.list(limit=2, purpose="fine-tune", order="asc")]
        assert paged[-4:] == [file.id, *others], paged
        expiring = self.client.files.create(
            file=("row.jsonl", self.train.read_bytes()),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert expiring.expires_at == expiring.created_at + 3600
        for other in (*others, expiring.id):
            assert self.client.files.delete(other).deleted
        expect(openai.NotFoundError, lambda: self.client.files.retrieve(others[0]))
        self.file_id = file.id

    def uploads(self) -> None:
        """A file in parts, given out of order, and an upload that is cancelled."""
        content = self.held_back.read_bytes()
        halves = [content[: len(content) // 2], content[len(content) // 2 :]]
        upload = self.client.uploads.create(
            bytes=len(content), filename="held_back.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
        later = self.client.uploads.parts.create(upload.id, data=halves[1])
        first = self.client.uploads.parts.create(upload.id, data=halves[0])
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        done = self.client.uploads.complete(upload.id, part_ids=[first.id, later.id], md5=md5)
        assert done.status == "completed"
        assert done.file is not None
        assert self.client.files.content(done.file.id).read() == content
        whole = self.client.uploads.upload_file_chunked(
            file=self.held_back, mime_type="text/jsonl", purpose="fine-tune"
        )
        assert whole.file is not None
        assert whole.file.bytes == len(content)
        lasting = self.client.uploads.create(
            bytes=len(content),
            filename="held_back.jsonl",
            mime_type="text/jsonl",
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 7200},
        )
        part = self.client.uploads.parts.create(lasting.id, data=content)
        file = self.client.uploads.complete(lasting.id, part_ids=[part.id]).file
        assert file is not None
        assert file.expires_at == file.created_at + 7200
        given_up = self.client.uploads.create(bytes=5, filename="x.jsonl", mime_type="text/jsonl", purpose="fine-tune")
        assert self.client.uploads.cancel(given_up.id).status == "cancelled"
        self.held_back_id = done.file.id

    def models(self) -> None:
        """The base model is listed and can be retrieved; one that is not there says so."""
        assert "tiny" in [model.id for model in self.client.models.list()]
        assert self.client.models.retrieve("tiny").object == "model"
        error = expect(openai.NotFoundError, lambda: self.client.models.retrieve("ft:no/such::model"))
        assert error.code == "model_not_found", error

    def refusals(self) -> None:
        """Mistakes are told apart by class, code and parameter, and have a request id."""
        error = expect(
            openai.BadRequestError, lambda: self.client.fine_tuning.jobs.create(model="tiny", training_file="file-none")
        )
        assert error.param == "training_file", error
        assert error.request_id
        error = expect(openai.BadRequestError, lambda: self._create(method={"type": "dpo"}))
        assert error.code == "unsupported_value", error
        stranger = self.client.with_options(api_key="sk-lomo-of-nobody")
        expect(openai.AuthenticationError, stranger.models.list)
        error = expect(openai.BadRequestError, lambda: self._create(extra_body={"lomo": {"optimiser": "lomo"}}))
        assert "optimiser" in error.message, error

    def train_job(self) -> None:
        """A job to its end: metadata, numbers in place of "auto", events, checkpoints, figures."""
        job = self._create(
            validation_file=self.held_back_id,
            suffix="journey",
            seed=7,
            metadata={"journey": self.name},
            integrations=[{"type": "wandb", "wandb": {"project": "journey", "tags": ["client"]}}],
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
            extra_body={"lomo": {"learning_rate": 0.1, "precision": "fp32", "checkpoint_every_steps": 10}},
        )
        assert job.hyperparameters.n_epochs == 2
        (integration,) = job.integrations
        assert (integration.wandb.project, integration.wandb.tags) == ("journey", ["client"]), integration
        found = [each.id for each in self.client.fine_tuning.jobs.list(metadata={"journey": self.name})]
        assert found == [job.id], found
        self.job = job = self._wait(job.id, ENDED)
        assert job.status == "succeeded", job.error
        assert job.trained_tokens
        assert isinstance(job.hyperparameters.batch_size, int)
        events = list(self.client.fine_tuning.jobs.list_events(job.id, limit=7))  # several pages
        assert [event.model_extra["seq"] for event in events] == list(range(len(events), 0, -1))
        assert not [event.message for event in events if "Weights & Biases" in event.message]  # only where it failed
        checkpoints = list(self.client.fine_tuning.jobs.checkpoints.list(job.id))
        assert checkpoints[0].fine_tuned_model_checkpoint.startswith("ft:tiny::journey:")
        figures = self.client.files.content(job.result_files[0]).text.splitlines()
        assert figures[0].startswith("step,train_loss"), figures[0]
        assert len(figures) > 1
        assert self.client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model

    def cancel_job(self) -> None:
        """A job that is cancelled, and the answer to a second cancel."""
        job = self._create(method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50}}})
        self.client.fine_tuning.jobs.cancel(job.id)
        assert self._wait(job.id, ENDED).status == "cancelled"
        expect(openai.BadRequestError, lambda: self.client.fine_tuning.jobs.cancel(job.id))

    def retried_creation(self) -> None:
        """A request with an idempotency key makes one job, however often it is sent."""
        given = {"extra_headers": {"Idempotency-Key": self.name}, "seed": 5}
        first, second = self._create(**given), self._create(**given)
        assert first.id == second.id
        self.client.fine_tuning.jobs.cancel(first.id)

    def pause_job(self) -> None:
        """A running job that is paused, goes on and is cancelled; a pause of one that has ended is refused."""
        job = self._create(method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50}}})
        self._wait(job.id, {"running"})
        # The status is none of the client's own enumeration.
        lenient = openai.OpenAI(max_retries=0).fine_tuning.jobs
        lenient.pause(job.id)
        assert self._wait(job.id, {"paused"}).status == "paused"
        assert lenient.resume(job.id).status == "queued"
        lenient.cancel(job.id)
        assert self._wait(job.id, ENDED).status == "cancelled"
        expect(openai.BadRequestError, lambda: lenient.pause(job.id))

    def tune_further(self) -> None:
        """A checkpoint as the base of the next job, which the list of models then knows, and which is deleted."""
        (checkpoint, *_) = self.client.fine_tuning.jobs.checkpoints.list(self.job.id)
        again = self.client.fine_tuning.jobs.create(
            model=checkpoint.fine_tuned_model_checkpoint,
            training_file=self.file_id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        )
        made = self._wait(again.id, ENDED)
        assert made.status == "succeeded", made.error
        assert self.client.models.delete(made.fine_tuned_model).deleted
        expect(openai.NotFoundError, lambda: self.client.models.retrieve(made.fine_tuned_model))

    def chat(self) -> None:
        """The tuned model answers, whole and as it writes: the same, where nothing is left to chance."""
        question: Any = {
            "model": self.job.fine_tuned_model,
            "messages": [{"role": "user", "content": "what goes with sun?"}],
            "temperature": 0,
            "max_tokens": 8,
        }
        whole = self.client.chat.completions.create(**question)
        assert whole.choices[0].finish_reason in {"stop", "length"}
        assert whole.usage is not None
        assert 0 < whole.usage.completion_tokens <= 8
        chunks = list(
            self.client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True})
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        error = expect(
            openai.NotFoundError, lambda: self.client.chat.completions.create(**question | {"model": "none"})
        )
        assert error.code == "model_not_found", error

    def data(self) -> None:
        """What the check of a job's files has found, and a row as the run has seen it."""
        rows = len(self.train.read_text().splitlines())
        for path, figures in {
            f"/fine_tuning/jobs/{self.job.id}/data_report": lambda report: report["training_file"],
            f"/files/{self.file_id}/report": lambda report: report["report"],
        }.items():
            found = figures(self._ask("get", path))
            assert (found["num_rows"], found["num_errors"]) == (rows, 0), found
        row = self._ask("get", f"/files/{self.file_id}/preview", params={"model": "tiny", "row": 3})
        answer = json.loads(self.train.read_text().splitlines()[2])["messages"][1]["content"]
        assert "".join(token["text"] for token in row["tokens"] if token["trained"]) == f"{answer}<|im_end|>", row
        path = f"/files/{self.file_id}/preview"
        error = expect(openai.BadRequestError, lambda: self._ask("get", path, params={"model": "none"}))
        assert error.code == "model_not_found", error

    def feeds(self) -> None:
        """Figures, log and events of a job that has ended: the list and the stream say the same."""
        path = f"/fine_tuning/jobs/{self.job.id}"
        columns = self._ask("get", f"{path}/metrics")["columns"]
        points = list(self._stream(f"{path}/metrics"))
        steps = [point["step"] for point in points if point["object"].endswith(".point")]
        assert steps == columns["step"], (steps, columns)
        for name in ("logs", "events"):
            listed = self._ask("get", f"{path}/{name}", params={"limit": 1000})["data"]
            streamed = list(self._stream(f"{path}/{name}"))
            assert [each["id"] for each in streamed] == [each["id"] for each in reversed(listed)], name
        assert list(self._stream(f"{path}/events", after=str(len(streamed) - 2))) == streamed[-2:]

    def hosts_and_plans(self) -> None:
        """The queue, the hosts, and the memory of a run that is none yet."""
        queue = self._ask("get", "/queue")
        assert (queue["object"], queue["num_queued"], queue["data"]) == ("list", 0, []), queue
        (host,) = self._ask("get", "/hosts")["data"]
        assert host["is_alive"], host
        plan = self._ask("post", "/plan", body={"model": "tiny"})
        assert plan["peak_bytes"] > 0, plan

    def export(self) -> None:
        """The tuned model as a tar and as a GGUF file, each as long as it was said to be."""
        path = f"/models/{self.job.fine_tuned_model}/export"
        tar = self._download(path, format="tar")
        with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
            assert {"model/config.json", "model/model.safetensors"} <= set(opened.getnames())
        assert self._download(path, format="gguf")[:8] == b"GGUF\x03\0\0\0"
        error = expect(openai.PermissionDeniedError, lambda: self._download("/models/tiny/export", format="gguf"))
        assert error.code == "base_model", error

    def clone_and_delete(self) -> None:
        """A job like the finished one but for its seed; it is cancelled, deleted and gone, the finished one is not."""
        path = "/fine_tuning/jobs"
        clone = self._ask("post", f"{path}/{self.job.id}/clone", body={"seed": 11})
        assert (clone["seed"], clone["training_file"]) == (11, self.file_id), clone
        expect(openai.BadRequestError, lambda: self._ask("delete", f"{path}/{clone['id']}"))
        self._ask("post", f"{path}/{clone['id']}/cancel")
        self._wait(clone["id"], ENDED)
        assert self._ask("delete", f"{path}/{clone['id']}")["deleted"]
        expect(openai.NotFoundError, lambda: self.client.fine_tuning.jobs.retrieve(clone["id"]))
        assert self.client.fine_tuning.jobs.retrieve(self.job.id).status == "succeeded"

    def organizations(self) -> None:
        """A tenant from its making to its end; its administrator's key reaches nothing that is another's."""
        made = self._ask("post", "/organizations", body={"name": self.name, "quotas": {"max_queued_jobs": 3}})
        path = f"/organizations/{made['id']}"
        assert self._ask("get", path) == made
        assert made["id"] in [each["id"] for each in self._ask("get", "/organizations", params={"limit": 100})["data"]]
        changed = self._ask("post", path, body={"quotas": {"max_running_jobs": 1}})["quotas"]
        assert (changed["max_queued_jobs"], changed["max_running_jobs"]) == (3, 1), changed
        assert self._ask("get", f"{path}/usage")["queued_jobs"] == {"used": 0, "limit": 3}
        first = self._ask("post", f"{path}/admin_api_keys", body={"name": "first"})
        tenant = self.client.with_options(api_key=first["value"])
        assert list(tenant.fine_tuning.jobs.list()) == []
        expect(openai.NotFoundError, lambda: tenant.fine_tuning.jobs.retrieve(self.job.id))
        expect(openai.PermissionDeniedError, lambda: self._ask("get", "/organizations", client=tenant))
        self._keys(tenant, "/organization/admin_api_keys", {"name": "second"})
        self._projects(tenant)
        assert self._ask("get", "/organization/usage", client=tenant)["organization_id"] == made["id"]
        assert self._ask("delete", path)["deleted"]
        expect(openai.NotFoundError, lambda: self._ask("get", path))

    def webhooks(self) -> None:
        """An endpoint's life, by its routes and by clients that know them; each takes what is ours alone."""
        asked = {"name": "ops", "url": "https://example.com/hook", "event_types": ["fine_tuning.job.succeeded"]}
        made = self._ask("post", "/webhook_endpoints", body=asked)
        path = f"/webhook_endpoints/{made['id']}"
        assert self._ask("get", path)["url"] == asked["url"]
        assert made["id"] in [each["id"] for each in self._ask("get", "/webhook_endpoints")["data"]]
        assert self._ask("post", path, body={"name": "on call"})["name"] == "on call"
        assert "fine_tuning.job.paused" in self._ask("get", "/webhook_event_types")["data"]
        secret = self._ask("post", f"{path}/rotate_secret", body={})["signing_secret"]
        assert secret != made["signing_secret"]
        assert self._ask("delete", path)["deleted"]
        expect(openai.NotFoundError, lambda: self._ask("get", path))
        self._unwrap(secret)
        if hasattr(self.client.webhooks, "create"):
            made = self.client.webhooks.create(
                name="ops", url="https://example.com/hook", event_types=["fine_tuning.job.succeeded"]
            )
            assert made.id in [each.id for each in self.client.webhooks.list()]
            assert self.client.webhooks.update(made.id, name="on call").name == "on call"
            assert self.client.webhooks.rotate_secret(made.id).signing_secret != made.signing_secret
            assert "fine_tuning.job.failed" in self.client.webhooks.event_types.list().data
            assert self.client.webhooks.delete(made.id).deleted

    def _unwrap(self, secret: str) -> None:
        """A message with our signature is an event to the client, and one with another's is refused."""
        event = {"id": "evt_1", "object": "event", "created_at": int(time.time()), "type": "fine_tuning.job.succeeded"}
        body = json.dumps(event | {"data": {"id": self.job.id}})
        sent_at = str(int(time.time()))
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signature = base64.b64encode(hmac.digest(key, f"evt_1.{sent_at}.{body}".encode(), "sha256")).decode()
        headers = {"webhook-id": "evt_1", "webhook-timestamp": sent_at, "webhook-signature": f"v1,{signature}"}
        unwrapped: Any = self.client.webhooks.unwrap(body, headers, secret=secret)
        assert (unwrapped.type, unwrapped.data.id) == (event["type"], self.job.id)
        try:
            self.client.webhooks.unwrap(body, headers | {"webhook-signature": "v1,AAAA"}, secret=secret)
        except openai.InvalidWebhookSignatureError:
            return
        raise AssertionError("a forged signature was taken for ours")

    def _projects(self, tenant: openai.OpenAI) -> None:
        """A project and its keys, until it is archived."""
        project = self._ask("post", "/organization/projects", client=tenant, body={"name": "search"})
        path = f"/organization/projects/{project['id']}"
        assert self._ask("post", path, client=tenant, body={"name": "find"})["name"] == "find"
        assert self._ask("get", path, client=tenant)["name"] == "find"
        assert project["id"] in [
            each["id"] for each in self._ask("get", "/organization/projects", client=tenant)["data"]
        ]
        self._keys(tenant, f"{path}/api_keys", {"name": "bot", "scopes": ["jobs:read", "models:read"]})
        narrowed = tenant.with_options(project=project["id"])
        assert list(narrowed.fine_tuning.jobs.list()) == []
        expect(openai.AuthenticationError, self.client.with_options(project=project["id"]).fine_tuning.jobs.list)
        assert self._ask("post", f"{path}/archive", client=tenant)["status"] == "archived"
        expect(openai.AuthenticationError, narrowed.fine_tuning.jobs.list)

    def _keys(self, tenant: openai.OpenAI, path: str, body: dict[str, Any]) -> None:
        """A key that gets another secret, which works in place of the first, and is revoked."""
        key = self._ask("post", path, client=tenant, body=body)
        own = f"{path}/{key['id']}"
        assert self._ask("get", own, client=tenant)["redacted_value"] != key["value"]
        assert key["id"] in [each["id"] for each in self._ask("get", path, client=tenant)["data"]]
        rotated = self._ask("post", f"{own}/rotate", client=tenant, body={"grace_s": 0})
        expect(openai.AuthenticationError, self.client.with_options(api_key=key["value"]).models.list)
        owner = self.client.with_options(api_key=rotated["value"])
        assert list(owner.models.list())
        if "scopes" in body:
            assert self._ask("post", own, client=tenant, body={"name": "other"})["name"] == "other"
            expect(openai.PermissionDeniedError, owner.files.list)
        assert self._ask("delete", own, client=tenant)["deleted"]
        expect(openai.NotFoundError, lambda: self._ask("get", own, client=tenant))

    def _ask(self, method: str, path: str, *, client: openai.OpenAI | None = None, **given: Any) -> Any:
        """A route that the client has no method for, through the client all the same. `params`: the query."""
        options = {"params": given.pop("params")} if "params" in given else {}
        return getattr(client or self.client, method)(path, cast_to=object, options=options, **given)

    def _download(self, path: str, **query: str) -> bytes:
        answer = self.client.get(path, cast_to=openai.HttpxBinaryResponseContent, options={"params": query})
        assert int(answer.response.headers["content-length"]) == len(answer.content)
        return answer.content

    def _create(self, **given: Any) -> Any:
        return self.client.fine_tuning.jobs.create(model="tiny", training_file=self.file_id, **given)

    def _wait(self, job_id: str, statuses: set[str]) -> Any:
        """The job once it has, or has had, one of these statuses: its stream of events says so."""
        seen: list[str] = []
        with closing(self._stream(f"/fine_tuning/jobs/{job_id}/events")) as events:
            for event in events:
                if status := (event["data"] or {}).get("status"):
                    seen.append(status)
                    if status in statuses:
                        # Only strict where the wire is OpenAI's own: a pause has a status that its enumeration lacks.
                        return openai.OpenAI(max_retries=0).fine_tuning.jobs.retrieve(job_id)
        raise AssertionError(f"{job_id} was {seen} and never one of {sorted(statuses)}")

    def _stream(self, path: str, **query: str) -> Generator[Any, None, None]:
        """What a stream sends until its end, as the client's own reader takes it."""
        options: Any = {"params": query | {"stream": "true"}, "timeout": SILENCE_S}
        with self.client.get(
            path, cast_to=object, options=options, stream=True, stream_cls=openai.Stream[object]
        ) as events:
            yield from events


def expect(kind: type[openai.APIError], call: Any) -> Any:
    """The error that a call must raise."""
    try:
        answer = call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected, not {answer!r}")


LEGS = (
    "files",
    "uploads",
    "models",
    "refusals",
    "train_job",
    "cancel_job",
    "retried_creation",
    "pause_job",
    "tune_further",
    "chat",
    "data",
    "feeds",
    "hosts_and_plans",
    "export",
    "clone_and_delete",
    "organizations",
    "webhooks",
)


if __name__ == "__main__":
    journey = Journey(Path(sys.argv[1]))
    for leg in LEGS:
        getattr(journey, leg)()
        print(leg, flush=True)
    print(json.dumps({"version": openai.__version__, "job": journey.job.id}))

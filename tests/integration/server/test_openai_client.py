"""The official client, unmodified and with its strict validation on, through the whole of a job's life."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from sqlalchemy import text

from jobs import lifecycle
from lomo_core import events as engine
from server import sse
from server.settings import ServerSettings

from .conftest import MODEL, TRAIN_ROW, Site, WaitUntil, make_model, running_site


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    """The client as a user makes it, but that refuses a response which is not as its types say."""
    with openai.OpenAI(api_key=site.key, base_url=f"{site.url}/v1", _strict_response_validation=True) as client:
        yield client


def test_a_job_from_upload_to_model(site: Site, client: openai.OpenAI) -> None:
    file = client.files.create(file=("übung.jsonl", TRAIN_ROW * 3), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == ("übung.jsonl", 3 * len(TRAIN_ROW), "fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"

    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        validation_file=file.id,
        suffix="docs",
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        extra_body={"lomo": {"learning_rate": 0.02, "clip": {"mode": "value"}}},
    )
    assert (job.status, job.metadata, job.fine_tuned_model) == ("queued", {"team": "a"}, None)
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == 4
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.lomo["learning_rate"] == 0.02  # type: ignore[attr-defined]
    assert job.lomo["clip"] == {"mode": "value", "threshold": 1.0, "exact": "auto"}  # type: ignore[attr-defined]

    run = site.claim(job.id)
    run.start()
    run.step(*range(1, 6))
    run.say(
        engine.Checkpoint(step=5, path="runs/x", manifest_sha256="0" * 64, num_bytes=7, train_loss=2.0),
        engine.Evaluation(step=5, num_rows=3, valid_loss=1.5, choice_accuracy=0.5),
    )
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    assert [event.seq for event in events] == list(range(len(events), 0, -1))  # type: ignore[attr-defined]
    metrics = next(event for event in events if event.type == "metrics" and "train_loss" in event.data)  # type: ignore[operator]
    assert metrics.data["memory"]["parameters_bytes"] == 1000  # type: ignore[index]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert [checkpoint.step_number for checkpoint in checkpoints] == [5]
    assert checkpoints.data[0].fine_tuned_model_checkpoint == f"ft:{MODEL}::docs:{job.id[6:14]}:ckpt-step-5"
    assert checkpoints.data[0].metrics.train_loss == 2.0

    name = run.succeed(site.settings.data_dir)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", name, 9)
    assert_result_file(client, done)
    assert name in {model.id for model in client.models.list()}
    assert client.models.retrieve(name).owned_by == "org-local"
    assert client.models.retrieve(MODEL).owned_by == "base"
    # The tuned model is a base model like any other.
    make_model(site.settings.data_dir / "runs" / job.id / "model")
    assert client.fine_tuning.jobs.create(model=name, training_file=file.id).model == name


def test_integrations_come_back_and_a_clone_has_them_too(site: Site, client: openai.OpenAI) -> None:
    file = client.files.create(file=("rows.jsonl", TRAIN_ROW * 3), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        integrations=[{"type": "wandb", "wandb": {"project": "tunes", "tags": ["a"]}}],
    )
    clone = client.post(f"/fine_tuning/jobs/{job.id}/clone", cast_to=FineTuningJob)
    for each in (job, client.fine_tuning.jobs.retrieve(job.id), clone):
        assert each.integrations is not None
        [integration] = each.integrations
        assert (integration.type, integration.wandb.project, integration.wandb.tags) == ("wandb", "tunes", ["a"])
        assert (integration.wandb.name, integration.wandb.entity) == (None, None)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=file.id,
            integrations=[{"type": "tensorboard", "wandb": {"project": "tunes"}}],  # type: ignore[typeddict-item]
        )
    assert caught.value.param == "integrations.0.type"
    assert "wandb" in caught.value.message


def test_a_server_may_allow_no_integrations(settings: ServerSettings, wait_until: WaitUntil) -> None:
    asked = [{"type": "wandb", "wandb": {"project": "tunes"}}]
    with running_site(settings, wait_until) as open_site:
        body = {"model": MODEL, "training_file": open_site.upload(), "integrations": asked}
        old = open_site.client().post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    with running_site(settings.model_copy(update={"integrations": ()}), wait_until) as site:
        jobs = "/v1/fine_tuning/jobs"
        for path, sent in ((jobs, body), (f"{jobs}/{old}/clone", {})):
            refused = site.client().post(path, json=sent)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (400, "integration_not_allowed")
            assert error["param"] == "integrations.0.type"
            assert "LOMO_INTEGRATIONS" in error["message"]
        cloned = site.client().post(f"{jobs}/{old}/clone", json={"integrations": []})
        assert (cloned.status_code, cloned.json()["integrations"]) == (200, [])


def assert_result_file(client: openai.OpenAI, job: FineTuningJob) -> None:
    """A job's result can be found, read and deleted, and nothing can be trained on it."""
    [file_id] = job.result_files
    file = client.files.retrieve(file_id)
    assert (file.filename, file.purpose) == ("step_metrics.csv", "fine-tune-results")
    assert [listed.id for listed in client.files.list(purpose="fine-tune-results")] == [file_id]
    assert client.files.content(file_id).text.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,10.0,0.5,,",
        "2,5.0,0.5,,",
        f"3,{10 / 3},0.5,,",
        "4,2.5,0.5,,",
        "5,2.0,0.5,1.5,",
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model=MODEL, training_file=file_id)
    assert caught.value.code == "invalid_file_purpose"
    assert client.files.delete(file_id).deleted is True
    assert client.fine_tuning.jobs.retrieve(job.id).result_files == []


def test_a_failed_job_tells_why(site: Site, client: openai.OpenAI) -> None:
    run = site.run()
    run.fail()
    job = client.fine_tuning.jobs.retrieve(run.job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message, job.error.param) == ("diverged", "The loss is not finite.", None)


def test_the_clients_own_reader_follows_a_job(
    site: Site, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the comments that keep the connection alive, which it can take for events without data."""
    monkeypatch.setattr(sse, "_COMMENT_PING", (sse._COMMENT_PING[0], 0.01))
    run = site.run()
    path = f"/fine_tuning/jobs/{run.job_id}/events?stream=true"
    stream = client.get(path, cast_to=object, stream=True, stream_cls=openai.Stream[FineTuningJobEvent])
    seen = [next(stream)]
    with site.client().stream("GET", f"/v1{path}&after={seen[0].id}") as other:
        next(line for line in other.iter_lines() if line == ": ping")
    run.start()
    run.step(1)
    run.succeed()
    seen += stream
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))  # type: ignore[attr-defined]
    assert (seen[-1].data or {})["status"] == "succeeded"  # type: ignore[index]


def test_pages_of_jobs(site: Site, client: openai.OpenAI) -> None:
    file_id = site.upload()
    made = [site.submit(training_file=file_id, metadata={"parity": str(number % 2)}) for number in range(7)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=3)] == made[::-1]
    odd = client.fine_tuning.jobs.list(limit=2, metadata={"parity": "1"})
    assert [job.id for job in odd] == made[5::-2]
    first = client.fine_tuning.jobs.list(limit=7)
    assert first.has_more is False
    assert client.fine_tuning.jobs.list(limit=6).has_more is True


def test_cancel(site: Site, client: openai.OpenAI) -> None:
    waiting = site.submit()
    assert client.fine_tuning.jobs.cancel(waiting).status == "cancelled"
    run = site.run()
    asked = client.fine_tuning.jobs.cancel(run.job_id)
    assert asked.status == "running"
    assert asked.lomo["cancel_requested"] is True  # type: ignore[attr-defined]
    lifecycle.cancelled(site.db, run.claim.lease)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.cancel(run.job_id)
    assert caught.value.code == "invalid_state"
    assert "been cancelled" in str(caught.value)


def test_files(client: openai.OpenAI) -> None:
    files = [client.files.create(file=(f"{number}.jsonl", TRAIN_ROW), purpose="fine-tune") for number in range(3)]
    other = client.files.create(file=("notes.txt", b"not JSON"), purpose="user_data")
    assert [file.id for file in client.files.list(limit=2)] == [other.id, *(file.id for file in reversed(files))]
    assert [file.id for file in client.files.list(order="asc", purpose="fine-tune")] == [file.id for file in files]
    assert client.files.content(other.id).read() == b"not JSON"
    assert client.files.delete(other.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(other.id)


def test_every_purpose_can_be_asked_for_and_listed(site: Site, client: openai.OpenAI) -> None:
    """`evals` is one that the client may send, and that its type of a file does not have."""
    client.files.create(file=("a.jsonl", TRAIN_ROW), purpose="evals")
    client.uploads.upload_file_chunked(
        file=TRAIN_ROW, filename="b.jsonl", bytes=len(TRAIN_ROW), mime_type="text/jsonl", purpose="evals"
    )
    assert [file.purpose for file in client.files.list()] == ["user_data", "user_data"]
    assert len(list(client.files.list(purpose="evals"))) == 2
    with site.db.transaction() as session:
        session.execute(text("UPDATE files SET purpose = 'evals'"))  # as earlier versions kept them
    assert [file.purpose for file in client.files.list()] == ["user_data", "user_data"]


def test_a_checkpoint_has_the_figures_of_its_step_and_is_a_model(site: Site, client: openai.OpenAI) -> None:
    run = site.run()
    run.start()
    run.step(4, 5)
    run.say(
        engine.Evaluation(step=5, num_rows=8, valid_loss=3.0, valid_mean_token_accuracy=0.25),
        engine.Checkpoint(step=4, path="c/4", manifest_sha256="0", num_bytes=1, train_loss=2.5),
        engine.Checkpoint(step=5, path="c/5", manifest_sha256="0", num_bytes=1, train_loss=2.0, valid_loss=3.0),
    )
    newest, older = client.fine_tuning.jobs.checkpoints.list(run.job_id)
    assert newest.metrics.to_dict() == {
        "step": 5,
        "train_loss": 2.0,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 3.0,
        "valid_mean_token_accuracy": 0.25,
        "full_valid_loss": 3.0,
        "full_valid_mean_token_accuracy": 0.25,
    }
    assert (older.metrics.train_mean_token_accuracy, older.metrics.valid_mean_token_accuracy) == (0.5, None)
    model = client.models.retrieve(newest.fine_tuned_model_checkpoint)
    assert (model.id, model.created) == (newest.fine_tuned_model_checkpoint, newest.created_at)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(newest.fine_tuned_model_checkpoint.replace("step-5", "step-3"))


def test_a_file_that_expires(site: Site, client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", TRAIN_ROW), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    assert [listed.expires_at for listed in client.files.list()] == [file.expires_at]
    job_id = site.submit(training_file=file.id)
    with site.db.transaction() as session:
        session.execute(text("UPDATE files SET expires_at = now()"))
    for absent in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            absent(file.id)
        assert missing.value.param == "file_id"
    assert list(client.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        client.files.list(after=file.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    assert (refused.value.code, refused.value.param) == ("file_not_found", "training_file")
    # The job that was created before keeps its data.
    assert site.claim(job_id).job_id == job_id
    assert (site.settings.files_dir / file.id).read_bytes() == TRAIN_ROW


def test_errors_are_typed_and_say_why(site: Site, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.fine_tuning.jobs.retrieve("ftjob-none")
    assert missing.value.request_id
    assert missing.value.param == "fine_tuning_job_id"
    with pytest.raises(openai.BadRequestError) as model:
        client.fine_tuning.jobs.create(model="gone", training_file=site.upload())
    assert (model.value.code, model.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as training:
        client.fine_tuning.jobs.create(model=MODEL, training_file="file-none")
    assert (training.value.code, training.value.param) == ("file_not_found", "training_file")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.fine_tuning.jobs.create(model=MODEL, training_file="f", extra_body={"lomo": {"galore": True}})
    assert (unknown.value.code, unknown.value.param) == ("unknown_parameter", "lomo.galore")
    with pytest.raises(openai.BadRequestError) as content:
        client.files.create(file=("x.jsonl", TRAIN_ROW + b"{oops\n"), purpose="fine-tune")
    assert "Line 2 is not valid JSON" in str(content.value)
    stranger = openai.OpenAI(api_key="sk-lomo-wrong", base_url=f"{site.url}/v1")
    with stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"

"""Pause, resume, clone and delete over HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from jobs import checkpoint_names, deletion, keys, lifecycle
from jobs.errors import InvalidRequestError
from jobs.references import hold_files
from lomo_core import events as engine

from .conftest import MODEL, TRAIN_ROW, Run, Site, make_model

JOBS = "/v1/fine_tuning/jobs"


def post(site: Site, path: str, body: Any = None, **headers: str) -> httpx.Response:
    content = None if body is None else json.dumps(body)
    return site.client(headers=headers).post(f"{JOBS}/{path}", content=content)


def error(response: httpx.Response, *, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    return found


# -- pause and resume


def test_the_official_client_pauses_and_resumes(site: Site) -> None:
    client = openai.OpenAI(api_key=site.key, base_url=f"{site.url}/v1", max_retries=0)
    with client:
        run = site.run()
        asked = client.fine_tuning.jobs.pause(run.job_id)
        assert (asked.status, asked.lomo["pause_requested"]) == ("running", True)  # type: ignore[attr-defined]
        lifecycle.paused(site.db, run.claim.lease)
        paused = client.fine_tuning.jobs.retrieve(run.job_id)
        assert (paused.status, paused.lomo["pause_requested"]) == ("paused", False)  # type: ignore[attr-defined]
        with pytest.raises(openai.BadRequestError, match="is already paused") as twice:
            client.fine_tuning.jobs.pause(run.job_id)
        assert twice.value.code == "invalid_state"
        assert client.fine_tuning.jobs.resume(run.job_id).status == "queued"
        with pytest.raises(openai.BadRequestError, match="only a paused job can be resumed"):
            client.fine_tuning.jobs.resume(run.job_id)
        assert site.claim(run.job_id).claim.lease.attempt == 2


def test_a_queued_job_is_paused_at_once_and_a_paused_one_can_be_cancelled(site: Site) -> None:
    job_id = site.submit()
    assert post(site, f"{job_id}/pause").json()["status"] == "paused"
    assert post(site, f"{job_id}/cancel").json()["status"] == "cancelled"
    assert error(post(site, f"{job_id}/pause"))["message"].endswith("already been cancelled and cannot be paused.")


def test_the_stream_tells_of_a_pause_and_goes_on(site: Site) -> None:
    run = site.run()
    follower = site.follow_job(run.job_id)
    post(site, f"{run.job_id}/pause")
    lifecycle.paused(site.db, run.claim.lease)
    post(site, f"{run.job_id}/resume")
    site.claim(run.job_id).succeed()
    follower.join()
    changes = [frame.body["data"]["status"] for frame in follower.frames if frame.event == "status"]
    assert changes == ["queued", "running", "paused", "queued", "running", "succeeded"]


@pytest.mark.parametrize("verb", ["pause", "resume", "clone"])
def test_another_organizations_job_is_not_found(site: Site, verb: str) -> None:
    job_id = site.submit()
    stranger = site.client(keys.create_key(site.db, name="b", organization_id="org-b"))
    assert stranger.post(f"{JOBS}/{job_id}/{verb}").status_code == 404
    assert stranger.delete(f"{JOBS}/{job_id}").status_code == 404
    assert site.get(job_id)["status"] == "queued"


# -- models that jobs have made, as the base of another job


def checkpoint_of(site: Site, run: Run, *, step: int = 5) -> str:
    relative = Path("runs") / run.job_id / "attempt-1" / "checkpoints" / f"step-{step}"
    make_model(site.settings.data_dir / relative)
    run.say(engine.Checkpoint(step=step, path=str(relative), manifest_sha256="0" * 64, num_bytes=9, train_loss=1.0))
    [found] = site.client().get(f"{JOBS}/{run.job_id}/checkpoints?limit=1").json()["data"]
    assert found["step_number"] == step
    return str(found["fine_tuned_model_checkpoint"])


def test_a_job_starts_from_a_checkpoint_and_is_planned(site: Site) -> None:
    run = site.run(suffix="100%_docs")
    name = checkpoint_of(site, run)
    job = site.get(site.submit(model=name))
    assert job["model"] == name
    assert job["lomo"]["memory"]["planned_peak_bytes"] > 0


@pytest.mark.parametrize("spoil", [":ckpt-step-6", ":ckpt-step-5x", "", ":ckpt-step-99999999999999999999"])
def test_a_checkpoint_that_is_not_there_is_refused(site: Site, spoil: str) -> None:
    run = site.run()
    name = checkpoint_of(site, run).removesuffix(":ckpt-step-5") + spoil
    found = error(site.client().post(JOBS, json={"model": name, "training_file": site.upload()}))
    assert (found["code"], found["param"]) == ("model_not_found", "model")


def test_a_model_whose_folder_is_gone_is_refused_with_the_reason(site: Site) -> None:
    run = site.run()
    name = checkpoint_of(site, run)
    tuned = run.succeed()
    (site.settings.data_dir / "runs" / run.job_id / "attempt-1" / "checkpoints").rename(site.settings.data_dir / "away")
    for model in (name, tuned):
        body = {"model": model, "training_file": site.upload()}
        found = error(site.client().post(JOBS, json=body))
        assert (found["code"], found["param"]) == ("model_not_found", "model")
        assert "no longer on this server" in found["message"]


def test_a_strangers_checkpoint_does_not_exist(site: Site) -> None:
    name = checkpoint_of(site, site.run())
    stranger = site.client(keys.create_key(site.db, name="b", organization_id="org-b"))
    file_id = stranger.post("/v1/files", files={"file": ("a.jsonl", TRAIN_ROW)}, data={"purpose": "fine-tune"}).json()[
        "id"
    ]
    found = error(stranger.post(JOBS, json={"model": name, "training_file": file_id}))
    assert (found["code"], "does not exist" in found["message"]) == ("model_not_found", True)


# -- clone


def test_a_clone_is_the_same_job_with_a_number_of_its_own(site: Site) -> None:
    first = site.submit(
        suffix="docs", metadata={"team": "a"}, lomo={"learning_rate": 0.02, "clip": {"mode": "value", "threshold": 0.5}}
    )
    made = post(site, f"{first}/clone").json()
    source = site.get(first)
    assert made["id"] != first
    assert made["status"] == "queued"
    for key in ("model", "training_file", "seed", "user_provided_suffix", "metadata", "hyperparameters", "method"):
        assert made[key] == source[key], key
    for key in ("learning_rate", "clip", "optimizer", "max_seq_length", "activation_checkpointing"):
        assert made["lomo"][key] == source["lomo"][key], key
    assert made["lomo"]["auto"] == [], "what was chosen for the first job is given for the second"


def test_a_clones_overrides_win_one_by_one(site: Site) -> None:
    first = site.submit(seed=3, metadata={"a": "1"}, lomo={"learning_rate": 0.02, "clip": {"threshold": 0.5}})
    overrides = {
        "seed": 4,
        "suffix": "second",
        "metadata": {"b": "2"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        "lomo": {"warmup_ratio": 0.5, "clip": {"mode": "value"}},
    }
    made = post(site, f"{first}/clone", overrides).json()
    source = site.get(first)
    assert (made["seed"], made["user_provided_suffix"], made["metadata"]) == (4, "second", {"b": "2"})
    assert made["hyperparameters"] == source["hyperparameters"] | {"n_epochs": 2}
    lomo = made["lomo"]
    assert (lomo["learning_rate"], lomo["warmup_ratio"]) == (0.02, 0.5)
    assert lomo["clip"] == {"mode": "value", "threshold": 0.5, "exact": "auto"}


def test_a_clone_with_another_optimizer_takes_that_ones_defaults(site: Site) -> None:
    plain = post(site, f"{site.submit()}/clone", {"lomo": {"optimizer": "adamw"}}).json()["lomo"]
    assert (plain["learning_rate"], plain["rounding"]) == (2e-5, "nearest")
    chosen = site.submit(lomo={"learning_rate": 0.003, "rounding": "nearest"})
    kept = post(site, f"{chosen}/clone", {"lomo": {"optimizer": "adalomo"}}).json()["lomo"]
    assert (kept["learning_rate"], kept["rounding"]) == (0.003, "nearest")


def test_older_hyperparameters_override_too(site: Site) -> None:
    made = post(site, f"{site.submit()}/clone", {"hyperparameters": {"n_epochs": 3, "batch_size": 2}}).json()
    assert (made["hyperparameters"]["n_epochs"], made["hyperparameters"]["batch_size"]) == (3, 2)


@pytest.mark.parametrize(
    ("overrides", "code", "param"),
    [
        ({"lomo": {"galore": 1}}, "unknown_parameter", "lomo.galore"),
        ({"lomo": 3}, "invalid_value", "lomo"),
        ({"seed": "x"}, "invalid_value", "seed"),
        ({"model": "gone"}, "model_not_found", "model"),
        ({"training_file": "file-none"}, "file_not_found", "training_file"),
    ],
)
def test_a_wrong_override_is_refused(site: Site, overrides: dict[str, Any], code: str, param: str) -> None:
    found = error(post(site, f"{site.submit()}/clone", overrides))
    assert (found["code"], found["param"]) == (code, param)


def test_one_request_makes_one_clone(site: Site) -> None:
    first, second = site.submit(), site.submit()
    made = [post(site, f"{first}/clone", **{"Idempotency-Key": "k"}) for _ in range(2)]
    assert made[0].json()["id"] == made[1].json()["id"]
    assert made[1].headers["Idempotent-Replayed"] == "true"
    reused = post(site, f"{second}/clone", **{"Idempotency-Key": "k"})
    assert error(reused, status=409)["code"] == "idempotency_key_reused"


def test_a_job_that_another_version_stored_is_not_cloned(site: Site) -> None:
    job_id = site.submit()
    with site.db.transaction() as session:
        session.execute(text("UPDATE jobs SET spec = spec || '{\"new\": 1}'"))
    found = error(post(site, f"{job_id}/clone"))
    assert (found["code"], "new" in found["message"]) == ("invalid_spec", True)


# -- delete


def delete(site: Site, job_id: str) -> httpx.Response:
    return site.client().delete(f"{JOBS}/{job_id}")


def ended(site: Site) -> Run:
    """A job that has succeeded, with a checkpoint, a model and a result file on disk."""
    run = site.run()
    run.start()
    run.step(1, 2, 3)
    checkpoint_of(site, run)
    run.succeed(site.settings.data_dir)
    make_model(site.settings.data_dir / "runs" / run.job_id / "model")
    return run


@pytest.mark.parametrize("rows_at_once", [100_000, 1])
def test_a_deleted_job_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(deletion, "_ROWS_AT_ONCE", rows_at_once)
    run = ended(site)
    kept = site.submit()
    job = site.get(run.job_id)
    folder = site.settings.data_dir / "runs" / run.job_id
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert num_bytes > 0
    response = delete(site, run.job_id)
    assert response.json() == {
        "object": "fine_tuning.job",
        "id": run.job_id,
        "deleted": True,
        "bytes_freed": num_bytes,
    }
    assert not folder.exists()
    client = site.client()
    for path in (
        f"{JOBS}/{run.job_id}",
        f"{JOBS}/{run.job_id}/events",
        f"/v1/files/{job['result_files'][0]}",
        f"/v1/models/{job['fine_tuned_model']}",
    ):
        assert client.get(path).status_code == 404, path
    with site.db.read() as session:
        for table in ("events", "checkpoints", "metrics", "attempts", "models", "log_lines"):
            left = session.scalar(
                text(f"SELECT count(*) FROM {table} WHERE job_id = :id"),  # noqa: S608 - named above
                {"id": run.job_id},
            )
            assert left == 0, table
    assert delete(site, run.job_id).status_code == 404
    assert site.get(kept)["status"] == "queued"
    assert client.get(f"/v1/files/{job['training_file']}").status_code == 200, "the data are the user's own"


@pytest.mark.parametrize("status", ["queued", "running", "paused"])
def test_a_job_that_has_not_ended_is_not_deleted(site: Site, status: str) -> None:
    job_id = site.run().job_id if status == "running" else site.submit()
    if status == "paused":
        post(site, f"{job_id}/pause")
    found = error(delete(site, job_id))
    assert (found["code"], "cancel it first" in found["message"]) == ("invalid_state", True)
    assert site.get(job_id)["status"] == status


@pytest.mark.parametrize("base", ["model", "checkpoint"])
def test_a_job_that_another_one_starts_from_is_not_deleted(site: Site, base: str) -> None:
    run = site.run(suffix="a_b%")
    checkpoint = checkpoint_of(site, run)
    tuned = run.succeed(site.settings.data_dir)
    make_model(site.settings.data_dir / "runs" / run.job_id / "model")
    child = site.submit(model=tuned if base == "model" else checkpoint)
    found = error(delete(site, run.job_id))
    assert (found["code"], child in found["message"]) == ("invalid_state", True)
    assert (site.settings.data_dir / "runs" / run.job_id / "model").is_dir()
    post(site, f"{child}/cancel")
    assert delete(site, run.job_id).status_code == 200


def test_a_deletion_and_a_job_that_starts_from_the_model_at_once(site: Site) -> None:
    """One of the two is refused, whoever is first: no job is left without its base."""
    runs = [ended(site) for _ in range(6)]
    file_id = site.upload()
    models = [site.get(run.job_id)["fine_tuned_model"] for run in runs]
    client = site.client()

    def ask(number: int) -> int:
        if number % 2:
            return client.delete(f"{JOBS}/{runs[number // 2].job_id}").status_code
        return client.post(JOBS, json={"model": models[number // 2], "training_file": file_id}).status_code

    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(ask, range(2 * len(runs))))
    pairs = list(zip(codes[::2], codes[1::2], strict=True))
    assert all(sorted(pair) == [200, 400] for pair in pairs), pairs


def test_a_deletion_of_a_file_and_a_job_that_needs_it_at_once(site: Site) -> None:
    """One of the two is refused: no job is left without its data."""
    files = [site.upload() for _ in range(8)]
    client = site.client()

    def ask(number: int) -> int:
        file_id = files[number // 2]
        if number % 2:
            return client.delete(f"/v1/files/{file_id}").status_code
        return client.post(JOBS, json={"model": MODEL, "training_file": file_id}).status_code

    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(ask, range(2 * len(files))))
    pairs = list(zip(codes[::2], codes[1::2], strict=True))
    assert all(sorted(pair) == [200, 400] for pair in pairs), pairs


def test_a_files_deletion_waits_for_a_job_that_comes_to_be(site: Site) -> None:
    file_id = site.upload()
    with ThreadPoolExecutor(1) as pool:
        with site.db.transaction() as session:
            hold_files(session, organization_id="org-local", file_ids=[file_id])
            answer = pool.submit(site.client().delete, f"/v1/files/{file_id}")
            blocked = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            site.wait_until(lambda: session.scalar(blocked), 10, "the deletion to wait")
        assert answer.result().status_code == 200
    with pytest.raises(InvalidRequestError, match="just been deleted"), site.db.transaction() as session:
        hold_files(session, organization_id="org-local", file_ids=[file_id])


def test_a_deletion_waits_for_a_job_that_comes_to_be(site: Site) -> None:
    run = ended(site)
    name = site.get(run.job_id)["fine_tuned_model"]
    with ThreadPoolExecutor(1) as pool:
        with site.db.transaction() as session:
            checkpoint_names.hold_maker(session, organization_id="org-local", name=name)
            answer = pool.submit(delete, site, run.job_id)
            blocked = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
            site.wait_until(lambda: session.scalar(blocked), 10, "the deletion to wait")
        assert answer.result().status_code == 200
    with (
        pytest.raises(InvalidRequestError, match="its job was deleted"),
        site.db.transaction() as session,
    ):
        checkpoint_names.hold_maker(session, organization_id="org-local", name=name)


def test_a_link_in_the_folders_place_or_inside_is_not_followed(site: Site, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x" * 100)
    first, second = ended(site), ended(site)
    runs = site.settings.data_dir / "runs"
    (runs / first.job_id / "link").symlink_to(outside)
    assert delete(site, first.job_id).status_code == 200
    (runs / second.job_id).rename(tmp_path / "moved")
    (runs / second.job_id).symlink_to(outside)
    assert delete(site, second.job_id).json()["bytes_freed"] == 0
    assert not (runs / second.job_id).is_symlink()
    assert (outside / "precious").read_bytes() == b"x" * 100


def test_a_path_in_a_row_is_not_followed(site: Site, tmp_path: Path) -> None:
    run = ended(site)
    (tmp_path / "precious").mkdir()
    with site.db.transaction() as session:
        session.execute(text("UPDATE models SET path = '../precious'"))
        session.execute(text("UPDATE checkpoints SET path = 'models'"))
    assert delete(site, run.job_id).status_code == 200
    assert (tmp_path / "precious").is_dir()
    assert (site.settings.data_dir / "models" / MODEL / "config.json").is_file()


@pytest.mark.parametrize("job_id", ["..", "%2e%2e", "ftjob-none", "..%2Fmodels", "."])
def test_an_address_that_is_no_job_deletes_nothing(site: Site, job_id: str) -> None:
    assert delete(site, job_id).status_code in {404, 405}
    assert (site.settings.data_dir / "models" / MODEL / "config.json").is_file()

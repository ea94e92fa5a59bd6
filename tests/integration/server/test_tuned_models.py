"""Tuned models are taken away as a tar and deleted: by their owner alone, whole, and nothing beside them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import gguf
import openai
import pytest
import torch
import transformers
from sqlalchemy import update

from jobs import keys, reads, submission
from jobs.keys import DEFAULT_ORGANIZATION
from jobs.models import TunedModel
from jobs.owner import Owner
from jobs.planning import PlannedJob
from jobs.spec import JobSpec
from jobs.tuned_models import ModelArchive
from lomo_core import events as engine
from tests.support.tiny_model import make_tiny_model

from .conftest import MODEL, Run, Site


def write_manifest(folder: Path) -> None:
    """As the engine does at the end of a checkpoint."""
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    ]
    (folder / "MANIFEST.json").write_text(json.dumps({"step": 5, "files": files}), encoding="utf-8")


def tune(site: Site) -> tuple[Run, str, Path]:
    """A job that has succeeded, its model's name and folder."""
    run = site.run(suffix="docs")
    run.start()
    name = run.succeed()
    folder = make_tiny_model(site.settings.data_dir / f"runs/{run.job_id}/model")
    write_manifest(folder)
    return run, name, folder


def code_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_an_export_is_the_folder_and_loads(site: Site, tmp_path: Path) -> None:
    _, name, folder = tune(site)
    response = site.client().get(f"/v1/models/{name}/export", params={"format": "tar"})
    assert response.status_code == 200, response.text
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["content-disposition"] == 'attachment; filename="model.tar"'
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        assert all(member.isfile() for member in tar.getmembers())
        tar.extractall(tmp_path / "out", filter="data")
    out = tmp_path / "out" / "model"
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert needed <= {path.name for path in out.iterdir()}
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in out.iterdir())
    assert transformers.AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template


def test_a_checkpoints_export_leaves_the_runs_own_state_out(site: Site) -> None:
    run = site.run()
    run.start()
    path = f"runs/{run.job_id}/attempt-1/checkpoints/step-5"
    folder = make_tiny_model(site.settings.data_dir / path)
    (folder / "optimizer.safetensors").write_bytes(b"moments")
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder)
    (folder / "left.behind").write_text("not in the manifest")
    run.say(engine.Checkpoint(step=5, path=path, manifest_sha256="0" * 64, num_bytes=7, train_loss=2.0))
    [checkpoint] = site.client().get(f"/v1/fine_tuning/jobs/{run.job_id}/checkpoints").json()["data"]
    response = site.client().get(f"/v1/models/{checkpoint['fine_tuned_model_checkpoint']}/export")
    assert response.status_code == 200, response.text
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        names = set(tar.getnames())
    assert "model/model.safetensors" in names
    assert not names & {"model/optimizer.safetensors", "model/trainer_state.json", "model/left.behind"}


def test_an_export_as_gguf_loads(site: Site, tmp_path: Path) -> None:
    _, name, folder = tune(site)
    response = site.client().get(f"/v1/models/{name}/export", params={"format": "gguf"})
    assert response.status_code == 200, response.text
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["content-disposition"] == 'attachment; filename="model.gguf"'
    (tmp_path / "model.gguf").write_bytes(response.content)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(weight, expected[key]) for key, weight in found.items())
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["general.name"].contents() == name


def test_what_gguf_cannot_say_is_told(site: Site) -> None:
    _, name, folder = tune(site)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert code_of(site.client().get(f"/v1/models/{name}/export?format=gguf")) == (404, "model_not_found")
    (folder / "MANIFEST.json").unlink()
    write_manifest(folder)
    response = site.client().get(f"/v1/models/{name}/export?format=gguf")
    assert code_of(response) == (400, "unsupported_model")
    assert "GGUF has no llama with the activation 'relu'" in response.json()["error"]["message"]
    assert site.client().get(f"/v1/models/{name}/export?format=tar").is_success


def test_what_cannot_be_exported(site: Site) -> None:
    _, name, folder = tune(site)
    client = site.client()
    assert code_of(client.get(f"/v1/models/{MODEL}/export")) == (403, "base_model")
    assert code_of(client.get("/v1/models/ft:none::x:12345678/export")) == (404, "model_not_found")
    assert client.get(f"/v1/models/{name}/export?format=zip").status_code == 400
    stranger = site.client(keys.create_key(site.db, name="other", organization_id="org-other"))
    assert code_of(stranger.get(f"/v1/models/{name}/export")) == (404, "model_not_found")
    assert code_of(stranger.delete(f"/v1/models/{name}")) == (404, "model_not_found")
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to(folder / "real.json")
    assert code_of(client.get(f"/v1/models/{name}/export")) == (404, "model_not_found")


def test_a_large_file_is_read_in_chunks(tmp_path: Path) -> None:
    """8 GiB and more need the header's other form; the file is sparse."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(9 * 2**30)
    (tmp_path / "config.json").write_bytes(b"x" * 512)
    write = {"files": [{"name": "config.json", "size": 512}, {"name": "model.safetensors", "size": 9 * 2**30}]}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(write))
    archive = ModelArchive(tmp_path, name="ft:x")
    assert archive.num_bytes == 512 + 512 + 512 + 9 * 2**30 + 1024
    chunks = archive.chunks()
    head = b"".join(next(chunks) for _ in range(4))
    assert tarfile.TarInfo.frombuf(head[1024:1536], "utf-8", "strict").size == 9 * 2**30
    assert len(next(chunks)) == 2**20
    chunks.close()


def test_deletion(site: Site) -> None:
    run, name, folder = tune(site)
    beside = folder.parent / "attempt-1"
    beside.mkdir(exist_ok=True)
    with openai.OpenAI(api_key=site.key, base_url=f"{site.url}/v1", _strict_response_validation=True) as client:
        deleted = client.models.delete(name)
        assert (deleted.id, deleted.object, deleted.deleted) == (name, "model", True)
        assert name not in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError):
            client.models.delete(name)
        with pytest.raises(openai.PermissionDeniedError, match="is a base model"):
            client.models.delete(MODEL)
        assert client.fine_tuning.jobs.retrieve(run.job_id).status == "succeeded"
    assert not folder.exists()
    assert beside.exists()
    assert not list(folder.parent.glob(".tmp-*"))


def test_a_model_that_a_job_starts_from_stays(site: Site) -> None:
    _, name, folder = tune(site)
    second = submission.submit(
        site.db,
        planned=PlannedJob(spec=JobSpec(model=name, training_file=site.upload(), seed=1), planned_bytes=None),
        owner=Owner(DEFAULT_ORGANIZATION),
        api_key_id=None,
        metadata={},
    ).id
    response = site.client().delete(f"/v1/models/{name}")
    assert code_of(response) == (400, "invalid_state")
    assert second in response.json()["error"]["message"]
    assert folder.is_dir()
    site.client().post(f"/v1/fine_tuning/jobs/{second}/cancel").raise_for_status()
    assert site.client().delete(f"/v1/models/{name}").is_success


@pytest.mark.parametrize("path", ["../outside", "runs/../outside", "runs", "/etc", "runs/link"])
def test_a_path_that_leads_elsewhere_is_not_followed(site: Site, path: str) -> None:
    """Nobody can write such a row by the API; a restored or edited database may hold one."""
    _, name, _ = tune(site)
    outside = site.settings.data_dir.parent / "outside"
    outside.mkdir(exist_ok=True)
    (site.settings.data_dir / "outside").mkdir()
    (site.settings.runs_dir / "link").symlink_to(outside)
    with site.db.transaction() as session:
        session.execute(update(TunedModel).where(TunedModel.id == name).values(path=path))
    assert site.client().delete(f"/v1/models/{name}").status_code == 400
    assert outside.is_dir()
    assert (site.settings.data_dir / "outside").is_dir()
    assert site.settings.runs_dir.is_dir()


@pytest.mark.parametrize("name", ["../models/tiny", "ft:../../etc", "%2e%2e%2fruns", "..%2f..%2fetc"])
def test_a_name_is_not_a_path(site: Site, name: str) -> None:
    assert site.client().delete(f"/v1/models/{name}").status_code in (403, 404)
    assert site.client().get(f"/v1/models/{name}/export").status_code in (403, 404)
    assert reads.list_models(site.db, owner=Owner(DEFAULT_ORGANIZATION)) == []

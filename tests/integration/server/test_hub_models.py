"""Models of the hub can be named where the server's list has them, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from server.settings import ServerSettings

from .conftest import MODEL, Site, WaitUntil, running_site


@pytest.fixture
def site(settings: ServerSettings, wait_until: WaitUntil) -> Iterator[Site]:
    """A server that allows one model of the hub by name, and all of an owner's."""
    allowing = settings.model_copy(update={"hub_models": ("some/model", "open/*")})
    with running_site(allowing, wait_until) as site:
        yield site


def test_models_allowed_by_name_are_listed_and_can_be_retrieved(site: Site) -> None:
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key, _strict_response_validation=True)
    assert {(model.id, model.owned_by) for model in client.models.list()} == {
        (MODEL, "base"),
        ("some/model", "huggingface"),
    }
    assert client.models.retrieve("some/model").owned_by == "huggingface"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("some/model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("open/anything")


@pytest.mark.parametrize("name", ["some/model", "open/anything"])
def test_a_job_of_an_allowed_model_waits_for_its_download(site: Site, name: str) -> None:
    job_id = site.submit(model=name)
    assert site.get(job_id)["status"] == "queued"
    events = site.client().get(f"/v1/fine_tuning/jobs/{job_id}/events").json()["data"]
    assert "its model has not been downloaded yet" in events[0]["message"]


@pytest.mark.parametrize("name", ["some/other", "open2/anything", "some/model/x", "open/.."])
def test_any_other_is_unknown(site: Site, name: str) -> None:
    body = {"model": name, "training_file": site.upload()}
    response = site.client().post("/v1/fine_tuning/jobs", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "model_not_found")

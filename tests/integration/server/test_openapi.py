"""The description of the API, and every route held against it by schemathesis: whatever it is sent, no 5xx."""

from __future__ import annotations

import contextlib
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from server.scopes import PUBLIC

from .conftest import Site

EXAMPLES = 6  # of each kind and route; some 50 routes take 20 s
TIMEOUT_S = 20.0
# Answers that only a server in trouble gives, and that are described.
DECLARED = {503, 507}


def test_it_needs_no_key_and_names_every_route(site: Site) -> None:
    document = site.client(key="").get("/openapi.json").raise_for_status().json()
    assert document["openapi"].startswith("3.1")
    described = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert "POST /v1/fine_tuning/jobs" in described
    assert "POST /v1/chat/completions" in described
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert ("security" in operation) == (f"{method.upper()} {path}" not in PUBLIC), (method, path)
            assert operation["description"], (method, path)


def test_options_have_texts_and_ranges(site: Site) -> None:
    schemas = site.client(key="").get("/openapi.json").json()["components"]["schemas"]
    options = schemas["RequestedOptions"]["properties"]
    rate = next(kind for kind in options["learning_rate"]["anyOf"] if kind.get("type") == "number")
    assert rate["maximum"] == 10
    assert "Peak rate" in options["learning_rate"]["description"]
    assert options["optimizer"]["enum"] == ["lomo", "adalomo", "sgd", "adamw"]


@pytest.mark.parametrize(
    "name", ["RequestedOptions", "JobLomo", "ClipOptions", "ParamGroup", "Hyperparameters", "CreateJob", "Memory"]
)
def test_every_field_of_a_job_has_a_text_and_what_is_asked_for_a_range(site: Site, name: str) -> None:
    schema = site.client(key="").get("/openapi.json").json()["components"]["schemas"][name]
    assert schema["description"]
    for field, described in schema["properties"].items():
        assert described.get("description"), field
        kinds = [described, *described.get("anyOf", [])]
        numbers = [kind for kind in kinds if kind.get("type") in {"number", "integer"} and "const" not in kind]
        if name not in {"JobLomo", "Memory"}:
            assert all({"minimum", "exclusiveMinimum"} & kind.keys() for kind in numbers), field


def test_the_options_of_a_job_are_described_as_used_and_as_asked_for(site: Site) -> None:
    schemas = site.client(key="").get("/openapi.json").json()["components"]["schemas"]
    used, asked = schemas["JobLomo"]["properties"], schemas["RequestedOptions"]["properties"]
    assert asked.keys() <= used.keys()
    assert {"eta_s", "loss_curve", "queue_position"} <= used.keys()


def test_lists_that_may_be_streams_are_described(site: Site) -> None:
    paths = site.client(key="").get("/openapi.json").json()["paths"]
    job = "/v1/fine_tuning/jobs/{job_id}"
    for path, name in (
        ("/v1/fine_tuning/jobs", "JobList"),
        (f"{job}/events", "EventList"),
        (f"{job}/logs", "LogList"),
        (f"{job}/metrics", "JobMetrics"),
    ):
        schema = paths[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{name}"}


def test_examples_fit_their_schemas(site: Site) -> None:
    document = site.client(key="").get("/openapi.json").json()
    found = 0
    for methods in document["paths"].values():
        for operation in methods.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if "example" in content:
                    schema = {**content["schema"], "components": document["components"]}
                    jsonschema_rs.validate(schema, content["example"])
                    found += 1
    assert found >= 5


@pytest.mark.slow
def test_nothing_that_is_sent_is_answered_with_a_server_error(site: Site) -> None:
    job_id, file_id = site.submit(), site.upload()
    document = site.client().get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    known = {"job_id": job_id, "file_id": file_id, "training_file": file_id, "model": "tiny"}
    failures: list[str] = []
    num_sent = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case) -> None:
        nonlocal num_sent
        # A stream of one's own jobs does not end; what it sends has tests of its own.
        case.query.pop("stream", None)
        for name in case.path_parameters:
            if name in known and num_sent % 2:
                case.path_parameters[name] = known[name]
        num_sent += 1
        answer = case.call(base_url=site.url, headers={"Authorization": f"Bearer {site.key}"}, timeout=TIMEOUT_S)
        if answer.status_code >= 500 and answer.status_code not in DECLARED:
            failures.append(f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text[:200]}")

    for result in schema.get_all_operations():
        operation = result.ok()
        _run(operation, send)
    assert not failures, "\n".join(failures)
    assert num_sent > 5 * len(document["paths"])


def _run(operation: Any, send: Any) -> None:
    """Send cases of one route, such as fit its description and such as do not. Nothing can be wrong where it takes
    nothing."""
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        with contextlib.suppress(Unsatisfiable):
            given(case=operation.as_strategy(generation_mode=mode))(send)()

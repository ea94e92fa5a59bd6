"""`POST /v1/plan`: what a run will need, by name or by a bare configuration, and which host can hold it."""

from __future__ import annotations

import subprocess
from typing import Any

import httpx
import pytest

from .conftest import MODEL, Site, register_host
from .conftest import MODEL_CONFIG as CONFIG

MIB = 2**20
NUM_PARAMETERS = 512 * 64 + 2 * 50304 + 64


def ask(site: Site, **body: Any) -> httpx.Response:
    return site.client().post("/v1/plan", json=body, timeout=120)


def test_a_bare_configuration_is_planned_and_held_against_the_hosts(site: Site) -> None:
    register_host(site.db, "card", available_bytes=64 * MIB)
    register_host(site.db, "cpu", available_bytes=64 * MIB, run_overhead_bytes=400 * MIB)
    answer = ask(site, config=CONFIG, hyperparameters={"batch_size": 2}, lomo={"precision": "fp32"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["object"] == "plan"
    assert found["num_parameters"] == NUM_PARAMETERS
    assert found["parameters_bytes"] == 4 * NUM_PARAMETERS
    assert found["optimizer_bytes"] == 0
    assert found["batch_size"] == 2
    assert {phase["name"] for phase in found["phases"]} == {"forward", "loss", "backward", "embedding", "update"}
    assert found["beside"]["lomo"] == found["peak_bytes"]
    fits = {fit["host"]: fit for fit in found["fits"]}
    assert fits["card"] == {"host": "card", "device_bytes": 64 * MIB, "needed_bytes": found["peak_bytes"], "ok": True}
    # On a CPU the interpreter and the libraries need some hundred MiB themselves.
    assert not fits["cpu"]["ok"]
    assert fits["cpu"]["needed_bytes"] == found["peak_bytes"] + 400 * MIB


def test_the_second_plan_of_a_model_starts_no_process(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG | {"vocab_size": 640}
    assert ask(site, config=config).status_code == 200
    monkeypatch.setattr("jobs.shape_cache._ask_engine", lambda config: pytest.fail("the shapes are known"))
    larger, smaller = (
        ask(site, config=config, lomo={"optimizer": name, "max_seq_length": 1024}).json() for name in ("adamw", "lomo")
    )
    assert larger["optimizer_bytes"] == 2 * 2 * (NUM_PARAMETERS + 128 * 64)
    assert smaller["optimizer_bytes"] == 0


def test_wrong_requests_are_400_with_the_field(site: Site) -> None:
    for body, param, said in (
        ({}, None, "either a model's name or its config"),
        ({"model": MODEL, "config": CONFIG}, None, "either a model's name or its config"),
        ({"model": "no-such"}, "model", "does not exist"),
        ({"config": {"model_type": "no-such"}}, "model", "knows no models of type"),
        ({"config": {}}, "model", "model_type"),
        ({"config": CONFIG | {"auto_map": {"AutoConfig": "x.Y"}}}, "model", "never run here"),
        ({"config": CONFIG | {"hidden_size": -1}}, "model", "cannot be"),
        ({"config": CONFIG | {"num_attention_heads": 0}}, "model", "cannot be"),
        ({"config": CONFIG, "lomo": {"max_seq_length": 4096}}, "lomo.max_seq_length", "1024"),
        ({"config": CONFIG, "lomo": {"colour": "red"}}, "lomo.colour", ""),
    ):
        answer = ask(site, **body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert said in error["message"], error
        assert param is None or error["param"] == param, error
        assert "Traceback" not in answer.text


def test_nobody_plans_without_a_key(site: Site) -> None:
    assert httpx.post(f"{site.url}/v1/plan", json={"config": CONFIG}).status_code == 401


def test_the_engine_does_not_see_the_services_settings(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setenv("LOMO_DATABASE_URL", "postgresql://secret")

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(env)
        return subprocess.CompletedProcess(command, 1, "", "Traceback: a defect")

    monkeypatch.setattr("jobs.shape_cache.subprocess.run", run)
    answer = ask(site, config=CONFIG | {"vocab_size": 513})
    assert answer.status_code == 400
    assert "Traceback" not in answer.text
    assert seen and not any(name.startswith("LOMO_") for name in seen[0])

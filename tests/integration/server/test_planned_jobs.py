"""A job's memory at its creation: planned, refused where it cannot fit, and chosen where "auto" leaves it open."""

from __future__ import annotations

import json
from typing import Any

import httpx

from jobs import reads
from jobs.owner import Owner

from .conftest import MODEL, MODEL_CONFIG, Site, make_model, register_host

MIB = 2**20
# Of the model of the site, in fp32: 512 x 64 embeddings, two blocks of 4 x 64 x 64 + 3 x 64 x 176 + 2 x 64, a norm.
PARAMETERS_BYTES = 4 * (512 * 64 + 2 * 50304 + 64)
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "other")


def create(site: Site, *, model: str = MODEL, batch_size: int | str | None = None, **lomo: Any) -> httpx.Response:
    body = {
        "model": model,
        "training_file": site.upload(),
        "hyperparameters": {} if batch_size is None else {"batch_size": batch_size},
        "lomo": {"precision": "fp32", **lomo},
    }
    return site.client().post("/v1/fine_tuning/jobs", json=body, timeout=60)


def created(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def planned_peak(site: Site, **options: Any) -> int:
    """What a job of these options needs, from a site without any limit."""
    peak: int = created(create(site, **options))["lomo"]["memory"]["planned_peak_bytes"]
    return peak


def queued_message(site: Site, job_id: str) -> str:
    events = site.client().get(f"/v1/fine_tuning/jobs/{job_id}/events").json()["data"]
    return next(event["message"] for event in events if event["message"].startswith("Queued"))


def test_a_job_carries_its_plan_from_its_creation(site: Site) -> None:
    register_host(site.db, "cpu", available_bytes=2**34, run_overhead_bytes=300 * MIB)
    job = created(create(site, batch_size=2))
    memory = job["lomo"]["memory"]
    planned = memory["planned"]
    assert planned["parameters_bytes"] == PARAMETERS_BYTES
    assert planned["optimizer_bytes"] == 0
    assert planned["other_bytes"] > 300 * MIB
    assert sum(planned[f"{name}_bytes"] for name in CATEGORIES) == planned["peak_bytes"]
    assert memory["planned_peak_bytes"] == planned["peak_bytes"]
    assert (memory["measured"], memory["measured_peak_bytes"]) == (None, None)
    assert queued_message(site, job["id"]).startswith("Queued. Planned memory: 0.3")
    assert job["lomo"]["auto"] == []
    with_moments = created(create(site, batch_size=2, optimizer="adamw"))["lomo"]["memory"]["planned"]
    assert with_moments["optimizer_bytes"] == 2 * PARAMETERS_BYTES


def test_a_batch_that_no_host_can_hold_is_refused_with_the_table_and_the_nearest_that_fits(site: Site) -> None:
    capacity = planned_peak(site, batch_size=5)
    register_host(site.db, "card", available_bytes=capacity)
    answer = create(site, batch_size=64)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("wont_fit", "invalid_request_error")
    assert error["plan"]["parameters_bytes"] == PARAMETERS_BYTES
    assert error["plan"]["peak_bytes"] > capacity
    assert error["host"] == {"name": "card", "available_bytes": capacity, "overhead_bytes": 0}
    nearest = error["nearest"]
    assert nearest == {"batch_size": 5, "peak_bytes": capacity}
    head, *table, advice = error["message"].splitlines()
    assert "the largest host, card, has" in head
    assert [line.split()[0] for line in table] == [*CATEGORIES, "peak"]
    assert advice.startswith("The nearest setting that fits: batch_size 5 (")
    assert len(site.client().get("/v1/fine_tuning/jobs").json()["data"]) == 1  # the one that fitted
    assert create(site, batch_size=5).status_code == 200
    assert create(site, batch_size=6).status_code == 400


def test_checkpointing_is_the_nearest_where_it_suffices(site: Site) -> None:
    register_host(site.db, "card", available_bytes=planned_peak(site, batch_size=8))
    error = create(site, batch_size=8, activation_checkpointing=False).json()["error"]
    assert error["nearest"]["activation_checkpointing"] is True
    assert set(error["nearest"]) == {"activation_checkpointing", "peak_bytes"}


def test_the_process_counts_on_a_cpu_host(site: Site) -> None:
    peak = planned_peak(site, batch_size=4)
    register_host(site.db, "cpu", available_bytes=peak + 300 * MIB - 1, run_overhead_bytes=300 * MIB)
    assert create(site, batch_size=4).json()["error"]["code"] == "wont_fit"
    register_host(site.db, "cpu", available_bytes=peak + 300 * MIB, run_overhead_bytes=300 * MIB)
    assert create(site, batch_size=4).status_code == 200


def test_auto_chooses_what_fits_and_records_it(site: Site) -> None:
    at_2 = planned_peak(site, batch_size=2)
    register_host(site.db, "card", available_bytes=at_2)
    job = created(create(site, batch_size="auto", activation_checkpointing="auto", devices="auto", offload="auto"))
    lomo = job["lomo"]
    assert job["hyperparameters"]["batch_size"] == 2
    assert (lomo["activation_checkpointing"], lomo["devices"], lomo["offload"]) == (True, 1, "none")
    assert lomo["auto"] == ["batch_size", "activation_checkpointing", "devices", "offload"]
    assert lomo["memory"]["planned_peak_bytes"] == at_2
    said = queued_message(site, job["id"])
    assert "batch_size 2, activation_checkpointing true, devices 1, offload none" in said
    stored = reads.get_job(site.db, owner=Owner(job["organization_id"]), job_id=job["id"]).spec
    assert (stored["batch_size"], stored["lomo"]["activation_checkpointing"]) == (2, True)


def test_without_a_batch_size_the_default_is_a_limit(site: Site) -> None:
    assert created(create(site))["hyperparameters"]["batch_size"] == 4
    register_host(site.db, "card", available_bytes=planned_peak(site, batch_size=1))
    job = created(create(site))
    assert job["hyperparameters"]["batch_size"] == 1
    assert job["lomo"]["auto"] == ["batch_size"]


def test_auto_that_cannot_help_is_refused(site: Site) -> None:
    register_host(site.db, "card", available_bytes=PARAMETERS_BYTES)
    error = create(site, batch_size="auto", activation_checkpointing="auto").json()["error"]
    assert (error["code"], error["nearest"]) == ("wont_fit", None)
    assert "a smaller model" in error["message"]


def test_auto_is_taken_where_it_may_stand_only(site: Site) -> None:
    error = create(site, packing="auto").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "lomo.packing")


def test_a_model_whose_memory_cannot_be_foreseen_runs_without_a_plan(site: Site) -> None:
    folder = site.settings.data_dir / "models" / "experts"
    make_model(folder)
    config = MODEL_CONFIG | {"model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    register_host(site.db, "card", available_bytes=1)
    job = created(create(site, model="experts"))
    assert job["lomo"]["memory"]["planned"] is None
    assert "its memory not planned: " in queued_message(site, job["id"])
    assert "cannot be foreseen" in queued_message(site, job["id"])


def test_a_model_that_cannot_be_built_is_refused_at_once(site: Site) -> None:
    folder = site.settings.data_dir / "models" / "broken"
    make_model(folder)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    error = create(site, model="broken").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_model", "model")

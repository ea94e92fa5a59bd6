"""`/metrics`: what Prometheus' own parser makes of it, after jobs, a host and requests of every kind."""

from __future__ import annotations

import dataclasses

from prometheus_client.parser import text_string_to_metric_families

from jobs import host_registry
from jobs.host_registry import HostReport

from .conftest import HOST, Site, make_step

Samples = dict[tuple[str, tuple[str, ...]], float]


def scrape(site: Site) -> Samples:
    """Every sample by its name and its labels' values."""
    response = site.client().get("/metrics").raise_for_status()
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_jobs_hosts_and_memory(site: Site) -> None:
    run = site.run()
    memory = make_step(1).memory
    run.start(planned=dataclasses.replace(memory, peak_bytes=2 * memory.peak_bytes))
    run.step(1)
    waiting = site.submit()
    found = scrape(site)
    assert found["lomo_jobs", ("running",)] == found["lomo_jobs", ("queued",)] == 1
    assert found["lomo_jobs", ("failed",)] == 0
    assert found["lomo_queue_oldest_seconds", ()] > 0
    assert found["lomo_running_memory_bytes", ("parameters",)] == 1000
    assert found["lomo_running_memory_bytes", ("gradients",)] == memory.gradients_bytes
    assert found["lomo_planned_by_measured_peak_count", ()] == 0
    assert found["lomo_host_alive", (HOST,)] == found["lomo_host_running_jobs", (HOST,)] == 1
    assert found["lomo_host_memory_bytes", (HOST, "available")] > found["lomo_host_memory_bytes", (HOST, "free")] > 0
    run.succeed()
    site.client().post(f"/v1/fine_tuning/jobs/{waiting}/cancel").raise_for_status()
    found = scrape(site)
    assert (found["lomo_planned_by_measured_peak_count", ()], found["lomo_planned_by_measured_peak_sum", ()]) == (1, 2)
    assert (found["lomo_jobs", ("succeeded",)], found["lomo_jobs", ("cancelled",)]) == (1, 1)
    assert found["lomo_queue_oldest_seconds", ()] == 0
    assert found["lomo_running_memory_bytes", ("parameters",)] == 0
    assert found["lomo_trained_tokens_total", ()] == 9
    assert found["lomo_host_running_jobs", (HOST,)] == 0


def test_the_cards_of_a_host(site: Site) -> None:
    cards = [
        {"index": index, "uuid": f"GPU-{index}", "name": 'NVIDIA "H200"', "memory_bytes": 2**37, "free_bytes": 2**36}
        for index in range(2)
    ]
    report = HostReport(name="gpu2", incarnation="1", memory_bytes=2**38, devices={"cpu": {}, "gpus": cards})
    host_registry.register_host(site.db, report)
    found = scrape(site)
    for index in ("0", "1"):
        assert found["lomo_host_gpu_memory_bytes", (index, "gpu2", 'NVIDIA "H200"')] == 2**37


def test_requests_are_counted_by_route_and_not_by_address(site: Site) -> None:
    client = site.client()
    for name in ("ftjob-1", "ftjob-2"):
        assert client.get(f"/v1/fine_tuning/jobs/{name}").status_code == 404
    assert client.get("/no/such/page").status_code == 404
    assert client.request("PROPFIND", "/v1/models").status_code == 405
    assert site.client(key="").get("/v1/models").status_code == 401
    found = scrape(site)
    route = "/v1/fine_tuning/jobs/{job_id}"
    assert found["lomo_http_requests_total", ("GET", route, "404")] == 2
    assert found["lomo_http_response_start_seconds_count", ("GET", route)] == 2
    assert found["lomo_http_requests_total", ("GET", "none", "404")] == 1
    assert found["lomo_http_requests_total", ("GET", "/v1/models", "401")] == 1
    methods = {labels[0] for name, labels in found if name == "lomo_http_requests_total"}
    assert methods <= {"GET", "OTHER"}


def test_nobody_reads_them_without_a_key(site: Site) -> None:
    assert site.client(key="").get("/metrics").status_code == 401

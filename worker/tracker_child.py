"""Weights & Biases or MLflow, in a process of its own: `python -m worker.tracker_child`, fed with JSON lines.

The first line says which tool and what run, each further one is a step's figures; the run ends with the input. Their
libraries start threads and processes, wait for servers and load hundreds of modules: none of it may happen beside
an engine's worker. What goes wrong ends the process; the last line of its output says why.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Json = dict[str, Any]
Tell = Callable[[int, float, Json], None]
"""Takes a step, its time in seconds since the epoch, and its figures."""

_MAX_BATCH_METRICS = 1000  # of one log_batch: https://mlflow.org/docs/latest/api_reference/rest-api.html
_MAX_PARAM_CHARS = 6000  # of a parameter's value, the same page
_FLUSH_EVERY_S = 1.0  # MLflow takes a request for each batch: some 10 ms on a server nearby


def main(lines: Iterator[str]) -> None:
    """Tell one run to one tool."""
    run = json.loads(next(lines))
    with _TOOLS[run["tool"]](run) as tell:
        for line in lines:
            point = json.loads(line)
            tell(point["step"], point["time_s"], point["values"])


@contextlib.contextmanager
def _wandb(run: Json) -> Iterator[Tell]:
    """A W&B run; offline it is a folder below `run["folder"]`, which `wandb sync` uploads."""
    wandb = importlib.import_module("wandb")
    settings = wandb.Settings(
        mode=run["mode"],
        root_dir=run["folder"],
        console="off",
        silent=True,
        # About this process, which is not the one that trains.
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    given = {name: run[name] for name in ("project", "entity", "name", "tags", "id", "group", "config")}
    with wandb.init(**given, settings=settings) as started:
        # Its own step only grows, and a run that goes back repeats some.
        started.define_metric("*", step_metric="step")
        yield lambda step, _, values: started.log({"step": step, **values})


@contextlib.contextmanager
def _mlflow(run: Json) -> Iterator[Tell]:
    """An MLflow run: `config` as its parameters, figures as metrics in batches."""
    entities: Any = importlib.import_module("mlflow.entities")
    client = importlib.import_module("mlflow").MlflowClient(run["tracking_uri"])
    experiment = client.get_experiment_by_name(run["project"])
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(run["project"])
    run_id = client.create_run(experiment_id, run_name=run["name"], tags={"lomo.job_id": run["group"]}).info.run_id
    params = [entities.Param(key, value) for key, value in _flat(run["config"])]
    client.log_batch(run_id, params=params)
    waiting: list[Any] = []
    sent_at = 0.0

    def tell(step: int, time_s: float, values: Json) -> None:
        nonlocal sent_at
        if len(waiting) + len(values) > _MAX_BATCH_METRICS:
            flush()
        waiting.extend(entities.Metric(name, value, round(time_s * 1000), step) for name, value in values.items())
        if time.monotonic() - sent_at > _FLUSH_EVERY_S:
            flush()

    def flush() -> None:
        nonlocal sent_at
        client.log_batch(run_id, metrics=waiting)
        waiting.clear()
        sent_at = time.monotonic()

    yield tell
    if waiting:
        flush()
    client.set_terminated(run_id, "FINISHED")


def _flat(config: Json, prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)[:_MAX_PARAM_CHARS]


_TOOLS: dict[str, Callable[[Json], contextlib.AbstractContextManager[Tell]]] = {"wandb": _wandb, "mlflow": _mlflow}

if __name__ == "__main__":
    main(iter(sys.stdin))

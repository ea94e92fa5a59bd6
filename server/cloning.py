"""A job again: the body that would create it, with other options over it."""

from __future__ import annotations

from typing import Any

from jobs.errors import InvalidRequestError
from jobs.models import Job
from jobs.spec import JobSpec, read_stored
from lomo_core.config import OptimizerConfig

Json = dict[str, Any]

_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
# Objects whose keys are taken one by one; any other value replaces the old one whole.
_MERGED = frozenset({"method", "supervised", "hyperparameters", "lomo", "clip"})


def clone_body(job: Job, overrides: Json) -> Json:
    """The body that creates a job like `job`: the values as it used them, its seed, and what was chosen for "auto", so
    that without overrides the same data give the same weights. The overrides are not validated here.

    Raises:
        InvalidRequestError: another version of this program stored the job.
    """
    spec = read_stored(job.spec)
    if not isinstance(spec, JobSpec):
        raise InvalidRequestError(
            f"Job {job.id} cannot be cloned: this version does not know its {', '.join(spec.unreadable[:3])}.",
            code="invalid_spec",
            param="fine_tuning_job_id",
        )
    stored = spec.model_dump(mode="json")
    body: Json = {
        **{
            name: stored[name]
            for name in ("model", "training_file", "validation_file", "suffix", "seed", "integrations")
        },
        "metadata": dict(job.metadata_),
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {name: stored[name] for name in _HYPERPARAMETERS}},
        },
        "lomo": _without_defaults_of_the_rule(stored["lomo"], overrides.get("lomo")),
    }
    return _merge(body, _as_method(overrides))


def _without_defaults_of_the_rule(options: Json, overrides: Any) -> Json:
    """The stored options; where another optimizer is asked for, without the rate and the rounding that the old one has
    by default, so that the new one's own defaults come in their places."""
    if not isinstance(overrides, dict) or overrides.get("optimizer", options["optimizer"]) == options["optimizer"]:
        return options
    rule = OptimizerConfig(name=options["optimizer"])
    defaults = {"learning_rate": rule.peak_learning_rate, "rounding": rule.weight_rounding}
    return {key: value for key, value in options.items() if key not in defaults or value != defaults[key]}


def _as_method(overrides: Json) -> Json:
    """With the deprecated hyperparameters at the top, where they are the only ones, in the present ones' place."""
    if not isinstance(overrides.get("hyperparameters"), dict) or "method" in overrides:
        return overrides
    rest = {key: value for key, value in overrides.items() if key != "hyperparameters"}
    return {**rest, "method": {"supervised": {"hyperparameters": overrides["hyperparameters"]}}}


def _merge(old: Json, new: Json) -> Json:
    merged = dict(old)
    for key, value in new.items():
        inner = merged.get(key)
        if key in _MERGED and isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merge(inner, value)
        else:
            merged[key] = value
    return merged

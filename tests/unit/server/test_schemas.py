"""From the body of a job's creation to the job: defaults filled in, nothing unknown, nothing ignored."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import upload_create_params
from openai.types.chat import completion_create_params
from openai.types.fine_tuning import job_create_params
from pydantic import BaseModel, ValidationError

from jobs.errors import InvalidRequestError
from server.errors import describe_validation
from server.schemas import CreateChat, CreateJob, CreateUpload

MINIMAL = {"model": "tiny", "training_file": "file-1"}


def fault(**changes: Any) -> tuple[str | None, str, str]:
    """Param, code and message of the error that a body makes."""
    with pytest.raises(ValidationError) as caught:
        CreateJob.model_validate(MINIMAL | changes)
    error = describe_validation(caught.value.errors(), MINIMAL | changes)
    return error.param, error.code, error.message


def test_minimal_body_gets_every_default() -> None:
    spec = CreateJob.model_validate(MINIMAL).to_spec()
    assert (spec.n_epochs, spec.batch_size, spec.learning_rate_multiplier) == (1, 4, 1.0)
    assert spec.lomo.learning_rate == 0.01
    assert 0 <= spec.seed < 2**31


def test_absent_seeds_differ_and_zero_is_a_seed() -> None:
    seeds = {CreateJob.model_validate(MINIMAL).to_spec().seed for _ in range(8)}
    assert len(seeds) == 8
    assert CreateJob.model_validate(MINIMAL | {"seed": 0}).to_spec().seed == 0


@pytest.mark.parametrize("place", ["method", "top"])
def test_auto_becomes_the_number_used(place: str) -> None:
    given = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 2}
    method = {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}}
    body = MINIMAL | (method if place == "method" else {"hyperparameters": given})
    spec = CreateJob.model_validate(body).to_spec()
    assert (spec.n_epochs, spec.batch_size, spec.learning_rate_multiplier) == (3, 4, 2.0)


def test_hyperparameters_in_two_places_must_agree() -> None:
    inner = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}}
    assert CreateJob.model_validate(MINIMAL | inner | {"hyperparameters": {"n_epochs": 2}}).to_spec().n_epochs == 2
    with pytest.raises(InvalidRequestError, match="given twice"):
        CreateJob.model_validate(MINIMAL | inner | {"hyperparameters": {"n_epochs": 3}}).to_spec()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {"hyperparameters": {}}}}, "method"),
    ],
)
def test_known_but_unsupported_parts_are_refused_with_a_reason(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"support|no settings") as caught:
        CreateJob.model_validate(MINIMAL | changes).to_spec()
    assert (caught.value.param, caught.value.code) == (param, "unsupported_value")


@pytest.mark.parametrize(
    ("wandb", "at"),
    [
        ({}, "project"),
        ({"project": "a/b"}, "project"),
        ({"project": "p" * 129}, "project"),
        ({"project": "p", "name": "two\nlines"}, "name"),
        ({"project": "p", "tags": [""]}, "tags"),
        ({"project": "p", "key": "secret"}, "key"),
    ],
)
def test_what_wandb_would_refuse_is_refused(wandb: dict[str, Any], at: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CreateJob.model_validate(MINIMAL | {"integrations": [{"type": "wandb", "wandb": wandb}]})
    [error] = caught.value.errors()
    assert error["loc"][:4] == ("integrations", 0, "wandb", at)


def test_at_most_five_integrations() -> None:
    integration = {"type": "wandb", "wandb": {"project": "p"}}
    assert len(CreateJob.model_validate(MINIMAL | {"integrations": [integration] * 5}).to_spec().integrations) == 5
    with pytest.raises(ValidationError, match="at most 5"):
        CreateJob.model_validate(MINIMAL | {"integrations": [integration] * 6})


def test_options_that_the_engine_cannot_have_together_are_refused() -> None:
    body = MINIMAL | {"lomo": {"early_stopping_patience": 2, "eval_every_steps": 10}}
    with pytest.raises(InvalidRequestError, match="needs a validation file") as caught:
        CreateJob.model_validate(body).to_spec()
    assert (caught.value.param, caught.value.code) == ("lomo.early_stopping_patience", "invalid_value")
    assert CreateJob.model_validate(body | {"validation_file": "file-2"}).to_spec().lomo.early_stopping_patience == 2


def test_nulls_are_absent() -> None:
    names = ["validation_file", "suffix", "seed", "metadata", "integrations", "hyperparameters", "method", "lomo"]
    assert CreateJob.model_validate(MINIMAL | dict.fromkeys(names)).to_spec().suffix is None
    assert CreateJob.model_validate(MINIMAL | {"integrations": []}).to_spec()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"surprise": 1}, "surprise"),
        ({"lomo": {"optimiser": "lomo"}}, "lomo.optimiser"),
        ({"lomo": {"clip": {"threshhold": 1}}}, "lomo.clip.threshhold"),
        ({"lomo": {"param_groups": [{"pattern": "*", "lr": 1}]}}, "lomo.param_groups.0.lr"),
        ({"method": {"type": "supervised", "supervised": {"epochs": 1}}}, "method.supervised.epochs"),
        ({"hyperparameters": {"epochs": 1}}, "hyperparameters.epochs"),
    ],
)
def test_unknown_keys_are_named(changes: dict[str, Any], param: str) -> None:
    assert fault(**changes) == (param, "unknown_parameter", f"Unknown key: '{param}'.")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": 1}, "model"),
        ({"model": ""}, "model"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": True}, "seed"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a\nb"}, "suffix"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"method": {"type": "other"}}, "method.type"),
        ({"lomo": {"learning_rate": 11}}, "lomo.learning_rate"),
        ({"lomo": {"clip": {"threshold": 0}}}, "lomo.clip.threshold"),
        ({"lomo": []}, "lomo"),
        ({"lomo": {"optimizer": "adam"}}, "lomo.optimizer"),
        ({"lomo": {"clip": {"exact": "spill"}}}, "lomo.clip.exact"),
        ({"lomo": {"sample_prompts": ["q"] * 17}}, "lomo.sample_prompts"),
        ({"lomo": {"sample_prompts": ["q" * 4001]}}, "lomo.sample_prompts.0"),
        ({"lomo": {"sample_max_new_tokens": 0}}, "lomo.sample_max_new_tokens"),
        ({"lomo": {"frozen": ["*"] * 17}}, "lomo.frozen"),
        ({"lomo": {"frozen": ["(a+)+$"]}}, "lomo.frozen.0"),
        ({"lomo": {"frozen": ["a" * 65]}}, "lomo.frozen.0"),
        ({"lomo": {"frozen": ["*a" * 9]}}, "lomo.frozen.0"),
    ],
)
def test_wrong_values_name_their_place(changes: dict[str, Any], param: str) -> None:
    found, code, message = fault(**changes)
    assert (found, code) == (param, "invalid_value")
    assert message.startswith(f"Invalid value for '{param}': ")


def test_a_missing_key_is_named_and_others_are_counted() -> None:
    with pytest.raises(ValidationError) as caught:
        CreateJob.model_validate({})
    error = describe_validation(caught.value.errors(), {})
    assert (error.param, error.code) == ("model", "missing_required_parameter")
    assert error.message == "Missing required key: 'model'. (1 more)"


@pytest.mark.parametrize(
    ("changes", "param", "reason"),
    [
        ({"lomo": {"devices": 2}}, "lomo.devices", "Input should be 1 or 'auto'"),
        ({"lomo": {"offload": "cpu"}}, "lomo.offload", "Input should be 'none' or 'auto'"),
        (
            {"lomo": {"activation_checkpointing": "yes"}},
            "lomo.activation_checkpointing",
            "Input should be a valid boolean or 'auto'",
        ),
        ({"lomo": {"clip": None}}, "lomo.clip", "Input should be an object"),
        ({"metadata": []}, "metadata", "Input should be an object"),
        ({"metadata": {"k" * 50: 1}}, f"metadata.{'k' * 50}", "Input should be a valid string"),
    ],
)
def test_what_may_be_of_several_kinds_is_refused_in_the_words_of_the_request(
    changes: dict[str, Any], param: str, reason: str
) -> None:
    assert fault(**changes) == (param, "invalid_value", f"Invalid value for {param!r}: {reason}.")


@pytest.mark.parametrize(
    ("message", "param", "reason"),
    [
        ({"content": 1}, "content", "Input should be a valid string or a valid list"),
        ({"content": []}, "content", "List should have at least 1 item after validation, not 0"),
        ({"content": [{"type": "image_url", "text": ""}]}, "content.0.type", "Input should be 'text'"),
    ],
)
def test_a_message_is_refused_for_the_kind_of_content_that_it_has(
    message: dict[str, Any], param: str, reason: str
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", **message}]}
    with pytest.raises(ValidationError) as caught:
        CreateChat.model_validate(body)
    error = describe_validation(caught.value.errors(), body)
    assert (error.param, error.message) == (
        f"messages.0.{param}",
        f"Invalid value for 'messages.0.{param}': {reason}.",
    )


@pytest.mark.parametrize("multiplier", [1e300, 1e-300, 2000])
def test_a_multiplier_cannot_carry_the_rate_past_its_bounds(multiplier: float) -> None:
    body = CreateJob.model_validate(MINIMAL | {"hyperparameters": {"learning_rate_multiplier": multiplier}})
    with pytest.raises(InvalidRequestError, match="between 1e-12 and 10") as caught:
        body.to_spec()
    assert caught.value.param == "hyperparameters.learning_rate_multiplier"


def test_a_key_that_is_called_as_a_source_is_named() -> None:
    assert fault(query=1) == ("query", "unknown_parameter", "Unknown key: 'query'.")


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (completion_create_params.CompletionCreateParamsBase, CreateChat),
        (job_create_params.JobCreateParams, CreateJob),
        (upload_create_params.UploadCreateParams, CreateUpload),
    ],
)
def test_every_parameter_of_the_official_client_is_known(sent: type, read: type[BaseModel]) -> None:
    """Read, or refused with a reason of its own; not as a key that is misspelt."""
    assert sent.__annotations__.keys() <= read.model_fields.keys()


def test_a_rejected_value_is_not_echoed() -> None:
    assert "hunter2" not in fault(seed="hunter2")[2]

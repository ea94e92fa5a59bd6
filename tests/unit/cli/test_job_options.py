"""The body of a job out of options: nothing of the server's `lomo` object is missing, and what wins over what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

import pytest

from cli.errors import UsageError
from cli.job_options import JOB_OPTIONS, parse_engine_options, parse_metadata, place_values, read_config
from jobs.spec import ClipOptions, JobSpec, LomoOptions
from tests.support.scripted_server import Response, ScriptedServer, make_job

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Lomo

JOBS = "/fine_tuning/jobs"


def test_every_engine_option_is_an_option_of_the_command() -> None:
    places = {option.place[1:] for option in JOB_OPTIONS if option.place[0] == "lomo"}
    # A list of objects is given as JSON: --lomo 'param_groups=[...]'.
    fields = {(name,) for name in LomoOptions.model_fields if name not in {"clip", "param_groups"}}
    assert places == fields | {("clip", name) for name in ClipOptions.model_fields}


def test_every_hyperparameter_is_an_option_of_the_command() -> None:
    places = {option.place[-1] for option in JOB_OPTIONS if option.place[0] == "method"}
    assert places == set(JobSpec.model_fields) & {"n_epochs", "batch_size", "learning_rate_multiplier"}
    assert len(places) == 3


@pytest.mark.parametrize(
    "option", [option for option in JOB_OPTIONS if option.place[0] == "lomo"], ids=lambda o: o.name
)
def test_the_help_names_every_choice(option) -> None:
    model = ClipOptions if option.place[1] == "clip" else LomoOptions
    annotation = model.model_fields[option.place[-1]].annotation
    literals = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    if literals and option.kind is str:
        assert [choice for choice in get_args(literals[0]) if choice not in option.help] == []


def test_a_whole_body(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("POST", JOBS, Response(body=make_job()))
    # fmt: off
    code, out, _ = lomo(
        "jobs", "create", "--model", "m", "--training-file", "file-a", "--validation-file", "file-b",
        "--suffix", "docs", "--seed", "7", "--n-epochs", "2", "--batch-size", "4", "--metadata", "team=nlp",
        "--metadata", "note=a=b", "--optimizer", "adalomo", "--learning-rate", "5e-4", "--clip-mode", "norm",
        "--clip-threshold", "0.5", "--no-activation-checkpointing", "--max-steps", "10",
        "--lomo", "warmup_ratio=0.1", "--lomo", "train_on=all", "--sample-prompts", "Why?", "--sample-prompts", "How?",
        "--lomo", 'param_groups=[{"pattern": "*.bias"}]', "--frozen", "model.embed*",
    )
    # fmt: on
    assert (code, out) == (0, f"{make_job()['id']}\n")
    assert server.requests[-1].json == {
        "model": "m",
        "training_file": "file-a",
        "validation_file": "file-b",
        "suffix": "docs",
        "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        "metadata": {"team": "nlp", "note": "a=b"},
        "lomo": {
            "optimizer": "adalomo",
            "learning_rate": 5e-4,
            "clip": {"mode": "norm", "threshold": 0.5},
            "activation_checkpointing": False,
            "max_steps": 10,
            "warmup_ratio": 0.1,
            "train_on": "all",
            "sample_prompts": ["Why?", "How?"],
            "param_groups": [{"pattern": "*.bias"}],
            "frozen": ["model.embed*"],
        },
    }


def test_what_is_not_given_is_not_sent(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("POST", JOBS, Response(body=make_job()))
    assert lomo("jobs", "create", "--model", "m", "--training-file", "file-a").code == 0
    assert server.requests[-1].json == {"model": "m", "training_file": "file-a"}


def test_options_win_over_the_configuration(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    config = tmp_path / "job.json"
    body = {"model": "m", "training_file": "file-a", "lomo": {"precision": "fp32", "clip": {"mode": "none"}}}
    config.write_text(json.dumps(body), encoding="utf-8")
    server.on("POST", JOBS, Response(body=make_job()))
    assert lomo("jobs", "create", "--config", str(config), "--model", "other", "--clip-threshold", "2").code == 0
    assert server.requests[-1].json == {
        "model": "other",
        "training_file": "file-a",
        "lomo": {"precision": "fp32", "clip": {"mode": "none", "threshold": 2.0}},
    }


def test_files_given_by_path_are_uploaded_first(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    server.on("POST", JOBS, Response(body=make_job()))
    server.on("POST", "/files", Response(body={"id": "file-1"}), Response(body={"id": "file-2"}))
    for name in ("train", "valid"):
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    train, valid = str(tmp_path / "train"), str(tmp_path / "valid")
    code, out, err = lomo("jobs", "create", "--model", "m", "--training-file", train, "--validation-file", valid)
    assert (code, out) == (0, f"{make_job()['id']}\n")
    assert "Uploaded train (35 B) as file-1." in err
    assert server.requests[-1].json["training_file"] == "file-1"
    assert server.requests[-1].json["validation_file"] == "file-2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training-file", "file-a"], "a job needs --model"),
        (["--model", "m"], "a job needs --training-file"),
        (["--model", "m", "--training-file", "none.jsonl"], "cannot upload none.jsonl: there is no such file"),
        (["--model", "m", "--training-file", "/"], "cannot upload /: it is not a regular file"),
        (["--model", "m", "--training-file", "file-a", "--metadata", "x"], "--metadata takes key=value, not 'x'"),
        (["--model", "m", "--training-file", "file-a", "--lomo", "=x"], "--lomo takes key=value, not '=x'"),
        (["--model", "m", "--training-file", "file-a", "--batch-size", "many"], "Invalid value for '--batch-size'"),
        (["--model", "m", "--training-file", "file-a", "--unknown"], "No such option: --unknown"),
        (["--config", "none.json"], "cannot read none.json: No such file"),
        (["--model", "m", "--training-file", "file-a", "--lomo", "clip=1", "--lomo", "clip.mode=x"], "clip is not an"),
    ],
)
def test_wrong_usage_is_2_and_sends_nothing(
    server: ScriptedServer, lomo: Lomo, arguments: list[str], message: str
) -> None:
    code, out, err = lomo("jobs", "create", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert server.requests == []


def test_a_value_of_an_engine_option_is_json_or_text() -> None:
    pairs = ["a=1", "b=true", "c=null", "d=text", "e.f=1.5", 'g="1"', "h="]
    assert [value for _, value in parse_engine_options(pairs)] == [1, True, None, "text", 1.5, "1", ""]
    assert parse_engine_options(["e.f=1"])[0][0] == ("lomo", "e", "f")


def test_placing_leaves_the_given_body_alone() -> None:
    body = {"lomo": {"clip": {"mode": "none"}}}
    assert place_values(body, [(("lomo", "clip", "mode"), "norm")]) == {"lomo": {"clip": {"mode": "norm"}}}
    assert body == {"lomo": {"clip": {"mode": "none"}}}


def test_metadata_stays_text() -> None:
    assert parse_metadata(["n=1", "t=true"]) == {"n": "1", "t": "true"}


@pytest.mark.parametrize(("text", "message"), [("[]", "must hold a JSON object"), ("{", "is not valid JSON")])
def test_a_configuration_must_be_an_object(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        read_config(path)

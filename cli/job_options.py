"""The body of `POST /v1/fine_tuning/jobs` out of options: a table of the engine's options, and how they are merged.

The table repeats the names of the server's `lomo` object (a test compares them), so that the command starts without
pydantic's schema of them; values are judged by the server, which knows better what is allowed. `param_groups`, a list
of objects, has no option of its own: `--lomo 'param_groups=[...]'`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.auto import INTEGER_METAVAR, SWITCH_METAVAR, parse_integer, parse_switch
from cli.errors import UsageError

Json = dict[str, Any]

_HYPERPARAMETERS = ("method", "supervised", "hyperparameters")
_LOMO = ("lomo",)


@dataclass(frozen=True, slots=True)
class JobOption:
    """One option of `lomo jobs create`, and where its value goes in the body."""

    name: str
    kind: Any
    """Of its value; an option of a list is given once per item."""
    help: str
    at: tuple[str, ...] = _LOMO
    """The object that holds it."""
    key: str | None = None
    """Its key there, where that is not `name`."""
    auto: bool = False
    """Whether a number or a switch may be "auto", too."""

    @property
    def place(self) -> tuple[str, ...]:
        """Keys from the body down to the value."""
        return (*self.at, self.key or self.name)


_CLIP = ("lomo", "clip")

JOB_OPTIONS: tuple[JobOption, ...] = (
    JobOption("suffix", str, "Part of the tuned model's name, 1 to 64 characters.", at=()),
    JobOption("seed", int, "Same seed, data and options: same weights.", at=()),
    JobOption("n_epochs", int, "Passes over the data.", at=_HYPERPARAMETERS),
    JobOption("batch_size", int, "Rows per step; auto: as many as fit, at most 4.", at=_HYPERPARAMETERS, auto=True),
    JobOption("learning_rate_multiplier", float, "Multiplies the learning rate.", at=_HYPERPARAMETERS),
    JobOption("optimizer", str, "lomo or adalomo; sgd and adamw, which need more memory, to compare with."),
    JobOption("learning_rate", float, "Peak rate; by default 0.01 for lomo and sgd, 5e-4 for adalomo, 2e-5 for adamw."),
    JobOption("schedule", str, "linear, cosine or constant."),
    JobOption("warmup_ratio", float, "Share of the steps in which the rate rises from 0."),
    JobOption("weight_decay", float, "Decoupled decay of the weights."),
    JobOption(
        "clip_mode", str, "norm (exact), delayed (the step before's), value, group or none.", at=_CLIP, key="mode"
    ),
    JobOption("clip_threshold", float, "Largest norm or value.", at=_CLIP, key="threshold"),
    JobOption("clip_exact", str, "auto, second_backward, spill_memory or spill_file.", at=_CLIP, key="exact"),
    JobOption("precision", str, "bf16, fp16 or fp32."),
    JobOption("rounding", str, "stochastic or nearest, of updates to 16-bit weights; by default the optimizer's."),
    JobOption("frozen", list[str], "Parameters not to train, as a glob such as 'model.layers.[0-3].*'; repeatable."),
    JobOption(
        "activation_checkpointing",
        bool,
        "Recompute activations instead of keeping them (--no-activation-checkpointing); auto: where it is needed.",
        auto=True,
    ),
    JobOption("max_seq_length", int, "Tokens; longer rows are cut."),
    JobOption("packing", bool, "Several rows in one sequence."),
    JobOption("train_on", str, "assistant or all: the tokens that have a loss."),
    JobOption("devices", int, "GPUs.", auto=True),
    JobOption("nodes", int, "Hosts."),
    JobOption("offload", str, "Where weights rest between uses: none or auto."),
    JobOption("checkpoint_every_steps", int, "0: no checkpoint before the end."),
    JobOption("keep_checkpoints", int, "How many are kept."),
    JobOption("eval_every_steps", int, "0: before the first and after the last step only."),
    JobOption("early_stopping_patience", int, "Stop after so many evaluations in a row without a better one."),
    JobOption("keep_best", bool, "Keep the model of the best evaluation, too."),
    JobOption("final_model", str, "last or best: whose weights the job ends with."),
    JobOption("sample_prompts", list[str], "Answered with each evaluation; repeatable, at most 16."),
    JobOption("sample_max_new_tokens", int, "Longest answer to a sample prompt."),
    JobOption("max_steps", int, "Stop after so many steps."),
    JobOption("priority", int, "Higher runs first, -100 to 100."),
)


def option_parameters() -> list[inspect.Parameter]:
    """The table as parameters of a command, each None unless given."""
    return [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(option),
        )
        for option in JOB_OPTIONS
    ]


SWITCHES = tuple(option.name.replace("_", "-") for option in JOB_OPTIONS if option.auto and option.kind is bool)
"""Options that are flags and take "auto" as well (`cli.auto.command_with_switches`)."""


def _annotation(option: JobOption) -> Any:
    if not option.auto:
        return Annotated[option.kind | None, typer.Option(help=option.help)]
    if option.kind is bool:
        return Annotated[str | None, typer.Option(parser=parse_switch, metavar=SWITCH_METAVAR, help=option.help)]
    return Annotated[str | None, typer.Option(parser=parse_integer, metavar=INTEGER_METAVAR, help=option.help)]


def given_values(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """The options of the table that were given, with their places in the body."""
    # A list option that was not given is None or empty, as typer likes.
    return [(option.place, values[option.name]) for option in JOB_OPTIONS if values[option.name] not in (None, [])]


def read_config(path: Path) -> Json:
    """Read a file that holds (part of) the body as JSON.

    Raises:
        UsageError: it cannot be read or is not a JSON object.
    """
    try:
        body = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise UsageError(f"{path} must hold a JSON object, the body of the request that creates a job")
    return body


def parse_metadata(pairs: Sequence[str]) -> dict[str, str]:
    """`key=value` pairs as an object of strings.

    Raises:
        UsageError: a pair has no `=`.
    """
    return dict(_split(pair, option="--metadata") for pair in pairs)


def parse_engine_options(pairs: Sequence[str]) -> list[tuple[tuple[str, ...], Any]]:
    """`key=value` pairs for the `lomo` object; a value is JSON where it can be read so, else text; dots nest.

    Raises:
        UsageError: a pair has no `=`.
    """
    found = []
    for pair in pairs:
        key, text = _split(pair, option="--lomo")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found.append((("lomo", *key.split(".")), value))
    return found


def place_values(body: Json, values: Sequence[tuple[tuple[str, ...], Any]]) -> Json:
    """Return `body` with values put at their places, over what it holds there; the later ones win.

    Raises:
        UsageError: a place is inside something that is not an object.
    """
    result: Json = json.loads(json.dumps(body))
    for place, value in values:
        target = result
        for key in place[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UsageError(f"cannot set {'.'.join(place)}: {key} is not an object in the given configuration")
        target[place[-1]] = value
    if "method" in result:
        result["method"].setdefault("type", "supervised")
    return result


def _split(pair: str, *, option: str) -> tuple[str, str]:
    key, separator, value = pair.partition("=")
    if not separator or not key:
        raise UsageError(f"{option} takes key=value, not {pair!r}")
    return key, value

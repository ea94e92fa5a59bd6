"""`python -m lomo_core plan`: the memory of a run from a model's configuration alone, as one JSON object."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lomo_core.clipping_choice import available_memory_bytes
from lomo_core.config import OptimizerName
from lomo_core.errors import ConfigError, ModelError
from lomo_core.memory.lora import lora_peak_bytes
from lomo_core.memory.model_shapes import ModelShapes
from lomo_core.memory.plan import Plan, Setting, plan
from lomo_core.memory.process import TYPICAL, process_peak_bytes
from lomo_core.memory.shapes import read_shapes
from lomo_core.model import pick_device
from lomo_core.tokenizer import LOAD_ERRORS, silence_transformers

# A configuration is a few KB; the largest on record lists quantised layers and has 500 KB.
_MAX_CONFIG_BYTES = 4 * 2**20
# What people compare with: one gradient at a time against all gradients, and all gradients and moments.
_BESIDE: tuple[OptimizerName, ...] = ("lomo", "adalomo", "sgd", "adamw")


def plan_config(path: Path, setting: Setting) -> dict[str, Any]:
    """Plan a run of the model whose `config.json` (or whose folder) is at `path`.

    `fits` is about this machine; `beside` has the peak of the same run under each optimizer, and under LoRA (at least).

    Raises:
        ModelError: the configuration cannot be read or asks for code, or transformers does not know the model.
        ConfigError: the model has fewer positions than the setting's rows have tokens.
    """
    shapes = read_shapes(read_config(path))
    check_length(shapes, setting)
    found = plan(shapes, setting)
    return {
        "architecture": shapes.architecture,
        "num_parameters": shapes.num_parameters,
        "setting": dataclasses.asdict(setting),
        **describe(found),
        "beside": {
            **{name: plan(shapes, replace(setting, optimizer=name)).peak_bytes for name in _BESIDE},
            "lora": lora_peak_bytes(shapes, setting),
        },
        "fits": [fit_here(found)],
    }


def fit_here(found: Plan) -> dict[str, Any]:
    """Whether the run fits what is free now on the device of this machine; on a CPU the process around it counts."""
    device = pick_device()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = found.peak_bytes
    else:
        free, needed = available_memory_bytes(), process_peak_bytes(found, TYPICAL)
    return {"host": platform.node(), "device_bytes": free, "needed_bytes": needed, "ok": needed <= free}


def describe(found: Plan) -> dict[str, Any]:
    """A plan as JSON; each phase with its sum."""
    phases = [{**dataclasses.asdict(phase), "bytes": phase.bytes} for phase in found.phases]
    return {**dataclasses.asdict(found), "phases": phases}


def read_config(path: Path) -> Any:
    """A model's configuration as transformers reads it. No code is run and nothing is downloaded.

    Raises:
        ModelError: see `plan_config`.
    """
    silence_transformers()
    file = path / "config.json" if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_CONFIG_BYTES + 1)
        raw = json.loads(text) if len(text) <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file.name} cannot be read: {error}", param="model") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{file.name} is no model's config.json: it must be an object with model_type", param="model")
    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        raise ModelError(f"transformers knows no models of type {raw['model_type'][:100]!r}", param="model")
    if raw.get("auto_map"):
        raise ModelError(
            f"{file.name} asks for code from the model folder (auto_map), which is never run here", param="model"
        )
    try:
        config = transformers.AutoConfig.for_model(**raw)
    except (*LOAD_ERRORS, ArithmeticError) as error:
        raise ModelError(f"{file.name} cannot be used: {error}", param="model") from error
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{config.model_type!r} models are no causal language models that transformers knows", param="model"
        )
    return config


def check_length(shapes: ModelShapes, setting: Setting) -> None:
    """Refuse rows that the model has no positions for.

    Raises:
        ConfigError: there are more tokens than positions.
    """
    limit = shapes.max_seq_length
    if limit is not None and setting.seq_length > limit:
        raise ConfigError(
            f"the model takes {limit} tokens a row, not {setting.seq_length}: set max_seq_length to {limit} or less",
            param="max_seq_length",
        )

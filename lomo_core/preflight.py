"""What can be known to be wrong with a run before a byte of weights is read: seconds instead of minutes, and a text
that names the field instead of a failure deep inside of the model."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lomo_core.config import OptimizerConfig, OptimizerName, TrainConfig
from lomo_core.data.token_cache import TokenCounts
from lomo_core.errors import ConfigError, ModelError
from lomo_core.evaluations import Evaluations
from lomo_core.model_folder import check_model_folder
from lomo_core.param_groups import group_parameters
from lomo_core.tokenizer import LOAD_ERRORS, silence_transformers

# Below it plain SGD hardly moves (arXiv 2306.09782 uses 5e-4 to 5e-2): the rate of somebody who is used to Adam.
_ADAM_SCALE = 1e-4
# Above it AdamW, whose steps do not shrink with the gradient, destroys a pretrained model: a rate of LOMO's scale.
_LOMO_SCALE = 1e-3
_SGD_LIKE: tuple[OptimizerName, ...] = ("lomo", "sgd")


def check_architecture(config: TrainConfig) -> Any:
    """The model's configuration as transformers reads it, after every check that needs no data.

    Raises:
        ModelError: the folder is incomplete or unsafe, or no causal language model that transformers knows.
        ConfigError: a pattern takes none of the model's parameters.
    """
    check_model_folder(config.model_path)
    silence_transformers()
    try:
        architecture = transformers.AutoConfig.from_pretrained(
            config.model_path, trust_remote_code=False, local_files_only=True
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"the model's config.json cannot be used: {error}", param="model") from error
    if type(architecture) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{architecture.model_type!r} models are no causal language models that transformers knows: "
            "use one that AutoModelForCausalLM can load",
            param="model",
        )
    if config.optimizer.param_groups or config.optimizer.frozen:
        group_parameters(_parameter_names(architecture), config.optimizer)
    return architecture


def check_lengths_and_ids(counts: TokenCounts, evaluations: Evaluations, architecture: Any) -> None:
    """Refuse rows and samples that the model has no place for.

    Raises:
        ConfigError: rows are longer than the model's positions, or hold ids that its vocabulary lacks.
    """
    text = architecture.get_text_config()
    longest, highest = counts.longest_row, counts.highest_token_id
    if evaluations.evaluator is not None:
        of_evaluator = evaluations.evaluator.extremes()
        longest, highest = max(longest, of_evaluator[0]), max(highest, of_evaluator[1])
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and longest > limit:
        raise ConfigError(
            f"the longest row has {longest} tokens but the model takes {limit}: set max_seq_length to {limit} or less",
            param="max_seq_length",
        )
    sample_length = evaluations.sampler.longest if evaluations.sampler is not None else 0
    if isinstance(limit, int) and sample_length > limit:
        raise ConfigError(
            f"the longest sample may have {sample_length} tokens but the model takes {limit}: "
            "set sample_max_new_tokens lower, or use shorter prompts",
            param="sample_max_new_tokens",
        )
    vocabulary = getattr(text, "vocab_size", None)
    if isinstance(vocabulary, int) and highest >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives token {highest} but the model has {vocabulary}: they do not belong together",
            param="model",
        )


def rate_warning(config: OptimizerConfig) -> str | None:
    """A sentence where the learning rate is of another family's scale."""
    rate = config.peak_learning_rate
    if config.name in _SGD_LIKE and rate < _ADAM_SCALE:
        return (
            f"learning_rate {rate:g} is of Adam's scale: {config.name} is SGD and needs about 5e-4 to 5e-2; at this "
            "rate the model hardly changes"
        )
    if config.name == "adamw" and rate > _LOMO_SCALE:
        return (
            f"learning_rate {rate:g} is of LOMO's scale: adamw needs about 1e-5 to 5e-5; at this rate it soon destroys "
            "what the model knows"
        )
    return None


def _parameter_names(architecture: Any) -> list[str]:
    """Names of the model's parameters, tied ones once, from a model without storage.

    Raises:
        ModelError: transformers cannot build the model.
    """
    try:
        with torch.device("meta"):
            auto_model: Any = transformers.AutoModelForCausalLM
            model = auto_model.from_config(architecture)
    except LOAD_ERRORS as error:
        raise ModelError(f"the model cannot be built from its config.json: {error}", param="model") from error
    return [name for name, _ in model.named_parameters()]

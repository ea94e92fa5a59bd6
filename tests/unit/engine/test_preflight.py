"""Whatever is wrong with a run is said before a byte of weights is read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lomo_core.build import build_optimizer
from lomo_core.config import DataConfig, OptimizerConfig, ParamGroupConfig, TrainConfig
from lomo_core.errors import ConfigError, DataError, EngineError, ModelError
from lomo_core.events import Finished, Message
from lomo_core.model import load_model
from lomo_core.model_folder import read_model_folder
from lomo_core.param_groups import NamedGroup, group_parameters
from tests.support.engine_runs import MakeConfig, events_of, rewrite_json, run_here
from tests.support.tiny_model import chat, chat_rows, write_jsonl

NAMES = ("embed.weight", "layers.0.proj.weight", "layers.0.norm.weight", "layers.1.proj.weight", "norm.weight")


@pytest.fixture
def broken_weights(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a weight file that cannot be read."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    (folder / "model.safetensors").write_bytes(b"garbage")
    return folder


def refused(config: TrainConfig) -> EngineError:
    with pytest.raises(EngineError) as caught:
        run_here(config)
    assert not any("loading the weights" in event.message for event in events_of(config.run_dir, Message))
    return caught.value


def test_weights_that_are_garbage_are_only_found_when_all_else_is_right(
    make_config: MakeConfig, broken_weights: Path
) -> None:
    with pytest.raises(ModelError, match="not a safetensors file"):
        run_here(dataclasses.replace(make_config(), model_path=str(broken_weights)))


def group(pattern: str, **fields: Any) -> OptimizerConfig:
    return OptimizerConfig(param_groups=(ParamGroupConfig(pattern=pattern, **fields),))


@pytest.mark.parametrize(
    ("optimizer", "param", "text"),
    [
        (
            group("nonsense"),
            "param_groups",
            "'nonsense' takes no parameter: names are like 'model.embed_tokens.weight'",
        ),
        (OptimizerConfig(frozen=("lm_head",)), "frozen", "'lm_head' takes no parameter"),
        (OptimizerConfig(frozen=(".",)), "frozen", "nothing to train"),
        (
            OptimizerConfig(frozen=("norm",), param_groups=(ParamGroupConfig(pattern="input_layernorm"),)),
            "param_groups",
            "is taken by an earlier one",
        ),
    ],
)
def test_patterns_that_match_nothing(
    make_config: MakeConfig, broken_weights: Path, optimizer: OptimizerConfig, param: str, text: str
) -> None:
    error = refused(dataclasses.replace(make_config(), optimizer=optimizer, model_path=str(broken_weights)))
    assert isinstance(error, ConfigError) and error.param == param
    assert text in error.message


def test_an_architecture_that_transformers_does_not_know(make_config: MakeConfig, broken_weights: Path) -> None:
    rewrite_json(broken_weights / "config.json", model_type="llama9")
    error = refused(dataclasses.replace(make_config(), model_path=str(broken_weights)))
    assert isinstance(error, ModelError) and "llama9" in error.message and error.param == "model"


def test_a_model_of_another_kind(make_config: MakeConfig, broken_weights: Path) -> None:
    rewrite_json(broken_weights / "config.json", model_type="vit", architectures=["ViTModel"])
    error = refused(dataclasses.replace(make_config(), model_path=str(broken_weights)))
    assert isinstance(error, ModelError) and "'vit' models are no causal language models" in error.message


def test_code_and_pickles_in_the_model_folder(make_config: MakeConfig, broken_weights: Path) -> None:
    config = dataclasses.replace(make_config(), model_path=str(broken_weights))
    rewrite_json(broken_weights / "config.json", auto_map={"AutoModel": "code.Model"})
    assert "auto_map" in refused(config).message
    rewrite_json(broken_weights / "config.json", auto_map=None)
    (broken_weights / "model.safetensors").rename(broken_weights / "pytorch_model.bin")
    assert "a pickle may run code" in refused(config).message


def test_rows_longer_than_the_model(make_config: MakeConfig, broken_weights: Path, tmp_path: Path) -> None:
    data = DataConfig(
        train_path=str(tmp_path / "train.jsonl"),
        validation_path=str(tmp_path / "valid.jsonl"),
        max_seq_length=1000,
    )
    config = dataclasses.replace(make_config(), data=data, model_path=str(broken_weights))
    for name in ("train.jsonl", "valid.jsonl"):
        write_jsonl(tmp_path / name, [chat("word " * 800, "x")])
        error = refused(config)
        assert isinstance(error, ConfigError) and error.param == "max_seq_length"
        assert "the model takes 512" in error.message
        write_jsonl(tmp_path / name, chat_rows(4))


def test_samples_longer_than_the_model(make_config: MakeConfig, broken_weights: Path) -> None:
    config = make_config(sample_prompts=("hello",), sample_max_new_tokens=510)
    error = refused(dataclasses.replace(config, model_path=str(broken_weights)))
    assert isinstance(error, ConfigError) and error.param == "sample_max_new_tokens"


@pytest.mark.parametrize("validation", [None, "choices.jsonl"])
def test_a_tokenizer_of_another_model(
    make_config: MakeConfig, broken_weights: Path, validation: str | None, tmp_path: Path
) -> None:
    rewrite_json(broken_weights / "config.json", vocab_size=300)
    config = make_config(validation=validation)
    error = refused(dataclasses.replace(config, model_path=str(broken_weights)))
    assert isinstance(error, ConfigError) and error.param == "model"
    assert "do not belong together" in error.message


def test_data_without_a_trainable_token(make_config: MakeConfig, broken_weights: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(make_config(), model_path=str(broken_weights))
    row = chat("hello", "x")
    row["messages"][1]["weight"] = 0  # type: ignore[index]
    write_jsonl(tmp_path / "train.jsonl", [row])
    error = refused(config)
    assert isinstance(error, DataError) and "line 1" in error.message


def test_a_weight_file_that_was_cut(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "cut"))
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])
    with pytest.raises(ModelError, match="it ends 100 bytes too early"):
        read_model_folder(folder)


def test_the_first_pattern_takes_a_name() -> None:
    config = OptimizerConfig(
        weight_decay=0.1,
        frozen=("embed",),
        param_groups=(
            ParamGroupConfig(pattern=r"norm", weight_decay=0.0),
            ParamGroupConfig(pattern=r"layers\.0", learning_rate_scale=0.5),
        ),
    )
    grouping = group_parameters(NAMES, config)
    assert grouping.frozen == {"embed.weight"}
    assert grouping.groups == (
        NamedGroup(names=("layers.1.proj.weight",), learning_rate_scale=1.0, weight_decay=0.1),
        NamedGroup(names=("layers.0.norm.weight", "norm.weight"), learning_rate_scale=1.0, weight_decay=0.0),
        NamedGroup(names=("layers.0.proj.weight",), learning_rate_scale=0.5, weight_decay=0.1),
    )


@pytest.mark.parametrize("name", ["lomo", "adalomo", "sgd", "adamw"])
def test_frozen_weights_stay_and_groups_have_their_rate(make_config: MakeConfig, tiny_model: Path, name: Any) -> None:
    rule = OptimizerConfig(
        name=name,
        learning_rate=0.01,
        frozen=("mlp",),
        param_groups=(ParamGroupConfig(pattern="norm", learning_rate_scale=0.0),),
    )
    config = make_config(optimizer=rule, max_steps=2)
    run_here(config)
    (end,) = events_of(config.run_dir, Finished)
    cpu = torch.device("cpu")
    before = dict(load_model(tiny_model, precision="fp32", device=cpu).named_parameters())
    after = dict(load_model(end.model_path, precision="fp32", device=cpu).named_parameters())
    for key, weight in after.items():
        assert torch.equal(weight, before[key]) == ("mlp" in key or "norm" in key), key


@pytest.mark.parametrize("name", ["lomo", "adamw"])
def test_frozen_weights_have_no_state(make_config: MakeConfig, tiny_model: Path, name: Any) -> None:
    model = load_model(tiny_model, precision="fp32", device=torch.device("cpu"))
    optimizer = build_optimizer(make_config(optimizer=OptimizerConfig(name=name, frozen=("mlp",))), model, way=None)
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for key, param in model.named_parameters():
        assert (id(param) in held) == param.requires_grad == ("mlp" not in key)

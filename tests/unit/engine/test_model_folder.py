"""Bad model folders are refused before a weight is read, with a sentence that says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lomo_core.errors import ModelError
from lomo_core.model import describe_device, load_model, parameter_bytes, pick_device, weights_sha256
from lomo_core.model_folder import read_model_folder
from lomo_core.tokenizer import load_tokenizer
from tests.support.engine_runs import rewrite_json

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def shard(folder: Path, name: str = "a.safetensors") -> None:
    """Turn the single weight file into one that an index names."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = ["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    rewrite_json(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(names, name))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def link_outside(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").symlink_to(target)


BAD: dict[str, Callable[[Path], object]] = {
    "there is no model folder": shutil.rmtree,
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "config.json is not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "config.json must hold a JSON object": lambda f: (f / "config.json").write_text("[]"),
    "config.json asks for code": lambda f: rewrite_json(f / "config.json", auto_map={"AutoModel": "x.Y"}),
    "tokenizer_config.json asks for code": lambda f: rewrite_json(f / "tokenizer_config.json", auto_map={"a": "b"}),
    "is quantised": lambda f: rewrite_json(f / "config.json", quantization_config={"bits": 4}),
    "has no tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "pytorch_model.bin cannot be used: a pickle may run code": only_a_pickle,
    "has no model.safetensors: save": lambda f: (f / "model.safetensors").unlink(),
    "is a link out of the model folder": link_outside,
    "names '../x.safetensors': only plain names": lambda f: shard(f, "../x.safetensors"),
    "names 'code.py': only plain names": lambda f: shard(f, "code.py"),
    "names 'b.safetensors', which is missing": lambda f: shard(f, "b.safetensors"),
    "model.safetensors is not a safetensors file": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 20),
    "model.safetensors is not a safetensors file (": lambda f: (f / "model.safetensors").write_bytes(b"abc"),
}


@pytest.mark.parametrize("expected", BAD)
def test_a_bad_folder(folder: Path, expected: str) -> None:
    BAD[expected](folder)
    with pytest.raises(ModelError) as caught:
        load_model(folder, precision="fp32", device=CPU)
    assert expected in caught.value.message
    assert caught.value.param == "model"


def test_a_hub_snapshot_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    assert read_model_folder(snapshot).num_parameters == read_model_folder(folder).num_parameters


def test_missing_tensors_are_not_made_up(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors \(model\.norm\.weight\)"):
        load_model(folder, precision="fp32", device=CPU)


def test_an_unknown_architecture(folder: Path) -> None:
    rewrite_json(folder / "config.json", model_type="nonsense", architectures=None)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, precision="fp32", device=CPU)


def test_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_facts_and_loading(tiny_model: Path) -> None:
    facts = read_model_folder(tiny_model).facts()
    model = load_model(tiny_model, precision="bf16", device=CPU)
    assert facts["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["dtypes"] == ["F32"] and facts["has_chat_template"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # The tied head shares the embedding's storage, which counts once.
    assert parameter_bytes(model) == 2 * facts["num_parameters"]


def test_the_hash_of_the_weights(tiny_model: Path) -> None:
    first, second = (load_model(tiny_model, precision="bf16", device=CPU) for _ in range(2))
    assert weights_sha256(first) == weights_sha256(second)
    with torch.no_grad():
        second.model.norm.weight[0] += 1
    assert weights_sha256(first) != weights_sha256(second)


def test_the_device_has_a_name() -> None:
    name, num_bytes = describe_device(pick_device())
    assert name.startswith(("cpu (", "cuda:0 ("))
    assert num_bytes is not None and num_bytes > 2**28

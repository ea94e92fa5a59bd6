"""What a model folder must look like before a byte of weights is read: complete, safe, and of a kind the engine trains.

Only safetensors weights are accepted, never a pickle, never code from the folder. Torch-free, so that a server can
check a folder too, and `inspect` answers at once.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lomo_core.config import Precision
from lomo_core.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The format's own limit of a header (safetensors: MAX_HEADER_SIZE).
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Facts of a model folder, from its JSON files and the headers of its weights."""

    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    has_chat_template: bool
    num_parameters: int
    """Elements in the weight files: tied weights are stored once."""
    dtypes: tuple[str, ...]
    weight_bytes: int

    def facts(self) -> dict[str, Any]:
        """The folder as one flat JSON object, for `inspect`."""
        text = self.config.get("text_config") or self.config
        return {
            "path": str(self.path),
            "model_type": self.config.get("model_type"),
            "architectures": self.config.get("architectures"),
            "num_parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "dtypes": list(self.dtypes),
            "hidden_size": text.get("hidden_size"),
            "num_hidden_layers": text.get("num_hidden_layers"),
            "vocab_size": text.get("vocab_size"),
            "max_position_embeddings": text.get("max_position_embeddings"),
            "tie_word_embeddings": self.config.get("tie_word_embeddings"),
            "has_chat_template": self.has_chat_template,
        }


def read_model_folder(path: str | Path) -> ModelFolder:
    """Check a model folder.

    Raises:
        ModelError: a file is missing, broken or unsafe; the text says what to do.
    """
    folder = Path(path)
    files = check_model_folder(folder)
    config = _read_json(folder / "config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json", required=False)
    headers = [read_header(file) for file in files]
    tensors = [tensor for header in headers for name, tensor in header.items() if name != "__metadata__"]
    return ModelFolder(
        path=folder,
        config=config,
        weight_files=files,
        has_chat_template=(folder / "chat_template.jinja").is_file() or bool(tokenizer_config.get("chat_template")),
        num_parameters=sum(_num_elements(tensor) for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.get("dtype")) for tensor in tensors})),
        weight_bytes=sum(file.stat().st_size for file in files),
    )


def stored_precision(folder: ModelFolder) -> Precision:
    """The precision that holds the weights as they are stored."""
    if "F32" in folder.dtypes:
        return "fp32"
    return "fp16" if "F16" in folder.dtypes and "BF16" not in folder.dtypes else "bf16"


def loaded_bytes(folder: ModelFolder) -> int:
    """Bytes of the weights, loaded in `stored_precision`."""
    return folder.num_parameters * (4 if stored_precision(folder) == "fp32" else 2)


def check_model_folder(path: str | Path) -> tuple[Path, ...]:
    """Check all of a model folder but the contents of its weight files, and return those.

    Raises:
        ModelError: a file is missing, broken or unsafe; the text says what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder.name!r}: check the model's name", param="model")
    config = _read_json(folder / "config.json")
    _refuse_code(config, "config.json")
    _refuse_code(_read_json(folder / "tokenizer_config.json", required=False), "tokenizer_config.json")
    if "quantization_config" in config:
        raise ModelError(
            "the model is quantised: all parameters can only be trained in bf16 or fp32; use the unquantised model",
            param="model",
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError("the model folder has no tokenizer.json: save its fast tokenizer there", param="model")
    return _weight_files(folder)


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if not required:
            return {}
        raise ModelError(f"the model folder has no {path.name}: is it a Hugging Face model folder?", param="model")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the model's {path.name} is not valid JSON: {error}", param="model") from error
    if not isinstance(raw, dict):
        raise ModelError(f"the model's {path.name} must hold a JSON object", param="model")
    return raw


def _refuse_code(config: dict[str, Any], name: str) -> None:
    if config.get("auto_map"):
        raise ModelError(
            f"the model's {name} asks for code from the model folder (auto_map), which is never run here: "
            "use an architecture that transformers knows",
            param="model",
        )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX_NAME
    if index.is_file():
        names = _index_names(index)
    elif (folder / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        found = f" ({', '.join(pickles[:3])} cannot be used: a pickle may run code)" if pickles else ""
        raise ModelError(
            f"the model folder has no {SINGLE_NAME}{found}: save the model with safetensors", param="model"
        )
    files = tuple(folder / name for name in names)
    for file in files:
        if not file.is_file():
            raise ModelError(f"{INDEX_NAME} names {file.name!r}, which is missing: copy the model again", param="model")
        _refuse_outside(file, folder)
    return files


def _index_names(index: Path) -> list[str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"the model's {INDEX_NAME} has no weight_map: copy the model again", param="model")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{INDEX_NAME} names {name!r}: only plain names of .safetensors files are accepted", param="model"
            )
    return names


def _refuse_outside(file: Path, folder: Path) -> None:
    """Refuse a link that leaves the folder, except into the blobs of a hub cache that the folder is a snapshot of."""
    real, root = file.resolve(), folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelError(f"{file.name} is a link out of the model folder: copy the file itself there", param="model")


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of length (little endian), then the JSON.

    Raises:
        ModelError: it is none, or the file is shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        missing = 8 + length + max(ends, default=0) - file.stat().st_size
        if missing > 0:
            raise ValueError(f"it ends {missing} bytes too early")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, RecursionError) as error:
        raise ModelError(f"{file.name} is not a safetensors file ({error}): copy it again", param="model") from error
    assert isinstance(header, dict)
    return header


def _num_elements(tensor: Any) -> int:
    count = 1
    for size in tensor.get("shape", []):
        count *= int(size)
    return count

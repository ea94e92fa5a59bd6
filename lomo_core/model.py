"""Loading a model for training: own dtype from the start, no code from the folder, no network.

The weights are read straight into the run's precision: a bf16 run never holds an fp32 copy of the model.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lomo_core.config import Precision
from lomo_core.errors import ModelError
from lomo_core.model_folder import read_model_folder
from lomo_core.oom import is_out_of_memory
from lomo_core.tokenizer import LOAD_ERRORS, silence_transformers

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def describe_device(device: torch.device) -> tuple[str, int | None]:
    """PyTorch's name of the device with what it is, and its memory in bytes (None: unknown)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name})", properties.total_memory
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), "unknown")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return f"cpu ({name})", total


def load_model(path: str | Path, *, precision: Precision, device: torch.device) -> Any:
    """Load the weights in the run's precision on the device, in evaluation mode.

    Raises:
        ModelError: the folder is unsafe or incomplete, or transformers does not know the model.
    """
    silence_transformers()
    read_model_folder(path)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=DTYPES[precision],
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"the model cannot be loaded: {error}", param="model") from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the model's weight files lack {len(missing)} tensors ({', '.join(missing[:3])}): copy the model again",
            param="model",
        )
    return model.to(device).eval()


def enable_activation_checkpointing(model: Any) -> bool:
    """Recompute each block's activations in the backward pass; False where the architecture cannot.

    Never the reentrant kind: with it a shared weight would be updated before its gradient is complete.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return True


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, found by their share: the list of modules that holds the most parameters.

    Empty where a model has no such list.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for b in blocks for p in b.parameters()), default=[])


def has_linear_head(model: Any) -> bool:
    """Whether a model ends in a plain linear layer whose weight, where it is tied, is a plain embedding's.

    That is what the head in blocks takes apart. What the model does after it is another question.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.base_model is model or type(head) is not nn.Linear or head.bias is not None:
        return False
    is_plain_lookup = type(embedding) is nn.Embedding and embedding.max_norm is None
    return embedding.weight is not head.weight or (is_plain_lookup and not embedding.scale_grad_by_freq)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, each storage counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def weights_are_finite(model: nn.Module) -> bool:
    """Whether no weight is inf or nan."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def weights_sha256(model: nn.Module) -> str:
    """Hash of every parameter's name, dtype, shape and bytes, in the order of the names; a tied weight counts once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(_as_bytes(parameter.detach()))
    return digest.hexdigest()


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()

"""A GGUF file to a Hugging Face model folder, so that a quantised model that comes as one file can be fine-tuned.

transformers dequantises the tensors; what is left to do is to make the model forget that it was quantised (else it
refuses to be saved), and to put the folder in place only when it is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lomo_core.errors import ModelError
from lomo_core.tokenizer import silence_transformers


def convert_gguf(gguf_path: Path, out_dir: Path) -> None:
    """Write the model of `gguf_path` to the new folder `out_dir`: bfloat16 safetensors, tokenizer, chat template.

    Quantised tensors are rounded to bfloat16 once more; both roundings are below the quantisation's own error.

    Raises:
        ModelError: the file is missing or not a GGUF of a known architecture, or the folder exists.
    """
    if not gguf_path.is_file():
        raise ModelError(f"there is no file {gguf_path}", param="gguf")
    if out_dir.exists():
        raise ModelError(f"{out_dir} exists already: remove it or name another folder", param="out")
    silence_transformers()
    source, name = str(gguf_path.parent), gguf_path.name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    except (ValueError, OSError, ImportError) as error:
        raise ModelError(
            f"{gguf_path.name} cannot be read as a causal language model: {error}", param="gguf"
        ) from error
    # save_pretrained would ask the quantiser how to write quantised weights; these are plain ones.
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out_dir)

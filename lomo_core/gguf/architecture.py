"""What a model's config.json says in GGUF's words, and which tensors the model must have under which names.

GGUF's words and names are those of llama.cpp's loader (github.com/ggml-org/llama.cpp: `gguf-py/gguf/constants.py`,
`tensor_mapping.py`). A model is only exported where the loader would compute what transformers does: whatever the
configuration asks for beyond that is refused, never left out.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lomo_core.errors import ModelError
from lomo_core.gguf.head import Pairs

# By transformers' model_type, which is GGUF's architecture too. The linear layers that may have a bias: those that
# llama.cpp's loader of the architecture reads one for.
_BIASED = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
    "qwen3": (),
}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_DEFAULT_ROPE_THETA = 10_000.0  # of all three architectures, in transformers and in llama.cpp
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """A tensor that the file is to have."""

    source: str
    """Its name in the model folder."""
    name: str
    """Its name in GGUF."""
    shape: tuple[int, ...]
    interleaved_heads: int | None = None
    """Where its rows go over in another order: into how many heads they fall (see `export.interleave`)."""
    is_optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model as its config.json describes it."""

    name: str
    num_blocks: int
    hidden_size: int
    inner_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    is_tied: bool
    rope: dict[str, Any]

    @classmethod
    def of(cls, config: dict[str, Any]) -> Architecture:
        """Read a configuration.

        Raises:
            ModelError: llama.cpp would not compute what this model does.
        """
        name = str(config.get("model_type"))
        if name not in _BIASED:
            known = ", ".join(_BIASED)
            raise ModelError(f"models of type {name!r} cannot be written as GGUF here, only {known}", param="model")
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(f"GGUF has no {name} with the activation {config['hidden_act']!r}", param="model")
        if config.get("use_sliding_window"):
            raise ModelError(f"GGUF has no {name} with sliding windows (use_sliding_window)", param="model")
        try:
            num_heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
            return cls(
                name=name,
                num_blocks=int(config["num_hidden_layers"]),
                hidden_size=hidden_size,
                inner_size=int(config["intermediate_size"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_size=int(config.get("head_dim") or hidden_size // num_heads),
                vocab_size=int(config["vocab_size"]),
                context_length=int(config["max_position_embeddings"]),
                rms_norm_eps=float(config["rms_norm_eps"]),
                is_tied=bool(config.get("tie_word_embeddings", False)),
                rope=_read_rope(config),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ModelError(f"its config.json lacks a number, or has a wrong one: {error}", param="model") from error

    def describe(self, pairs: Pairs) -> None:
        """Add what the loader must know of the model's shape."""
        counts = {
            "block_count": self.num_blocks,
            "context_length": self.context_length,
            "embedding_length": self.hidden_size,
            "feed_forward_length": self.inner_size,
            "attention.head_count": self.num_heads,
            "attention.head_count_kv": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "rope.dimension_count": self.head_size,
        }
        if self.head_size * self.num_heads != self.hidden_size or self.name == "qwen3":
            counts |= {"attention.key_length": self.head_size, "attention.value_length": self.head_size}
        for key, count in counts.items():
            pairs.uint32(f"{self.name}.{key}", count)
        pairs.float32(f"{self.name}.attention.layer_norm_rms_epsilon", self.rms_norm_eps)
        pairs.float32(f"{self.name}.rope.freq_base", self.rope["rope_theta"])
        if self.rope["rope_type"] in ("linear", "yarn"):
            pairs.text(f"{self.name}.rope.scaling.type", self.rope["rope_type"])
            pairs.float32(f"{self.name}.rope.scaling.factor", self.rope["factor"])
        if self.rope["rope_type"] == "yarn":
            length = int(self.rope["original_max_position_embeddings"])
            pairs.uint32(f"{self.name}.rope.scaling.original_context_length", length)

    def tensors(self) -> Iterator[WantedTensor]:
        """What the model's files must have, and where a bias may be."""
        yield WantedTensor("model.embed_tokens.weight", "token_embd.weight", (self.vocab_size, self.hidden_size))
        for block in range(self.num_blocks):
            for layer, shape in self._block_shapes().items():
                source, name = f"model.layers.{block}.{layer}", f"blk.{block}.{_BLOCK_NAMES[layer]}"
                heads = self._interleaved_heads(layer)
                yield WantedTensor(f"{source}.weight", f"{name}.weight", shape, heads)
                if layer.rpartition(".")[2] in _BIASED[self.name]:
                    yield WantedTensor(f"{source}.bias", f"{name}.bias", shape[:1], heads, is_optional=True)
        yield WantedTensor("model.norm.weight", "output_norm.weight", (self.hidden_size,))
        if not self.is_tied:
            yield WantedTensor("lm_head.weight", "output.weight", (self.vocab_size, self.hidden_size))

    def rope_factors(self) -> bytes | None:
        """fp32 [head_size / 2], little endian: what each frequency is divided by; None where that is 1 throughout.

        Llama 3.1's rule, as transformers' `_compute_llama3_parameters` has it: long waves are stretched by the factor,
        short ones are left, and those in between are blended.
        """
        if self.rope["rope_type"] != "llama3":
            return None
        factor, length = float(self.rope["factor"]), int(self.rope["original_max_position_embeddings"])
        low, high = float(self.rope["low_freq_factor"]), float(self.rope["high_freq_factor"])
        factors = []
        for place in range(0, self.head_size, 2):
            wave_length = 2 * math.pi * self.rope["rope_theta"] ** (place / self.head_size)
            if wave_length < length / high:
                factors.append(1.0)
            elif wave_length > length / low:
                factors.append(factor)
            else:
                share = (length / wave_length - low) / (high - low)
                factors.append(1 / ((1 - share) / factor + share))
        return struct.pack(f"<{len(factors)}f", *factors)

    def _block_shapes(self) -> dict[str, tuple[int, ...]]:
        all_heads, kv_heads = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (self.hidden_size,),
            "self_attn.q_proj": (all_heads, self.hidden_size),
            "self_attn.k_proj": (kv_heads, self.hidden_size),
            "self_attn.v_proj": (kv_heads, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, all_heads),
            "post_attention_layernorm": (self.hidden_size,),
            "mlp.gate_proj": (self.inner_size, self.hidden_size),
            "mlp.up_proj": (self.inner_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.inner_size),
        }
        if self.name == "qwen3":
            shapes |= {"self_attn.q_norm": (self.head_size,), "self_attn.k_norm": (self.head_size,)}
        return shapes

    def _interleaved_heads(self, layer: str) -> int | None:
        """llama.cpp turns neighbouring rows of a Llama's heads, transformers rows that are half a head apart."""
        if self.name != "llama":
            return None
        return {"self_attn.q_proj": self.num_heads, "self_attn.k_proj": self.num_kv_heads}.get(layer)


def _read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's parameters, in transformers 5's form or the one before it."""
    given = config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta", _DEFAULT_ROPE_THETA),
    }
    kind = str(given.get("rope_type") or given.get("type") or "default")
    extra = {key: value for key, value in given.items() if key not in ("rope_type", "type", "rope_theta")}
    if extra.get("partial_rotary_factor") == 1.0:
        del extra["partial_rotary_factor"]
    if kind not in _ROPE_KEYS or set(extra) != _ROPE_KEYS[kind]:
        said = ", ".join(sorted(extra)) or "no parameters"
        raise ModelError(f"positions of the type {kind!r} with {said} cannot be written as GGUF here", param="model")
    return {"rope_type": kind, "rope_theta": float(given.get("rope_theta", _DEFAULT_ROPE_THETA)), **extra}

"""What a model's tokenizer says in GGUF's words: byte-level BPE, with one of the splits that llama.cpp knows.

llama.cpp has the splits of texts into words by name, and reads none from the file: a tokenizer that splits in another
way is refused, since the model would get other tokens there than it was trained on.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from lomo_core.errors import ModelError
from lomo_core.gguf.head import Pairs

# Llama 3's and Qwen 2's, as their tokenizer.json has them; they differ in how digits fall together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_NAMES = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
# In llama.cpp this split comes with it: a word that is a token is one, whatever the merges say.
_IGNORES_MERGES = "llama-bpe"
_ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _TokenType(IntEnum):
    """llama.cpp's numbers (`llama_token_type`)."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


def describe_vocabulary(folder: Path, pairs: Pairs, *, config: dict[str, Any]) -> None:
    """Add a model folder's tokens, merges, special tokens and chat template.

    Raises:
        ModelError: llama.cpp would make other tokens of a text than the folder's tokenizer does.
    """
    try:
        tokenizer, settings = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json", required=False)
        tokens, types = _list_tokens(tokenizer, vocab_size=int(config["vocab_size"]))
        pairs.text("tokenizer.ggml.model", "gpt2")  # llama.cpp's word for BPE over bytes
        pairs.text("tokenizer.ggml.pre", _name_split(tokenizer))
        pairs.texts("tokenizer.ggml.tokens", tokens)
        pairs.int32s("tokenizer.ggml.token_type", types)
        pairs.texts("tokenizer.ggml.merges", [_merge(merge) for merge in tokenizer["model"]["merges"]])
        ids = _special_ids(settings, config, tokens)
        for key, token_id in ids.items():
            pairs.uint32(f"tokenizer.ggml.{_ID_KEYS[key]}_token_id", token_id)
        first, last = _added_around(tokenizer.get("post_processor"))
        pairs.flag("tokenizer.ggml.add_bos_token", value=_is_token(first, tokens, ids.get("bos")))
        pairs.flag("tokenizer.ggml.add_eos_token", value=_is_token(last, tokens, ids.get("eos")))
        pairs.flag("tokenizer.ggml.add_space_prefix", value=False)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError(f"its tokenizer's files are not of the known form: {error!r}", param="model") from error
    template = _find_template(folder, settings)
    if template is not None:
        pairs.text("tokenizer.chat_template", template)


def _read(path: Path, *, required: bool = True) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return raw


def _list_tokens(tokenizer: dict[str, Any], *, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token, by id; ids that the embedding has and the tokenizer lacks are filled up."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(_TokenType.UNUSED)] * vocab_size
    for text, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = text, _TokenType.NORMAL
    for token in tokenizer.get("added_tokens") or []:
        kind = _TokenType.CONTROL if token["special"] else _TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    return tokens, types


def _name_split(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of how this tokenizer splits a text into words."""
    model = tokenizer["model"]
    plain = {"dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "byte_fallback": False}
    other = [key for key, value in plain.items() if (model.get(key) or value) != value]
    if model["type"] != "BPE" or other:
        said = f"with {', '.join(other)}" if other else f"of type {model['type']}"
        raise ModelError(f"its tokenizer is not a plain byte-level BPE, but one {said}", param="model")
    normalizer = tokenizer.get("normalizer")
    # Qwen's; llama.cpp leaves it out, which shows in texts that are not composed.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ModelError(f"its tokenizer normalises texts ({normalizer['type']}), which GGUF cannot say", param="model")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    name = _find_split(steps)
    if name is None or bool(model.get("ignore_merges")) != (name == _IGNORES_MERGES):
        kinds = " + ".join(str(step["type"]) for step in steps) or "nothing"
        raise ModelError(f"its tokenizer splits texts (by {kinds}) in a way that GGUF has no name for", param="model")
    return name


def _steps(part: dict[str, Any] | None, key: str = "pretokenizers") -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, which may be none, one, or a sequence."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _find_split(steps: list[dict[str, Any]]) -> str | None:
    match [step["type"] for step in steps]:
        case ["ByteLevel"] if _is_byte_level(steps[0], splits=True):
            return "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and _is_byte_level(steps[1], splits=True):
            return "smollm"
        case ["Split", "ByteLevel"] if _is_byte_level(steps[1], splits=False):
            split = steps[0]
            if split["behavior"] == "Isolated" and not split["invert"]:
                return _SPLIT_NAMES.get(split["pattern"].get("Regex", ""))
    return None


def _is_byte_level(step: dict[str, Any], *, splits: bool) -> bool:
    return not step["add_prefix_space"] and step.get("use_regex", True) == splits


def _merge(merge: str | list[str]) -> str:
    """A merge as "left right": a pair since tokenizers 0.20, such a string before."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _special_ids(settings: dict[str, Any], config: dict[str, Any], tokens: list[str]) -> dict[str, int]:
    """Ids of the special tokens: the tokenizer's, or where it names none, the model's."""
    found = {}
    for key in _ID_KEYS:
        token = settings.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        given = config.get(f"{key}_token_id")
        number = tokens.index(text) if text is not None else given[0] if isinstance(given, list) else given
        if number is not None:
            found[key] = int(number)
    return found


def _added_around(processor: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """What the tokenizer puts before and after every text."""
    first = last = None
    for step in _steps(processor, "processors"):
        if step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            raise ModelError(f"its tokenizer ends in {step['type']}, which GGUF cannot say", param="model")
        around = [piece.get("SpecialToken", {}).get("id") for piece in step["single"]]
        place = around.index(None)
        if place > 1 or len(around) - place > 2:
            raise ModelError("its tokenizer puts several tokens around a text, which GGUF cannot say", param="model")
        first = around[0] if place else first
        last = around[-1] if place < len(around) - 1 else last
    return first, last


def _is_token(text: str | None, tokens: list[str], token_id: int | None) -> bool:
    if text is None:
        return False
    if token_id is None or tokens[token_id] != text:
        raise ModelError(f"its tokenizer puts {text!r} around texts, which GGUF cannot say", param="model")
    return True


def _find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None

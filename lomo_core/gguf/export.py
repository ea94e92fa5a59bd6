"""A model folder as a GGUF file of known length, made while it is read: head first, then each tensor in pieces."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lomo_core.errors import ModelError
from lomo_core.gguf.architecture import Architecture, WantedTensor
from lomo_core.gguf.head import Pairs, TensorEntry, TensorType, encode_head, padding
from lomo_core.gguf.vocabulary import describe_vocabulary
from lomo_core.model_folder import read_header, read_model_folder

_CHUNK_BYTES = 1 << 20
# `general.file_type` (llama.cpp's `llama_ftype`): what most of the weights are.
_FILE_TYPES = {TensorType.F32: 0, TensorType.F16: 1, TensorType.BF16: 32}
_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION: its loader asks for it, also where nothing is quantised


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies in the model folder."""

    file: BinaryIO
    offset: int
    type: TensorType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file to be: what the table says of it, and where its data come from."""

    entry: TensorEntry
    stored: _Stored | None
    interleaved_heads: int | None = None
    made: bytes = b""
    """The data, where no file has them."""

    def chunks(self) -> Iterator[bytes]:
        """The data, in pieces, with the padding behind them."""
        if self.stored is None:
            yield self.made
        elif self.stored.type is not self.entry.type:
            yield widen(_read(self.stored, self._stored_bytes()), self.stored.type, heads=self.interleaved_heads)
        elif self.interleaved_heads is not None:
            head_bytes = self._stored_bytes() // self.interleaved_heads
            for head in range(self.interleaved_heads):
                rows = self.entry.shape[0] // self.interleaved_heads
                yield interleave(_read(self.stored, head_bytes, skip=head * head_bytes), num_rows=rows)
        else:
            num_bytes = self._stored_bytes()
            for begin in range(0, num_bytes, _CHUNK_BYTES):
                yield _read(self.stored, min(_CHUNK_BYTES, num_bytes - begin), skip=begin)
        yield padding(self.entry.num_bytes)

    def _stored_bytes(self) -> int:
        assert self.stored is not None
        return self.entry.num_bytes // self.entry.type.element_bytes * self.stored.type.element_bytes


class GgufModel:
    """A model folder as a GGUF file. Its weights are opened at once, so that a deletion in between harms nothing.

    Raises:
        ModelError: the folder is not whole, or GGUF cannot say what the model is.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        facts = read_model_folder(folder)
        architecture = Architecture.of(facts.config)
        with ExitStack() as files:
            self._tensors = _find_tensors(architecture, _open(facts.weight_files, files))
            self._head = _make_head(folder, architecture, self._tensors, config=facts.config, name=name)
            self._files = files.pop_all()

    @property
    def num_bytes(self) -> int:
        """Length of the whole file."""
        data = [tensor.entry.num_bytes for tensor in self._tensors]
        return len(self._head) + sum(num_bytes + len(padding(num_bytes)) for num_bytes in data)

    def chunks(self) -> Iterator[bytes]:
        """The file, piece by piece; the weights are closed at its end.

        Raises:
            EOFError: the weights have become shorter meanwhile.
        """
        try:
            yield self._head
            for tensor in self._tensors:
                yield from tensor.chunks()
        finally:
            self.close()

    def close(self) -> None:
        """Close the weights."""
        self._files.close()


def write_gguf(folder: Path, path: Path) -> None:
    """Write a model folder's GGUF file; it is in place only when it is whole.

    Raises:
        ModelError: the folder is not whole, GGUF cannot say what the model is, or there is such a file.
    """
    if path.exists():
        raise ModelError(f"{path} exists already: remove it or name another file", param="out")
    model = GgufModel(folder, name=folder.name)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(model.chunks())
        partial.rename(path)
    finally:
        model.close()
        partial.unlink(missing_ok=True)


def interleave(head: bytes, *, num_rows: int) -> bytes:
    """The rows of one head, first half and second half by turns: rows (0, 1, 2, 3) become (0, 2, 1, 3).

    transformers turns row i of a head together with row i + num_rows / 2; llama.cpp turns rows 2i and 2i + 1. The same
    order as `LlamaModel.permute` of llama.cpp's converter: `reshape(2, n / 2, ...).swapaxes(0, 1)`.
    """
    view, row_bytes, half = memoryview(head), len(head) // num_rows, num_rows // 2
    rows = [view[row * row_bytes : (row + 1) * row_bytes] for row in range(num_rows)]
    return b"".join(rows[place // 2 + (place % 2) * half] for place in range(num_rows))


def widen(raw: bytes, stored: TensorType, *, heads: int | None = None) -> bytes:
    """A vector in fp32, which ggml wants norms and biases in; exact. `heads`: its rows are interleaved too."""
    if stored is TensorType.F16:
        count = len(raw) // 2
        wide = struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", raw))
    else:  # a bf16 is the upper half of an fp32
        halves = bytearray(2 * len(raw))
        halves[2::4], halves[3::4] = raw[0::2], raw[1::2]
        wide = bytes(halves)
    if heads is None:
        return wide
    head_bytes = len(wide) // heads
    parts = (wide[begin : begin + head_bytes] for begin in range(0, len(wide), head_bytes))
    return b"".join(interleave(part, num_rows=head_bytes // 4) for part in parts)


def _open(paths: tuple[Path, ...], files: ExitStack) -> dict[str, _Stored]:
    """Every tensor of these files, by name."""
    found = {}
    for path in paths:
        header = read_header(path)
        file = files.enter_context(path.open("rb"))
        (length,) = struct.unpack("<Q", file.read(8))
        for name, tensor in header.items():
            if name != "__metadata__":
                found[name] = _stored(file, 8 + length, name, tensor)
    return found


def _stored(file: BinaryIO, data_offset: int, name: str, tensor: dict[str, Any]) -> _Stored:
    dtype = str(tensor["dtype"])
    if dtype not in TensorType.__members__:
        raise ModelError(f"its tensor {name} is stored as {dtype}, not as F32, F16 or BF16", param="model")
    begin, end = tensor["data_offsets"]
    stored = _Stored(file, data_offset + int(begin), TensorType[dtype], tuple(map(int, tensor["shape"])))
    if TensorEntry(name, stored.shape, stored.type).num_bytes != end - begin:
        raise ModelError(f"its tensor {name} has another size than its shape says: copy the model again", param="model")
    return stored


def _find_tensors(architecture: Architecture, stored: dict[str, _Stored]) -> list[_Tensor]:
    """The tensors of the file to be, in order."""
    left = dict(stored)
    if architecture.is_tied:
        left.pop("lm_head.weight", None)  # the embedding, once more
    found = []
    for wanted in architecture.tensors():
        source = left.pop(wanted.source, None)
        if source is not None:
            found.append(_match(wanted, source))
        elif not wanted.is_optional:
            raise ModelError(f"its weight files lack {wanted.source}", param="model")
    if left:
        raise ModelError(f"GGUF has no place for its tensor {min(left)}", param="model")
    factors = architecture.rope_factors()
    if factors is not None:
        entry = TensorEntry("rope_freqs.weight", (len(factors) // 4,), TensorType.F32)
        found.append(_Tensor(entry, None, made=factors))
    return found


def _match(wanted: WantedTensor, stored: _Stored) -> _Tensor:
    if stored.shape != wanted.shape:
        message = f"its tensor {wanted.source} is {list(stored.shape)}, and {list(wanted.shape)} by its config.json"
        raise ModelError(message, param="model")
    # ggml's kernels take norms and biases in fp32 alone.
    kind = TensorType.F32 if len(wanted.shape) == 1 else stored.type
    return _Tensor(TensorEntry(wanted.name, wanted.shape, kind), stored, wanted.interleaved_heads)


def _make_head(
    folder: Path, architecture: Architecture, tensors: list[_Tensor], *, config: dict[str, Any], name: str
) -> bytes:
    entries = [tensor.entry for tensor in tensors]
    pairs = Pairs()
    try:
        pairs.text("general.architecture", architecture.name)
        pairs.text("general.type", "model")
        pairs.text("general.name", name)
        architecture.describe(pairs)
        largest = max(entries, key=lambda entry: entry.num_bytes)
        pairs.uint32("general.file_type", _FILE_TYPES[largest.type])
        pairs.uint32("general.quantization_version", _QUANTIZATION_VERSION)
        describe_vocabulary(folder, pairs, config=config)
        return encode_head(pairs, entries)
    except struct.error as error:
        raise ModelError(f"a number of its configuration is out of range: {error}", param="model") from error


def _read(stored: _Stored, num_bytes: int, *, skip: int = 0) -> bytes:
    """Part of a tensor's bytes, all of them."""
    stored.file.seek(stored.offset + skip)
    raw = stored.file.read(num_bytes)
    if len(raw) != num_bytes:
        # The announced length can no longer be kept: the connection breaks, as it must.
        raise EOFError(f"{os.fspath(stored.file.name)} has become shorter while it was read")
    return raw

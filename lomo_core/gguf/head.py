"""The head of a GGUF file, version 3: typed key-value pairs, then the table of its tensors; all little endian.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

# Where a file sets no general.alignment (the specification's default).
ALIGNMENT_BYTES = 32
_MAGIC, _VERSION = b"GGUF", 3


class TensorType(IntEnum):
    """How a tensor's elements are stored: ggml's numbers."""

    F32 = 0
    F16 = 1
    BF16 = 30

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return 4 if self is TensorType.F32 else 2


class _ValueType(IntEnum):
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    """As in PyTorch: the last dimension is contiguous."""
    type: TensorType

    @property
    def num_bytes(self) -> int:
        """Bytes of its data, without padding."""
        count = self.type.element_bytes
        for size in self.shape:
            count *= size
        return count


class Pairs:
    """Key-value pairs, encoded as they are added; the method says the type."""

    def __init__(self) -> None:
        self.encoded = bytearray()
        self.count = 0

    def uint32(self, key: str, value: int) -> None:
        """A count, a length or an id."""
        self._add(key, _ValueType.UINT32, struct.pack("<I", value))

    def float32(self, key: str, value: float) -> None:
        """A real number."""
        self._add(key, _ValueType.FLOAT32, struct.pack("<f", value))

    def flag(self, key: str, *, value: bool) -> None:
        """True or false."""
        self._add(key, _ValueType.BOOL, struct.pack("<?", value))

    def text(self, key: str, value: str) -> None:
        """A string, in UTF-8."""
        self._add(key, _ValueType.STRING, _string(value))

    def texts(self, key: str, values: Sequence[str]) -> None:
        """An array of strings."""
        body = b"".join(map(_string, values))
        self._add(key, _ValueType.ARRAY, struct.pack("<IQ", _ValueType.STRING, len(values)) + body)

    def int32s(self, key: str, values: Sequence[int]) -> None:
        """An array of whole numbers."""
        body = struct.pack(f"<{len(values)}i", *values)
        self._add(key, _ValueType.ARRAY, struct.pack("<IQ", _ValueType.INT32, len(values)) + body)

    def _add(self, key: str, kind: _ValueType, value: bytes) -> None:
        self.encoded += _string(key) + struct.pack("<I", kind) + value
        self.count += 1


def padding(num_bytes: int) -> bytes:
    """What follows so many bytes for the next ones to be aligned."""
    return bytes(-num_bytes % ALIGNMENT_BYTES)


def encode_head(pairs: Pairs, tensors: Sequence[TensorEntry]) -> bytes:
    """The file up to the first tensor's data. The data follow in the table's order, each padded to the alignment."""
    head = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), pairs.count))
    head += pairs.encoded
    offset = 0
    for tensor in tensors:
        sizes = tuple(reversed(tensor.shape))  # ggml names the contiguous dimension first
        head += _string(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", tensor.type, offset)
        offset += tensor.num_bytes + len(padding(tensor.num_bytes))
    return bytes(head + padding(len(head)))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw

"""The encoded rows of a data file in memory-mapped files: encoded once, read by every attempt, larger than memory if
need be.

A cache is a folder `tokens-<key>`: `ids.bin` (int32) and `trained.bin` (bool) one after the other over all rows,
`ends.bin` (int64, where each row ends), `cut.bin` (bool, whether it lost its beginning), and `meta.json` with counts,
sizes and SHA-256. The key is the hash of all that decides the tokens: the file, the tokenizer with its template, the
options, the libraries. It is written beside its place, put on disk and renamed, so that it is whole or absent; a
damaged one is found by its hashes and written anew. Several processes may use the same parent folder: each writes a
folder of its own, which it keeps locked (`flock`) while it lives, so that what a dead one left is known and swept.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray

from lomo_core.config import TrainOn
from lomo_core.data.encode import RowEncoder
from lomo_core.data.formats import RowErrors, RowReader
from lomo_core.data.rows import ChoiceRow, TrainRow, WrongRow
from lomo_core.data.template import EncodedRow
from lomo_core.disk_full import disk_full_named
from lomo_core.errors import DataError

# Part of every key: raised when the layout of the files or the meaning of a row changes.
_VERSION = 1
_META_NAME = "meta.json"
_DTYPES = {"ids.bin": "<i4", "trained.bin": "?", "ends.bin": "<i8", "cut.bin": "?"}
_MAX_META_BYTES = 64 * 1024
_BUFFER_BYTES = 1 << 20
# Hashed in about 1 ms.
_HASH_BLOCK_BYTES = 1 << 20
# Short files are done before anybody looks; then a line every few seconds is enough to see that it goes on.
_QUIET_S = 2.0
_SAY_EVERY_S = 5.0
# Rows between two looks whether to stop: a few milliseconds.
_ROWS_PER_CHECK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """What decides the tokens beside file and tokenizer."""

    max_seq_length: int
    train_on: TrainOn


@dataclass(frozen=True, slots=True)
class Watch:
    """How the long work of encoding is heard and stopped."""

    say: Callable[[str], None]
    """Told how far it is, every few seconds."""
    check: Callable[[], None]
    """Called every few rows; may raise to end the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """What a data set amounts to."""

    num_rows: int
    num_truncated: int
    """Rows that lost their beginning."""
    num_tokens: int
    num_trained: int
    """Tokens with a loss."""
    longest_row: int
    """In tokens."""
    highest_token_id: int


class TokenDataset:
    """Encoded rows in mapped files; a row is read from them when it is asked for."""

    def __init__(self, folder: Path, counts: TokenCounts) -> None:
        self.counts = counts
        mapped = {name: np.memmap(folder / name, dtype=dtype, mode="r") for name, dtype in _DTYPES.items()}
        self._ids, self._trained = mapped["ids.bin"], mapped["trained.bin"]
        self._ends, self._cut = mapped["ends.bin"], mapped["cut.bin"]
        self.lengths: NDArray[np.int32] = np.diff(self._ends, prepend=0).astype(np.int32)
        """Tokens of each row, [num_rows]."""

    def __len__(self) -> int:
        return self.counts.num_rows

    def row(self, place: int) -> EncodedRow:
        """The row at a place, 0 to `len() - 1`, in the file's order."""
        end = int(self._ends[place])
        part = slice(end - int(self.lengths[place]), end)
        return EncodedRow(np.array(self._ids[part]), np.array(self._trained[part]), is_cut=bool(self._cut[place]))


def open_dataset(
    source: RowReader, tokenizer: Any, *, options: EncodeOptions, cache_dir: Path, watch: Watch
) -> TokenDataset:
    """The encoded rows of a file: those in `cache_dir` if they are there and whole, else they are made.

    Raises:
        DataError: the file cannot be read, is empty, or rows are wrong (the first 20 are listed).
        ModelError: the tokenizer lacks what the format needs.
        DiskFullError: there is no room; nothing is left behind.
    """
    key = _key(source, tokenizer, options, watch)
    folder = cache_dir / f"tokens-{key[:32]}"
    if folder.exists():
        counts = _verify(folder, key, watch)
        if counts is not None:
            return TokenDataset(folder, counts)
        watch.say("the encoded rows on disk are damaged: they are made anew")
        shutil.rmtree(folder)
    # What a job learns from is nobody else's to read.
    cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _sweep(cache_dir)
    encoder = RowEncoder(tokenizer, max_seq_length=options.max_seq_length, train_on=options.train_on)
    with disk_full_named("the encoded rows"), _own_folder(cache_dir) as own:
        counts = _write(own, key, _encoded_rows(source, encoder, watch))
        _rename(own, folder)
    return TokenDataset(folder, counts)


@contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder, locked as long as it is being filled; gone afterwards unless it was renamed."""
    path = parent / f".tmp-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Delete the temporary folders that no living process has locked."""
    for path in parent.glob(".tmp-*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def _rename(path: Path, target: Path) -> None:
    """Make a whole folder exist."""
    try:
        path.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # Another process was faster: its folder holds the same.
        return
    _fsync(target.parent)


def _key(source: RowReader, tokenizer: Any, options: EncodeOptions, watch: Watch) -> str:
    """Hash, in hex, of all that decides the tokens of a file."""
    deciding = {
        "version": _VERSION,
        "file": _sha256(source.path, watch),
        "format": source.format,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "options": asdict(options),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _encoded_rows(source: RowReader, encoder: RowEncoder, watch: Watch) -> Iterator[EncodedRow]:
    """Encode row by row. After the first wrong row the rest is only looked through for others.

    Raises:
        DataError: rows are wrong.
    """
    errors = RowErrors(source.param)
    progress = _Progress(source, watch.say)

    def good_rows() -> Iterator[TrainRow | WrongRow]:
        for number, row in enumerate(source, start=1):
            if number % _ROWS_PER_CHECK == 0:
                watch.check()
            if isinstance(row, ChoiceRow):
                raise DataError(
                    "rows with choices measure accuracy: use them as validation file, not to train", param=source.param
                )
            if isinstance(row, WrongRow) or not errors.count:
                yield row

    for row in encoder.encode(good_rows()):
        progress.advance()
        if isinstance(row, WrongRow):
            errors.add(row)
        elif not errors.count:
            yield row
    errors.raise_if_any()
    progress.finish()


class _Progress:
    """Says how many rows are done, and how long the rest will take by the share of bytes read."""

    def __init__(self, source: RowReader, say: Callable[[str], None]) -> None:
        self._source = source
        self._say = say
        self._start = time.monotonic()
        self._next_s = self._start + _QUIET_S
        self._num_rows = 0

    def advance(self) -> None:
        """One row more is done."""
        self._num_rows += 1
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + _SAY_EVERY_S
        share = self._source.num_bytes_read / self._source.num_bytes
        left_s = (now - self._start) * (1 - share) / share
        self._say(f"encoded {self._num_rows} rows, {share:.0%} of the file; about {left_s:.0f} s left")

    def finish(self) -> None:
        """Every row is done."""
        seconds = time.monotonic() - self._start
        if seconds > _QUIET_S:
            self._say(f"encoded {self._num_rows} rows in {seconds:.0f} s")


class _HashedFile:
    """A file written from its start to its end, with its hash."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=_BUFFER_BYTES)
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def write(self, raw: bytes) -> None:
        """Append bytes."""
        self._stream.write(raw)
        self._digest.update(raw)
        self._num_bytes += len(raw)

    def finish(self) -> dict[str, Any]:
        """Put the file on disk; its size and hash."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return {"size": self._num_bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Give the file back, whether or not it was finished; unfinished, it is not needed."""
        with suppress(OSError):
            self._stream.close()


def _write(folder: Path, key: str, rows: Iterator[EncodedRow]) -> TokenCounts:
    """Fill a folder with the rows and put it on disk."""
    with ExitStack() as stack:
        files = {name: stack.enter_context(closing(_HashedFile(folder / name))) for name in _DTYPES}
        counts = _append_rows(files, rows)
        meta = {"key": key, "counts": asdict(counts), "files": {name: file.finish() for name, file in files.items()}}
    (folder / _META_NAME).write_text(json.dumps(meta, indent=2), encoding="utf-8")
    _fsync(folder / _META_NAME)
    _fsync(folder)
    return counts


def _append_rows(files: dict[str, _HashedFile], rows: Iterator[EncodedRow]) -> TokenCounts:
    num_rows = num_truncated = num_tokens = num_trained = longest = highest = 0
    for row in rows:
        num_rows += 1
        num_truncated += row.is_cut
        num_tokens += len(row.ids)
        num_trained += row.num_trained
        longest = max(longest, len(row.ids))
        highest = max(highest, int(row.ids.max()))
        files["ids.bin"].write(row.ids.astype("<i4").tobytes())
        files["trained.bin"].write(row.trained.tobytes())
        files["ends.bin"].write(np.int64(num_tokens).astype("<i8").tobytes())
        files["cut.bin"].write(np.bool_(row.is_cut).tobytes())
    return TokenCounts(
        num_rows=num_rows,
        num_truncated=num_truncated,
        num_tokens=num_tokens,
        num_trained=num_trained,
        longest_row=longest,
        highest_token_id=highest,
    )


def _verify(folder: Path, key: str, watch: Watch) -> TokenCounts | None:
    """The counts of a cache that is whole, or None."""
    try:
        with (folder / _META_NAME).open("rb") as stream:
            meta = json.loads(stream.read(_MAX_META_BYTES))
        for name in _DTYPES:
            if _sha256(folder / name, watch) != meta["files"][name]["sha256"]:
                return None
        return TokenCounts(**meta["counts"]) if meta["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path, watch: Watch) -> str:
    """SHA-256 of a file's bytes, in hex; can be stopped, since a large file takes minutes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if len(block) == _HASH_BLOCK_BYTES:
                watch.check()
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    """Put a file or a folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

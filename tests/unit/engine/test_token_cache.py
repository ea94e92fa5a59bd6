"""The encoded rows on disk: the same as encoded in memory, whole or absent, and never more of them in memory than a
few."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lomo_core.config import TrainOn
from lomo_core.data import encode, json_rows, token_cache
from lomo_core.data.encode import RowEncoder
from lomo_core.data.formats import RowReader
from lomo_core.data.rows import ChoiceRow
from lomo_core.data.template import EncodedRow
from lomo_core.data.token_cache import EncodeOptions, TokenDataset, Watch, open_dataset
from lomo_core.errors import DataError, DiskFullError, InterruptedRunError, ModelError
from lomo_core.tokenizer import load_tokenizer
from tests.support.tiny_model import TAGGED_TEMPLATE, chat, chat_rows, choice_rows, write_jsonl


class Heard:
    """What was said, and after how many looks (one every 64 rows) to stop."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.said: list[str] = []
        self._looks_left = stop_after
        self.watch = Watch(say=self.said.append, check=self._check)

    def _check(self) -> None:
        if self._looks_left is not None:
            self._looks_left -= 1
            if self._looks_left < 0:
                raise InterruptedRunError("asked to stop")


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def open_rows(
    path: Path, tokenizer: Any, *, max_seq_length: int = 24, train_on: TrainOn = "assistant", heard: Heard | None = None
) -> TokenDataset:
    return open_dataset(
        RowReader(path, param="training_file"),
        tokenizer,
        options=EncodeOptions(max_seq_length=max_seq_length, train_on=train_on),
        cache_dir=path.parent / "cache",
        watch=(heard or Heard()).watch,
    )


def encoded(path: Path, tokenizer: Any) -> list[EncodedRow]:
    rows = [row for row in RowReader(path, param="training_file") if not isinstance(row, ChoiceRow)]
    found = RowEncoder(tokenizer, max_seq_length=24, train_on="assistant").encode(rows)
    return [row for row in found if isinstance(row, EncodedRow)]


def test_rows_come_back_as_they_were_encoded(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(1100))
    expected = encoded(path, tokenizer)
    rows = open_rows(path, tokenizer)
    assert len(rows) == len(expected) == 1100
    for place, row in enumerate(expected):
        found = rows.row(place)
        assert found.ids.dtype == np.int32 and found.trained.dtype == np.bool_
        np.testing.assert_array_equal(found.ids, row.ids)
        np.testing.assert_array_equal(found.trained, row.trained)
        assert found.is_cut == row.is_cut
    assert rows.lengths.tolist() == [len(row.ids) for row in expected]
    assert rows.counts.num_truncated == sum(row.is_cut for row in expected) > 0
    assert rows.counts.num_tokens == sum(len(row.ids) for row in expected)
    assert rows.counts.num_trained == sum(row.num_trained for row in expected)
    assert rows.counts.longest_row == 24
    assert rows.counts.highest_token_id == max(int(row.ids.max()) for row in expected)


def test_a_second_opening_encodes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(70))
    first = open_rows(path, tokenizer)
    # Reading the rows would raise.
    again = open_rows(path, tokenizer, heard=Heard(stop_after=0))
    assert again.counts == first.counts
    np.testing.assert_array_equal(again.row(7).ids, first.row(7).ids)


def test_all_that_decides_the_tokens_is_in_the_key(tmp_path: Path, tokenizer: Any, tagged_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(20))
    folders = tmp_path / "cache"
    open_rows(path, tokenizer)
    open_rows(path, tokenizer, max_seq_length=25)
    open_rows(path, tokenizer, train_on="all")
    tokenizer.chat_template = TAGGED_TEMPLATE
    open_rows(path, tokenizer)
    tokenizer.add_tokens(["what goes"])
    open_rows(path, tokenizer)
    write_jsonl(path, chat_rows(21))
    assert len(open_rows(path, tokenizer)) == 21
    assert len(list(folders.iterdir())) == 6


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "ends.bin", "cut.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_damage_is_found_and_mended(tmp_path: Path, tokenizer: Any, name: str, damage: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(20))
    first = open_rows(path, tokenizer)
    (folder,) = (tmp_path / "cache").iterdir()
    raw = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(raw[:-1] if damage == "short" else bytes([raw[0] ^ 1]) + raw[1:])
    heard = Heard()
    again = open_rows(path, tokenizer, heard=heard)
    assert heard.said == ["the encoded rows on disk are damaged: they are made anew"]
    assert again.counts == first.counts
    assert (folder / name).read_bytes() == raw


def test_a_stop_leaves_nothing_and_leftovers_are_swept(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(600))
    with pytest.raises(InterruptedRunError):
        open_rows(path, tokenizer, heard=Heard(stop_after=8))
    assert list((tmp_path / "cache").iterdir()) == []
    # What a killed process leaves.
    (tmp_path / "cache" / ".tmp-dead").mkdir()
    (tmp_path / "cache" / ".tmp-dead" / "ids.bin").write_bytes(b"1234")
    open_rows(path, tokenizer)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("tokens-")


def test_two_processes_may_encode_the_same_file_at_once(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(70))
    other: list[TokenDataset] = []

    def overtake() -> None:
        if not other:
            other.append(open_rows(path, tokenizer))

    slow = Heard()
    slow.watch = Watch(say=slow.said.append, check=overtake)
    rows = open_rows(path, tokenizer, heard=slow)
    # The faster one has not swept the slower one's folder, and the slower one has used the faster one's.
    assert rows.counts == other[0].counts and slow.said == []
    np.testing.assert_array_equal(rows.row(3).ids, other[0].row(3).ids)
    assert [folder.name.startswith("tokens-") for folder in (tmp_path / "cache").iterdir()] == [True]


def test_a_full_disk(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(5))

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache, "_fsync", full)
    with pytest.raises(DiskFullError, match="encoded rows"):
        open_rows(path, tokenizer)
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_wrong_rows_of_every_kind_in_the_order_of_the_file(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ message['content'] + '<|im_end|>' }}{% endfor %}"
    )
    rows: list[Any] = [chat("a", "b"), chat("bad", "b"), {"messages": []}, chat("bad", "c"), chat("a", "c")]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *[{"messages": 1}] * 25])
    with pytest.raises(DataError) as caught:
        open_rows(path, tokenizer)
    lines = caught.value.message.splitlines()
    assert lines[0] == "28 rows are wrong, the first 20 of them:" and len(lines) == 21
    assert [line.split(":")[0] for line in lines[1:5]] == ["line 2", "line 3", "line 4", "line 6"]
    assert "refuses the conversation: no" in lines[1] and caught.value.param == "training_file"
    assert list((tmp_path / "cache").iterdir()) == []


def test_choice_rows_are_no_training_data(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="use them as validation file"):
        open_rows(write_jsonl(tmp_path / "rows.jsonl", choice_rows(2)), tokenizer)


def test_every_format_can_be_opened(tmp_path: Path, tokenizer: Any) -> None:
    bodies: list[dict[str, object]] = [
        chat("a", "b"),
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"text": "a b"},
    ]
    for body in bodies:
        rows = open_rows(write_jsonl(tmp_path / "rows.jsonl", [body, body]), tokenizer)
        assert len(rows) == 2 and rows.counts.num_trained > 0
    (tmp_path / "book.txt").write_text("some words\n" * 100)
    rows = open_rows(tmp_path / "book.txt", tokenizer)
    # All but the first token, each once.
    assert rows.counts.num_trained == rows.counts.num_tokens - len(rows)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        open_rows(write_jsonl(tmp_path / "rows.jsonl", [bodies[0]]), tokenizer)
    assert len(open_rows(write_jsonl(tmp_path / "rows.jsonl", [bodies[3]]), tokenizer)) == 1


def test_long_work_says_how_far_it_is(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(1500))
    clock = iter(range(10_000))
    # Each look at the clock finds that 10 ms have gone by.
    monkeypatch.setattr(token_cache.time, "monotonic", lambda: next(clock) / 100)
    heard = Heard()
    open_rows(path, tokenizer, heard=heard)
    assert [line.split(" rows")[0] for line in heard.said] == [
        "encoded 200",
        "encoded 700",
        "encoded 1200",
        "encoded 1500",
    ]
    assert heard.said[0].endswith("s left") and heard.said[-1] == "encoded 1500 rows in 15 s"
    heard = Heard()
    open_rows(write_jsonl(tmp_path / "rows.jsonl", chat_rows(50)), tokenizer, heard=heard)
    assert heard.said == []


def peak_bytes_of(path: Path, tokenizer: Any) -> int:
    """Highest memory of Python and numpy while a file is encoded and read through."""
    tracemalloc.start()
    rows = open_rows(path, tokenizer, max_seq_length=512)
    assert rows.counts.num_truncated == 0
    for place in range(0, len(rows), 7):
        rows.row(place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("as_array", [False, True])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, as_array: bool
) -> None:
    # The fixed parts fill up with few rows, which tracemalloc makes slow.
    monkeypatch.setattr(encode, "_ROWS_PER_CALL", 16)
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 4096)
    bodies = [chat("what goes with the sun? " * 8, f"day {place}") for place in range(40)]
    peaks = []
    for times in (1, 20):
        path = tmp_path / f"rows-{times}.json"
        lines = [json.dumps(body) for body in bodies * times]
        path.write_text("[" + ",\n".join(lines) + "]" if as_array else "\n".join(lines))
        peaks.append(peak_bytes_of(path, tokenizer))
    # The rows themselves take about 2 kB each as Python objects; allowed are the 4 bytes of a row's length.
    assert peaks[1] - peaks[0] < 19 * 40 * 100

"""SIGTERM in every phase of a real process: an orderly end with exit code 17, and nothing done is lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lomo_core import checkpoint as checkpoints
from lomo_core.config import TrainConfig
from lomo_core.errors import InterruptedRunError
from lomo_core.events import Checkpoint, Evaluation, Failed, Finished, Message, Started, Step
from lomo_core.run_identity import run_sha256
from lomo_core.stop import StopRequest
from tests.support.engine_runs import MakeConfig, Start, events_of, write_run
from tests.support.tiny_model import chat, chat_rows, write_jsonl

WaitUntil = Callable[[Callable[[], object], float, str], object]

LONG_ROWS = [chat("word " * 400, "x")] * 24


def says(config: TrainConfig, text: str) -> bool:
    return any(text in event.message for event in events_of(config.run_dir, Message))


@pytest.fixture
def stop_when(start_engine: Start, wait_until: WaitUntil) -> Callable[[TrainConfig, Callable[[], object]], Failed]:
    """Start a run, send SIGTERM once a condition holds, and return its last word."""

    def stop(config: TrainConfig, condition: Callable[[], object]) -> Failed:
        process = start_engine("train", write_run(config))
        wait_until(condition, 120, "the phase to stop in")
        if sys.platform == "linux":
            score = Path(f"/proc/{process.pid}/oom_score_adj").read_text(encoding="ascii")
            assert score.strip() == "500", "where the host runs out of memory the kernel takes the engine"
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
        assert process.returncode == InterruptedRunError.exit_code, stderr
        assert "Traceback" not in stderr
        assert not events_of(config.run_dir, Finished)
        (failed,) = events_of(config.run_dir, Failed)
        assert failed.code == "interrupted"
        return failed

    return stop


def check_saved(config: TrainConfig, failed: Failed) -> None:
    """The last step is in a valid checkpoint, and the last word says so."""
    last = events_of(config.run_dir, Step)[-1].step
    saved = events_of(config.run_dir, Checkpoint)[-1]
    assert saved.step == last and f"step {last}" in failed.message
    assert checkpoints.verify_checkpoint(Path(saved.path), run_sha256=run_sha256(config)).step == last
    assert not list((Path(config.run_dir) / "checkpoints").glob(".tmp-*"))


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    """A stop request that SIGTERM reaches, for the length of a test."""
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    request.install()
    yield request
    signal.signal(signal.SIGTERM, before)


def test_a_long_call_is_ended_from_within(stop: StopRequest) -> None:
    reached = []
    with pytest.raises(InterruptedRunError, match="while it was loading"), stop.interrupting():
        signal.raise_signal(signal.SIGTERM)
        reached.append("behind the signal")
    assert not reached and stop.is_requested


def test_a_library_that_swallows_the_interruption_does_not_hide_it(stop: StopRequest) -> None:
    with pytest.raises(InterruptedRunError), stop.interrupting(), suppress(Exception):
        signal.raise_signal(signal.SIGTERM)


def test_outside_of_such_a_call_the_signal_is_only_noted(stop: StopRequest) -> None:
    with stop.interrupting():
        pass
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_requested
    with pytest.raises(InterruptedRunError), stop.interrupting():
        pytest.fail("a stop that was asked for before the block must not enter it")


@pytest.mark.slow
def test_while_the_data_is_read(make_config: MakeConfig, tmp_path: Path, stop_when: Any) -> None:
    config = make_config()
    write_jsonl(tmp_path / "train.jsonl", chat_rows(20_000))
    failed = stop_when(config, lambda: says(config, "reading the data"))
    assert "while it was loading" in failed.message
    assert not says(config, "loading the weights")


@pytest.mark.slow
def test_while_the_weights_are_loaded(make_config: MakeConfig, stop_when: Any) -> None:
    config = make_config()
    failed = stop_when(config, lambda: says(config, "loading the weights"))
    assert "while it was loading" in failed.message
    assert not events_of(config.run_dir, Started)


@pytest.mark.slow
def test_while_the_longest_batch_is_tried(make_config: MakeConfig, tmp_path: Path, stop_when: Any) -> None:
    config = make_config(batch_size=24)
    write_jsonl(tmp_path / "train.jsonl", LONG_ROWS)
    failed = stop_when(config, lambda: says(config, "trying the longest batch"))
    assert "before its first step" in failed.message
    assert events_of(config.run_dir, Started) and not events_of(config.run_dir, Step)


@pytest.mark.slow
def test_in_a_step(make_config: MakeConfig, stop_when: Any) -> None:
    config = make_config(n_epochs=100_000, checkpoint_every_steps=0)
    check_saved(config, stop_when(config, lambda: events_of(config.run_dir, Step)))


@pytest.mark.slow
def test_in_an_evaluation(make_config: MakeConfig, tmp_path: Path, stop_when: Any) -> None:
    config = make_config(validation="valid.jsonl", eval_every_steps=1)
    write_jsonl(tmp_path / "valid.jsonl", chat_rows(4000))
    check_saved(config, stop_when(config, lambda: events_of(config.run_dir, Step)))
    assert [event.step for event in events_of(config.run_dir, Evaluation)] == [0]


@pytest.mark.slow
def test_while_a_checkpoint_is_written(make_config: MakeConfig, stop_when: Any) -> None:
    config = make_config(n_epochs=100_000, checkpoint_every_steps=1)
    folder = Path(config.run_dir) / "checkpoints"
    check_saved(config, stop_when(config, lambda: list(folder.glob(".tmp-step-*"))))

"""What an engine's end means: the whole table."""

from __future__ import annotations

import signal

import pytest

from lomo_core.errors import EXIT_CODES
from lomo_core.events import Failed, Finished
from worker.outcome import Asked, Cancelled, Died, GaveUp, Paused, Released, Succeeded, describe_signal, judge

FINISHED = Finished(step=1, model_path="/m", weights_sha256="0", num_trained_tokens=1, peak_bytes=1, seconds=1.0)


def test_success_needs_the_exit_code_and_the_word() -> None:
    assert judge(0, asked=Asked.NOTHING, finished=FINISHED, failed=None) == Succeeded(FINISHED)
    without = judge(0, asked=Asked.NOTHING, finished=None, failed=None)
    assert isinstance(without, GaveUp)
    assert without.failure.code == "engine_error"
    # The word alone is not enough: the engine may have died while it was closing.
    assert isinstance(judge(-9, asked=Asked.NOTHING, finished=FINISHED, failed=None), Died)


@pytest.mark.parametrize("asked", list(Asked))
def test_success_wins_over_whatever_was_asked(asked: Asked) -> None:
    assert isinstance(judge(0, asked=asked, finished=FINISHED, failed=None), Succeeded)


@pytest.mark.parametrize("exit_code", [-9, -15, 0, 1, 12, 17, 99])
def test_a_cancel_ends_as_a_cancel(exit_code: int) -> None:
    assert judge(exit_code, asked=Asked.CANCEL, finished=None, failed=None) == Cancelled()


@pytest.mark.parametrize("exit_code", [-9, -15, 0, 1, 17, 99])
def test_a_pause_ends_as_a_pause(exit_code: int) -> None:
    assert judge(exit_code, asked=Asked.PAUSE, finished=None, failed=None) == Paused()


def test_an_error_of_the_engines_own_is_told_although_it_should_pause() -> None:
    verdict = judge(16, asked=Asked.PAUSE, finished=None, failed=None)
    assert isinstance(verdict, GaveUp)
    assert verdict.failure.code == "disk_full"


@pytest.mark.parametrize("exit_code", [-9, -15, 0, 1, 17, 99])
def test_after_our_own_sigterm_a_death_says_nothing_of_the_job(exit_code: int) -> None:
    assert isinstance(judge(exit_code, asked=Asked.STOP, finished=None, failed=None), Released)


@pytest.mark.parametrize("exit_code", [code for code in EXIT_CODES if code not in (1, 17)])
@pytest.mark.parametrize("asked", [Asked.NOTHING, Asked.STOP])
def test_an_error_of_the_engine_is_final(exit_code: int, asked: Asked) -> None:
    verdict = judge(exit_code, asked=asked, finished=None, failed=None)
    assert isinstance(verdict, GaveUp)
    assert verdict.failure.code == EXIT_CODES[exit_code].code
    assert verdict.failure.message.endswith(f"(exit code {exit_code}).")
    assert not verdict.show_log


def test_the_engines_own_words_are_kept() -> None:
    failed = Failed(code="invalid_training_file", message="line 3: no messages", param="data.train_path")
    verdict = judge(12, asked=Asked.NOTHING, finished=None, failed=failed)
    assert isinstance(verdict, GaveUp)
    assert verdict.failure.as_dict() == {
        "code": "invalid_training_file",
        "message": "line 3: no messages",
        "param": "training_file",
    }


@pytest.mark.parametrize("exit_code", [1, 2, 99])
def test_a_defect_shows_the_log(exit_code: int) -> None:
    verdict = judge(exit_code, asked=Asked.NOTHING, finished=None, failed=None)
    assert isinstance(verdict, GaveUp)
    assert (verdict.failure.code, verdict.show_log) == ("engine_error", True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGTERM])
def test_a_signal_is_worth_another_try(number: int) -> None:
    verdict = judge(-number, asked=Asked.NOTHING, finished=None, failed=None)
    assert verdict == Died(f"The engine was killed by {describe_signal(number)}")


def test_a_stranger_may_stop_an_engine() -> None:
    assert isinstance(judge(17, asked=Asked.NOTHING, finished=None, failed=None), Died)


def test_signals_have_names() -> None:
    assert describe_signal(11) == "signal 11 (SIGSEGV)"
    assert "memory" in describe_signal(9)
    assert describe_signal(50) == "signal 50"

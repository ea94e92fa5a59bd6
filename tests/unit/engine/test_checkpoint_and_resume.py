"""Checkpoints are whole or absent, and a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lomo_core import checkpoint as checkpoints
from lomo_core.config import ClipConfig, ExactClipping, OptimizerConfig, OptimizerName, TrainConfig
from lomo_core.errors import CheckpointError, DiskFullError, InterruptedRunError
from lomo_core.events import Checkpoint, Evaluation, Finished, Message, Started, Step
from lomo_core.run_identity import run_sha256
from lomo_core.stop import StopRequest
from tests.support.engine_runs import MakeConfig, Start, StopWhen, events_of, rewrite_json, run_here, write_run

WaitUntil = Callable[[Callable[[], object], float, str], object]

RATES: dict[OptimizerName, float] = {"lomo": 0.05, "adalomo": 0.01, "sgd": 0.05, "adamw": 0.001}
RULES: dict[str, dict[str, Any]] = {
    f"{name} {precision} {mode}": {
        "optimizer": OptimizerConfig(name=name, learning_rate=rate, clip=ClipConfig(mode=mode)),
        "precision": precision,
    }
    for name, rate in RATES.items()
    for precision, mode in (("fp32", "norm"), ("bf16", "group"))
}
RULES |= {
    f"lomo {precision} {clip.mode} {clip.exact}": {
        "optimizer": OptimizerConfig(learning_rate=0.05, clip=clip),
        "precision": precision,
    }
    for precision, clip in (
        ("fp16", ClipConfig(mode="norm")),
        ("fp16", ClipConfig(mode="group")),
        ("bf16", ClipConfig(mode="delayed")),
        ("bf16", ClipConfig(mode="norm", exact="spill_memory")),
    )
}


def checkpoint_paths(config: TrainConfig, *steps: int) -> tuple[str, ...]:
    return tuple(str(Path(config.run_dir) / "checkpoints" / f"step-{step}") for step in steps)


def losses(config: TrainConfig) -> dict[int, float]:
    return {event.step: event.loss for event in events_of(config.run_dir, Step)}


def batches_and_losses(config: TrainConfig) -> list[tuple[int, str | None, float, float | None]]:
    return [(event.step, event.rows_hash, event.loss, event.grad_norm) for event in events_of(config.run_dir, Step)]


def finished(config: TrainConfig) -> Finished:
    (event,) = events_of(config.run_dir, Finished)
    return event


def warnings_of(config: TrainConfig) -> list[str]:
    return [event.message for event in events_of(config.run_dir, Message) if event.level == "warn"]


@pytest.mark.parametrize("name", RULES)
def test_resuming_is_bit_identical(make_config: MakeConfig, name: str) -> None:
    """From the first step, from one inside of an epoch, and from the last one."""
    straight = make_config(run="straight", keep_checkpoints=10, checkpoint_every_steps=1, **RULES[name])
    run_here(straight)
    for step in (1, 5, 8):
        resumed = make_config(run=f"from-{step}", resume_from=checkpoint_paths(straight, step), **RULES[name])
        run_here(resumed)
        assert events_of(resumed.run_dir, Started)[0].step == step
        assert batches_and_losses(resumed) == batches_and_losses(straight)[step:]
        assert finished(resumed).weights_sha256 == finished(straight).weights_sha256
        assert finished(resumed).num_trained_tokens == finished(straight).num_trained_tokens


def test_every_way_to_the_exact_norm_gives_the_same_bits(make_config: MakeConfig) -> None:
    ways: tuple[ExactClipping, ...] = ("second_backward", "spill_memory", "spill_file")
    found = []
    for way in ways:
        rule = OptimizerConfig(learning_rate=0.05, clip=ClipConfig(mode="norm", exact=way))
        config = make_config(run=way, optimizer=rule, precision="bf16")
        run_here(config)
        found.append((batches_and_losses(config), finished(config).weights_sha256))
    assert found[0] == found[1] == found[2]
    # Hence a run may go on in another way than it began.
    resumed = make_config(run="resumed", optimizer=rule, precision="bf16", resume_from=checkpoint_paths(config, 6))
    run_here(
        dataclasses.replace(
            resumed, optimizer=dataclasses.replace(rule, clip=ClipConfig(mode="norm", exact="second_backward"))
        )
    )
    assert events_of(resumed.run_dir, Started)[0].step == 6
    assert finished(resumed).weights_sha256 == found[0][1]


def test_two_runs_of_another_seed_differ(make_config: MakeConfig) -> None:
    first, second = make_config(run="a", seed=1), make_config(run="b", seed=2)
    run_here(first)
    run_here(second)
    assert finished(first).weights_sha256 != finished(second).weights_sha256


def test_a_checkpoint_is_a_model_folder(make_config: MakeConfig) -> None:
    config = make_config(optimizer=OptimizerConfig(name="adalomo", learning_rate=0.01), precision="bf16")
    run_here(config)
    last = Path(checkpoint_paths(config, 8)[0])
    for folder in (last, Path(finished(config).model_path)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert model.config.use_cache
        assert AutoTokenizer.from_pretrained(folder).chat_template
    assert (last / "optimizer.safetensors").exists()
    assert not (Path(finished(config).model_path) / "optimizer.safetensors").exists()


def test_only_the_newest_are_kept_and_announced_when_whole(make_config: MakeConfig) -> None:
    config = make_config(keep_checkpoints=2)
    parent = Path(config.run_dir) / "checkpoints"
    (parent / ".tmp-step-1-dead").mkdir(parents=True)
    run_here(config)
    assert sorted(path.name for path in parent.iterdir()) == ["step-6", "step-8"]
    announced = events_of(config.run_dir, Checkpoint)
    assert [event.step for event in announced] == [2, 4, 6, 8]
    assert announced[-1].num_bytes == sum(path.stat().st_size for path in (parent / "step-8").iterdir())
    state = checkpoints.verify_checkpoint(parent / "step-8", run_sha256=run_sha256(config))
    assert (state.step, state.versions["torch"]) == (8, torch.__version__)


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "model.safetensors is damaged": flip_a_bit,
    "bytes instead of": cut,
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "MANIFEST.json cannot be read": lambda folder: (folder / "MANIFEST.json").unlink(),
    "MANIFEST.json is not valid JSON": lambda folder: (folder / "MANIFEST.json").write_text("{"),
    "MANIFEST.json does not hold a JSON object": lambda folder: (folder / "MANIFEST.json").write_text("[]"),
    "MANIFEST.json lists no files": lambda folder: rewrite_json(folder / "MANIFEST.json", files=[]),
    "../x is missing": lambda folder: rewrite_json(folder / "MANIFEST.json", files=[{"name": "../x"}]),
}


def test_damage_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=2)
    run_here(config)
    whole = Path(checkpoint_paths(config, 2)[0])
    for expected, damage in DAMAGE.items():
        folder = Path(shutil.copytree(whole, tmp_path / "copy"))
        damage(folder)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.verify_checkpoint(folder, run_sha256=run_sha256(config))
        assert expected in caught.value.message
        shutil.rmtree(folder)


def test_a_damaged_checkpoint_is_reported_and_the_next_older_taken(make_config: MakeConfig) -> None:
    straight = make_config(run="straight")
    run_here(straight)
    flip_a_bit(Path(checkpoint_paths(straight, 8)[0]))
    resumed = make_config(run="resumed", resume_from=checkpoint_paths(straight, 8, 6))
    run_here(resumed)
    assert any("step-8 is not used: model.safetensors is damaged" in text for text in warnings_of(resumed))
    assert events_of(resumed.run_dir, Started)[0].step == 6
    assert finished(resumed).weights_sha256 == finished(straight).weights_sha256


def test_only_valid_checkpoints_count_as_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(checkpoint_every_steps=1, keep_checkpoints=9, max_steps=5)
    run_here(config)
    parent = Path(config.run_dir) / "checkpoints"
    cut(parent / "step-4")
    (parent / "step-3" / "MANIFEST.json").unlink()
    checkpoints.prune_checkpoints(parent, keep=2)
    assert [path.name for path in checkpoints.checkpoint_folders(parent)] == ["step-2", "step-5"]
    cut(parent / "step-5")
    checkpoints.prune_checkpoints(parent, keep=1)
    assert [path.name for path in checkpoints.checkpoint_folders(parent)] == ["step-2"]


def test_checkpoints_of_another_run_are_not_used(make_config: MakeConfig) -> None:
    straight = make_config(run="straight")
    run_here(straight)
    other = make_config(run="other", seed=5, resume_from=(*checkpoint_paths(straight, 8), "/nowhere/step-1"))
    run_here(other)
    texts = warnings_of(other)
    assert any("step-8 is not used: it belongs to a run with other settings" in text for text in texts)
    assert any("step-1 is not used: MANIFEST.json cannot be read" in text for text in texts)
    assert texts[-1] == "no checkpoint is valid: the run begins anew at step 0"
    assert events_of(other.run_dir, Started)[0].step == 0


def test_what_decides_a_runs_numbers(make_config: MakeConfig) -> None:
    config = make_config()
    first = run_sha256(config)
    assert run_sha256(dataclasses.replace(config, run_dir="/x", keep_checkpoints=9, eval_every_steps=3)) == first
    assert run_sha256(dataclasses.replace(config, batch_size=4)) != first
    with Path(config.data.train_path).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    assert run_sha256(config) != first


def test_a_full_disk_leaves_nothing_behind(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(max_steps=2)
    usage = shutil.disk_usage(config.model_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match="only 0 MiB are free"):
        run_here(config)
    assert list((Path(config.run_dir) / "checkpoints").iterdir()) == []


def test_a_disk_that_fills_up_while_writing(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    config = make_config(max_steps=2)
    monkeypatch.setattr(checkpoints, "_fsync", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        run_here(config)
    assert list((Path(config.run_dir) / "checkpoints").iterdir()) == []


def test_a_final_model_of_an_earlier_attempt_is_replaced(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2)
    leftover = Path(config.run_dir) / "model"
    leftover.mkdir(parents=True)
    (leftover / "old.txt").write_text("old", encoding="utf-8")
    run_here(config)
    assert not (leftover / "old.txt").exists()
    assert not list(Path(config.run_dir).glob(".tmp-*"))


def test_a_stop_between_steps_writes_a_checkpoint(make_config: MakeConfig) -> None:
    straight = make_config(run="straight", checkpoint_every_steps=0)
    run_here(straight)
    assert not (Path(straight.run_dir) / "checkpoints").exists()
    stopped = make_config(run="stopped", checkpoint_every_steps=0, validation="valid.jsonl")
    with pytest.raises(InterruptedRunError, match="its checkpoint is at step 3"):
        run_here(stopped, stop=StopWhen(lambda: len(events_of(stopped.run_dir, Step)) == 3))
    resumed = make_config(run="resumed", checkpoint_every_steps=0, resume_from=checkpoint_paths(stopped, 3))
    run_here(resumed)
    assert finished(resumed).weights_sha256 == finished(straight).weights_sha256


def test_a_stop_while_loading_has_no_checkpoint(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(InterruptedRunError):
        run_here(config, stop=StopWhen(lambda: True))
    assert not events_of(config.run_dir, Started)


def test_evaluations_come_before_between_and_after(make_config: MakeConfig) -> None:
    config = make_config(validation="valid.jsonl", eval_every_steps=3)
    run_here(config)
    evaluations = events_of(config.run_dir, Evaluation)
    assert [event.step for event in evaluations] == [0, 3, 6, 8]
    by_step = {event.step: event.valid_loss for event in evaluations}
    assert {event.step: event.valid_loss for event in events_of(config.run_dir, Checkpoint)} == {
        2: None,
        4: None,
        6: by_step[6],
        8: by_step[8],
    }
    resumed = make_config(run="b", validation="valid.jsonl", resume_from=checkpoint_paths(config, 8))
    run_here(resumed)
    assert not events_of(resumed.run_dir, Evaluation)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_steps"), [("lomo fp32 norm", 11), ("adamw bf16 group", 37)])
def test_a_killed_run_goes_on_bit_identically(
    make_config: MakeConfig, start_engine: Start, wait_until: WaitUntil, name: str, num_steps: int
) -> None:
    """Killed at whatever it does once it has done so many of its 120 steps."""
    fields = {**RULES[name], "n_epochs": 30, "checkpoint_every_steps": 10}
    straight, killed = make_config(run="straight", **fields), make_config(run="killed", **fields)
    run_here(straight)
    process = start_engine("train", write_run(killed))
    wait_until(lambda: len(events_of(killed.run_dir, Step)) >= num_steps, 120, f"step {num_steps}")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not events_of(killed.run_dir, Finished)
    newest = [str(path) for path in reversed(checkpoints.checkpoint_folders(Path(killed.run_dir) / "checkpoints"))]
    run_here(dataclasses.replace(killed, resume_from=tuple(newest)))
    assert events_of(killed.run_dir, Started)[-1].step >= 10
    assert finished(killed).weights_sha256 == finished(straight).weights_sha256
    # Lines of both attempts: the later one counts, and every step has the batch and the loss of the uninterrupted run.
    both = {line[0]: line for line in batches_and_losses(killed)}
    assert list(both.values()) == batches_and_losses(straight)


def test_a_second_sigterm_is_not_caught() -> None:
    child = os.fork()
    if child == 0:
        stop = StopRequest()
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        if not stop.is_requested:
            os._exit(3)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM

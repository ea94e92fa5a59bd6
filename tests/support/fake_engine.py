"""An engine that plays a script in place of training: what the worker's tests run as the engine's command.

Started like the real one, `fake_engine.py train RUN_JSON`, it speaks the same wire (run.json, journal, exit codes,
death watch). What it does stands in the first line of the job's training file: `{"attempts": [[action, ...], ...]}`,
one list per attempt, the last one also for all further attempts. An action is a name and its arguments:

    ["steps", n]             n training steps, on from the step resumed from
    ["checkpoint"]           publish a checkpoint of the step reached
    ["say", text]            a message
    ["sample"]               an answer to each of the run's sample prompts
    ["raw", text]            write text to the journal as it is (no newline is added)
    ["print", text]          write to standard output
    ["wait", name]           until the file `name` stands beside the run's folders (in the job's folder)
    ["touch", name]          make that file
    ["fail", code, message, param]   a `failed` event
    ["exit", code]           end
    ["die", number]          end by a signal, as killed from outside
    ["finish"]               write the model, say so and end with 0
    ["ignore_sigterm"]       be deaf to it; by default a SIGTERM gives a checkpoint and exit code 17
    ["environment"]          write the environment's names and values to `environment.json`
    ["child"]                start a process in the same group and write its number to `child.pid`
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lomo_core import events
from lomo_core.config import TrainConfig
from lomo_core.death_watch import start_death_watch
from lomo_core.errors import InterruptedRunError

MEMORY = events.MemoryBytes(
    parameters_bytes=100, gradients_bytes=10, optimizer_bytes=0, activations_bytes=20, other_bytes=5, peak_bytes=135
)
TOTAL_STEPS = 100
_POLL_S = 0.01


class FakeEngine:
    """Plays the actions of one attempt."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.step = 0
        self.is_stopping = False
        self._journal = (self.run_dir / events.JOURNAL_NAME).open("ab", buffering=0)

    def play(self) -> int:
        """Run the script of this attempt to its end; a script that ends without an exit hangs."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        (self.run_dir / "engine.pid").write_text(str(os.getpid()), encoding="ascii")
        script = json.loads(Path(self.config.data.train_path).read_text(encoding="utf-8").splitlines()[0])["attempts"]
        attempt = int(self.run_dir.name.removeprefix("attempt-"))
        self._resume()
        for name, *arguments in script[min(attempt, len(script)) - 1]:
            code = getattr(self, f"do_{name}")(*arguments)
            if code is None and self.is_stopping:
                code = self._stop()
            if code is not None:
                return int(code)
        while not self.is_stopping:
            threading.Event().wait(_POLL_S)
        return self._stop()

    def write(self, event: events.Event) -> None:
        """Append an event to the journal."""
        self._journal.write(events.encode_line(events.JournalLine(time.time(), event)))

    def do_steps(self, count: int) -> None:
        for _ in range(count):
            self.step += 1
            self.write(
                events.Step(
                    step=self.step,
                    total_steps=TOTAL_STEPS,
                    epoch=self.step / TOTAL_STEPS,
                    loss=3.0 / self.step,
                    mean_token_accuracy=0.5,
                    learning_rate=0.01,
                    grad_norm=1.0,
                    num_tokens=64,
                    num_trained_tokens=32 * self.step,
                    step_s=0.01,
                    tokens_per_s=6400.0,
                    memory=MEMORY,
                )
            )

    def do_checkpoint(self) -> None:
        folder = self.run_dir / "checkpoints" / f"step-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"step": self.step}), encoding="utf-8")
        self.write(
            events.Checkpoint(
                step=self.step, path=str(folder), manifest_sha256=_sha256(self.step), num_bytes=12, train_loss=1.0
            )
        )

    def do_say(self, text: str) -> None:
        self.write(events.Message(level="info", message=text))

    def do_sample(self) -> None:
        for prompt in self.config.sample_prompts:
            self.write(events.Sample(step=self.step, prompt=prompt, text=f"re: {prompt}", num_tokens=2))

    def do_raw(self, text: str) -> None:
        self._journal.write(text.encode())

    def do_print(self, text: str) -> None:
        print(text, flush=True)

    def do_wait(self, name: str) -> None:
        while not (self.run_dir.parent / name).exists() and not self.is_stopping:
            threading.Event().wait(_POLL_S)

    def do_touch(self, name: str) -> None:
        (self.run_dir.parent / name).touch()

    def do_fail(self, code: str, message: str, param: str | None = None) -> None:
        self.write(events.Failed(code=code, message=message, param=param))

    def do_exit(self, code: int) -> int:
        return code

    def do_die(self, number: int) -> None:
        os.kill(os.getpid(), number)
        threading.Event().wait()

    def do_finish(self) -> int:
        folder = self.run_dir / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        self.write(
            events.Finished(
                step=self.step,
                model_path=str(folder),
                weights_sha256=_sha256(self.step),
                num_trained_tokens=32 * self.step,
                peak_bytes=135,
                seconds=1.0,
            )
        )
        return 0

    def do_ignore_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def do_environment(self) -> None:
        (self.run_dir / "environment.json").write_text(json.dumps(dict(os.environ)), encoding="utf-8")

    def do_child(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
        (self.run_dir / "child.pid").write_text(str(child.pid), encoding="ascii")

    def _resume(self) -> None:
        for path in self.config.resume_from:
            self.step = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))["step"]
            break
        self.write(
            events.Started(
                step=self.step,
                total_steps=TOTAL_STEPS,
                num_parameters=1000,
                num_train_rows=1,
                num_truncated_rows=0,
                num_trainable_tokens=32,
                device="cpu (fake)",
                device_bytes=None,
            )
        )

    def _stop(self) -> int:
        self.do_checkpoint()
        self.do_fail(InterruptedRunError.code, "the run was asked to stop")
        return InterruptedRunError.exit_code

    def _on_sigterm(self, *_: Any) -> None:
        self.is_stopping = True


def _sha256(step: int) -> str:
    return hashlib.sha256(f"weights of step {step}".encode()).hexdigest()


CALIBRATION = {"base_bytes": 300 << 20, "libraries_bytes": 40 << 20}

if __name__ == "__main__":
    start_death_watch()
    if sys.argv[1] == "calibrate":
        sys.exit(print(json.dumps(CALIBRATION)))
    sys.exit(FakeEngine(TrainConfig.from_json(Path(sys.argv[2]).read_text(encoding="utf-8"))).play())

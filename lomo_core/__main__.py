"""The engine as a process: `python -m lomo_core train RUN_JSON | check-data CHECK_JSON | preview CHECK_JSON |
plan | shapes | calibrate | evaluate | inspect | convert | export-gguf | chat`.

Exit codes are those of `errors.py`. A user's error is one line on stderr and a `failed` event, never a traceback; an
unexpected error leaves its traceback on stderr, which the worker keeps, and exit code 1.

torch and transformers are imported by the commands that need them, after the environment is set: both read it on
import, and `inspect` needs neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import json
import os
import platform
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, MutableMapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from lomo_core.config import DataConfig, OptimizerName, Precision, TrainConfig
from lomo_core.data.check_config import CheckConfig
from lomo_core.death_watch import start_death_watch
from lomo_core.errors import ConfigError, DiskFullError, EngineError, OutOfMemoryError
from lomo_core.events import Failed
from lomo_core.gguf.export import write_gguf
from lomo_core.journal import Journal
from lomo_core.memory.plan import Norm, Setting
from lomo_core.model_folder import read_model_folder
from lomo_core.stop import StopRequest
from lomo_core.terminal import shown_in_terminal

THREADS = "LOMO_ENGINE_THREADS"
_MALLOC = "MALLOC_MMAP_THRESHOLD_"
# Tensors up to 8 MiB in the heap, 32 MiB of free memory at its top, and holes kept below a limit by
# `memory/allocator.py`. Measured on SmolLM2 with activation checkpointing, peak above the weights and CPU seconds of a
# step: 2 x 512 fp32 165 MiB and 15.3 s, bf16 115 and 8.5. With 1 MiB for both: 135 and 17.0, 101 and 10.7 (tensors that
# are mapped one by one cost page faults). With glibc's own, which raises its threshold up to 32 MiB: 416 and 14.8, 167
# and 8.2.
_MALLOC_ENVIRONMENT = {_MALLOC: str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20)}
_MOST_SHAPES_BYTES = 3 << 30
# Half of the machine's memory in badness: enough to come before a service that holds more than this engine does.
_OOM_SCORE_ADJ = 500
_LIBRARY_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Its advice is for whoever chose the libraries: a check of data does without torch on purpose.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # libgomp's threads otherwise spin while they wait: beside other processes on 2 cores a step of SmolLM2 took 9 CPU
    # seconds instead of 3, and up to a minute on the clock.
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN keeps what it compiled for the last 1024 shapes; a step of one shape needs about 20 of them.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    # cuBLAS is deterministic only with a fixed workspace (docs.pytorch.org, notes/randomness).
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def main(argv: list[str], environment: MutableMapping[str, str]) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    start_death_watch()
    for name, value in _LIBRARY_ENVIRONMENT.items():
        environment.setdefault(name, value)
    try:
        return _run_command(arguments, environment)
    except EngineError as error:
        sys.stderr.write(f"{error.message}\n")
        return error.exit_code
    except Exception:  # noqa: BLE001 - the engine's outermost boundary: the worker needs the traceback and the code
        traceback.print_exc()
        return EngineError.exit_code


def _run_command(arguments: argparse.Namespace, environment: MutableMapping[str, str]) -> int:
    commands: dict[str, Callable[[], int]] = {
        "train": lambda: _train(Path(arguments.run_json), environment),
        "check-data": lambda: _check_data(Path(arguments.check_json)),
        "preview": lambda: _preview(Path(arguments.check_json)),
        "evaluate": lambda: _evaluate(arguments, environment),
        "convert": lambda: _convert(arguments, environment),
        "export-gguf": lambda: _export_gguf(arguments),
        "chat": lambda: _chat(Path(arguments.model), environment),
        "plan": lambda: _plan(arguments),
        "shapes": lambda: _shapes(Path(arguments.config)),
        "calibrate": lambda: _calibrate(environment),
        "inspect": lambda: _inspect(Path(arguments.model)),
    }
    return commands[arguments.command]()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lomo_core", description="The fine-tuning engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run a training job from its specification")
    train.add_argument("run_json", help="file with a TrainConfig as JSON")
    check = commands.add_parser("check-data", help="look through a job's files and write a report on them")
    check.add_argument("check_json", help="file with a CheckConfig as JSON")
    preview = commands.add_parser("preview", help="print one row of a file as text and tokens, as JSON")
    preview.add_argument("check_json", help="file with a CheckConfig as JSON")
    evaluate = commands.add_parser("evaluate", help="measure a model on a validation file")
    evaluate.add_argument("--model", required=True, help="model folder")
    evaluate.add_argument("--data", required=True, help="file of chat rows or of choice rows")
    evaluate.add_argument("--max-seq-length", type=int, default=512, help="tokens per row (default 512)")
    evaluate.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    plan = commands.add_parser("plan", help="print the memory of a run, from a model's config.json alone")
    plan.add_argument("--config", required=True, help="config.json, or the folder that it is in")
    plan.add_argument("--optimizer", choices=get_args(OptimizerName), default="lomo")
    plan.add_argument("--precision", choices=get_args(Precision), default="bf16")
    plan.add_argument("--batch-size", type=_at_least_one, default=1)
    plan.add_argument("--max-seq-length", type=_at_least_one, default=512, help="tokens per row (default 512)")
    plan.add_argument("--no-activation-checkpointing", action="store_true")
    plan.add_argument("--norm", choices=get_args(Norm), default="one_pass", help="how clipping gets its norm")
    plan.add_argument("--num-ranks", type=_at_least_one, default=1, help="devices that share the weights")
    shapes = commands.add_parser("shapes", help="print what a plan needs to know of a model, as JSON")
    shapes.add_argument("--config", required=True, help="config.json, or the folder that it is in")
    commands.add_parser("calibrate", help="measure what this CPU host adds to a plan, as JSON")
    inspect = commands.add_parser("inspect", help="check a model folder and print its facts")
    inspect.add_argument("--model", required=True, help="model folder")
    convert = commands.add_parser("convert", help="make a model folder of a GGUF file")
    convert.add_argument("--gguf", required=True, help="the file to read")
    convert.add_argument("--out", required=True, help="the folder to make")
    export = commands.add_parser("export-gguf", help="make a GGUF file of a model folder")
    export.add_argument("--model", required=True, help="model folder")
    export.add_argument("--out", required=True, help="the file to write")
    chat = commands.add_parser("chat", help="answer chats: JSON lines on stdin and stdout")
    chat.add_argument("--model", required=True, help="model folder")
    return parser


def _train(path: Path, environment: MutableMapping[str, str]) -> int:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the run's specification {path.name} cannot be read: {error}") from error
    config = TrainConfig.from_json(text)
    stop = StopRequest()
    stop.install()
    console = Console(stderr=True)
    with shown_in_terminal(console) if console.is_terminal else nullcontext() as view:
        journal = Journal(config.run_dir, show=None if view is None else view.show)
        _run(config, journal, stop, environment)
    return 0


def _offer_to_the_kernel() -> None:
    """Where the host runs out of memory, this process is to be ended and not the service beside it: a run goes on from
    its checkpoint (proc(5), oom_score_adj: 0 is what others have)."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ), encoding="ascii")


def _run(config: TrainConfig, journal: Journal, stop: StopRequest, environment: MutableMapping[str, str]) -> None:
    _offer_to_the_kernel()
    try:
        _set_up_torch(environment)
        importlib.import_module("lomo_core.trainer").Trainer(config, journal, stop).run()
    except EngineError as error:
        _record(journal, _failed(error))
        raise
    except BaseException as error:
        _record(journal, Failed(code=EngineError.code, message=f"unexpected {type(error).__name__}: {error}"))
        raise
    finally:
        journal.close()


def _failed(error: EngineError) -> Failed:
    if isinstance(error, OutOfMemoryError):
        return Failed(code=error.code, message=error.message, memory=error.memory, suggestion=error.suggestion)
    return Failed(code=error.code, message=error.message, param=error.param)


def _record(journal: Journal, failed: Failed) -> None:
    """Write the run's end; on a full disk the exit code alone has to say it."""
    with suppress(DiskFullError):
        journal.write(failed, durable=True)


def _check_data(path: Path) -> int:
    config = _limited(path)
    tokenizer = None if config.model_path is None else _load_tokenizer_alone(config.model_path)
    report = importlib.import_module("lomo_core.data.check").check_files(config, tokenizer)
    Path(config.report_path).write_text(json.dumps(report), encoding="utf-8")
    return 0


def _preview(path: Path) -> int:
    config = _limited(path)
    if config.model_path is None:
        raise ConfigError("a preview needs the folder of a model", param="model")
    tokenizer = _load_tokenizer_alone(config.model_path)
    _print_json(importlib.import_module("lomo_core.data.preview").preview_row(config, tokenizer))
    return 0


def _load_tokenizer_alone(model_path: str) -> Any:
    """The tokenizer of a model, in a process that has no torch from here on.

    transformers takes torch along wherever it is installed, though a tokenizer needs none of it. A check of 100 chats
    with SmolLM2's tokenizer: 1.4 CPU seconds and 134 MB resident instead of 4.7 and 409, and the same report. Its 890
    configurations and tokenizer classes are made either way (5.23).
    """
    sys.modules["torch"] = None  # type: ignore[assignment] # what import and find_spec take for "is not there"
    read_model_folder(model_path)
    return importlib.import_module("lomo_core.tokenizer").load_tokenizer(model_path)


def _limited(path: Path) -> CheckConfig:
    """The specification of a check, after this process has been bounded: chat templates are programs of strangers."""
    config = CheckConfig.read(path)
    # RLIMIT_DATA counts what is written (Linux 4.7, setrlimit(2)); RLIMIT_AS would count the libraries mapped, too,
    # which with CUDA are larger than all that is to be bounded.
    resource.setrlimit(resource.RLIMIT_DATA, (config.most_bytes, config.most_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (config.most_cpu_s, config.most_cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return config


def _evaluate(arguments: argparse.Namespace, environment: MutableMapping[str, str]) -> int:
    _set_up_torch(environment)
    engine = importlib.import_module("lomo_core.model")
    evaluate = importlib.import_module("lomo_core.evaluate")
    read_model_folder(arguments.model)
    tokenizer = importlib.import_module("lomo_core.tokenizer").load_tokenizer(arguments.model)
    data = DataConfig(
        train_path=arguments.data, validation_path=arguments.data, max_seq_length=arguments.max_seq_length
    )
    stop = StopRequest()
    stop.install()
    # The mapped files of the encoded rows stay readable after their folder is gone.
    with tempfile.TemporaryDirectory() as folder:
        watch = evaluate.Watch(say=lambda message: None, check=stop.raise_if_requested)
        evaluator = evaluate.Evaluator(data, tokenizer, cache_dir=Path(folder), watch=watch)
    model = engine.load_model(arguments.model, precision=arguments.precision, device=engine.pick_device())
    loss_of = functools.partial(importlib.import_module("lomo_core.head").batch_loss, model)
    found = evaluator.run(model, loss_of, step=0, check=stop.raise_if_requested)
    _print_json({name: getattr(found, name) for name in found.__slots__ if name != "step"})
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    setting = Setting(
        optimizer=arguments.optimizer,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        seq_length=arguments.max_seq_length,
        activation_checkpointing=not arguments.no_activation_checkpointing,
        norm=arguments.norm,
        num_ranks=arguments.num_ranks,
    )
    command = importlib.import_module("lomo_core.plan_command")
    gc.disable()  # as for the shapes
    _print_json(command.plan_config(Path(arguments.config), setting))
    return 0


def _shapes(config: Path) -> int:
    # A configuration may come from a stranger and ask for a million layers. 0.6 GB is what one of 80 layers takes.
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_SHAPES_BYTES, _MOST_SHAPES_BYTES))
    shapes = importlib.import_module("lomo_core.memory.shapes")
    read_config = importlib.import_module("lomo_core.plan_command").read_config
    # There is nothing to give back in a process of seconds: 4.7 s instead of 5.1 for 80 layers.
    gc.disable()
    sys.stdout.write(shapes.read_shapes(read_config(config)).to_json() + "\n")
    return 0


def _calibrate(environment: MutableMapping[str, str]) -> int:
    _set_up_torch(environment)
    _print_json(dataclasses.asdict(importlib.import_module("lomo_core.calibrate").calibrate()))
    return 0


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def _inspect(model: Path) -> int:
    _print_json(read_model_folder(model).facts())
    return 0


def _convert(arguments: argparse.Namespace, environment: MutableMapping[str, str]) -> int:
    _set_up_torch(environment)
    importlib.import_module("lomo_core.convert").convert_gguf(Path(arguments.gguf), Path(arguments.out))
    return 0


def _export_gguf(arguments: argparse.Namespace) -> int:
    write_gguf(Path(arguments.model), Path(arguments.out))
    return 0


def _chat(model: Path, environment: MutableMapping[str, str]) -> int:
    _offer_to_the_kernel()
    _set_up_torch(environment)
    importlib.import_module("lomo_core.chat").serve(model)
    return 0


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _set_up_torch(environment: MutableMapping[str, str]) -> None:
    torch = importlib.import_module("torch")
    if threads := environment.get(THREADS):
        torch.set_num_threads(int(threads))
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Only for debugging: it would write to every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False


def restart_with_allocator_environment() -> None:
    """On glibc, start this program once more with the allocator's settings, which it only reads at process start.

    The worker sets them; this is for people who call the engine by hand. The process id stays the same.
    """
    if _MALLOC in os.environ or platform.libc_ver()[0] != "glibc":
        return
    environment = {**os.environ, **_MALLOC_ENVIRONMENT}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - itself


if __name__ == "__main__":
    restart_with_allocator_environment()
    sys.exit(main(sys.argv[1:], os.environ))

